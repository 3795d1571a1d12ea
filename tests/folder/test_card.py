import dataclasses
import json

import pytest
from huggingface_hub import ModelCard

from optimum_fista.folder.card import model_card


def card_of(saved, **model) -> ModelCard:
    return ModelCard(
        model_card(dataclasses.replace(saved.report, model=saved.report.model | model))
    )


def test_saved_card_has_the_numbers(saved):
    text = ModelCard.load(saved.folder / "README.md").text
    totals = saved.report.totals
    assert f"{totals['num_zeros']:,} of the {totals['num_weights']:,} weights" in text
    assert (
        f"{totals['mean_fit_error']:.4f} on average, {totals['max_fit_error']:.4f} at most" in text
    )
    assert "128 tokens in 8 sequences of random tokens" in text
    assert saved.report.calibration["sha256"] in text
    assert f"torch {saved.report.versions['torch']}" in text
    assert "| pattern | 2:4 |" in text
    assert "| zeros | the same share in every operator |" in text


def test_card_tells_how_the_zeros_were_shared(saved_by_rows):
    first, second, *_ = saved_by_rows.report.operators
    operators = [
        dataclasses.replace(first, sparsity=0.125),
        dataclasses.replace(second, sparsity=0.6),
    ]
    config = saved_by_rows.report.config | {"allocation": "fisher"}
    text = model_card(dataclasses.replace(saved_by_rows.report, operators=operators, config=config))
    assert ", 30% unstructured\n" in text
    assert "| zeros | shared over the operators by gradients of the loss, 12.5% to 60.0% |" in text


def test_card_of_a_retrained_model_says_what_was_measured_before(saved):
    perplexity = {"dense": 20.0, "pruned": 30.0, "num_tokens": 1000, "text": "sea.txt"}
    report = dataclasses.replace(saved.report, perplexity=perplexity)
    for each, before in (
        (report, ""),
        (dataclasses.replace(report, retrained=True), ", before retraining"),
    ):
        assert (
            f"| perplexity{before} | 30.00 (no verdict on fewer than 4,096 tokens), 20.00 of the dense model: "
            "on 1,000 tokens of sea.txt"
        ) in model_card(each)


def test_saved_card_has_one_row_for_every_kind_of_operator(saved):
    text = ModelCard.load(saved.folder / "README.md").text
    rows = [line for line in text.splitlines() if "_proj |" in line]
    assert len(rows) == 7
    errors = [
        o.fit_error for o in saved.report.operators if o.name.endswith("mlp.down_proj.weight")
    ]
    outputs = [
        o.output_error for o in saved.report.operators if o.name.endswith("mlp.down_proj.weight")
    ]
    numbers = f"{sum(errors) / 2:.4f} | {max(errors):.4f} | {sum(outputs) / 2:.4f}"
    assert f"| mlp.down_proj | 32 x 48 | 75.00% | {numbers} |" in rows


def test_the_configuration_in_the_card_makes_the_model_again(saved):
    text = ModelCard.load(saved.folder / "README.md").text
    block = text.split("```json\n")[1].split("```")[0]
    assert json.loads(block) == saved.pruner.config.resolved().to_dict()


@pytest.mark.parametrize(
    ("name", "base_model", "title"),
    [
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B", "Llama-3.2-1B, 2:4"),
        ("gpt2", None, "gpt2, 2:4"),
        ("", None, "LlamaForCausalLM, 2:4"),
    ],
)
def test_base_model_is_a_hub_id(saved, name, base_model, title):
    card = card_of(saved, name=name)
    assert card.data.base_model == base_model
    assert f"# {title}\n" in card.text


def test_what_search_and_the_model_tree_of_the_hub_read(saved):
    calibration = saved.report.calibration | {"source": "c4"}
    report = dataclasses.replace(
        saved.report, model=saved.report.model | {"name": "a/b"}, calibration=calibration
    )
    data = ModelCard(model_card(report)).data
    assert (data.base_model_relation, data.datasets) == ("finetune", ["allenai/c4"])
    data = ModelCard.load(saved.folder / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.datasets) == (
        "transformers",
        "text-generation",
        None,
    )
    assert (data.base_model, data.get("base_model_relation")) == (None, None)
    assert {"optimum-fista", "pruned", "sparse"} <= set(data.tags)


def test_license_and_languages_are_those_of_the_dense_model(saved, tmp_path):
    card = "---\nlicense: other\nlicense_name: sea\nlanguage:\n- de\n- en\ntags:\n- dense\n---\n# The sea\n"
    (tmp_path / "README.md").write_text(card)
    data = ModelCard(model_card(saved.report, dense=str(tmp_path))).data
    assert (data.license, data.license_name, data.language) == ("other", "sea", ["de", "en"])
    assert "dense" not in data.tags
    (tmp_path / "README.md").write_text("---\n- [\n---\n")
    for folder in (str(tmp_path), "", "no/such-model"):
        assert model_card(saved.report, dense=folder) == model_card(saved.report)


def test_held_out_errors_have_a_line_and_a_column(saved):
    report, totals = saved.report, saved.report.totals
    assert "held-out" not in model_card(report)
    operators = [
        dataclasses.replace(o, held_out_fit_error=2 * o.fit_error) for o in report.operators
    ]
    calibration = report.calibration | {
        "held_out": {"sha256": "cd", "num_tokens": 1234, "num_sequences": 3}
    }
    text = model_card(dataclasses.replace(report, operators=operators, calibration=calibration))
    assert (
        f"| fit error on held-out tokens | {2 * totals['mean_fit_error']:.4f} on average, "
        f"{2 * totals['max_fit_error']:.4f} at most, on 1,234 tokens in 3 further sequences |"
    ) in text
    assert (
        "| mean fit error | largest fit error | mean output error | mean held-out fit error |"
        in text
    )
    errors = [o.held_out_fit_error for o in operators if o.name.endswith("mlp.down_proj.weight")]
    (line,) = [line for line in text.splitlines() if line.startswith("| mlp.down_proj |")]
    assert line.endswith(f"| {sum(errors) / 2:.4f} |")


def test_text_of_others_is_no_markdown(saved):
    name, source = "/models/a|b *c* <img src=x> `d`", "[click](http://x)\n# Title\n__e__ $1$"
    calibration = saved.report.calibration | {"source": source}
    report = dataclasses.replace(
        saved.report, model=saved.report.model | {"name": name}, calibration=calibration
    )
    text = model_card(report)
    assert r"# a\|b \*c\* \<img src=x\> \`d\`, 2:4" in text
    assert r"of \[click\](http://x) # Title \__e_\_ \$1\$ |" in text

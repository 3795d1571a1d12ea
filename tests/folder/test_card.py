"""Model cards: they have the numbers of the report, load the model, and claim only what is so."""

import dataclasses
import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from media_models import MEDIA_FAMILIES, media_model
from tiny_llama import tiny_tokenizer
from tiny_models import tiny_model
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from optimum_fista.folder.card import _plain, loading_class, model_card
from optimum_fista.origin import OriginReport, StepReport
from optimum_fista.recovery_report import RecoveryReport
from optimum_fista.report import PruningReport


def changed(report: PruningReport, **model) -> PruningReport:
    """The same report with other values of `model`."""
    return dataclasses.replace(report, model=report.model | model)


def card_of(saved, **model) -> ModelCard:
    """The card of a saved model, if its report had these values of `model`."""
    return ModelCard(model_card(changed(saved.report, **model)))


def text_of_saved_card(saved) -> str:
    """The Markdown of the card in the folder of a saved model, without its metadata."""
    return ModelCard.load(saved.folder / "README.md").text


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("down_proj", "down_proj"),
        ("__init__", r"\_\_init\_\_"),
        ("___y___ *z*", r"\_\_\_y\_\_\_ \*z\*"),
        ("a_ _b", r"a\_ \_b"),
    ],
)
def test_nothing_in_a_name_acts_as_markdown(name, written):
    assert _plain(name) == written


def test_the_saved_card_has_the_numbers_of_the_report(saved):
    totals = saved.report.totals

    text = text_of_saved_card(saved)

    assert f"{totals['num_zeros']:,} of the {totals['num_weights']:,} weights" in text
    errors = f"{totals['mean_fit_error']:.4f} on average, {totals['max_fit_error']:.4f} at most"
    assert errors in text
    assert "128 tokens in 8 sequences of random tokens" in text
    assert saved.report.calibration["sha256"] in text
    assert f"torch {saved.report.versions['torch']}" in text
    assert "| pattern | 2:4 |" in text
    # 2:4, and 1:4 in the down projections
    assert "| zeros | 50.0% to 75.0% of an operator, as the configuration says |" in text


def test_the_card_tells_if_all_operators_have_the_same_share_of_zeros(saved_gpt2):
    text = text_of_saved_card(saved_gpt2)

    assert "| zeros | the same share in every operator |" in text
    assert "weights of the linear operators that this run pruned are zero" in text


def test_the_card_tells_how_the_zeros_were_shared(saved_by_rows):
    first, second, *_ = saved_by_rows.report.operators
    operators = [
        dataclasses.replace(first, sparsity=0.125),
        dataclasses.replace(second, sparsity=0.6),
    ]
    config = saved_by_rows.report.config | {"allocation": "fisher"}

    text = model_card(dataclasses.replace(saved_by_rows.report, operators=operators, config=config))

    assert ", 30% unstructured\n" in text
    assert "| zeros | shared over the operators by gradients of the loss, 12.5% to 60.0% |" in text


@pytest.mark.parametrize(
    ("retrained", "before"), [(False, ""), (True, ", before retraining")], ids=["pruned", "trained"]
)
def test_the_card_says_whether_its_perplexity_was_measured_before_a_training(
    saved, retrained, before
):
    perplexity = {"dense": 20.0, "pruned": 30.0, "num_tokens": 1000, "text": "sea.txt"}
    report = dataclasses.replace(saved.report, perplexity=perplexity, retrained=retrained)

    text = model_card(report)

    assert (
        f"| perplexity{before} | 30.00 (no verdict on fewer than 4,096 tokens), 20.00 of the dense model: "
        "on 1,000 tokens of sea.txt"
    ) in text


def test_the_saved_card_has_one_row_for_every_kind_of_operator(saved):
    operators = [o for o in saved.report.operators if o.name.endswith("mlp.down_proj.weight")]
    errors = [o.fit_error for o in operators]
    outputs = [o.output_error for o in operators]

    rows = [line for line in text_of_saved_card(saved).splitlines() if "_proj |" in line]

    assert len(rows) == 7
    numbers = f"{sum(errors) / 2:.4f} | {max(errors):.4f} | {sum(outputs) / 2:.4f}"
    assert f"| mlp.down_proj | 32 x 48 | 75.00% | {numbers} |" in rows


def test_the_configuration_in_the_card_makes_the_model_again(saved):
    block = text_of_saved_card(saved).split("```json\n")[1].split("```")[0]

    assert json.loads(block) == saved.pruner.config.resolved().to_dict()


@pytest.mark.parametrize(
    ("name", "base_model", "title"),
    [
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B", "Llama-3.2-1B, 2:4"),
        ("gpt2", None, "gpt2, 2:4"),
        ("", None, "LlamaForCausalLM, 2:4"),
    ],
)
def test_the_base_model_of_the_card_is_a_hub_id(saved, name, base_model, title):
    card = card_of(saved, name=name)

    assert card.data.base_model == base_model
    assert f"# {title}\n" in card.text


def test_the_base_model_of_several_runs_is_the_first_model(saved):
    origin = OriginReport("meta-llama/Llama-3.2-1B", 10**9, steps=[StepReport("layers:0.1")])
    report = dataclasses.replace(changed(saved.report, name="smaller"), origin=origin)

    card = ModelCard(model_card(report))

    assert card.data.base_model == "meta-llama/Llama-3.2-1B"
    assert "# Llama-3.2-1B, layers:0.1, then 2:4\n" in card.text


def test_the_card_names_the_base_model_and_the_data_set_as_the_hub_does(saved):
    calibration = saved.report.calibration | {"source": "c4"}
    report = dataclasses.replace(changed(saved.report, name="a/b"), calibration=calibration)

    data = ModelCard(model_card(report)).data

    assert data.base_model == "a/b"
    assert data.base_model_relation == "finetune"  # the Hub has no word for pruned models
    assert data.datasets == ["allenai/c4"]


def test_the_card_names_no_base_model_or_data_set_that_the_hub_lacks(saved):
    data = ModelCard.load(saved.folder / "README.md").data

    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.base_model is None
    assert data.get("base_model_relation") is None
    assert data.datasets is None
    assert {"optimum-fista", "pruned", "sparse"} <= set(data.tags)


def test_license_and_languages_are_those_of_the_dense_model(saved, tmp_path):
    card = "---\nlicense: other\nlicense_name: sea\nlanguage:\n- de\n- en\ntags:\n- dense\n---\n# The sea\n"
    (tmp_path / "README.md").write_text(card)

    data = ModelCard(model_card(saved.report, dense=str(tmp_path))).data

    assert data.license == "other"
    assert data.license_name == "sea"
    assert data.language == ["de", "en"]
    assert "dense" not in data.tags


def test_a_card_of_the_dense_model_that_can_not_be_read_changes_nothing(saved, tmp_path):
    (tmp_path / "README.md").write_text("---\n- [\n---\n")
    without_dense = model_card(saved.report)

    for folder in (str(tmp_path), "", "no/such-model"):
        assert model_card(saved.report, dense=folder) == without_dense


def test_the_card_has_a_line_and_a_column_of_held_out_errors(saved):
    totals = saved.report.totals
    operators = [
        dataclasses.replace(o, held_out_fit_error=2 * o.fit_error) for o in saved.report.operators
    ]
    held_out = {"sha256": "cd", "num_tokens": 1234, "num_sequences": 3}
    calibration = saved.report.calibration | {"held_out": held_out}
    report = dataclasses.replace(saved.report, operators=operators, calibration=calibration)

    text = model_card(report)

    assert (
        f"| fit error on held-out tokens | {2 * totals['mean_fit_error']:.4f} on average, "
        f"{2 * totals['max_fit_error']:.4f} at most, on 1,234 tokens in 3 further sequences |"
    ) in text
    headings = (
        "| mean fit error | largest fit error | mean output error | mean held-out fit error |"
    )
    assert headings in text
    errors = [o.held_out_fit_error for o in operators if o.name.endswith("mlp.down_proj.weight")]
    (line,) = [line for line in text.splitlines() if line.startswith("| mlp.down_proj |")]
    assert line.endswith(f"| {sum(errors) / 2:.4f} |")
    assert "held-out" not in model_card(saved.report)


def test_markdown_in_names_is_escaped_in_the_card(saved):
    source = "[click](http://x)\n# Title\n__e__ $1$"
    report = dataclasses.replace(
        changed(saved.report, name="/models/a|b *c* <img src=x> `d`"),
        calibration=saved.report.calibration | {"source": source},
        versions=saved.report.versions | {"[x](y)": "`<b>`"},
    )

    text = model_card(report)

    assert r"# a\|b \*c\* \<img src=x\> \`d\`, 2:4" in text
    assert r"of \[click\](http://x) # Title \_\_e\_\_ \$1\$ |" in text
    assert r"\[x\](y) \`\<b\>\`" in text


def recovered(report, **changes):
    """The report of a model that was recovered after pruning, and of whose pruning a perplexity is known."""
    recovery = RecoveryReport(
        teacher="dense",
        train="all",
        num_trained=1000,
        num_tokens=4096,
        calibration={"source": "lake.txt", "held_out": 8, "sequence_length": 512},
        options={},
        evaluations=[[0, 0.0, 3.678], [8, 60.0, 3.636]],
        best_step=8,
        held_out_loss_before=3.678,
        held_out_loss=3.636,
        seconds=60.0,
    )
    perplexity = {"dense": 30.0, "pruned": 37.42, "num_tokens": 4096, "text": "sea.txt"}
    perplexity["vocabulary"] = 49152
    return dataclasses.replace(
        report, retrained=True, recoveries=[recovery], perplexity=perplexity, **changes
    )


def test_the_card_of_a_recovered_model_with_masks_has_the_numbers_of_the_recovery(saved):
    text = model_card(recovered(saved.report))

    assert "in one shot and then retrained under its masks, by" in text
    assert (
        "| perplexity, before retraining | 37.42 (usable as it is), 30.00 of the dense model: on"
        in text
    )
    assert "| recovery after pruning, measured on another text than the perplexity above |" in text
    assert "(perplexity 39.57 -\\> 37.94)" in text


@pytest.mark.parametrize(
    "parts",
    [
        {"vocabulary": {"kept": 60, "before": 64}},
        {"layers_removed": [[1, 3.5]], "layers_kept": [0]},
    ],
)
def test_the_card_of_a_smaller_recovered_model_claims_nothing_about_other_tensors(saved, parts):
    size = saved.report.model["num_parameters"]
    smaller = {"num_parameters": size - 100, "dense_num_parameters": size}
    report = dataclasses.replace(changed(saved.report, **smaller, **parts), operators=[])

    text = model_card(recovered(report))

    assert "--dense MODEL" in model_card(report)
    assert "in one shot and then retrained, by" in text
    for claim in ("All other tensors are those", "--dense", "masks", "nothing from embeddings"):
        assert claim not in text


def snippet_of(card: str, folder: Path) -> str:
    """The Python code of a card, for a folder."""
    code = card.split("```python\n")[1].split("```")[0]
    return code.replace("THIS-REPOSITORY-OR-FOLDER", str(folder))


def tiny_qwen3_5() -> Qwen3_5ForConditionalGeneration:
    """A model whose `AutoModelForCausalLM` is a class without vision."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = sizes | {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8}
    text |= {"vocab_size": 64, "max_position_embeddings": 64, "layer_types": ["full_attention"] * 2}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
    vision |= {"patch_size": 2, "temporal_patch_size": 1, "out_hidden_size": 32}
    config = Qwen3_5Config(text_config=text, vision_config=vision, image_token_id=60)
    return Qwen3_5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    ("family", "loading", "tag"),
    [
        ("llama", "AutoModelForCausalLM", "text-generation"),
        ("gpt2", "AutoModelForCausalLM", "text-generation"),
        ("qwen3_5", "AutoModelForImageTextToText", "image-text-to-text"),
        ("qwen2_audio", "AutoModelForMultimodalLM", "audio-text-to-text"),
        *(
            (family, "AutoModelForImageTextToText", "image-text-to-text")
            for family in MEDIA_FAMILIES
            if family != "qwen2_audio"
        ),
    ],
)
def test_the_code_in_the_card_loads_the_whole_model(saved, tmp_path, capsys, family, loading, tag):
    if family in MEDIA_FAMILIES:
        model = media_model(family)
    elif family == "qwen3_5":
        model = tiny_qwen3_5()
    else:
        model = tiny_model(family)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    described = {"class": type(model).__name__, "model_type": model.config.model_type}
    card = card_of(saved, **described)

    names: dict = {}
    exec(snippet_of(card.text, tmp_path), names)

    assert card.data.pipeline_tag == tag
    assert f"{loading}.from_pretrained" in card.text
    assert type(names["model"]) is type(model)
    assert {*names["model"].state_dict()} == {*model.state_dict()}
    assert capsys.readouterr().out.strip()


def test_the_code_in_the_card_of_a_class_that_transformers_lacks_trusts_its_own():
    loading = loading_class("LlamaOfMyOwn", "my_llama")

    assert loading.name == "AutoModelForCausalLM"
    assert loading.arguments == ", trust_remote_code=True"


def test_the_card_says_what_the_removed_tokens_cost(saved):
    size = saved.report.model["num_parameters"]
    model = saved.report.model | {"dense_num_parameters": size + 100}
    model["vocabulary"] = {"kept": 60, "before": 1000}
    bits = {"dense": 1.0, "pruned": 1.25, "num_bytes": 20000, "num_tokens": 5000}
    bits |= {"num_tokens_pruned": 6000, "text": "sea.txt"}
    report = dataclasses.replace(saved.report, model=model, operators=[], bits_per_byte=bits)

    text = model_card(report)

    assert (
        "| what the removed tokens cost | 1.000 bits per byte before and 1.250 after, on 20,000 bytes of sea.txt that "
        "no token was counted on; they take 6,000 tokens instead of 5,000 (clearly worse, training would help) |"
    ) in text
    assert "other languages, code and names, takes more tokens" in text

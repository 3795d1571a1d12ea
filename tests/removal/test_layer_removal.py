"""Whole decoder layers go in every kind of run, and the layer after a removed one is repaired."""

import warnings

import pytest
import torch
from families import family_model, family_tokens
from folder_files import files_of, tensors_of
from killed import Killed, killed_at_write
from saved_models import prune_and_save
from shrunken_config import shrunken_config
from tiny_llama import save_tiny_folder, tiny_llama, tiny_tokens
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM
from untouched import Untouched

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.evaluate.verification import verify_checkpoint
from optimum_fista.folder.checkpoint import read_report
from optimum_fista.removal import parts_removal
from optimum_fista.solve.pattern import unpack_mask

LAYERS = 5
TOKENS = tiny_tokens(16, 24)
BATCHES = TOKENS.split(4)
TOGETHER = "channels:0.25/4+heads:0.5+layers:0.4"


def pruner(pattern: str = "layers:0.4", **options) -> FistaPruner:
    return FistaPruner(FistaPruningConfig(pattern=pattern, **options), progress=False)


def dense_model():
    return tiny_llama(num_hidden_layers=LAYERS)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def distance(model, other) -> float:
    return float((logits(model) - logits(other)).norm() / logits(other).norm())


@pytest.mark.parametrize("options", [{}, {"error_correction": "none"}])
def test_layers_that_do_nothing_are_the_ones_removed_and_logits_stay(options):
    model = dense_model()
    with torch.no_grad():
        for layer in (model.model.layers[1], model.model.layers[2]):
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
    expected = logits(model)
    stay = [model.model.layers[i] for i in (0, 3, 4)]
    # On its own text the loss is low, so that any layer that does something is missed.
    own = model.generate(TOKENS[:, :1], max_new_tokens=23, do_sample=False, eos_token_id=-1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = pruner(**options).prune(model, own.split(4))

    assert sorted(index for index, _ in report.model["layers_removed"]) == [1, 2]
    assert report.model["layers_kept"] == [0, 3, 4]
    assert 0 < report.seconds["allocation"] < report.seconds["total"]
    assert list(model.model.layers) == stay
    assert [layer.self_attn.layer_idx for layer in stay] == [0, 1, 2]
    assert model.config.num_hidden_layers == 3
    assert torch.allclose(logits(model), expected, atol=2e-4 * float(expected.abs().max()))
    assert report.model["num_parameters"] == model.num_parameters() < dense_model().num_parameters()
    generated = model.generate(TOKENS[:1, :4], max_new_tokens=3, do_sample=False)  # with a cache
    assert torch.equal(generated[0, 4], expected[0, 3].argmax())


@pytest.mark.parametrize("pattern", ["layers:0.4", TOGETHER])
def test_repairing_the_layer_after_a_removed_one_lowers_the_error(pattern):
    dense, repaired, plain = dense_model(), dense_model(), dense_model()

    report = pruner(pattern).prune(repaired, BATCHES)
    pruner(pattern, residual_correction=0.0).prune(plain, BATCHES)

    assert distance(repaired, dense) < 0.95 * distance(plain, dense)
    after = [
        i
        for i, old in enumerate(report.model["layers_kept"])
        if old - 1 not in report.model["layers_kept"] and old
    ]
    corrected = [operator.name for operator in report.operators if operator.residual_corrected]
    assert after
    assert {f"model.layers.{i}.mlp.down_proj.weight" for i in after} <= set(corrected)


def test_a_repair_keeps_all_columns_and_changes_nothing_else_in_the_layers():
    model = dense_model()
    dense = dense_model()
    layer_pruner = pruner()

    layer_pruner.prune(model, BATCHES)
    report, masks = layer_pruner.result(model)

    # Two layers are removed, and after each of them one operator is repaired, whose 48 columns all stay.
    assert len(report.operators) == 2
    for operator in report.operators:
        assert operator.pattern == "columns:48of48"
        assert operator.method == "refit"
        assert operator.sparsity == 0.0
    assert all(bool(unpack_mask(mask, (32, 48)).all()) for mask in masks.values())
    repaired = {operator.name for operator in report.operators}
    for new, old in enumerate(report.model["layers_kept"]):
        for name, dense_value in dense.model.layers[old].named_parameters():
            full_name = f"model.layers.{new}.{name}"
            is_changed = not torch.equal(model.get_parameter(full_name), dense_value)
            assert is_changed == (full_name in repaired)


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """A dense folder, and what an uninterrupted run from files to files makes of it."""
    folder = tmp_path_factory.mktemp("streamed")
    source = save_tiny_folder(folder / "source")
    dense_model().save_pretrained(source)
    pruner(TOGETHER).prune(str(source), BATCHES, output_dir=folder / "smaller")
    return source, folder / "smaller"


def test_removal_from_files_to_files_gives_the_same_model_as_in_memory(streamed, tmp_path):
    source, folder = streamed

    model = prune_and_save(dense_model(), tmp_path / "saved", BATCHES, pattern=TOGETHER).model

    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert all(
        torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items()
    )
    assert verify_checkpoint(folder) == verify_checkpoint(tmp_path / "saved")
    reports = [read_report(found) for found in (folder, tmp_path / "saved")]
    assert reports[0].model | {"name": ""} == reports[1].model | {"name": ""}
    assert reports[0].left_dense == reports[1].left_dense
    assert [layer.name for layer in reports[0].layers] == [f"model.layers.{i}" for i in range(3)]
    for part in ("operators", "layers"):
        errors = [
            [(o.name, getattr(o, "fit_error", None)) for o in getattr(report, part)]
            for report in reports
        ]
        assert errors[0] == errors[1]
    assert set(tensors_of(folder)) == set(model.state_dict())
    differing = 2 * 9 + len(reports[0].operators)  # tensors of removed layers, and pruned ones
    assert (
        verify_checkpoint(folder, dense=source).num_equal
        == len(dense_model().state_dict()) - differing
    )


@pytest.mark.parametrize("number", [6, 13])
def test_a_killed_run_resumes_to_the_same_bytes_and_does_not_choose_again(
    streamed, tmp_path, number, monkeypatch
):
    source, whole = streamed
    output = tmp_path / "smaller"
    with pytest.raises(Killed), killed_at_write(number):
        pruner(TOGETHER).prune(str(source), BATCHES, output_dir=output)
    assert (tmp_path / "smaller.unfinished" / "journal" / "layer-00001.json").exists() == (
        number == 13
    )
    monkeypatch.setattr(
        parts_removal, "layers_with_least_loss", lambda *_: pytest.fail("it chose again")
    )
    pruner(TOGETHER).prune(str(source), BATCHES, output_dir=output)
    assert files_of(output) == files_of(whole)


def test_a_mixture_whose_experts_no_run_can_prune_is_saved(tmp_path):
    model = prune_and_save(
        family_model("jetmoe"), tmp_path / "smaller", family_tokens(), pattern="layers:0.5"
    ).model

    assert verify_checkpoint(tmp_path / "smaller").num_parameters == model.num_parameters()


def test_the_last_attention_layer_of_a_hybrid_stays():
    config = shrunken_config("bamba")
    config.num_hidden_layers = 4
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[
            1
        ].feed_forward.down_proj.weight.zero_()  # the loss would take this layer first

    report = pruner("layers:0.5").prune(model, family_tokens())

    assert 1 in report.model["layers_kept"]
    assert model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=3).shape == (1, 7)
    with pytest.raises(ValueError, match=r"last of its kind \(.*_attention\): remove fewer"):
        pruner("layers:0.5").prune(model, family_tokens())


@pytest.mark.parametrize(
    ("family", "options", "pattern"),
    [
        # a list of layer_types, and a norm before the sum
        (
            "gemma3_text",
            {"num_hidden_layers": 4},
            "layers:0.5",
        ),
        ("gpt2", {"n_layer": 4}, "channels:0.5/8+layers:0.25"),  # weights stored as [in, out]
        ("qwen3_moe", {"num_hidden_layers": 4, "mlp_only_layers": [1, 2]}, "layers:0.5"),
    ],
)
def test_smaller_models_of_families_load_in_transformers_with_the_settings_of_kept_layers(
    family, options, pattern, tmp_path
):
    model = tiny_model(family, **options)
    model.save_pretrained(tmp_path / "source")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few tokens
        report = pruner(pattern).prune(model, BATCHES)
        pruner(pattern).prune(tmp_path / "source", BATCHES, output_dir=tmp_path / "smaller")

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")
    assert torch.allclose(logits(loaded), logits(model), atol=1e-6)
    assert verify_checkpoint(tmp_path / "smaller").num_parameters == model.num_parameters()
    kept = report.model["layers_kept"]
    config = loaded.config.to_dict()
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "source").config.to_dict()
    if "layer_types" in dense:
        assert config["layer_types"] == [dense["layer_types"][i] for i in kept]
    if family == "qwen3_moe":
        assert config["mlp_only_layers"] == [kept.index(i) for i in (1, 2) if i in kept]


@pytest.mark.usefixtures("fails_at_the_end")
def test_a_failure_at_the_end_brings_all_parts_back():
    model = dense_model()
    model(TOKENS, labels=TOKENS).loss.backward()
    before = dict(model.named_parameters())
    gradients = {name: p.grad for name, p in model.named_parameters()}
    layers = list(model.model.layers)
    config = model.config
    expected = logits(model)

    with Untouched(model), pytest.raises(KeyboardInterrupt):
        pruner(TOGETHER).prune(model, BATCHES)

    assert list(model.model.layers) == layers
    assert all(
        p is before[name] and p.grad is gradients[name] for name, p in model.named_parameters()
    )
    assert model.config is config
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(LAYERS))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "layers:0.95",
            r"'layers:0.95': 0 of 5 layers would stay .*pass a share for which 1 to 4 stay",
        ),
        ("layers:1.0", r"pass a share of the layers in \(0, 1\)"),
    ],
)
def test_shares_that_remove_all_layers_or_none_are_refused(pattern, message):
    with Untouched(model := dense_model()), pytest.raises(ValueError, match=message):
        pruner(pattern).prune(model, BATCHES)

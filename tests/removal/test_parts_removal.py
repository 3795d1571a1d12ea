"""Whole parts go in every kind of run: what is left is an ordinary smaller model with the same outputs."""

import threading
import warnings
from pathlib import Path

import pytest
import torch
from folder_files import with_changed_report
from saved_models import prune_and_save
from tiny_llama import tiny_llama, tiny_tokens
from tiny_models import tiny_model
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.llama.modeling_llama import LlamaMLP
from untouched import Untouched

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.evaluate.verification import VerificationError, verify_checkpoint
from optimum_fista.folder.checkpoint import read_report
from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.removal import model_outline, parts_removal, shrinking
from optimum_fista.removal.outline import described_model
from optimum_fista.solve.pattern import unpack_mask

BOTH = "channels:0.25/4+heads:0.5"
BATCHES = tiny_tokens().split(4)
PROBE = tiny_tokens(3)


def pruner(pattern: str = BOTH, **options) -> FistaPruner:
    return FistaPruner(FistaPruningConfig(pattern=pattern, **options), progress=False)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(PROBE).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    """A smaller model and its folder."""
    folder = tmp_path_factory.mktemp("saved") / "smaller"
    return prune_and_save(tiny_llama(), folder, pattern=BOTH).model, folder


@pytest.mark.parametrize("method", ["obs_admm", "flap", "alps"])
def test_a_smaller_model_computes_what_the_whole_does_with_zeros_in_the_removed_parts(
    method, monkeypatch
):
    dense = tiny_llama()
    model = tiny_llama()
    logits_with_zeros = []
    shrink = parts_removal.shrink_model

    def keep_logits_and_shrink(pruned_model, plan, kept):
        logits_with_zeros.append(logits(pruned_model))
        shrink(pruned_model, plan, kept)

    monkeypatch.setattr(parts_removal, "shrink_model", keep_logits_and_shrink)

    report = pruner(method=method).prune(model, BATCHES)

    (expected,) = logits_with_zeros
    assert model.config.intermediate_size == 36
    assert model.config.num_key_value_heads == 1
    assert model.config.num_attention_heads == 2
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert not torch.allclose(expected, logits(dense), atol=1e-2)
    assert report.model["num_parameters"] == model.num_parameters() < dense.num_parameters()
    assert report.totals["num_removed"] == dense.num_parameters() - model.num_parameters()
    assert report.totals["num_zeros"] == 0


def test_parts_that_nothing_reads_are_the_ones_removed_and_logits_stay():
    model = tiny_llama()
    idle_channels = torch.arange(0, 48, 4)
    idle_group = slice(0, 16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, idle_channels] = 0
            layer.self_attn.o_proj.weight[:, idle_group] = 0
    expected = logits(model)
    used_channels = sorted(set(range(48)) - set(idle_channels.tolist()))

    report = pruner().prune(model, BATCHES)

    for operator in report.operators:
        used_groups = used_channels if "down" in operator.name else [1]
        assert list(operator.groups_kept) == used_groups, operator.name
    assert torch.allclose(logits(model), expected, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("options", [{}, {"error_correction": "intra"}])
def test_down_projections_make_up_for_heads_that_go(options):
    tokens = tiny_tokens(16, 24)
    repaired, plain, dense = tiny_llama(), tiny_llama(), tiny_llama()

    report = pruner("heads:0.5", **options).prune(repaired, tokens.split(4))
    pruner("heads:0.5", residual_correction=0.0, **options).prune(plain, tokens.split(4))

    refitted = [operator for operator in report.operators if "down_proj" in operator.name]
    assert [(o.pattern, o.method, o.residual_corrected) for o in refitted] == [
        ("columns:48of48", "refit", True)
    ] * 2
    assert not report.warnings
    with torch.no_grad():
        expected = dense(tokens).logits
        error_of_repaired = torch.linalg.vector_norm(repaired(tokens).logits - expected)
        error_of_plain = torch.linalg.vector_norm(plain(tokens).logits - expected)
    assert error_of_repaired < 0.95 * error_of_plain
    kept = {
        name: value
        for name, value in dense.state_dict().items()
        if "gate" in name or "up_proj" in name
    }
    assert all(torch.equal(repaired.state_dict()[name], value) for name, value in kept.items())


def test_hooks_of_the_user_are_not_copied():
    class Counter:
        def __init__(self) -> None:
            self.lock = threading.Lock()  # can't be copied
            self.calls = 0

        def count(self, *_) -> None:
            with self.lock:
                self.calls += 1

    model = tiny_llama()
    counter = Counter()
    model.model.layers[0].mlp.register_forward_hook(counter.count)
    model.model.layers[0].mlp.my_hooks = []  # not hooks of PyTorch

    pruner(method="wanda").prune(model, BATCHES)

    assert counter.calls
    assert model.config.intermediate_size == 36


def test_masks_and_reports_are_those_of_the_smaller_weights(saved):
    _, folder = saved

    report = read_report(folder)

    shapes = {operator.name: operator.shape for operator in report.operators}
    assert set(shapes.values()) == {(32, 36), (32, 16)}
    assert {operator.pattern for operator in report.operators} == {
        "columns:36of48",
        "columns:1of2x16",
    }
    assert report.config["pattern"] == BOTH
    left = report.left_dense
    assert (
        left["model.layers.0.mlp.up_proj"]
        == "loses the rows that model.layers.0.mlp.down_proj no longer reads"
    )
    model = tiny_llama()
    run = pruner()
    run.prune(model, BATCHES)
    masks = run.result(model)[1]
    assert all(bool(unpack_mask(masks[name], shape).all()) for name, shape in shapes.items())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda o: o.update(groups_kept=[*o["groups_kept"][:-1], 99]),
            "are not numbers from 0 to 47 in rising order",
        ),
        (lambda o: o.update(groups_kept=o["groups_kept"][:-1]), "names 35 groups of 1 columns"),
        (lambda o: o.update(pattern="columns:0.25"), r"but its pattern is columns:0.25"),
    ],
)
def test_verify_finds_groups_that_are_not_those_of_the_weights(saved, tmp_path, edit, message):
    folder = with_changed_report(saved[1], tmp_path / "changed", edit)

    with pytest.raises(VerificationError, match=message):
        verify_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "dtype", "scale"),
    [
        # by their numbers
        (
            lambda channels: channels * torch.arange(channels.shape[-1]),
            torch.float32,
            1.0,
        ),
        (lambda channels: channels.flip(-1), torch.bfloat16, 1e4),  # beside large hidden states
    ],
)
def test_a_model_that_would_compute_something_else_is_refused(change, dtype, scale, monkeypatch):
    model = tiny_llama().to(dtype)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(scale)
    monkeypatch.setattr(
        LlamaMLP, "forward", lambda mlp, x: mlp.down_proj(change(mlp.act_fn(mlp.gate_proj(x))))
    )
    message = "does not return the same without the removed groups"

    with Untouched(model), pytest.raises(UnsupportedArchitectureError, match=message):
        pruner("channels:0.25/4").prune(model, BATCHES)


def test_a_proof_for_which_there_is_no_memory_is_tried_with_smaller_batches():
    model = tiny_llama()
    failed = []

    def run_out_once(layer, *_):
        if layer.mlp.down_proj.weight.shape[1] == 36 and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("no room")

    handle = model.model.layers[0].register_forward_hook(run_out_once)

    with pytest.warns(match="out of memory in model.layers.0"):
        pruner(method="wanda").prune(model, BATCHES)

    handle.remove()
    assert failed
    assert model.config.intermediate_size == 36


def test_heads_that_one_matrix_computes_are_refused():
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )

    with Untouched(model), pytest.raises(UnsupportedArchitectureError, match="can't lose heads"):
        pruner("heads:0.5").prune(model, BATCHES)


@pytest.mark.parametrize("pattern", ["unstructured", "layers:0.5", "experts:0.5"])
def test_a_model_that_lost_more_since_is_not_saved_with_an_old_report(pattern, tmp_path):
    family = "llama4_text" if "experts" in pattern else "llama"
    model, first, second = tiny_model(family, num_hidden_layers=4), pruner(pattern), pruner(pattern)
    with warnings.catch_warnings():
        # Warnings of layers that are not repaired, and of a model that was pruned before.
        warnings.simplefilter("ignore")
        first.prune(model, BATCHES)
        second.prune(model, BATCHES)

    with pytest.raises(ValueError, match="was pruned again by another FistaPruner: use that one"):
        first.save_pretrained(model, tmp_path / "stale")
    second.save_pretrained(model, tmp_path / "latest")
    found = verify_checkpoint(tmp_path / "latest")
    assert found.num_zeros or found.removed


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        # the model as it is, one with fewer parts, and the smaller one
        ("channels:0.25/4", 3),
        ("channels:0.25/4+heads:0.5", 4),
        # the model as it is, one for each layer that is tried first, and that of the run
        ("layers:0.5", 4),
    ],
)
def test_a_run_builds_as_few_outlines_as_it_needs(pattern, expected, monkeypatch):
    built = []

    def count(*arguments):
        built.append(arguments[1:])
        return described_model(*arguments)

    for module in (model_outline, shrinking):
        monkeypatch.setattr(module, "described_model", count)
    model = tiny_llama()

    pruner(pattern, method="wanda").prune(model, BATCHES)

    assert len(built) == expected

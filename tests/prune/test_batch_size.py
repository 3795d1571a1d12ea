"""A device that runs out of memory: smaller batches, the same result, and a warning; or an error that helps."""

import warnings

import pytest
import torch
from any_moment import assert_near, assert_same_files
from families import family_model, family_tokens
from killed import interrupted_after
from tiny_llama import save_tiny_folder, tiny_llama, tiny_tokens
from untouched import Untouched

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.model.calibration import CalibrationBatch, cut_batches
from optimum_fista.model.inputs import HiddenStates, cut_states
from optimum_fista.prune import named

CONFIGS = [FistaPruningConfig(), FistaPruningConfig(method="sparsegpt", error_correction="intra")]


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def run_out_of_memory_above(module, most, when=lambda: True, error=CUDA):
    """Have a module run out of memory on batches of more than `most` sequences; returns the sizes that failed."""
    failed: list[int] = []

    def check(_, arguments, keywords):
        tensor = arguments[0] if arguments else next(iter(keywords.values()))
        if tensor.shape[0] > most and when():
            failed.append(tensor.shape[0])
            raise error

    module.register_forward_pre_hook(check, with_kwargs=True)
    return failed


def run_out_of_memory_half_pruned(model, most):
    """Run out of memory in front of the second layer's last operator, when those before it are pruned."""
    mlp = model.model.layers[1].mlp
    return run_out_of_memory_above(
        mlp.down_proj, most, lambda: bool((mlp.gate_proj.weight == 0).any())
    )


def assert_same_run(model, report, expected, expected_report):
    assert report.totals["num_zeros"] == expected_report.totals["num_zeros"]
    assert [o.num_tokens for o in report.operators] == [
        o.num_tokens for o in expected_report.operators
    ]
    assert_near(model, report, expected, expected_report)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
@pytest.mark.parametrize("place", ["embeddings", "first pass", "half pruned", "gradients"])
def test_batches_are_halved_until_they_fit(config, place):
    model = tiny_llama()
    expected = tiny_llama()
    if place == "half pruned":
        failed = run_out_of_memory_half_pruned(model, 2)
    else:
        layer = model.model.layers[1]
        modules = {
            "embeddings": model.model,
            "first pass": layer.self_attn.q_proj,
            "gradients": model.lm_head,
        }
        failed = run_out_of_memory_above(modules[place], 2)

    expected_report = FistaPruner(config, progress=False).prune(expected, tiny_tokens().split(8))

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        report = FistaPruner(config, progress=False).prune(model, tiny_tokens().split(8))

    steps = []
    # SparseGPT does not share zeros by gradients. The default method's are computed on all eight sequences together.
    if config.method == "obs_admm" and place != "half pruned":
        steps.append("the gradients of the loss")
    if place != "gradients":
        steps.append("the embeddings" if place == "embeddings" else "model.layers.1")
    expected_warnings = [
        f"out of memory in {step}: batches of {size} sequences from here on ({CUDA})"
        for step in steps
        for size in (4, 2)
    ]
    assert failed == [8, 4] * len(steps)
    assert report.warnings == expected_warnings
    # Others are of files that earlier tests left open.
    messages = [str(warning.message) for warning in shown if warning.category is UserWarning]
    assert messages == expected_warnings
    assert_same_run(model, report, expected, expected_report)


@pytest.mark.filterwarnings("ignore")
def test_what_layers_hand_on_is_not_recorded_again_in_a_network_that_is_partly_pruned():
    model = family_model("hy_v4")
    first, second, *_ = model.model.layers
    run_out_of_memory_above(second, 1, lambda: bool((first.self_attn.o_proj.weight == 0).any()))
    config = FistaPruningConfig(method="wanda", include=("*.o_proj",))

    message = "pass more than hidden states to the next one: pass batches of at "
    with Untouched(model), pytest.raises(torch.OutOfMemoryError, match=message):
        FistaPruner(config, progress=False).prune(model, [torch.cat(family_tokens())])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
def test_a_layer_that_starts_again_half_pruned_starts_from_its_dense_weights(config):
    early = tiny_llama()
    late = tiny_llama()
    run_out_of_memory_above(
        early.model.layers[1].self_attn.q_proj, 2, lambda: not torch.is_grad_enabled()
    )
    run_out_of_memory_half_pruned(late, 2)

    for model in (early, late):
        with pytest.warns(UserWarning, match=r"in model\.layers\.1: batches of 2"):
            FistaPruner(config, progress=False).prune(model, tiny_tokens().split(4))

    assert all(map(torch.equal, early.parameters(), late.parameters()))


@pytest.mark.filterwarnings("ignore:out of memory")
@pytest.mark.parametrize("place", ["layer", "gradients"])
def test_one_sequence_that_is_too_long_is_an_error_that_helps(llama, tokens, place):
    if place == "layer":
        run_out_of_memory_above(llama.model.layers[1].mlp, 0, lambda: not torch.is_grad_enabled())
        expected = r"one sequence of 16 tokens: pass storage_device='cpu' \(--storage-device cpu\) or shorter sequences"
    else:
        run_out_of_memory_above(llama.model.layers[1].mlp, 0)
        expected = r"gradients of the loss on one sequence: pass allocation='uniform'"
    with Untouched(llama), pytest.raises(torch.OutOfMemoryError, match=expected):
        FistaPruner(progress=False).prune(llama, tokens.split(4))


@pytest.fixture
def streamed(tmp_path, monkeypatch):
    """Prune four layers from files, the second of which runs out of memory when it is half pruned."""
    source = tmp_path / "source"
    save_tiny_folder(source)
    tiny_llama(num_hidden_layers=4).to(torch.bfloat16).save_pretrained(source)
    load = named.load_lazily

    def load_and_watch(*arguments, **options):
        loaded = load(*arguments, **options)
        run_out_of_memory_half_pruned(loaded[0], 2)
        return loaded

    monkeypatch.setattr(named, "load_lazily", load_and_watch)

    # with hidden states that are kept between the layers
    config = FistaPruningConfig(error_correction=0.5, residual_correction=1.0)
    pruner = FistaPruner(config, progress=False)
    batches = tiny_tokens().split(8)
    return lambda output: pruner.prune(str(source), batches, output_dir=tmp_path / output)


@pytest.mark.filterwarnings("ignore:out of memory")
def test_a_streamed_run_goes_on_with_the_smaller_batches(streamed, tmp_path):
    report = streamed("whole")
    assert [w.partition(":")[0] for w in report.warnings] == ["out of memory in model.layers.1"] * 2

    with interrupted_after(1), pytest.raises(KeyboardInterrupt):
        streamed("cut")
    report = streamed("cut")

    assert report.warnings == ["continues with the batches of the last run, 2 sequences at most"]
    assert_same_files(tmp_path / "cut", tmp_path / "whole")


def test_batches_and_states_are_cut_alike():
    ids = torch.arange(18).view(6, 3)
    mask = torch.tensor([[True, True, False]])
    batches = [CalibrationBatch(ids[:5]), CalibrationBatch(ids[5:], mask, held_out=True)]
    dense = [torch.rand(5, 3, 2), torch.rand(1, 3, 2)]  # hidden states of the two batches
    cpu = torch.device("cpu")
    sizes = [3, 2, 1]

    cut = cut_batches(batches, sizes)
    states = cut_states(HiddenStates(dense, dense), sizes, cpu, cpu)

    assert torch.equal(torch.cat([b.input_ids for b in cut[:2]]), batches[0].input_ids)
    assert torch.equal(cut[2].attention_mask, mask)
    assert [batch.held_out for batch in cut] == [False, False, True]
    assert states.dense is states.pruned
    assert [h.shape[0] for h in states.dense] == sizes
    assert torch.equal(torch.cat(list(states.dense)), torch.cat(dense))

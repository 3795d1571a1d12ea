"""Whole parts go and what stays gets zeros, in one run."""

import warnings

import pytest
import torch
from folder_files import files_of, with_changed_report
from killed import Killed, killed_at_write
from tiny_llama import save_tiny_folder, tiny_llama, tiny_tokens
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM
from untouched import Untouched

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.model.errors import UnsupportedArchitectureError
from optimum_fista.run.checkpoints.checkpoint import read_report
from optimum_fista.run.estimate.estimate import Estimate
from optimum_fista.run.evaluation.verification import VerificationError, verify_checkpoint
from optimum_fista.run.packed_folders.packed_folder import pack_folder, unpack_folder
from optimum_fista.solve.bitmask import unpack_mask

PARTS = "channels:0.25/4+heads:0.5"
BATCHES = tiny_tokens().split(4)
GONE = 2 * (12 * 3 * 32 + 32 * 48)  # see tests/cli/test_smaller.py


def pruner(pattern: str, **options) -> FistaPruner:
    return FistaPruner(FistaPruningConfig(pattern=pattern, **options), progress=False)


def same(model, other) -> bool:
    found = other.state_dict()
    return all(torch.equal(value, found[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("zeros", ["2:4", "0.5"])
@pytest.mark.parametrize(
    ("family", "parts"),
    [("llama", PARTS), ("llama", f"{PARTS}+layers:0.25"), ("gpt2", "channels:0.25/4")],  # GPT-2 stores [in, out]
)
def test_magnitude_pruning_in_one_run_is_that_in_two(family, parts, zeros):
    make = (lambda: tiny_llama(num_hidden_layers=4)) if family == "llama" else lambda: tiny_model(family)
    one, two = make(), make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that are not repaired
        report = pruner(f"{parts},{zeros}", method="magnitude").prune(one, BATCHES)
        first = pruner(parts, method="magnitude").prune(two, BATCHES)
        second = FistaPruningConfig(method="magnitude", **({"pattern": zeros} if ":" in zeros else {"sparsity": 0.5}))
        second_report = FistaPruner(second, progress=False).prune(two, BATCHES)
    assert same(one, two)
    assert one.config.to_dict() | {"fista_pruning": 0} == two.config.to_dict() | {"fista_pruning": 0}
    assert report.removed == first.removed
    assert report.totals["num_zeros"] == second_report.totals["num_zeros"] > 0
    kept = {o.name: o.groups_kept for o in first.operators}
    assert {o.name: o.groups_kept for o in report.operators if o.groups_kept is not None} == kept
    assert [(o.name, o.shape, o.num_kept, o.pattern) for o in report.operators] == [
        (o.name, o.shape, o.num_kept, o.pattern) for o in second_report.operators
    ]
    assert report.model.get("layers_kept") == first.model.get("layers_kept")


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        (f"{PARTS},0.5", {}),
        (f"{PARTS}+layers:0.25,0.5", {}),
        (f"{PARTS},2:4", {"error_correction": "intra"}),
        (f"{PARTS},unstructured", {"method": "wanda", "sparsity": 0.25, "held_out": 2}),
    ],
)
def test_what_stays_has_exactly_the_zeros_asked_for(pattern, options):
    model, run = tiny_llama(num_hidden_layers=4), pruner(pattern, **options)
    report = run.prune(model, BATCHES)
    assert model.config.intermediate_size == 36
    zeros = sum(int((module.weight == 0).sum()) for module in model.model.layers.modules() if hasattr(module, "weight"))
    assert zeros == report.totals["num_zeros"] == run.config.sparsity * report.totals["num_weights"]
    _, masks = run.result(model)
    for operator in report.operators:
        weight = model.get_parameter(operator.name)
        mask = unpack_mask(masks[operator.name], tuple(weight.shape))
        assert operator.shape == tuple(weight.shape)
        assert not bool(weight[~mask].any())
        assert operator.num_kept == int(mask.sum())


def test_whole_columns_of_what_stays_can_be_the_zeros(tmp_path):
    model, run = tiny_llama(), pruner("channels:0.25/4,columns:0.25", method="wanda")
    report = run.prune(model, BATCHES)
    run.save_pretrained(model, tmp_path / "smaller")
    assert verify_checkpoint(tmp_path / "smaller").num_zeros == report.totals["num_zeros"] > 0
    assert int((model.model.layers[0].mlp.down_proj.weight == 0).all(0).sum()) == 9  # of 36


def test_what_stays_compensates_for_the_columns_that_go():
    dense, one, two = tiny_llama(), tiny_llama(), tiny_llama()
    pruner(f"{PARTS},2:4").prune(one, BATCHES)
    for pattern in (PARTS, "2:4"):
        pruner(pattern).prune(two, BATCHES)
    with torch.no_grad():
        logits = [model(BATCHES[0]).logits for model in (dense, one, two)]
    # two runs aim at the smaller model, one run at the dense one
    assert (logits[1] - logits[0]).norm() < 0.9 * (logits[2] - logits[0]).norm()


@pytest.mark.parametrize("pattern", ["channels:0.25/4,0.5", "channels:0.25/4"])
def test_an_operator_that_is_never_called_is_refused(pattern):
    model = tiny_llama()
    model.model.layers[1].mlp.forward = lambda hidden: hidden
    message = r"layers\.1\.mlp\.down_proj is never called"
    with Untouched(model), pytest.raises(UnsupportedArchitectureError, match=message):
        pruner(pattern, method="magnitude").prune(model, BATCHES)


@pytest.fixture(scope="module", params=[f"{PARTS},2:4", "channels:0.25/4+layers:0.5,0.5"])
def streamed(request, tmp_path_factory):
    """A dense folder, the pattern, and what an uninterrupted run from files to files makes of it."""
    folder = tmp_path_factory.mktemp("streamed")
    source = save_tiny_folder(folder / "source")
    pruner(request.param).prune(str(source), BATCHES, output_dir=folder / "smaller")
    return source, request.param, folder / "smaller"


def test_files_to_files_gives_the_same_model(streamed, tmp_path):
    source, pattern, folder = streamed
    model, run = tiny_llama(), pruner(pattern)
    run.prune(model, BATCHES)
    run.save_pretrained(model, tmp_path / "saved")
    assert same(model, AutoModelForCausalLM.from_pretrained(folder))
    proven = verify_checkpoint(folder, dense=source)
    assert proven == verify_checkpoint(tmp_path / "saved", dense=source)
    assert proven.num_zeros * 2 == proven.num_weights
    assert proven.removed
    if pattern.endswith("2:4"):
        down = model.model.layers[0].mlp.down_proj.weight
        assert down.shape == (32, 36)
        assert bool(((down.view(32, 9, 4) != 0).sum(-1) == 2).all())


@pytest.mark.parametrize("number", [9, 12])
def test_a_killed_run_resumes_to_the_same_bytes(streamed, tmp_path, number):
    source, pattern, whole = streamed
    output = tmp_path / "smaller"
    with pytest.raises(Killed), killed_at_write(number):
        pruner(pattern).prune(str(source), BATCHES, output_dir=output)
    pruner(pattern).prune(str(source), BATCHES, output_dir=output)
    assert files_of(output) == files_of(whole)


def test_it_is_packed_in_the_run_and_after_it(streamed, tmp_path):
    source, pattern, whole = streamed
    pruner(pattern).prune(str(source), BATCHES, output_dir=tmp_path / "packed", packed=True)
    pack_folder(whole, tmp_path / "later")
    expected = AutoModelForCausalLM.from_pretrained(whole)
    for name in ("packed", "later"):
        assert verify_checkpoint(tmp_path / name).num_zeros == read_report(whole).totals["num_zeros"]
        unpack_folder(tmp_path / name, tmp_path / f"{name}-dense")
        assert same(expected, AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-dense"))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda o: o.update(groups_kept=[*o["groups_kept"][:-1], 99]), "are not numbers from 0 to 47 in rising order"),
        (lambda o: o.update(num_groups=None), "its pattern is"),
        (lambda o: o.update(groups_kept=o["groups_kept"][:-1]), "names 35 groups of 1 columns"),
    ],
)
def test_verify_finds_groups_that_are_not_those_of_the_weights(streamed, tmp_path, edit, message):
    folder = with_changed_report(streamed[2], tmp_path / "changed", edit)
    with pytest.raises(VerificationError, match=message):
        verify_checkpoint(folder)


def test_the_estimate_counts_what_goes_and_what_is_zero(streamed):
    source, pattern, whole = streamed
    report = read_report(whole)
    config = FistaPruningConfig(pattern=pattern)
    found = Estimate(source, config, num_samples=8, sequence_length=16, device="cpu", timed=False)
    assert found.operators["together"]["weights"] == report.totals["num_weights"]
    assert found.operators["together"]["zeros"] == report.totals["num_zeros"]
    assert found.num_removed == report.totals["num_removed"]
    assert "zeros" in str(found)
    assert f"{report.totals['num_removed']:,} parameters go" in str(found)


def test_heads_of_a_mixture_go_and_its_experts_get_zeros(tmp_path):
    model, run = tiny_model("qwen3_moe"), pruner("heads:0.5,2:4", method="wanda")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of experts that few tokens reach
        report = run.prune(model, BATCHES)
    run.save_pretrained(model, tmp_path / "smaller")
    assert any("experts" in operator.name for operator in report.operators)
    assert verify_checkpoint(tmp_path / "smaller").num_zeros == report.totals["num_zeros"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2:4,0.5"}, "before a comma pass whole parts"),
        ({"pattern": "channels:0.25,heads:0.5"}, "all joined by '\\+'"),
        ({"pattern": "channels:0.25,0"}, "the fraction of zeros of what stays"),
        ({"pattern": "channels:0.25,"}, "pattern='channels:0.25,': before a comma pass whole parts"),
        ({"pattern": "channels:0.25,0.5.5"}, "pattern='0.5.5': pass 'unstructured' or 'n:m'"),
        ({"pattern": "channels:0.25,2:4", "sparsity": 0.25}, "sparsity=0.25 and pattern='2:4' disagree"),
        ({"pattern": "channels:0.25", "sparsity": 0.5}, "pass pattern='channels:0.25,0.5' alone"),
        ({"pattern": "channels:0.25,2:4", "method": "greedy_obs"}, "can't remove single weights"),
        ({"pattern": "channels:0.25,2:4", "method": "sparsegpt"}, "can't remove whole columns"),
        ({"pattern": "channels:0.25,2:4", "scope": "row"}, "scope='row' has no meaning"),
        ({"pattern": "channels:0.25,2:4", "exclude": ["*.q_proj"]}, "exclude=.* has no meaning"),
        ({"pattern": "experts:0.25,2:4"}, "one run can't remove experts and set zeros"),
    ],
)
def test_what_contradicts_itself_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FistaPruningConfig(**options)


def test_a_pattern_that_does_not_fit_what_stays_is_refused():
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj has rows of 36 inputs, which 4:8 does not divide"):
        pruner("channels:0.25/4,4:8").prune(model, BATCHES)
    assert same(model, tiny_llama())

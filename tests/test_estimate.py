import sys
import time
from types import SimpleNamespace

import pytest
import torch
from estimate import CASES, beside_a_run
from safetensors.torch import load_file
from tiny_llama import tiny_llama, tiny_tokens
from tiny_models import tiny_model
from torch.utils.benchmark import Timer
from transformers import LlamaConfig

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.estimate.estimate import Estimate
from optimum_fista.estimate.peak_memory import LIBRARIES, _solving
from optimum_fista.folder.output import unfinished_folder
from optimum_fista.prune.journal import Journal


def estimated(config=None, model=None, **options) -> Estimate:
    settings = {"num_samples": 8, "sequence_length": 16, "device": "cpu"}
    return Estimate(tiny_llama().config if model is None else model, config, **(settings | options))


SIZES = {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "vocab_size": 128256,
}
HUGE = LlamaConfig(**SIZES, num_attention_heads=128, num_key_value_heads=8, dtype="bfloat16")
LARGE_RUN = {
    "model": HUGE,
    "num_samples": 128,
    "sequence_length": 2048,
    "device": "cuda",
    "batch_size": 1,
}


def held(estimate: Estimate, place: str = "host") -> float:
    return sum(estimate.memory[place].values())


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", FistaPruningConfig(pattern="2:4", method="wanda")),
        ("llama", FistaPruningConfig(pattern="channels:0.25/4+heads:0.5", method="wanda")),
        ("llama", FistaPruningConfig(pattern="layers:0.4", allocation_tokens=16)),
        (
            "gpt2",
            FistaPruningConfig(
                0.6, method="magnitude", exclude="*.0.*.c_fc", overrides={"*.c_attn": "1:4"}
            ),
        ),
        (
            "gpt_oss",
            FistaPruningConfig(method="magnitude", scope="row", exclude=("*.experts.1.down_proj",)),
        ),
        (
            "mixtral",
            FistaPruningConfig(
                method="magnitude", overrides={"*.experts.0.*": 0.25, "*.up_proj": "2:4"}
            ),
        ),
    ],
)
def test_an_estimate_has_the_operators_and_numbers_of_the_run(family, config):
    model = tiny_llama(num_hidden_layers=5) if family == "llama" else tiny_model(family)
    sizes_before = {name: parameter.numel() for name, parameter in model.named_parameters()}

    estimate = estimated(config, model.config)
    report = FistaPruner(config, progress=False).prune(model, tiny_tokens().split(4))

    assert estimate.num_removed == (report.totals.get("num_removed") or 0)
    if "layers" in config.pattern:
        return  # the values of the weights decide which decoder layers go, and the estimate has none
    names = {operator.name.removesuffix(".weight") for operator in report.operators}
    assert {*estimate.operators} == names
    weights = sum(estimate.weights.values())
    assert weights == sum(
        sizes_before.get(operator.name, operator.shape[0] * operator.shape[1])
        for operator in report.operators
    )
    num_kept = sum(operator.num_kept for operator in report.operators)
    assert weights - sum(estimate.zeros.values()) == num_kept
    assert estimate.left_dense == report.left_dense


@pytest.mark.parametrize(
    ("name", "size", "least"),
    [("num_samples", 0, 1), ("sequence_length", -7, 2), ("batch_size", 0, 1)],
)
def test_sizes_that_are_too_small_are_refused(name, size, least):
    with pytest.raises(ValueError, match=rf"{name}={size} \(--\S+\): pass at least {least}"):
        estimated(**{name: size})


def test_a_model_of_405_billion_parameters_is_estimated_without_weights():
    estimate = estimated(**LARGE_RUN, storage_device="cpu")

    # The device holds about one decoder layer and its Gram matrices; no side holds all weights.
    assert estimate.model.num_parameters() == 405_853_388_800
    assert 30 < held(estimate, "device") / 2**30 < 60
    assert held(estimate) < estimate.weight_bytes / 4

    # One decoder layer is timed on the device of the run, which is absent or too slow here.
    with pytest.raises(ValueError, match="cuda"):
        _ = estimate.seconds
    with pytest.raises(ValueError, match="one decoder layer takes too much time or memory here"):
        _ = estimated(**LARGE_RUN | {"device": "cpu"}).seconds


def test_every_expert_has_gram_matrices():
    config = FistaPruningConfig(method="magnitude")
    sizes = []

    for number in (2, 4):
        model = tiny_model("mixtral", num_local_experts=number).config
        estimate = estimated(config, model, measures_perplexity=False)
        sizes.append(estimate.memory["host"]["other Gram matrices"])

    # Two experts more, with two Gram matrices each, of float32 numbers of 4 bytes.
    assert sizes[1] - sizes[0] == 2 * 4 * (32**2 + 48**2)


def test_gram_matrices_of_the_attention_wait_if_its_groups_are_summed_in_one_pass():
    # The MLP is so narrow that the attention takes most memory.
    model = tiny_model("llama", intermediate_size=4).config

    def waiting(error_correction):
        config = FistaPruningConfig(error_correction=error_correction, allocation="uniform")
        memory = estimated(config, model, measures_perplexity=False).memory["host"]
        return memory.get("other Gram matrices", 0)

    assert waiting("intra") == 0
    assert waiting("after_attention") == 4 * 32**2


def test_the_copy_of_a_layer_without_its_removed_experts_is_counted():
    model = tiny_model("mixtral").config  # 4 experts a layer, in 2 layers
    config = FistaPruningConfig(pattern="experts:0.5")

    one_text = estimated(config, model, measures_perplexity=False).memory["host"]
    two_texts = estimated(config, model, measures_perplexity=False, num_sources=2).memory["host"]

    layer = tiny_model("mixtral").model.layers[0]
    of_experts = sum(parameter.nbytes for parameter in layer.mlp.experts.parameters())
    of_router = sum(parameter.nbytes for parameter in layer.mlp.gate.parameters())
    assert one_text["experts that stay"] == (of_experts + of_router) / 2
    assert one_text["refit of an expert"] == 0
    # Two Gram matrices [48, 48] and targets [32, 48] of float32, one for each text, and four copies of each.
    assert two_texts["refit of an expert"] == 4 * (2 + 4) * (48 * 48 + 32 * 48)


def test_activations_are_counted_where_the_storage_device_puts_them():
    near, far, disk = (
        estimated(**LARGE_RUN, storage_device=place) for place in (None, "cpu", "disk")
    )

    assert held(near, "device") > held(far, "device") == held(disk, "device")
    assert held(far) > 1.5 * max(held(near), held(disk))
    assert far.memory["host"]["activations that wait"] > 5 * 2 * 128 * 2048 * 16384


MUCH, LITTLE = 2**50, 2**20  # bytes of free memory: more than any batch needs, less than one needs


@pytest.mark.parametrize(
    ("free", "options", "expected"),
    [
        # 8,192 tokens keep an accelerator busy; the free memory is not always known
        (None, {"sequence_length": 2048}, 4),
        (MUCH, {"sequence_length": 2048}, 4),
        (LITTLE, {"sequence_length": 2048}, 1),
        (None, {"sequence_length": 16384}, 1),
        # there are no more sequences
        (None, {"sequence_length": 16, "num_samples": 5}, 5),
        # a CPU is as fast with one
        (None, {"sequence_length": 16, "device": "cpu"}, 1),
        # what the user asks for
        (LITTLE, {"sequence_length": 2048, "batch_size": 3}, 3),
    ],
)
def test_batches_are_as_large_as_an_accelerator_needs_and_its_memory_allows(
    monkeypatch, free, options, expected
):
    monkeypatch.setattr("optimum_fista.estimate.estimate.available_bytes", lambda device: free)
    settings = {"device": "cuda", "storage_device": "cpu", "num_samples": 128} | options

    estimate = Estimate(LlamaConfig(max_position_embeddings=16384), **settings)

    assert estimate.batch_size == expected


def pruned_and_estimated(config, source, output):
    """Prune a folder on the tiny tokens, and estimate the bytes of this run on the disk, by part."""
    ids = tiny_tokens()
    FistaPruner(config, progress=False).prune(source, ids.split(4), output_dir=output)
    return estimated(
        config,
        str(source),
        num_samples=len(ids),
        sequence_length=ids.shape[1],
        measures_perplexity=False,
    ).disk_bytes


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_disk_is_what_a_run_writes(tmp_path, monkeypatch, pattern):
    source = tmp_path / "source"
    output = tmp_path / "out"
    tiny_llama(hidden_size=64, intermediate_size=256, num_attention_heads=4).save_pretrained(source)
    sizes = []  # after each decoder layer
    keep_layer = Journal.keep_layer

    def watched(*arguments):
        keep_layer(*arguments)
        folder = unfinished_folder(output)
        sizes.append(sum(path.stat().st_size for path in folder.rglob("*.safetensors")))

    monkeypatch.setattr(Journal, "keep_layer", watched)

    disk_bytes = pruned_and_estimated(FistaPruningConfig(pattern=pattern), source, output)

    written = 0
    for path in output.glob("model*.safetensors"):
        written += sum(tensor.nbytes for tensor in load_file(path).values())
    assert written == disk_bytes["model"]
    assert max(sizes) < 1.05 * sum(disk_bytes.values())


@pytest.mark.parametrize("error_correction", ["intra", "full", 0.5])
def test_hidden_states_on_disk_are_those_that_a_run_keeps_to_resume(
    tmp_path, monkeypatch, error_correction
):
    source = tmp_path / "source"
    output = tmp_path / "out"
    tiny_llama().save_pretrained(source)
    sizes = [0]  # after each decoder layer
    keep_layer = Journal.keep_layer

    def watched(*arguments):
        keep_layer(*arguments)
        for path in unfinished_folder(output).rglob("states-*.safetensors"):
            sizes.append(sum(tensor.nbytes for tensor in load_file(path).values()))

    monkeypatch.setattr(Journal, "keep_layer", watched)

    disk_bytes = pruned_and_estimated(
        FistaPruningConfig(error_correction=error_correction), source, output
    )

    assert disk_bytes["hidden states of two layers"] == 2 * max(sizes)
    assert bool(max(sizes)) == (error_correction != "intra")


def test_a_real_run_takes_what_is_estimated(monkeypatch):
    """docs/howto/big-models.md: within 25%; time of a busy machine is allowed twice that."""
    monkeypatch.setattr(time, "perf_counter", time.process_time)

    run = beside_a_run(CASES["tiny"])

    assert 1 / 1.25 < run["estimated_bytes"] / run["measured_bytes"] < 1.25
    assert 1 / 1.5 < run["estimated_seconds"] / run["measured_seconds"] < 1.5


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
def test_held_out_logits_of_a_large_vocabulary_are_counted():
    run = beside_a_run(CASES["a large vocabulary, channels"])

    assert run["measured_bytes"] > LIBRARIES + 150 * 2**20, "the logits must matter here"
    assert 1 / 1.25 < run["estimated_bytes"] / run["measured_bytes"] < 1.25


def test_a_layer_is_timed_even_on_a_machine_that_is_busy_with_other_work(monkeypatch):
    def busy_clock():
        """A clock on which everything seems to take a million times as long."""
        return 1e6 * time.perf_counter()

    def timer_of_the_wall_clock(*arguments, timer=busy_clock, **options):
        return Timer(*arguments, timer=timer, **options)

    monkeypatch.setattr("optimum_fista.estimate.trial.Timer", timer_of_the_wall_clock)

    assert sum(estimated(FistaPruningConfig(method="wanda")).seconds.values()) > 0


def test_layers_of_every_kind_are_tried_and_time_grows_with_layers_and_tokens():
    def seconds(layers, samples=4):
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_attention_heads=2,
            vocab_size=64,
            num_hidden_layers=layers,
        )
        return estimated(
            FistaPruningConfig(method="sparsegpt"), config, num_samples=samples, batch_size=4
        ).seconds

    # A run has a part that no layer adds to, so 100 times the layers take less than 100 times as long.
    assert sum(seconds(200).values()) > 5 * sum(seconds(2).values())

    mixed = tiny_model("qwen3_moe", mlp_only_layers=[0], num_hidden_layers=3).config
    assert sum(estimated(FistaPruningConfig(method="wanda"), mixed).seconds.values()) > 0


def test_layers_of_each_attention_are_tried():
    # All layers have the same shapes, but a model without one of its kinds of attention has no configuration.
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    model = tiny_model("gemma3_text", layer_types=kinds, num_hidden_layers=3)
    estimate = estimated(FistaPruningConfig(method="wanda"), model.config)

    assert sum(estimate.seconds.values()) > 0


def test_the_time_of_removing_decoder_layers_is_not_tried_on_a_few():
    estimate = estimated(FistaPruningConfig(pattern="layers:0.5"))

    with pytest.raises(ValueError, match="chooses decoder layers by the loss of the whole model"):
        _ = estimate.seconds


@pytest.mark.parametrize(("method", "solver_groups"), [("obs_admm", 4), ("wanda", 1)])
def test_groups_that_are_solved_together_are_counted_by_what_the_method_holds(
    method, solver_groups
):
    run = SimpleNamespace(on_cpu=True, config=FistaPruningConfig(method=method))

    alone = _solving(run, [64, 64], 256)
    together = _solving(run, [64, 64], 256, together=4)

    assert together["solver"] == solver_groups * alone["solver"]
    # Methods that make stacks hold each matrix twice.
    copies = 2 if method == "obs_admm" else 1
    assert together["Gram matrix"] == 4 * copies * alone["Gram matrix"]
    assert together["weights and targets"] == 4 * copies * alone["weights and targets"]

"""Peak memory of pruning from files to files: what it is made of, and how little of it the model's depth is."""

import sys
from argparse import Namespace

import pytest
import torch
from conftest import PINNED
from quantized_models import VOCAB_SIZE, fp8_deepseek
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.memory import measure
from benchmarks.shared import watched
from optimum_fista import FistaPruningConfig
from optimum_fista.estimate.estimate import Estimate

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="anonymous memory is read from /proc"
)

MIB = 2**20


def peaks(
    depths: tuple[int, ...], hidden: int, ffn: int, length: int, *, fewer_steps: bool = False
) -> list[dict]:
    """Measurements of runs on models of several numbers of layers; the sizes are those of a layer and of sequences."""
    settings = {"hidden": hidden, "ffn": ffn, "num_samples": 8, "sequence_length": length}
    arguments = Namespace(**settings, storage_device=None, fewer_steps=fewer_steps)
    return [measure(arguments, layers) for layers in depths]


def bound(hidden: int, ffn: int) -> int:
    """Bytes: a decoder layer in bfloat16, a group's problem and working set in float32, blocks of rows, the rest.

    The larger of two groups: the down projection with two Gram-shaped matrices (the Gram matrix; its copy, factor or
    inverse) and three of its shape (weights, target, iterate), or gate and up with three of theirs.
    """
    layer = 2 * (4 * hidden**2 + 3 * hidden * ffn)
    down = 4 * (2 * ffn**2 + 3 * hidden * ffn)
    gate_and_up = 4 * (2 * hidden**2 + 6 * hidden * ffn)
    blocks = 4 * 4 * max(2**19, 192 * ffn) + 2 * hidden * ffn * 3
    # left by allocators, MKL's buffers, one batch, the report, what Python loads on the way
    rest = 36 * MIB
    return layer + max(down, gate_and_up) + blocks + rest


def test_peak_memory_is_what_the_formula_says():
    (run,) = peaks((12,), 384, 1536, 64, fewer_steps=True)  # a step needs the memory of many

    most = bound(384, 1536)

    assert run["peak_bytes"] <= most
    # It would not pass if the model were held as well.
    assert run["peak_bytes"] + run["model_bytes"] > most + 16 * MIB


def distance_from_estimate(source, folder, *, samples, length, **config) -> tuple[int, int]:
    """Prune the model in `source` from its files to `folder`, on sequences of `length` tokens, and watch its memory.

    Returns the peak minus the estimated peak, and the estimated size of the largest decoder layer, both in bytes.
    """
    run = {"source": source, "output": folder, "config": config, "vocabulary": VOCAB_SIZE}
    _, curve, _ = watched(**run, samples=samples, length=length)
    options = {
        "num_samples": samples,
        "sequence_length": length,
        "calibration": "text",
        "device": "cpu",
    }
    estimate = Estimate(source, FistaPruningConfig.from_dict(config), **options)
    estimated = dict(estimate.memory["host"])
    # an older Transformers imports pandas and scikit-learn where they are installed, 60 MiB more
    estimated["Python and libraries"] = max(estimated["Python and libraries"], curve[0][1])
    layers = [sum(p.nbytes for p in layer.parameters()) for _, layer in estimate.layers]
    return max(held for _, held in curve) - sum(estimated.values()), max(layers)


def test_the_peak_of_a_quantized_model_is_the_estimate_to_a_decoder_layer(tmp_path):
    """Stored in 8 bits, the weights of one decoder layer at a time are made to 16 bits, as the estimate counts them."""
    sizes = {
        "hidden_size": 512,
        "moe_intermediate_size": 512,
        "n_routed_experts": 32,
        "num_hidden_layers": 4,
    }
    source = fp8_deepseek(tmp_path / "source", **sizes)

    difference, layer_bytes = distance_from_estimate(
        source,
        tmp_path / "out",
        samples=4,
        length=32,
        method="magnitude",
        exclude=["*.experts.*"],  # pruning all experts would take long
    )

    assert abs(difference) < layer_bytes


@pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="needs a CPU that is fast in bfloat16"
)
def test_a_mixture_does_not_keep_memory_for_every_number_of_tokens_of_an_expert(
    tmp_path, monkeypatch
):
    for name in PINNED:  # oneDNN keeps what it compiles for the instructions of bfloat16
        monkeypatch.delenv(name, raising=False)
    attention = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    experts = {"moe_intermediate_size": 256, "num_experts": 32, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(
        hidden_size=512, num_hidden_layers=2, vocab_size=VOCAB_SIZE, **attention, **experts
    )
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(tmp_path / "source")

    difference, layer_bytes = distance_from_estimate(
        tmp_path / "source",
        tmp_path / "out",
        samples=16,
        length=128,
        method="wanda",
        compute_dtype="bfloat16",
    )

    assert abs(difference) < layer_bytes


@pytest.mark.slow
def test_a_model_of_24_layers_takes_two_fifths_of_its_size_and_one_of_48_hardly_more():
    of_24, of_48 = peaks((24, 48), 768, 3072, 512, fewer_steps=True)

    assert of_24["peak_bytes"] <= 0.42 * of_24["model_bytes"]
    assert of_24["peak_bytes"] <= bound(768, 3072)
    # measured 5; 24 more weigh 433
    assert of_48["peak_bytes"] == pytest.approx(of_24["peak_bytes"], abs=14 * MIB)

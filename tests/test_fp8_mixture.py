"""benchmarks/fp8_mixture.py writes a mixture that loads, prunes it, and measures what the run held."""

import json
import sys

import pytest
import torch
from transformers import Qwen3MoeConfig

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="anonymous memory is read from /proc"
)


def tiny_config(num_layers):
    return Qwen3MoeConfig(
        hidden_size=128,
        moe_intermediate_size=128,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=256,
        tie_word_embeddings=False,
        architectures=["Qwen3MoeForCausalLM"],
        dtype="bfloat16",
    )


def test_values_in_fp8_are_finite_and_have_both_signs(benchmark):
    script = benchmark("fp8_mixture")

    values = script.random_fp8(64, 32, torch.Generator().manual_seed(0)).float()

    assert values.shape == (64, 32)
    magnitudes = values.abs().unique().tolist()  # in rising order
    assert magnitudes == [0.5 + step / 16 for step in range(8)]
    assert 0.4 < float((values < 0).float().mean()) < 0.6


def test_a_mixture_is_written_once_pruned_and_stays_quantized(benchmark, tmp_path, monkeypatch):
    script = benchmark("fp8_mixture")
    monkeypatch.setattr(script, "mixture_config", tiny_config)
    output = tmp_path / "rows.json"
    flags = ["--folder", str(tmp_path), "--layers", "2", "--pattern", "experts:0.5"]
    flags += ["--num-samples", "4", "--sequence-length", "32", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["fp8_mixture.py", *flags])

    script.main()
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "mixture-2").iterdir()}
    script.main()

    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "mixture-2").iterdir()} == written
    (row,) = json.loads(output.read_text())["runs"]
    of_experts = 2 * 4 * 3 * 128 * 128  # a byte for each weight in FP8
    assert row["source_bytes"] - row["result_bytes"] == pytest.approx(of_experts / 2, rel=0.05)
    assert row["estimated_bytes"] == sum(row["estimated_parts"].values()) > row["import_bytes"]
    assert 0 < row["import_bytes"] < row["peak_bytes"]
    assert not (tmp_path / "pruned").exists()

"""benchmarks/gpu.py measures a device: time by stage, memory, and how far its results are those of the CPU."""

from argparse import Namespace

import pytest
import torch
from simulated_device import backend
from tiny_llama import TEXT, save_tiny_folder, tiny_llama

from optimum_fista.memory import watched_memory
from optimum_fista.solve.selection import keep_largest, keep_largest_in_groups

SETTINGS = {
    "device": "simulated:0",  # which is not the current one
    "vocabulary": 64,
    "num_samples": 8,
    "sequence_length": 16,
    "batch_size": 4,
    "seed": 0,
    "trained_samples": 8,
    "max_windows": 2,
}


def test_a_peak_is_that_of_the_whole_run(benchmark, bytes_before):
    device = torch.device(SETTINGS["device"])
    num_bytes = 2**20

    with benchmark("gpu").peak_of_run(device) as peak:
        large = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        del large
        with watched_memory(device):  # as a run does for each decoder layer
            pass

    assert peak.device_bytes == bytes_before[0] + num_bytes
    backend.reset_peak_memory_stats(0)  # works again
    assert backend.max_memory_allocated(0) == bytes_before[0]


@pytest.mark.parametrize("way", ["files", "memory"])
def test_the_host_waits_for_the_device_when_a_stage_begins_or_ends(benchmark, tmp_path, way):
    tiny_llama().save_pretrained(tmp_path / "model")
    arguments = Namespace(**SETTINGS)
    script = benchmark("gpu")
    waits = {}

    for by_stage in (False, True):
        with backend.counted() as counts:
            measured = script.measure(
                arguments,
                tmp_path / "model",
                way=way,
                method="default",
                pattern="0.5",
                by_stage=by_stage,
                folder=tmp_path / str(by_stage),
            )
        waits[by_stage] = counts.waits

    assert waits[True].total() > waits[False].total() + 100
    assert sum(measured["stages"].values()) == measured["seconds"]
    unused = {
        "rest of the solver"
    }  # all of it is in other stages, or takes less than the clock tells
    assert benchmark("stages").STAGES.keys() - unused <= measured["stages"].keys()


def test_a_trained_model_has_the_zeros_of_the_cpu(benchmark, tmp_path):
    save_tiny_folder(tmp_path / "model")
    text = tmp_path / "sea.txt"
    text.write_text(TEXT * 8)
    arguments = Namespace(
        trained=str(tmp_path / "model"),
        calibration=str(text),
        texts=[str(text)],
        **SETTINGS,
    )

    row = benchmark("gpu").compare_devices(
        arguments, method="default", pattern="0.5", folder=tmp_path
    )

    assert row["equal_zeros"] > 0.99
    on_cpu, on_device = row["results"]
    assert on_device["device"] == "simulated:0"
    assert on_device["perplexity"]["sea"] == pytest.approx(on_cpu["perplexity"]["sea"], rel=1e-3)


def test_the_arithmetic_knows_the_kernels_of_a_selection(benchmark):
    arithmetic = benchmark("gpu_arithmetic")
    weights = torch.randn(64, 64).to(SETTINGS["device"])

    with backend.counted() as among_all:
        keep_largest(weights, weights.numel() // 2)
    with backend.counted() as among_four:
        keep_largest_in_groups(weights, 2, 4)

    assert among_all.runs.total() == arithmetic.LAUNCHES_OF_SELECTION
    assert among_four.runs.total() == arithmetic.LAUNCHES_OF_SELECTION_IN_FOURS

"""The memory that is estimated for a device is what it holds: a Llama of 1/16 of the width of 8B."""

import gc
import warnings

import pytest
import torch
from accelerate import cpu_offload
from tiny_llama import tiny_llama, tiny_tokens
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.estimate import Estimate
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.choice import find_operators
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.model.sensitivity import DenseLoss, measure_sensitivities
from optimum_fista.solve.linalg import SCALE_ON_DEVICES, row_blocks, rows_in_block
from optimum_fista.solve.problem import InputStatistics, LayerProblem

DEVICE = "simulated:0"  # which is not the current one
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
}


@pytest.mark.parametrize("storage", ["cpu", None])
def test_the_device_holds_what_is_estimated(storage, tmp_path, monkeypatch):
    config = AutoConfig.for_model(
        "llama", vocab_size=8192, num_hidden_layers=2, dtype="bfloat16", **SIZES
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "dense"
    )
    settings = {"num_samples": 4, "sequence_length": 256, "storage_device": storage}
    estimate = Estimate(config, device="simulated", batch_size=1, **settings)
    ids = torch.randint(0, 8192, (4, 256), generator=torch.Generator().manual_seed(0))
    pruner = FistaPruner(FistaPruningConfig(), progress=False, storage_device=storage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few tokens
        torch.simulated.reset_peak_memory_stats(DEVICE)
        monkeypatch.setattr(
            torch.simulated, "reset_peak_memory_stats", lambda *_: None
        )  # the run does for each layer
        pruner.prune(
            tmp_path / "dense", ids.split(1), output_dir=tmp_path / "pruned", device=DEVICE
        )
    measured = torch.simulated.max_memory_allocated(DEVICE)
    assert 1 / 1.25 < sum(estimate.memory["device"].values()) / measured < 1.25


def test_blocks_of_rows_on_a_device_are_a_quarter_of_a_gibibyte():
    rows, columns = 8192, 28672  # the down projection of 70B
    on_device, on_cpu = rows_in_block(rows, columns, SCALE_ON_DEVICES), rows_in_block(rows, columns)
    assert 2**26 < 4 * on_device * columns <= 2**28
    assert on_cpu < 200
    weight = torch.empty(rows, columns, device="meta")
    assert next(row_blocks(weight)) == slice(0, on_device)


def test_statistics_go_when_nobody_needs_them():
    before = torch.simulated.memory_allocated(DEVICE)
    statistics = InputStatistics(torch.eye(64, device=DEVICE), 64)
    problem = LayerProblem(torch.ones(4, 64, device=DEVICE), statistics)
    assert problem.decoupled() is problem
    gc.disable()  # a reference to itself would keep them until cycles are collected
    try:
        del problem, statistics
        assert torch.simulated.memory_allocated(DEVICE) == before
    finally:
        gc.enable()


def test_gradients_leave_no_offloaded_weight_on_the_device():
    model = cpu_offload(tiny_llama(num_hidden_layers=4), execution_device=torch.device(DEVICE))
    layers = find_decoder_layers(model)
    operators = {name: o for layer in layers for name, o in find_operators(*layer).items()}
    found = measure_sensitivities(
        DenseLoss(layers, [CalibrationBatch(tiny_tokens())], 64), operators
    )
    assert all(sensitivity.num_tokens for sensitivity in found.values())
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}

"""The memory that is estimated for a device is what it holds: a Llama of 1/16 of the width of 8B."""

import gc
import warnings

import pytest
import torch
from accelerate import cpu_offload
from tiny_llama import tiny_llama, tiny_tokens
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.estimate.estimate import Estimate
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.choice import find_operators
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.model.sensitivity import DenseLoss, measure_sensitivities
from optimum_fista.solve.linalg import SCALE_ON_DEVICES, row_blocks, rows_in_block
from optimum_fista.solve.problem import InputStatistics, LayerProblem

DEVICE = "simulated:0"  # which is not the current one
VOCABULARY = 8192
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
}


@pytest.mark.parametrize("storage", ["cpu", None])
def test_the_device_holds_what_is_estimated(storage, tmp_path, monkeypatch, bytes_before):
    config = AutoConfig.for_model("llama", dtype="bfloat16", **SIZES)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    ids = torch.randint(0, VOCABULARY, (4, 256), generator=torch.Generator().manual_seed(0))
    estimate = Estimate(
        config,
        device="simulated",
        batch_size=1,
        num_samples=4,
        sequence_length=256,
        storage_device=storage,
        measures_perplexity=False,  # no batch is held out
    )
    # the run resets the peak for each layer, but here that of the whole run is measured
    monkeypatch.setattr(torch.simulated, "reset_peak_memory_stats", lambda *_: None)

    pruner = FistaPruner(FistaPruningConfig(), progress=False, storage_device=storage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few tokens
        pruner.prune(
            tmp_path / "dense", ids.split(1), output_dir=tmp_path / "pruned", device=DEVICE
        )

    measured = torch.simulated.max_memory_allocated(DEVICE) - bytes_before[0]
    estimated = sum(estimate.memory["device"].values())
    assert 1 / 1.25 < estimated / measured < 1.25


def test_blocks_of_rows_on_a_device_are_a_quarter_of_a_gibibyte():
    # the down projection of 70B
    rows = 8192
    columns = 28672

    on_device = rows_in_block(rows, columns, SCALE_ON_DEVICES)
    on_cpu = rows_in_block(rows, columns)
    first_block = next(row_blocks(torch.empty(rows, columns, device="meta")))

    assert 2**26 < 4 * on_device * columns <= 2**28
    assert on_cpu < 200
    assert first_block == slice(0, on_device)


def test_statistics_go_when_nobody_needs_them(bytes_before):
    statistics = InputStatistics(torch.eye(64, device=DEVICE), 64)
    problem = LayerProblem(torch.ones(4, 64, device=DEVICE), statistics)
    assert problem.decoupled() is problem

    gc.disable()  # a reference to itself would keep them until cycles are collected
    try:
        del problem, statistics
        assert torch.simulated.memory_allocated(DEVICE) == bytes_before[0]
    finally:
        gc.enable()


def test_gradients_leave_no_offloaded_weight_on_the_device():
    model = cpu_offload(tiny_llama(num_hidden_layers=4), execution_device=torch.device(DEVICE))
    layers = find_decoder_layers(model)
    operators = {}
    for name, layer in layers:
        operators |= find_operators(name, layer)
    loss = DenseLoss(layers, [CalibrationBatch(tiny_tokens())], num_tokens=64)

    sensitivities, _ = measure_sensitivities(loss, operators)

    assert all(sensitivity.num_tokens for sensitivity in sensitivities.values())
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}

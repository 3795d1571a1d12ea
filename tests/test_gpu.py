"""The same runs on a CUDA device; skipped, and said so, if there is none."""

from copy import deepcopy

import pytest
import torch
from rotate import rotate_model
from tiny_llama import tiny_llama, tiny_tokens

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.solve.methods import METHODS
from optimum_fista.solve.pattern import parse_pattern

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("storage_device", [None, "cpu"])
def test_a_gpu_prunes_as_the_cpu_does(method, pattern, storage_device):
    model = tiny_llama()
    on_gpu = deepcopy(model).to("cuda")
    config = FistaPruningConfig(pattern=pattern, method=method)
    expected = FistaPruner(config, progress=False).prune(model, tiny_tokens().split(4))
    pruner = FistaPruner(config, progress=False, storage_device=storage_device)

    report = pruner.prune(on_gpu, tiny_tokens().split(4))

    assert report.totals["num_zeros"] == expected.totals["num_zeros"]
    assert all(layer.memory.device_bytes > 0 for layer in report.layers)
    assert report.totals["mean_fit_error"] == pytest.approx(
        expected.totals["mean_fit_error"], rel=2e-2
    )


def test_a_gpu_rotates_as_the_cpu_does():
    results = []

    for device in ("cpu", "cuda"):
        with torch.no_grad():
            results.append(
                rotate_model(
                    tiny_llama().to(device), tiny_tokens(), parse_pattern("2:4", None), 10, 0
                )
            )
    on_cpu, on_gpu = results
    assert on_gpu["error_ratio"] == pytest.approx(on_cpu["error_ratio"], rel=0.02)
    assert on_gpu["difference"] < 1e-4

"""Wherever a model and its activations lie, it is pruned as on the CPU, with every method and option of the pruning."""

import json
from functools import cache
from itertools import product

import pytest
from simulated_device.backend import counted
from simulated_device.places import PLACES, pruned_at, require_the_same
from tiny_llama import tiny_llama, tiny_tokens
from torch import Tensor

from optimum_fista import FistaPruner, FistaPruningConfig, PruningReport
from optimum_fista.solve.methods import METHODS

PATTERNS = (
    {"sparsity": 0.5, "scope": "matrix"},
    {"sparsity": 0.6, "scope": "row"},
    {"pattern": "2:4"},
)
CORRECTIONS = (
    {"error_correction": "none", "residual_correction": 0.0},
    {"error_correction": "intra", "residual_correction": 1.0},
    {"error_correction": "full", "residual_correction": 0.5},
    {"error_correction": 0.5, "residual_correction": 1.0},
)
ALLOCATIONS = ({"allocation": "uniform"}, {"allocation": "fisher"})
CASES = [  # every place meets every pattern, correction and allocation; two places share a result of the CPU
    ([*METHODS][(4 * k + j) % len(METHODS)], place, (j + k) % len(PATTERNS), k, (j + k // 2) % 2)
    for (p, place), k in product(enumerate(PLACES), range(len(CORRECTIONS)))
    for j in [p % 4]
]
BATCHES = tiny_tokens(16, 64).split(4)  # so many tokens that rounding changes no mask


@cache
def on_cpu(config: str) -> tuple[dict[str, Tensor], PruningReport]:
    model = tiny_llama()
    report = FistaPruner(FistaPruningConfig.from_dict(json.loads(config)), progress=False).prune(
        model, BATCHES
    )
    return dict(model.state_dict()), report


@pytest.mark.parametrize(("method", "place", "pattern", "correction", "allocation"), CASES)
def test_pruned_as_on_the_cpu(method, place, pattern, correction, allocation, tmp_path):
    config = FistaPruningConfig(
        method=method, **PATTERNS[pattern], **CORRECTIONS[correction], **ALLOCATIONS[allocation]
    )
    expected, expected_report = on_cpu(json.dumps(config.to_dict()))
    with counted() as counts:
        found, report = pruned_at(place, config, tiny_llama(), BATCHES, tmp_path)
    assert counts.runs["mm"] + counts.runs["addmm"] > 0
    assert report.totals["num_zeros"] == expected_report.totals["num_zeros"]
    if method in (
        "admm",
        "alps",
    ):  # rounding decides near ties, and how the penalty of ALPS grows: two good masks
        same = [
            ((found[name] == 0) == (weight == 0)).float().mean()
            for name, weight in expected.items()
        ]
        assert min(same) > 0.98
        error = expected_report.totals["mean_fit_error"]
        assert report.totals["mean_fit_error"] == pytest.approx(error, rel=1e-3)
    else:
        # FISTA stops by a relative change, which a device is asked for every tenth step only: it may end a step apart.
        require_the_same(found, expected, 3e-4 if method == "fista" else 1e-4)

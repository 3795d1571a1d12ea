"""Wherever a model and its activations lie, it is pruned as on the CPU, with every method and option of the pruning."""

import json
from functools import cache

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
BATCHES = tiny_tokens(16, 64).split(4)  # so many tokens that rounding changes no mask


def cases() -> list[tuple[str, str, int, int, int]]:
    """Method, place, and the numbers of pattern, correction and allocation.

    Every place meets every pattern, correction and allocation; two places share a result of the CPU.
    """
    methods = list(METHODS)
    chosen = []
    for place_number, place in enumerate(PLACES):
        shift = place_number % 4
        for correction in range(len(CORRECTIONS)):
            method = methods[(4 * correction + shift) % len(methods)]
            pattern = (shift + correction) % len(PATTERNS)
            allocation = (shift + correction // 2) % len(ALLOCATIONS)
            chosen.append((method, place, pattern, correction, allocation))
    return chosen


@cache
def on_cpu(config: str) -> tuple[dict[str, Tensor], PruningReport]:
    """The weights and the report of a model that is pruned on the CPU; `config` is JSON, which can be a key."""
    model = tiny_llama()
    pruner = FistaPruner(FistaPruningConfig.from_dict(json.loads(config)), progress=False)
    report = pruner.prune(model, BATCHES)
    return dict(model.state_dict()), report


@pytest.mark.parametrize(("method", "place", "pattern", "correction", "allocation"), cases())
def test_pruned_as_on_the_cpu(method, place, pattern, correction, allocation, tmp_path):
    config = FistaPruningConfig(
        method=method, **PATTERNS[pattern], **CORRECTIONS[correction], **ALLOCATIONS[allocation]
    )
    expected, expected_report = on_cpu(json.dumps(config.to_dict()))

    with counted() as counts:
        weights, report = pruned_at(place, config, tiny_llama(), BATCHES, tmp_path)

    assert counts.runs["mm"] + counts.runs["addmm"] > 0
    assert report.totals["num_zeros"] == expected_report.totals["num_zeros"]
    if method in ("admm", "alps"):
        # rounding decides near ties, and how the penalty of ALPS grows: two good masks
        for name, weight in expected.items():
            is_same = (weights[name] == 0) == (weight == 0)
            assert float(is_same.float().mean()) > 0.98, name
        error = expected_report.totals["mean_fit_error"]
        assert report.totals["mean_fit_error"] == pytest.approx(error, rel=1e-3)
    else:
        # FISTA stops by a relative change, which a device is asked for every tenth step only: it may end a step apart.
        require_the_same(weights, expected, 3e-4 if method == "fista" else 1e-4)

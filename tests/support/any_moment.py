"""Runs that something happens to at a chosen moment, and what has to come of them."""

import pytest
from tiny_llama import tiny_tokens

from optimum_fista import FistaPruner, FistaPruningConfig

CONFIG = FistaPruningConfig(method="wanda", error_correction="full", residual_correction=1.0)
"""All that a run may do, in few operations."""


def prune(model, storage_device=None, **options):
    return FistaPruner(CONFIG, progress=False, storage_device=storage_device).prune(
        model, tiny_tokens().split(4), **options
    )


def moments(count, share):
    """Every `share`-th of all moments; the slow tests take them all."""
    return range(1 + share // 2, count + 1, share)


def assert_same_result(model, report, expected, expected_report):
    """The result with memory enough, up to rounding, and a report that says that batches were cut."""
    assert ["out of memory in" in warning for warning in report.warnings] == [True]
    assert_near(model, report, expected, expected_report)


def assert_near(model, report, expected, expected_report):
    """The same result up to rounding."""
    pairs = zip(model.parameters(), expected.parameters(), strict=True)
    difference = sum(float((a - b).detach().norm() ** 2) for a, b in pairs)
    assert difference < 1e-4 * sum(float(p.detach().norm() ** 2) for p in expected.parameters())
    assert [layer.name for layer in report.layers] == [
        layer.name for layer in expected_report.layers
    ]
    for ours, theirs in zip(report.operators, expected_report.operators, strict=True):
        assert ours.name == theirs.name
        assert ours.fit_error == pytest.approx(theirs.fit_error, rel=1e-2)


def assert_same_files(folder, expected):
    shards = sorted(path.name for path in expected.glob("*.safetensors"))
    assert shards == sorted(path.name for path in folder.glob("*.safetensors"))
    for name in shards:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name

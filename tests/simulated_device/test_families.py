"""Every family that docs/architectures.md promises is streamed from files on a device as on the CPU."""

import pytest
from architectures import read_outcomes
from families import stream_family

FAMILIES = [family for family, outcome in read_outcomes().items() if outcome.status == "works"]
SAMPLE = (  # buffers and weights that Accelerate places, weights that are read without a call of their module
    "codegen", "deepseek_v3", "gemma4", "gpt_neo", "gptj", "llama4_text", "minimax", "prophetnet"
)  # fmt: skip


def require_same(family, folder):
    expected, found = stream_family(family, folder, ["cpu", "simulated:1"])
    assert found.totals["num_zeros"] == expected.totals["num_zeros"]
    assert found.left_dense == expected.left_dense
    error = expected.totals["mean_fit_error"]
    # a token whose experts are about equal may go to another one after other roundings
    assert found.totals["mean_fit_error"] == pytest.approx(error, rel=1e-2 if found_experts(found) else 1e-4)


def found_experts(report):
    return any(".experts." in operator.name for operator in report.operators)


@pytest.mark.parametrize("family", SAMPLE)
def test_a_family_that_once_failed_is_streamed(family, tmp_path):
    require_same(family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in SAMPLE])
def test_a_family_is_streamed(family, tmp_path):
    require_same(family, tmp_path)

"""A device whose allocations fail, one at a time: the result is the same, or an error leaves everything as it was."""

from contextlib import suppress

import pytest
import torch
from any_moment import assert_same_files, assert_same_result, moments, prune
from simulated_device.backend import failing_allocation
from tiny_llama import save_tiny_folder, tiny_llama
from transformers import AutoModelForCausalLM
from untouched import Untouched

LEAST = 1024  # bytes of allocations that count
NEVER = 10**9  # a number that no allocation has

pytestmark = pytest.mark.filterwarnings("ignore:out of memory")


def on_device():
    """A dense model on the device that is not the current one."""
    return tiny_llama().to("simulated:0")


@pytest.mark.parametrize("share", [401, pytest.param(1, marks=pytest.mark.slow)])
def test_a_model_in_memory(share):
    expected = on_device()
    with failing_allocation(NEVER, at_least=LEAST) as whole:
        expected_report = prune(expected)

    for moment in moments(whole.seen, share):
        model = on_device()
        report = None
        untouched = Untouched(model)

        with (
            failing_allocation(moment, at_least=LEAST) as failure,
            suppress(torch.OutOfMemoryError),
        ):
            report = prune(model)

        assert failure.seen >= moment
        if report is None:
            untouched.check()
        else:
            assert_same_result(model, report, expected, expected_report)


@pytest.mark.parametrize("storage", [None, "cpu"])
@pytest.mark.parametrize("share", [701, pytest.param(1, marks=pytest.mark.slow)])
def test_a_streamed_run(share, storage, tmp_path):
    source = save_tiny_folder(tmp_path / "source")
    options = {"device": "simulated:0", "storage_device": storage}
    with failing_allocation(NEVER, at_least=LEAST) as whole:
        expected_report = prune(source, output_dir=tmp_path / "expected", **options)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "expected")

    for moment in moments(whole.seen, share):
        output = tmp_path / str(moment)
        report = None

        with (
            failing_allocation(moment, at_least=LEAST) as failure,
            suppress(torch.OutOfMemoryError),
        ):
            report = prune(source, output_dir=output, **options)

        assert failure.seen >= moment
        if report is None:
            assert not output.exists()
            prune(source, output_dir=output, **options)
            assert_same_files(output, tmp_path / "expected")
        else:
            pruned = AutoModelForCausalLM.from_pretrained(output)
            assert_same_result(pruned, report, expected, expected_report)

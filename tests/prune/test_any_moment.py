"""Memory that runs out, and interrupts, at any moment of a run: its result is the same, or nothing has changed."""

import signal
from contextlib import suppress

import pytest
import torch
from accelerate import cpu_offload
from any_moment import assert_same_files, assert_same_result, moments, prune
from raising import InterruptAt, RaiseAt
from tiny_llama import tiny_llama
from torch.overrides import _get_current_function_mode
from transformers import AutoModelForCausalLM
from untouched import Untouched

from optimum_fista.model import precision

pytestmark = pytest.mark.filterwarnings("ignore:out of memory")


def prune_with(error, moment, model, **options):
    """The report, or None after the error."""
    with (
        RaiseAt(moment, error),
        suppress(type(error), ValueError),
    ):  # which PyTorch turns it into as safetensors loads
        return prune(model, **options)
    return None


@pytest.mark.parametrize("share", [401, pytest.param(1, marks=pytest.mark.slow)])
def test_out_of_memory_in_memory(share):
    expected = tiny_llama()
    with RaiseAt() as whole:
        expected_report = prune(expected)
    for moment in moments(whole.count, share):
        model = tiny_llama()
        untouched = Untouched(model)
        report = prune_with(torch.OutOfMemoryError("no room"), moment, model)
        if report is None:
            untouched.check()
        else:
            assert_same_result(model, report, expected, expected_report)


@pytest.mark.parametrize("share", [501, pytest.param(1, marks=pytest.mark.slow)])
def test_out_of_memory_streamed(share, tmp_path, tiny_folder):
    with RaiseAt() as whole:
        expected_report = prune(tiny_folder, output_dir=tmp_path / "expected")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "expected")
    for moment in moments(whole.count, share):
        output = tmp_path / str(moment)
        report = prune_with(
            torch.OutOfMemoryError("no room"), moment, tiny_folder, output_dir=output
        )
        if report is None:
            assert not output.exists()
            prune(tiny_folder, output_dir=output)
            assert_same_files(output, tmp_path / "expected")
        else:
            assert_same_result(
                AutoModelForCausalLM.from_pretrained(output), report, expected, expected_report
            )


def offloaded_llama():
    model = tiny_llama()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    cpu_offload(model, execution_device=torch.device("cpu"), state_dict=weights)
    return model


@pytest.mark.parametrize("make", [tiny_llama, offloaded_llama])
@pytest.mark.parametrize("share", [301, pytest.param(1, marks=pytest.mark.slow)])
def test_an_interrupt_in_memory(share, make):
    with RaiseAt() as whole:
        prune(make())
    for moment in moments(whole.count, share):
        with Untouched(model := make()):
            assert prune_with(KeyboardInterrupt(), moment, model) is None


@pytest.mark.parametrize("make", [tiny_llama, offloaded_llama])
@pytest.mark.parametrize("share", [15000, pytest.param(1000, marks=pytest.mark.slow)])
def test_one_interrupt_after_another(share, make):
    """The second one finds the run while it takes off what it has installed, or puts weights back."""

    def interrupted(*lines):
        with Untouched(model := make()), InterruptAt(*lines) as run, suppress(KeyboardInterrupt):
            prune(model)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        return run.count

    prune(make())  # what is done once a process
    with InterruptAt() as whole:
        prune(make())
    for first in moments(whole.count - 1000, share):
        end = interrupted(first)
        for second in moments(end - first, share // 50):
            interrupted(first, first + second)


@pytest.mark.parametrize("share", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_ctrl_c_in_a_run_from_a_bfloat16_folder(share, tmp_path, monkeypatch):
    """Where bfloat16 is slow, and all products inside the run are widened."""
    monkeypatch.setattr(precision, "is_fast", lambda *_: False)
    tiny_llama().bfloat16().save_pretrained(source := tmp_path / "source")
    report = prune(source, output_dir=tmp_path / "expected")
    assert report.environment["products"] == "widened"
    with InterruptAt() as whole:
        prune(source, output_dir=tmp_path / "whole")
    for moment in moments(whole.count, whole.count // share):
        output = tmp_path / str(moment)
        with InterruptAt(moment), suppress(KeyboardInterrupt):
            prune(source, output_dir=output)
        assert precision._PRODUCTS.get() == "float32"
        assert _get_current_function_mode() is None
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert (torch.get_default_dtype(), torch.get_float32_matmul_precision()) == (
            torch.float32,
            "highest",
        )
        if not output.exists():  # the very end waits for the signal
            prune(source, output_dir=output)
        assert_same_files(output, tmp_path / "expected")

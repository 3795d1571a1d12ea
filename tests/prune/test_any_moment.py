"""Memory that runs out, and interrupts, at any moment of a run: its result is the same, or nothing has changed."""

from contextlib import suppress

import pytest
import torch
from accelerate import cpu_offload
from any_moment import assert_same_files, assert_same_result, moments, prune
from killed import interrupted_after
from raising import RaiseAt
from tiny_llama import tiny_llama
from torch.overrides import _get_current_function_mode
from transformers import AutoModelForCausalLM
from untouched import Untouched

from optimum_fista.model import precision

pytestmark = pytest.mark.filterwarnings("ignore:out of memory")


def prune_with(error, moment, model, **options):
    """The report of a run that raises `error` at the operation of number `moment`; None if it ended with the error."""
    # PyTorch turns the error into a ValueError as safetensors loads.
    with (
        RaiseAt(moment, error),
        suppress(type(error), ValueError),
    ):
        return prune(model, **options)
    return None


@pytest.mark.parametrize("share", [401, pytest.param(1, marks=pytest.mark.slow)])
def test_a_loaded_model_is_pruned_as_ever_or_untouched_wherever_memory_runs_out(share):
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
def test_a_run_from_files_ends_as_ever_or_leaves_no_output_wherever_memory_runs_out(
    share, tmp_path, tiny_folder
):
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
def test_an_interrupted_run_in_memory_changes_nothing(share, make):
    with RaiseAt() as whole:
        prune(make())

    for moment in moments(whole.count, share):
        with Untouched(model := make()):
            assert prune_with(KeyboardInterrupt(), moment, model) is None


def test_ctrl_c_in_a_run_from_a_bfloat16_folder_restores_the_precision_and_loses_nothing(
    tmp_path, monkeypatch
):
    """If bfloat16 is slow, all products inside the run are widened."""
    monkeypatch.setattr(precision, "is_fast", lambda *_: False)
    source = tmp_path / "source"
    tiny_llama().bfloat16().save_pretrained(source)
    report = prune(source, output_dir=tmp_path / "expected")
    output = tmp_path / "output"

    with interrupted_after(0), pytest.raises(KeyboardInterrupt):
        prune(source, output_dir=output)

    assert report.environment["products"] == "widened"
    assert precision._PRODUCTS.get() == "float32"
    assert _get_current_function_mode() is None
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_float32_matmul_precision() == "highest"
    prune(source, output_dir=output)
    assert_same_files(output, tmp_path / "expected")

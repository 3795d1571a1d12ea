"""Two processes recover as one does; what is lost with one of them is little."""

import signal

import pytest
import quick_recovery
import torch
from launched import exit_codes, launch, recover_together, train_and_recover
from safetensors.torch import load_file
from tiny_llama import TEXT

from optimum_fista import recover
from optimum_fista.evaluate.verification import verify_checkpoint
from optimum_fista.folder.checkpoint import read_report
from optimum_fista.train import stored_teacher

QUICK = quick_recovery.QUICK | {"tokens": 128, "held_out": 3}


@pytest.fixture(scope="module")
def call(saved, tiny_folder, tmp_path_factory):
    """`call("out")` are the arguments of a recovery into this folder, with the fixture's own text and models."""
    folder = tmp_path_factory.mktemp("recovered")
    text = folder / "sea.txt"
    text.write_text(TEXT)

    def arguments(name, **changes):
        given = {
            "folder": saved.folder,
            "teacher": tiny_folder,
            "calibration": str(text),
            "output_dir": folder / name,
        }
        return given | QUICK | changes

    return arguments


@pytest.fixture(scope="module")
def log(call, saved):
    """Two processes train by hand, recover, are refused twice, and one fails; what they say of that."""
    calls = [
        call("two"),
        call("odd", accumulate=3),
        call("sharded", sharded=True),
        call("differs", rank_1={"label_share": 1.0}),
        call("stored", tokens_of_shard=32, teacher_logits=call("teacher")["output_dir"]),
        call("cut", stop=("fails", 1, 3)),
    ]
    log = calls[0]["output_dir"].with_name("log")
    assert exit_codes(launch(2, train_and_recover, saved.folder, calls, log)) == [3, 3]
    return log


def test_each_rank_reports_its_error_or_that_of_another_rank(log):
    said = {path.name.removeprefix("log-"): path.read_text() for path in log.parent.glob("log-?-?")}
    share = "ValueError: accumulate=3: 2 processes share the passes of a step: pass a multiple of 2 (--accumulate)."

    assert said.pop("3-0").startswith("RankError: rank 1 of 2 failed: ValueError: options differ")
    assert said.pop("3-1").startswith(
        "ValueError: options differ from those of rank 0: start every process with the"
    )
    assert said.pop("5-0").startswith(
        "RankError: rank 0 of 2 stops: another process of this run has ended or can't be reached; see what that one "
        "wrote before (this one saw only: "
    )
    assert said.pop("5-1") == "RuntimeError: no more of this"
    assert said == {"1-0": share, "1-1": share}


@pytest.mark.parametrize("name", ["two", "sharded"])
def test_two_processes_recover_the_model_as_one_process_does(name, log, call):
    arguments = call(f"one-{name}")
    of_two = log.with_name(name)

    one = recover(**arguments)

    two = read_report(of_two).recoveries[-1]
    assert one.train == two.train == "all"
    assert one.num_trained == two.num_trained
    assert two.held_out_loss < two.held_out_loss_before
    losses, expected = (
        [*(loss for _, _, loss in report.evaluations), report.held_out_loss]
        for report in (two, one)
    )
    assert losses == pytest.approx(expected, rel=1e-5)
    assert verify_checkpoint(of_two).num_zeros == verify_checkpoint(arguments["folder"]).num_zeros
    weights = load_file(of_two / "model.safetensors")
    for tensor_name, weight in load_file(arguments["output_dir"] / "model.safetensors").items():
        torch.testing.assert_close(weights[tensor_name], weight, rtol=1e-3, atol=1e-4)


def test_two_processes_store_the_predictions_that_one_process_stores(log, call, monkeypatch):
    monkeypatch.setattr(stored_teacher, "_TOKENS_OF_SHARD", 32)
    of_two = log.with_name("teacher")
    of_one = log.with_name("teacher-of-one")

    one = recover(**call("one-stored", teacher_logits=of_one))

    names = [f"predictions-0000{shard}.safetensors" for shard in range(4)]
    assert sorted(file.name for file in of_two.glob("predictions-*")) == names
    for name in names:
        assert (of_two / name).read_bytes() == (of_one / name).read_bytes()
    two = read_report(log.with_name("stored")).recoveries[-1]
    assert two.held_out_loss == pytest.approx(one.held_out_loss, rel=1e-5)


def test_runs_that_were_killed_or_failed_resume_to_the_same_bits(log, call):
    # also with decoder layers that Accelerate has wrapped, which compute the same
    sharded = {"sharded": True, "checkpointed": True}
    killed = call("killed", **sharded, stop=("killed", 1, 3))
    log_of_again = log.with_name("again")

    codes = exit_codes(launch(2, recover_together, [killed], log_of_again))

    assert codes == [3, -signal.SIGKILL]
    for name in ("cut", "killed"):
        state = log.with_name(f"{name}.unfinished") / "journal" / "checkpoint-2"
        assert (state / "rng_state_1.pth").exists()
    with pytest.raises(
        ValueError, match=r"was another one \(processes was 2, is 1\)\. Start it again as it was"
    ):
        recover(**call("cut"))

    calls = [call("cut"), call("killed", **sharded)]
    assert exit_codes(launch(2, recover_together, calls, log_of_again)) == [0, 0]

    assert not [*log.parent.glob("*.unfinished")]
    for whole_name, resumed_name in (("two", "cut"), ("sharded", "killed")):
        whole = log.with_name(whole_name) / "model.safetensors"
        resumed = log.with_name(resumed_name) / "model.safetensors"
        assert whole.read_bytes() == resumed.read_bytes()

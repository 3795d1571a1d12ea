"""Two processes recover as one does, each with a part of every tensor; what is lost with one of them is little."""

import signal

import pytest
import torch
from launched import exit_codes, launch, recover_together, train_and_recover
from safetensors.torch import load_file
from tiny_llama import TEXT, tiny_llama, tiny_tokenizer

from optimum_fista import recover
from optimum_fista.run.checkpoints.checkpoint import read_report
from optimum_fista.run.evaluation.verification import verify_checkpoint
from optimum_fista.run.retraining import recovery_training

QUICK = {"tokens": 128, "sequence_length": 16, "batch_size": 1, "accumulate": 2, "held_out": 3, "learning_rate": 1e-2}
QUICK |= {"device": "cpu", "compute_dtype": "float32", "progress": False}
LITTLE = {"free": 1000, "top_k": 8}  # too little memory for a teacher beside the model


@pytest.fixture(autouse=True)
def _one_picture(one_picture):
    """Every run saves a model."""


@pytest.fixture(scope="module")
def call(saved, tiny_folder, tmp_path_factory):
    here = tmp_path_factory.mktemp("recovered")
    (here / "sea.txt").write_text(TEXT)

    def options(name, **changes):
        given = {"folder": saved.folder, "teacher": tiny_folder, "calibration": str(here / "sea.txt")}
        return given | {"output_dir": here / name} | QUICK | changes

    return options


@pytest.fixture(scope="module")
def kinds(saved_by_rows, tmp_path_factory):
    """Options by what is tested; weights in bfloat16 are rounded at the end, and 45 rows are no two equal parts."""
    dense = tmp_path_factory.mktemp("dense")
    tiny_llama(tie_word_embeddings=True, intermediate_size=45).bfloat16().save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    rounded = {"folder": saved_by_rows.folder, "teacher": dense, "train": "all", "compute_dtype": "bfloat16"}
    return {"all": {}, "norms": LITTLE | {"tokens": 64}, "rounded": LITTLE | rounded}


@pytest.fixture(scope="module")
def log(call, kinds, saved):
    """Two processes train by hand, recover, are refused three times, and one fails; what they say of that."""
    calls = [call(f"{kind}-2", **changes) for kind, changes in kinds.items()]
    log = calls[0]["output_dir"].with_name("log")
    calls += [call("odd", accumulate=3), call("lora", train="lora"), call("apart", teacher_cache=log.parent, tokens=64)]
    calls.append(call("cut", stop=("fails", 1, 1)))
    assert exit_codes(launch(2, train_and_recover, saved.folder, calls, log)) == [3, 3]
    return log


def test_what_goes_wrong_is_said(log):
    said = {path.name.removeprefix("log-"): path.read_text() for path in log.parent.glob("log-?-?")}
    share = "ValueError: accumulate=3: 2 processes share the passes of a step: pass a multiple of 2 (--accumulate)."
    adapters = "ValueError: train='lora': several processes train no adapters: pass all or norms, or start one process."
    cache = f"ValueError: teacher_cache: rank 0 filled '{log.parent / '1'}', and it isn't here: pass a folder that all"
    assert said.pop("5-1") == f"{cache} nodes share."
    assert said.pop("5-0") == f"RankError: rank 1 of 2 failed: {cache} nodes share."
    assert said.pop("6-0").startswith("RankError: rank 0 of 2 has lost the others: one has ended (RuntimeError: ")
    assert said.pop("6-1") == "RuntimeError: no more of this"
    assert said == {"3-0": share, "3-1": share, "4-0": adapters, "4-1": adapters}


@pytest.mark.parametrize("kind", ["all", "norms", "rounded"])
def test_two_processes_recover_as_one(kind, log, call, kinds, monkeypatch):
    options = call(f"{kind}-1", **kinds[kind])
    free, two = options.pop("free", None), log.with_name(f"{kind}-2")
    monkeypatch.setattr(recovery_training, "available_bytes", lambda _: free)
    one, found = recover(**options), read_report(two).recoveries[-1]
    assert one.train == found.train == ("norms" if kind == "norms" else "all")
    assert one.num_trained == found.num_trained
    assert ("top_k" in one.options) == ("top_k" in found.options) == (kind != "all")  # the teacher was not in memory
    assert found.held_out_loss < found.held_out_loss_before
    losses = [[*(row[2] for row in rows.evaluations), rows.held_out_loss] for rows in (one, found)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2 if kind == "rounded" else 1e-5)
    assert (losses[1][-1] != losses[1][-2]) == (kind == "rounded")
    assert verify_checkpoint(two).num_zeros == verify_checkpoint(options["folder"]).num_zeros
    weights = [load_file(folder / "model.safetensors") for folder in (options["output_dir"], two)]
    close = {"rtol": 0, "atol": 1e-1} if kind == "rounded" else {"rtol": 1e-3, "atol": 1e-4}
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, **close)


def test_what_is_killed_ends_with_the_same_bits(log, call):
    kept = log.with_name("cut.unfinished") / "journal"
    assert {file.name for file in kept.glob("state-*")} == {f"state-{rank}-1.safetensors" for rank in (0, 1)}
    killed = call("cut", stop=("killed", 1, 2))
    assert exit_codes(launch(2, recover_together, [killed], log.with_name("again"))) == [3, -signal.SIGKILL]
    assert {file.stem.removeprefix("state-") for file in kept.glob("state-*")} == {"0-1", "0-2", "1-1"}
    with pytest.raises(ValueError, match=r"was another one \(processes was 2, is 1\)\. Start it again as it was"):
        recover(**call("cut"))
    assert exit_codes(launch(2, recover_together, [call("cut")], log.with_name("again"))) == [0, 0]
    assert [path.name for path in log.parent.glob("cut*")] == ["cut"]
    whole, resumed = (log.with_name(name) / "model.safetensors" for name in ("all-2", "cut"))
    assert whole.read_bytes() == resumed.read_bytes()

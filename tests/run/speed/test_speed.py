"""Speed of pruned models: processes that answer in turn, figures that add up, a table and a picture."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from launched import forked_workers
from transformers import AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.run.packed_folders.packed_folder import pack_folder
from optimum_fista.run.speed.measure import measure_speed
from optimum_fista.run.speed.speed_report import SpeedReport, SpeedSettings, draw_speed, speed_table
from optimum_fista.run.speed.worker import Worker

SETTINGS = SpeedSettings(
    variants=["dense float32", "packed float32"],
    batch_sizes=[1, 2],
    new_tokens=4,
    prompt_tokens=3,
    prefill_tokens=5,
    rounds=2,
    threads=1,
)


@pytest.fixture(scope="module")
def report(saved, tmp_path_factory):
    lines, temporary = list[str](), tmp_path_factory.mktemp("temporary")

    def progress(line: str) -> None:
        lines.append(line)
        # the packed copy is there until it is loaded: a run that is killed later leaves none
        assert any(temporary.glob("optimum-fista-*")) == line.startswith(("packing", "loading"))

    with forked_workers(), pytest.MonkeyPatch.context() as patched:
        patched.setattr("tempfile.tempdir", str(temporary))
        report = measure_speed(saved.folder, SETTINGS, progress)
    assert lines[:3] == [f"packing {saved.folder}", "loading dense float32", "loading packed float32"]
    assert lines[-1] == "round 2 of 2, prefill"
    return report


def test_the_figures_are_those_of_the_times(report, saved):
    dense, packed = report.variants["dense float32"], report.variants["packed float32"]
    for found in (dense, packed):
        times = found.seconds["batch 2"]
        assert len(times) == 2
        assert found.tokens_per_second[2] == pytest.approx(8 / (sum(times) / 2))
        assert found.prefill_tokens_per_second == pytest.approx(5 / (sum(found.seconds["prefill"]) / 2))
    assert dense.weight_bytes == 4 * saved.model.num_parameters()
    assert packed.weight_bytes < dense.weight_bytes


def test_packed_decoding_is_dense_decoding(report):
    dense, packed = report.variants["dense float32"], report.variants["packed float32"]
    assert dense.same_tokens is None
    assert packed.same_tokens == 1
    assert 0 <= packed.logits_difference < 1e-5


def test_a_table_and_a_picture(report, tmp_path):
    lines = speed_table(report).splitlines()
    assert lines[2].startswith("| dense float32 | ")
    assert "(1.00x)" in lines[2]
    assert "100%" in lines[3]
    assert "1 threads" in lines[-1]
    draw_speed(report, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    again = SpeedReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert speed_table(again) == speed_table(report)


def test_a_folder_above_has_a_name_and_can_be_measured(saved, tmp_path, monkeypatch):
    below = shutil.copytree(saved.folder, tmp_path / "pruned") / "below"
    below.mkdir()
    monkeypatch.chdir(below)
    settings = dataclasses.replace(SETTINGS, variants=["packed float32"], batch_sizes=[1], rounds=1)
    with forked_workers():
        assert measure_speed(Path(".."), settings).model == "pruned"


def test_a_packed_folder_is_measured_dense_from_an_unpacked_one(saved, tmp_path):
    pack_folder(saved.folder, tmp_path / "packed")
    lines: list[str] = []
    settings = dataclasses.replace(SETTINGS, variants=["dense float32"], batch_sizes=[1], rounds=1)
    with forked_workers():
        report = measure_speed(tmp_path / "packed", settings, lines.append)
    assert lines[0] == f"unpacking {tmp_path / 'packed'}"
    assert report.variants["dense float32"].weight_bytes == 4 * saved.model.num_parameters()


def test_a_smaller_model_is_measured_beside_the_original(saved, tmp_path):
    saved.model.save_pretrained(tmp_path / "original")
    smaller = FistaPruner(FistaPruningConfig(pattern="channels:0.5", method="magnitude"), progress=False)
    smaller.prune(tmp_path / "original", torch.arange(32).view(1, 32), output_dir=tmp_path / "smaller")
    lines: list[str] = []
    settings = dataclasses.replace(SETTINGS, variants=["original float32", "dense float32"], batch_sizes=[1], rounds=1)
    with forked_workers():
        report = measure_speed(tmp_path / "smaller", settings, lines.append, original=tmp_path / "original")
    assert lines[0] == "loading original float32"  # nothing was packed
    original, dense = report.variants.values()
    assert original.weight_bytes == 4 * saved.model.num_parameters()
    assert dense.weight_bytes == 4 * AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").num_parameters()
    assert dense.weight_bytes < original.weight_bytes
    with pytest.raises(ValueError, match="original='None'"):
        measure_speed(tmp_path / "smaller", settings)
    only = dataclasses.replace(settings, variants=["dense float32"])
    with pytest.raises(ValueError, match="variants='dense float32'"):
        measure_speed(tmp_path / "smaller", only, original=tmp_path / "original")


def test_more_tokens_than_positions_are_explained(saved_gpt2):
    most = saved_gpt2.model.config.n_positions
    worker, prompt = Worker("dense float32", saved_gpt2.folder, "cpu", 1), torch.ones(1, most + 1, dtype=torch.long)
    try:
        with pytest.raises(RuntimeError, match=rf"prefill_tokens .* at most {most}.*\(--prefill-tokens {most}"):
            worker.ask("prefill", prompt)
        with pytest.raises(RuntimeError, match=rf"{most + 2} tokens.*\(--prompt-tokens \+ --new-tokens {most}"):
            worker.ask("generate", prompt[:, 3:], 4)
        assert worker.ask("generate", prompt[:, 4:], 3)[0] > 0
    finally:
        worker.close()


def test_a_worker_says_what_went_wrong(saved):
    worker = Worker("dense float32", saved.folder, "cpu", 1)
    try:
        with pytest.raises(RuntimeError, match="dense float32: IndexError"):
            worker.ask("prefill", torch.tensor([[10**6]]))
        assert worker.ask("prefill", torch.tensor([[1]]))[0] > 0
        worker._process.kill()
        with pytest.raises(RuntimeError, match="its process has ended"):
            worker.ask("memory")
    finally:
        worker.close()


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_worker_whose_parent_is_gone_or_that_is_interrupted_ends_without_a_word(saved, interrupted):
    with forked_workers():
        worker = Worker("dense float32", saved.folder, "cpu", 1)
    assert worker.ask("parameters")[0] == 64
    if interrupted:
        os.kill(worker._process.pid, signal.SIGINT)
    else:
        worker._connection.send(("generate", (torch.tensor([[1]]), 40)))
    worker.close()
    assert worker._process.exitcode == (130 if interrupted else 0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"variants": ["packed int8"]}, "variants='packed int8'"),
        ({"variants": []}, "variants"),
        ({"variants": ["dense float32"] * 2}, "once"),
        ({"batch_sizes": [1, 0]}, "batch_sizes=0"),
        ({"rounds": 0}, "rounds=0"),
    ],
)
def test_settings_are_checked(changes, named):
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(SETTINGS, **changes)

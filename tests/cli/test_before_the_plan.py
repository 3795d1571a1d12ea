"""What can't be pruned is refused before the plan is printed, before weights are read, with one clear error."""

import shutil
from collections import namedtuple

import pytest
from tiny_llama import QUICK

from optimum_fista.cli.main import main

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def refused(tiny_folder, text_file, tmp_path, monkeypatch, capsys):
    """`refused(*flags)` runs `prune`, which must fail without reading weights, and returns what it said."""

    def run(*flags: object, model: object = tiny_folder) -> str:
        monkeypatch.setattr("optimum_fista.pruner.FistaPruner.prune", None)
        monkeypatch.setattr("optimum_fista.text.calibration_tokens.load_model", None)
        text = [] if "--calibration" in flags else ["--calibration", str(text_file)]
        output = ["--output", str(tmp_path / "out")]
        assert main(["prune", str(model), *output, *QUICK, *text, *map(str, flags)]) == 1
        assert not (tmp_path / "out").exists()
        printed = capsys.readouterr()
        assert printed.out == ""
        (line,) = printed.err.splitlines()
        assert line.startswith("error: ")
        return line

    return run


def test_an_empty_text_is_refused(refused, tmp_path):
    (tmp_path / "empty.txt").write_text("")

    error = refused("--calibration", tmp_path / "empty.txt")

    assert "empty.txt' is empty; pass a file with text" in error


def test_a_text_that_is_too_short_is_refused(refused, tmp_path):
    (tmp_path / "short.txt").write_text("one two three")

    error = refused("--calibration", tmp_path / "short.txt")

    assert "short.txt" in error
    assert "tokens" in error


@pytest.mark.parametrize("source", ["text", "self"])
def test_a_model_without_a_tokenizer_is_refused(refused, tiny_folder, text_file, tmp_path, source):
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model, ignore=shutil.ignore_patterns("tokenizer*"))

    error = refused("--calibration", text_file if source == "text" else "self", model=model)

    assert "has no tokenizer: copy the files of its tokenizer into the folder" in error


@pytest.mark.parametrize("source", ["text", "self"])
def test_sequences_that_are_longer_than_the_model_takes_are_refused(refused, text_file, source):
    calibration = text_file if source == "text" else "self"

    error = refused("--calibration", calibration, "--sequence-length", 100_000)

    assert "sequence_length=100000 (--sequence-length): the model has" in error
    assert "so pass at most" in error


@pytest.mark.parametrize(
    ("flag", "number", "least"),
    [("--num-samples", 0, 1), ("--sequence-length", 1, 2), ("--batch-size", 0, 1)],
)
def test_numbers_that_are_too_small_are_refused(refused, flag, number, least):
    for more in ([], ["--dry-run"]):
        assert refused(flag, number, *more) == f"error: {flag} {number}: pass at least {least}."


@pytest.mark.parametrize("source", ["text", "self"])
def test_an_output_on_a_full_disk_is_refused(refused, text_file, monkeypatch, source):
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(total=2**30, used=2**30, free=1000))

    error = refused("--calibration", text_file if source == "text" else "self")

    assert "of disk, and 0.98kiB are free there: make room, or pass --output" in error


def test_a_configuration_without_weights_is_refused(refused, tiny_folder, tmp_path):
    shutil.copy(tiny_folder / "config.json", tmp_path)

    error = refused(model=tmp_path / "config.json")

    assert "is a configuration without weights: pass its folder, or --dry-run too" in error

"""docs/files.md describes every file that commands write, and only such."""

import os
import re
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from doc_pages import ROOT
from tiny_llama import TEXT, save_tiny_folder

from optimum_fista.run.checkpoints.output_folder import LATER, MODEL_FILES
from optimum_fista_cli.main import main

PAGE = (ROOT / "docs" / "files.md").read_text()
ROWS = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
NAMES = [n for row in ROWS for n in re.findall(r"`([^`]+)`", row) if n == "lock" or not re.fullmatch("[a-z]+|FILE", n)]
_written: list[str] | None = None  # paths, while they are recorded


def _watch(event: str, arguments: tuple) -> None:
    if _written is not None and event == "open" and isinstance(arguments[2], int):
        path, _, flags = arguments
        is_path = isinstance(path, str | bytes | os.PathLike)
        if flags & (os.O_WRONLY | os.O_RDWR) and is_path and not os.path.isdir(path):  # there, it has no name
            _written.append(os.fsdecode(path))
    elif _written is not None and event == "os.rename":
        _written.extend(os.fsdecode(path) for path in arguments[:2])


sys.addaudithook(_watch)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> set[str]:
    """Names in the folders that commands wrote, also of files that are there no more."""
    global _written
    here = tmp_path_factory.mktemp("here")
    save_tiny_folder(here / "dense")
    (here / "sea.txt").write_text(TEXT)
    quick = ["--num-samples", "4", "--sequence-length", "16", "--device", "cpu"]
    measure = ["--sequence-length", "32", "--max-windows", "2", "--device", "cpu"]
    sampled = ["--texts", "sea.txt", *quick[:2], "--calibration-length", "16", *measure]
    recovering = [
        "--held-out",
        "2",
        "--train",
        "norms",
        "--device",
        "cpu",
        "--teacher-cache",
        "logits",
        "-o",
        "recovered",
    ]
    commands = [
        ["prune", "dense", "-o", "model", *quick],
        ["prune", "dense", "-o", "written-packed", "--packed", "--method", "wanda", "--calibration", "sea.txt", *quick],
        [
            *[
                "recover",
                "model",
                "--teacher",
                "dense",
                "--calibration",
                "sea.txt",
                "--tokens",
                "64",
                "--sequence-length",
                "16",
            ],
            *recovering,
        ],
        ["rotate", "dense", "-o", "rotated", "--calibration", "sea.txt", "--tokens", "64", "--steps", "1", *quick[2:]],
        ["pack", "model", "-o", "packed"],
        ["unpack", "packed", "-o", "unpacked"],
        ["evaluate", "model", "--text", "sea.txt", *measure, "-o", "model/fista/evaluation.json"],
        ["report", "model"],
        ["verify", "model", "--dense", "dense"],
        ["reproduce", "written-packed", "-o", "again"],
        [
            "compare",
            "dense",
            "-o",
            "compared",
            "--methods",
            "wanda",
            "--patterns",
            "0.5",
            "--texts",
            "sea.txt",
            *sampled,
        ],
    ]
    _written = []
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(here)
        try:
            codes = [main(command) for command in commands]
        finally:
            found, _written = _written, None
    assert codes == [0] * len(commands)
    names = {os.path.relpath(here / name, here) for name in found}
    names |= {path.relative_to(here).as_posix() for path in here.rglob("*") if path.is_file()}
    return {name for name in names if not name.startswith(("..", "dense", "sea.txt"))}


@pytest.mark.usefixtures("one_picture")
def test_every_file_that_is_written_is_on_the_page(written):
    assert len(written) > 60
    inner = {re.sub(r"^[\w-]+(\.unfinished)?/", "", name, count=1) for name in written if "/" in name}
    unknown = {n for n in inner if not any(fnmatch(n, p) or fnmatch(Path(n).name, p) for p in NAMES)}
    assert unknown == set()


def test_every_kind_of_name_on_the_page_is_one_that_is_written(written):
    """Less what only other runs write: long, of large models, with other tokenizers, on ranks, or interrupted."""
    inner = {re.sub(r"^[\w-]+(\.unfinished)?/", "", name, count=1) for name in written if "/" in name}
    idle = {p for p in NAMES if not any(fnmatch(n, p) or fnmatch(Path(n).name, p) for n in inner)}
    assert {name for name in idle if name not in MODEL_FILES} <= {
        "journal/offload-*",
        "journal/installing.json",
        "journal/state-*.safetensors",
        "packed*.safetensors.index.json",
        ".tmp*",
        "activations-*",
        "sparsity.png",
        "runs/*",
    }


def test_all_names_of_a_models_files_are_on_the_page():
    usual = [name for name in MODEL_FILES + LATER if not name.startswith("pytorch_model")]
    assert [name for name in usual if not any(fnmatch(name, pattern) for pattern in NAMES)] == []

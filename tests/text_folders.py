"""Folders of short texts that stand for model folders, written as every run writes them."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from optimum_fista.run.checkpoints import installation
from optimum_fista.run.checkpoints.installation import discard, install
from optimum_fista.run.checkpoints.output_folder import MODEL_FILES, require_output
from optimum_fista.run.checkpoints.output_lock import locked_output

OLD = ("config.json", "model.safetensors", "README.md", "tokenizer.json", "fista/report.json", "fista/report.html")
NEW = ("config.json", "model-00001-of-00001.safetensors", "README.md", "fista/report.json")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """In every test module that imports it."""
    monkeypatch.setattr(installation, "flush", lambda path: None)


def write(folder: Path, names: tuple[str, ...], text: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def contents(folder: Path) -> dict[str, str]:
    """All files but the list of those that belong to the model."""
    files = [path for path in folder.rglob("*") if path.is_file() and "files.json" not in path.name]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def foreign_files(folder: Path) -> dict[str, str]:
    """Files that are none of a model's, and what they are."""
    write(folder, ("notes.txt", "mine/model.safetensors", "fista/notes.txt", "mine.safetensors"), "foreign")
    (folder / "nowhere").symlink_to("nothing")
    (folder / "link").symlink_to("notes.txt")
    return {name: text for name, text in contents(folder).items() if text == "foreign"}


def put(output: Path, overwrite: bool = True, also: tuple[str, ...] = ()) -> None:
    """What every writer does."""
    with locked_output(output) as folder:
        require_output(output, overwrite, names=MODEL_FILES)
        discard(folder, overwrite)
        write(folder, (*NEW, *also), "new")
        install(folder, output, overwrite)


@contextmanager
def mounted(place: Path, *what: str) -> Iterator[None]:
    """Mount something at a new folder, or skip the test."""
    place.mkdir()
    if subprocess.run(["mount", *what, str(place)], capture_output=True, check=False).returncode:
        pytest.skip("mounting takes rights that this user does not have")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)

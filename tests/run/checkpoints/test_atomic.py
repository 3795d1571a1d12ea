"""A folder that takes the place of another, with the process killed at any moment."""

import itertools
import shutil
from pathlib import Path

import pytest
from killed import Killed, killed_at

from optimum_fista.run.checkpoints.atomic import flush_folder, replace_folder


def folder_of(path: Path, text: str) -> Path:
    (path / "fista").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "fista/report.json"):
        (path / name).write_text(text)
    return path


def texts_of(path: Path) -> set[str]:
    return {file.read_text() for file in path.rglob("*") if file.is_file()}


def test_whenever_it_is_killed_there_is_the_old_folder_the_new_or_none(tmp_path):
    seen = []
    for step in itertools.count():
        case = tmp_path / str(step)
        old, new = folder_of(case / "model", "old"), folder_of(case / ".new", "new")
        try:
            with killed_at(step):
                replace_folder(new, old)
        except Killed:
            seen.append(texts_of(old))
            assert len(seen[-1]) <= 1
            aside = [path for path in case.iterdir() if path.name.startswith(".model.old.")]
            assert seen[-1] or texts_of(aside[0]) == {"old"}  # nothing is lost
            continue
        break
    assert texts_of(old) == {"new"}
    assert [path.name for path in case.iterdir()] == ["model"]
    assert seen[0] == {"old"}
    assert seen[-1] == {"new"}


def test_what_a_killed_replacement_left_aside_goes_with_the_next(tmp_path):
    folder_of(tmp_path / ".model.old.abc" / "model", "older")
    folder_of(tmp_path / ".other.old.abc" / "other", "of another")
    replace_folder(folder_of(tmp_path / ".first", "1"), tmp_path / "model")
    assert (tmp_path / ".model.old.abc").exists()  # it may be all that there is
    replace_folder(folder_of(tmp_path / ".second", "2"), tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.old.abc", "model"]
    assert texts_of(tmp_path / "model") == {"2"}


def test_where_the_new_folder_cant_be_renamed_the_old_one_is_put_back(tmp_path):
    old = folder_of(tmp_path / "model", "old")
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "missing", old)
    assert texts_of(old) == {"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_nothing_there_and_folders_beside_it_that_are_not_ours(tmp_path):
    other = folder_of(tmp_path / "model.old", "the user's")
    replace_folder(folder_of(tmp_path / "first", "1"), tmp_path / "model")
    replace_folder(folder_of(tmp_path / "second", "2"), tmp_path / "model")
    assert texts_of(tmp_path / "model") == {"2"}
    assert texts_of(other) == {"the user's"}


def test_flushing_passes_over_links_that_lead_nowhere(tmp_path):
    folder_of(tmp_path / "model", "old")
    (tmp_path / "model" / "link").symlink_to("nowhere")
    flush_folder(tmp_path / "model")
    shutil.rmtree(tmp_path / "model")

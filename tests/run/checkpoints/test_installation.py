"""Files that come into a folder, with the process killed at any moment."""

import errno
import itertools
import os
from pathlib import Path

import pytest
from killed import Killed, killed_at
from text_folders import (
    NEW,
    OLD,
    contents,
    foreign_files,
    mounted,
    no_waiting_for_the_disk,  # noqa: F401
    put,
    write,
)

from optimum_fista.run.checkpoints import installation
from optimum_fista.run.checkpoints.installation import install
from optimum_fista.run.checkpoints.output_folder import INSTALLING, unfinished_folder
from optimum_fista.run.checkpoints.output_lock import locked_output


def test_whenever_it_is_killed_old_or_new_or_nothing_loads_and_the_next_run_finishes(tmp_path):
    loads = []
    for step in itertools.count():
        output = write(tmp_path / str(step) / "model", OLD, "old")
        foreign = foreign_files(output)
        try:
            with killed_at(step):
                put(output)
        except Killed:
            found = contents(output)
            assert {name: found[name] for name in foreign} == foreign
            models = {
                found[name] for name in found if name not in {*foreign, "tokenizer.json"} and ".partial" not in name
            }
            loads.append(models if "config.json" in found else set())
            assert len(loads[-1]) <= 1
            with locked_output(output):  # any next run
                found = contents(output)
                assert "config.json" in found
                assert len({found[name] for name in found if name not in {*foreign, "tokenizer.json"}}) == 1
            put(output)
        assert contents(output) == foreign | dict.fromkeys(NEW, "new") | {"tokenizer.json": "old"}
        assert (output / "nowhere").is_symlink()
        assert (output / "link").is_symlink()
        assert [path.name for path in output.parent.iterdir()] == ["model"]
        if len(loads) == step:
            break
    assert loads[0] == {"old"}
    assert set() in loads


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_without_a_model_is_finished_without_overwriting(tmp_path, exists):
    for step in itertools.count():
        output = tmp_path / str(step) / "model"
        output.parent.mkdir()
        foreign = foreign_files(output) if exists else {}
        try:
            with killed_at(step):
                put(output, overwrite=False)
            break
        except Killed:
            try:
                put(output, overwrite=False)
            except FileExistsError:  # it was finished
                put(output)
            assert contents(output) == foreign | dict.fromkeys(NEW, "new")
    assert [path.name for path in output.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.EIO, os.strerror(errno.EIO))])
@pytest.mark.parametrize("at", range(1, len(NEW) + 2))  # the list of files comes as well
def test_an_interrupt_or_an_error_while_files_come_leaves_the_new_model(tmp_path, monkeypatch, at, error, streamed):
    output, replace, done = write(tmp_path / "model", OLD, "old"), Path.replace, []

    def interrupted(self: Path, target: Path) -> Path:
        if unfinished_folder(output) not in target.parents:
            done.append(target)
            if len(done) == at:
                raise error
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises((KeyboardInterrupt, OSError)) as raised:
        put(output, also=("journal/fingerprint.json",) if streamed else ())
    if error is not KeyboardInterrupt:
        assert f"error: the new model is whole in '{unfinished_folder(output)}'" in str(raised.value)
    assert contents(output) == dict.fromkeys(NEW, "new") | {"tokenizer.json": "old"}
    assert unfinished_folder(output).exists() == streamed


def test_files_that_cant_come_now_are_kept_for_the_next_run(tmp_path, monkeypatch):
    output, replace = write(tmp_path / "model", OLD, "old"), Path.replace

    def broken(self: Path, target: Path) -> Path:
        if unfinished_folder(output) in target.parents:
            return replace(self, target)
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", broken)
        with pytest.raises(OSError, match=r"the new model is whole in .*, the next run into the same output brings it"):
            put(output)
    assert contents(unfinished_folder(output)).items() >= dict.fromkeys(NEW, "new").items()
    with locked_output(output):
        pass
    assert contents(output) == dict.fromkeys(NEW, "new") | {"tokenizer.json": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_came_after_all_new_files_is_kept(tmp_path):
    for step in itertools.count():
        output = write(tmp_path / str(step) / "model", ("fista/evaluation.json", *OLD), "old")
        with pytest.raises(Killed), killed_at(step):
            put(output)
        if contents(output).get("config.json") == "new":
            break
    assert (unfinished_folder(output) / INSTALLING).exists()
    write(output, ("fista/evaluation.json",), "later")
    with locked_output(output):
        pass
    assert contents(output) == dict.fromkeys(NEW, "new") | {"tokenizer.json": "old", "fista/evaluation.json": "later"}


def test_a_new_tokenizer_replaces_all_of_the_old_one(tmp_path):
    output = write(tmp_path / "model", (*OLD, "vocab.json", "added_tokens.json"), "old")
    put(output, also=("tokenizer_config.json",))
    assert set(contents(output).values()) == {"new"}


def test_a_folder_keeps_being_what_it_is(tmp_path):
    write(tmp_path / "disk", OLD, "old").chmod(0o700)
    (tmp_path / "link").symlink_to("disk")
    number = (tmp_path / "disk").stat().st_ino
    put(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "config.json").read_text() == "new"
    assert ((tmp_path / "disk").stat().st_ino, (tmp_path / "disk").stat().st_mode & 0o777) == (number, 0o700)


def test_a_mount_point_is_written_inside(tmp_path):
    output = tmp_path / "volume"
    with mounted(output, "-t", "tmpfs", "none"):
        assert unfinished_folder(output).parent == output
        write(output, ("lost+found/notes.txt",), "foreign")
        put(output, overwrite=False)
        assert contents(output) == dict.fromkeys(NEW, "new") | {"lost+found/notes.txt": "foreign"}
        assert [path.name for path in tmp_path.iterdir()] == ["volume"]


def test_a_file_system_without_second_names_gets_copies(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    put(write(tmp_path / "model", OLD, "old"))
    assert contents(tmp_path / "model") == dict.fromkeys(NEW, "new") | {"tokenizer.json": "old"}


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with locked_output(tmp_path / "model") as folder:
            write(folder, NEW, "new")
            (folder / NEW[1]).chmod(0o600)  # as safetensors does
            install(folder, tmp_path / "model", False)
    finally:
        os.umask(before)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").glob("*.*")} == {0o640}


def test_a_folder_with_the_name_of_the_journal_is_kept(tmp_path):
    foreign = dict.fromkeys(("journal/lock", "journal/monday.txt"), "foreign")
    put(write(tmp_path / "model", tuple(foreign), "foreign"), overwrite=False)
    assert contents(tmp_path / "model") == foreign | dict.fromkeys(NEW, "new")


@pytest.mark.parametrize("full_at", range(len(NEW)))
def test_a_full_disk_leaves_the_old_model_whole(tmp_path, monkeypatch, full_at):
    output, copied = write(tmp_path / "model", OLD, "old"), []

    def full(source: Path, target: Path) -> None:
        target.write_text("half")
        copied.append(target)
        if len(copied) > full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    with monkeypatch.context() as patched:
        patched.setattr(installation, "_link", full)
        with pytest.raises(OSError, match="No space left"):
            put(output)
    assert contents(output) == dict.fromkeys(OLD, "old")
    with pytest.raises(FileExistsError, match="already holds a model"):
        put(output, overwrite=False)


def test_a_partial_file_of_others_is_kept(tmp_path):
    write(tmp_path / "model", (*OLD, ".README.md.partial"), "old")
    with pytest.raises(FileExistsError, match=r"\.README\.md\.partial, which is in the way"):
        put(tmp_path / "model")
    assert contents(tmp_path / "model") == dict.fromkeys((*OLD, ".README.md.partial"), "old")


def test_a_file_that_came_in_the_meantime_is_kept_and_the_model_as_well(tmp_path):
    with locked_output(tmp_path / "model") as folder:
        write(folder, (*NEW, "journal/fingerprint.json"), "new")
        write(tmp_path / "model", ("README.md",), "foreign")
        with pytest.raises(FileExistsError, match=r"holds README\.md of something else"):
            install(folder, tmp_path / "model", True)
    assert contents(tmp_path / "model") == {"README.md": "foreign"}
    assert {"config.json", "README.md"} <= set(contents(unfinished_folder(tmp_path / "model")))


def test_layers_of_a_streamed_run_are_not_thrown_away_unasked(tmp_path):
    write(tmp_path / "model.unfinished", ("journal/fingerprint.json", "model-00001-of-00009.safetensors"), "layers")
    with pytest.raises(FileExistsError, match="holds an unfinished run: give its command again to finish it, delete"):
        put(tmp_path / "model", overwrite=False)
    assert len(contents(tmp_path / "model.unfinished")) == 3
    put(tmp_path / "model")
    assert contents(tmp_path) == {f"model/{name}": "new" for name in NEW}

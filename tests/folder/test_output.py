"""Output folders: the old or the new one is whole at its name whenever a process is killed, and no user's file goes."""

import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from killed import Killed, killed_at
from safetensors import SafetensorError

from optimum_fista import atomic
from optimum_fista.atomic import errors_of_writing, write_file
from optimum_fista.folder import output
from optimum_fista.folder.output import (
    discard,
    foreign_files,
    install,
    locked_output,
    model_files,
    new_output,
    require_output,
    rewrite,
    unfinished_folder,
    write_about,
)

OLD = ("config.json", "model.safetensors", "README.md", "tokenizer.json", "fista/report.json")
NEW = ("config.json", "model-00001-of-00001.safetensors", "README.md", "fista/report.json")


def write_files(folder: Path, names: tuple[str, ...], text: str) -> Path:
    """Write files with the same text into a folder, which is made if it is missing."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def contents(folder: Path) -> dict[str, str]:
    """All files but the list of those that belong to the model."""
    files = [path for path in folder.rglob("*") if path.is_file() and "files.json" not in path.name]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def write_model(
    output: Path, names: tuple[str, ...] = NEW, text: str = "new", overwrite: bool = True
) -> Path:
    """Write a model to an output folder, as every command does: files of these names, all with the same text."""
    with new_output(output, overwrite) as folder:
        write_files(folder, names, text)
    return output


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    for module in (atomic, output):
        monkeypatch.setattr(module, "flush", lambda path: None)


def test_a_folder_that_another_rank_removes_meanwhile_is_no_error(tmp_path, monkeypatch):
    remove = shutil.rmtree

    def the_other_was_first(path):
        remove(path)
        raise FileNotFoundError(path)

    with locked_output(tmp_path / "model") as unfinished:
        (unfinished / "journal" / "offload-1").mkdir()
        monkeypatch.setattr(shutil, "rmtree", the_other_was_first)

    assert not (unfinished / "journal" / "offload-1").exists()


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a model"])
def test_whenever_it_is_killed_the_old_or_the_new_folder_is_there(tmp_path, there):
    """Between the two renamings there is none, and any next run puts the old one back."""
    outcomes = set()
    for step in itertools.count():
        folder = tmp_path / str(step) / "model"
        if there == "a model":
            write_model(folder, OLD, "old")
        elif there == "an empty folder":
            folder.mkdir(parents=True)
        old = contents(folder)

        try:
            with killed_at(step):
                write_model(folder)
            break
        except Killed:
            pass

        was_there = there != "nothing"
        if was_there and not folder.exists():
            outcomes.add("none")
            with locked_output(folder):  # any next run
                pass
        is_old = contents(folder) == old
        outcomes.add("old" if is_old else "new")
        assert is_old or contents(folder) == dict.fromkeys(NEW, "new")

        lock = Path(f"{unfinished_folder(folder)}.lock")
        if not is_old and lock.exists():
            mark = lock.with_suffix("") / "journal" / "optimum-fista"
            if mark.exists():
                write_files(mark.parent, ("layer-0.json",), "finished")  # as a streamed run has it
            with pytest.raises(FileExistsError, match="already holds a model"):
                require_output(folder, overwrite=False)  # the same command tidies up
            assert [path.name for path in folder.parent.iterdir()] == ["model"]
            outcomes.add("tidied")
        write_model(folder)
        assert contents(folder.parent) == {f"model/{name}": "new" for name in NEW}

    assert outcomes - {"none"} == {"old", "new", "tidied"}
    assert ("none" in outcomes) == (there != "nothing")
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_folder_that_appears_between_two_renames_and_the_old_one_are_kept(tmp_path):
    for step in itertools.count():
        folder = write_model(tmp_path / str(step) / "model", OLD, "old")
        with pytest.raises(Killed), killed_at(step):
            write_model(folder)
        if not folder.exists():
            break
    write_files(folder, ("notes.txt",), "mine")

    for _ in range(2):
        with pytest.raises(OSError, match="replaced' -> "), locked_output(folder):
            pass

    assert contents(folder) == {"notes.txt": "mine"}
    assert contents(unfinished_folder(folder) / "replaced") == dict.fromkeys(OLD, "old")

    shutil.rmtree(folder)
    write_model(folder)
    assert contents(folder.parent) == {f"model/{name}": "new" for name in NEW}


def test_a_model_that_cant_be_moved_into_place_leaves_the_old_one(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "model", OLD, "old")
    rename = Path.rename

    def refuse(self, target):
        if self.name == "model" and target == folder:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)

    message = "not permitted: the new model can't take its place; give the same command again"
    with pytest.raises(OSError, match=message):
        write_model(folder)

    assert contents(tmp_path) == {f"model/{name}": "old" for name in OLD}


def refused(folder, **options) -> str:
    """The message with which `require_output` refuses an output; it changes no file."""
    before = contents(folder.parent)
    with pytest.raises((ValueError, OSError)) as raised:
        require_output(folder, **{"overwrite": True} | options)
    assert contents(folder.parent) == before
    return str(raised.value)


@pytest.mark.parametrize("name", ["notes.txt", "README.md", "fista/mine.txt", "model.safetensors"])
def test_a_file_that_was_added_or_changed_is_kept(tmp_path, name):
    folder = write_model(tmp_path / "model", OLD, "old")
    require_output(folder, True)

    write_files(folder, (name,), "mine")

    assert foreign_files(folder) == [name]
    said = refused(folder)
    assert f"holds {name}, which optimum-fista did not write or somebody changed" in said
    assert "it would be lost" in said

    (folder / name).unlink()
    require_output(folder, True)


def test_weights_with_a_new_time_are_kept_and_the_error_says_that_copying_does_this(tmp_path):
    original = write_model(tmp_path / "original", OLD, "old")
    folder = tmp_path / "model"
    shutil.copytree(original, folder)
    os.utime(folder / "model.safetensors", ns=(0, 0))  # as `cp -r` does

    said = refused(folder)

    assert said.count("(weights that were copied without their time count as changed)") == 1

    shutil.rmtree(folder)
    shutil.copytree(original, folder)  # keeps times, as `cp -a` does
    require_output(folder, True)


def test_a_file_that_is_added_during_the_run_and_the_new_model_are_kept(tmp_path):
    folder = write_model(tmp_path / "model", OLD, "old")

    with locked_output(folder) as unfinished:
        write_files(unfinished, ("journal/fingerprint.json",), "new")
        write_files(unfinished / "model", NEW, "new")
        (folder / "link").symlink_to("nowhere")
        with pytest.raises(FileExistsError, match="holds link, which"):
            install(unfinished, folder, True)

    assert contents(folder) == dict.fromkeys(OLD, "old")

    (folder / "link").unlink()
    with locked_output(folder) as unfinished:
        install(unfinished, folder, True)
    assert contents(tmp_path) == {f"model/{name}": "new" for name in NEW}


def test_files_that_commands_write_about_a_model_count_as_its_files(tmp_path):
    folder = write_model(tmp_path / "model", OLD, "old")

    for name in ("fista/report.html", "README.md", "notes.txt"):
        write_about(folder / name, "later")

    assert foreign_files(folder) == ["notes.txt"]
    assert model_files(folder) == {*OLD, "fista/files.json", "fista/report.html"}


def test_a_card_that_the_user_has_changed_stays_the_users(tmp_path):
    folder = write_model(tmp_path / "model", OLD, "old")
    (folder / "README.md").write_text("the user's")

    # as commands write what is about a model
    write_about(folder / "README.md", "the user's, and a line more")

    assert foreign_files(folder) == ["README.md"]


def test_an_output_with_a_model_is_refused_without_overwrite(tmp_path):
    folder = write_model(tmp_path / "model", OLD, "old")

    assert "already holds a model" in refused(folder, overwrite=False)


def test_an_output_without_a_name_is_refused(tmp_path):
    assert "has no name of its own" in refused(tmp_path / "..")


@pytest.mark.parametrize("name", ["source", "source/sub/out", "alias", "alias/out"])
def test_an_output_in_the_folder_that_is_read_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "source", OLD, "old")
    (tmp_path / "alias").symlink_to("source")

    assert "lies in the folder that is read" in refused(tmp_path / name, source="source")


def test_a_new_folder_in_the_place_of_the_one_that_is_read_is_refused(tmp_path):
    source = write_model(tmp_path / "source", OLD, "old")

    with (
        pytest.raises(ValueError, match="lies in the folder that is read"),
        new_output(source, True, source),
    ):
        pass

    assert contents(source) == dict.fromkeys(OLD, "old")


@pytest.mark.parametrize("name", ["out.unfinished", "model"])
def test_an_output_whose_unfinished_folder_is_read_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path / "out.unfinished", ("journal/optimum-fista", "model/config.json"), "kept")
    (tmp_path / "model").symlink_to("out.unfinished/model")

    message = refused(tmp_path / "out", source=name)

    assert "deletes: pass another output, or move the folder" in message


def test_a_file_and_a_folder_of_others_are_refused(tmp_path):
    write_files(tmp_path / "others", ("config.json", "model.safetensors"), "foreign")

    assert "is a file: pass a folder" in refused(tmp_path / "others" / "config.json")
    assert "holds config.json, model.safetensors, which" in refused(tmp_path / "others")


def test_an_output_that_cant_be_written_to_is_refused(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "model", OLD, "old")
    # Root may write everywhere, so the mode of the folder would not do.
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder)

    message = refused(folder)

    reason = "can't be replaced (Permission denied): make it writable, or pass another folder"
    assert reason in message


def test_a_mount_point_is_refused(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "model", OLD, "old")
    monkeypatch.setattr(os.path, "ismount", lambda path: True)

    message = refused(folder)

    assert "is a mount point, which can't be replaced: pass a folder in it" in message


def test_a_link_stays_a_link_and_the_mode_of_its_folder_stays(tmp_path):
    write_model(tmp_path / "disk", OLD, "old").chmod(0o700)
    (tmp_path / "link").symlink_to("disk")

    write_model(tmp_path / "link")

    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "disk") == dict.fromkeys(NEW, "new")
    assert (tmp_path / "disk").stat().st_mode & 0o777 == 0o700


def test_weights_can_be_read_by_those_who_may_read_the_other_files(tmp_path):
    before = os.umask(0o027)
    try:
        with output.new_output(tmp_path / "private", False) as folder:
            write_files(folder, NEW, "new")
            (folder / NEW[1]).chmod(0o600)  # as safetensors does
    finally:
        os.umask(before)

    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "private").glob("*.*")}
    assert modes == {0o640}


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_a_file_or_folder_with_the_name_of_the_unfinished_folder_is_not_touched(tmp_path, kind):
    unfinished = tmp_path / "model.unfinished"
    write_files(tmp_path / "elsewhere", ("journal/optimum-fista",), "foreign")
    if kind == "folder":
        write_files(unfinished, ("journal/notes.txt", "model/notes.txt"), "foreign")
    elif kind == "file":
        unfinished.write_text("foreign")
    else:
        unfinished.symlink_to("elsewhere")
    before = contents(tmp_path)

    message = r"model\.unfinished' is in the way and no unfinished run's: move it"
    with pytest.raises(FileExistsError, match=message):
        write_model(tmp_path / "model")

    assert contents(tmp_path) == before


def test_layers_of_an_unfinished_run_are_deleted_only_if_asked(tmp_path):
    with locked_output(tmp_path / "model") as unfinished:
        of_run = ("journal/fingerprint.json", "model/shard")
        write_files(unfinished, (*of_run, "journal/offload-a/weight.dat"), "layers")

    message = "holds an unfinished run: give its command again to finish it, delete"
    with pytest.raises(FileExistsError, match=message):
        write_model(tmp_path / "model", overwrite=False)

    assert {name for name, text in contents(unfinished).items() if text} == {*of_run}

    write_model(tmp_path / "model")
    assert contents(tmp_path) == {f"model/{name}": "new" for name in NEW}


def test_another_process_is_refused_until_the_first_is_gone(tmp_path):
    lock = tmp_path / "model.unfinished.lock"
    hold = textwrap.dedent("""
        import sys, time, filelock

        with filelock.FileLock(sys.argv[1]):
            print("held", flush=True)
            time.sleep(60)
    """)
    holder = subprocess.Popen([sys.executable, "-c", hold, str(lock)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        (tmp_path / "link").symlink_to(tmp_path)

        message = "is being written by another run: wait until it has ended, or pass"
        with pytest.raises(BlockingIOError, match=message):
            write_model(tmp_path / "link" / "model")
    finally:
        holder.kill()
        holder.wait()

    write_model(tmp_path / "model")
    assert set(contents(tmp_path / "model").values()) == {"new"}


def test_threads_that_write_at_once_never_mix_their_models(tmp_path):
    done = []
    failures = []

    def rounds(text: str) -> None:
        """Put a model of this text there again and again; note each time in `done`, an error in `failures`."""
        for _ in range(20):
            try:
                # The thread that holds the lock may ask again.
                with (
                    locked_output(tmp_path / "model"),
                    locked_output(tmp_path / "model") as folder,
                ):
                    discard(folder)
                    write_files(folder / "model", NEW, text)
                    install(folder, tmp_path / "model", True)
                    assert set(contents(tmp_path / "model").values()) == {text}
                    done.append(text)
            except BlockingIOError:
                pass
            except BaseException as error:
                failures.append(error)
                raise

    threads = [threading.Thread(target=rounds, args=(text,)) for text in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert done
    assert not failures
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_damaged_list_of_files_protects_every_file(tmp_path):
    folder = write_model(tmp_path / "model", OLD, "old")
    (folder / "fista" / "files.json").write_text(json.dumps([*OLD]))

    assert "holds README.md, config.json, fista and 2 more, which" in refused(folder)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path):
    file = tmp_path / "table.json"
    file.write_text("old")
    (tmp_path / ".table.json.partial").symlink_to("/dev/full")

    with pytest.raises(OSError, match=r"No space left on device: '.*/table\.json'$") as caught:
        write_file(file, "new")

    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["table.json"]
    assert file.read_text() == "old"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("I/O error: No space left on device (os error 28)", errno.ENOSPC),
        ("invalid header", errno.EIO),
    ],
)
def test_an_error_of_safetensors_becomes_an_os_error(tmp_path, text, number):
    with (
        pytest.raises(OSError, match=r"serializing.*: '.*/model'") as caught,
        errors_of_writing(tmp_path / "model"),
    ):
        raise SafetensorError(f"Error while serializing: {text}")

    assert caught.value.errno == number


def test_the_file_name_that_an_error_already_has_is_kept(tmp_path):
    with pytest.raises(OSError, match="another"), errors_of_writing(tmp_path):
        raise OSError(errno.ENOSPC, "full", "another")


def test_whenever_it_is_killed_files_that_are_written_again_are_none_of_the_users(tmp_path):
    texts = [name for name in NEW if not name.endswith(".safetensors")]
    for step in itertools.count():
        folder = write_model(tmp_path / str(step) / "model")
        try:
            with killed_at(step):
                rewrite(folder, dict.fromkeys(texts, "newer"))
            break
        except Killed:
            assert foreign_files(folder) == []

    assert step > len(texts) > 1
    assert foreign_files(folder) == []
    assert {(folder / name).read_text() for name in texts} == {"newer"}
    (folder / texts[0]).write_text("of the user")
    assert foreign_files(folder) == [texts[0]]

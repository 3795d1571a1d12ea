"""One run at a time writes an output: among threads, processes and mounts, and after a process is gone."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading

import pytest
from text_folders import NEW, OLD, contents, mounted, no_waiting_for_the_disk, put, write  # noqa: F401

from optimum_fista.run.checkpoints import output_lock
from optimum_fista.run.checkpoints.installation import discard, install
from optimum_fista.run.checkpoints.output_folder import unfinished_folder
from optimum_fista.run.checkpoints.output_lock import locked_output


def test_a_folder_under_another_mount_has_the_same_lock(tmp_path):
    disk, volume = write(tmp_path / "disk", OLD, "old"), tmp_path / "volume"
    with mounted(volume, "--bind", str(disk)):
        for first, second in ((disk, volume), (volume, disk)):
            with locked_output(first):
                assert unfinished_folder(first) != unfinished_folder(second)
                with pytest.raises(BlockingIOError, match="by another run, perhaps under another name of the folder"):
                    put(second)
            put(second)
    assert contents(disk) == dict.fromkeys(NEW, "new") | {"tokenizer.json": "old"}


@pytest.mark.parametrize("kind", ["folder", "folder with a lock", "file", "link"])
def test_what_has_the_name_of_the_unfinished_folder_is_not_touched(tmp_path, kind):
    unfinished = tmp_path / "model.unfinished"
    write(tmp_path / "elsewhere", ("journal/lock",), "foreign")
    if kind == "folder":
        write(unfinished, ("journal/notes.txt",), "foreign")
    elif kind == "folder with a lock":
        write(unfinished, ("journal/lock", "notes.txt"), "foreign")
    elif kind == "file":
        unfinished.write_text("foreign")
    else:
        unfinished.symlink_to("elsewhere")
    before = contents(tmp_path)
    with pytest.raises(OSError, match=r"model\.unfinished"):
        put(tmp_path / "model")
    assert contents(tmp_path) == before


def test_what_a_killed_writer_left_goes_with_the_next(tmp_path):
    write(tmp_path / ".model.old.mine", ("notes.txt",), "foreign")
    write(
        tmp_path / "model.unfinished",
        ("pytorch_model.bin", "journal/offload-abc/weight.dat", "journal/lock"),
        "process 1 on here",
    )
    assert len(contents(tmp_path / "model.unfinished")) == 3
    put(tmp_path / "model", overwrite=False)
    assert contents(tmp_path) == {f"model/{name}": "new" for name in NEW} | {".model.old.mine/notes.txt": "foreign"}


HOLD = """
import sys, time
from pathlib import Path
from optimum_fista.run.checkpoints.output_lock import locked_output
with locked_output(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_other_run_is_told_who_writes_until_that_process_is_gone(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "model")], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        (tmp_path / "link").symlink_to(tmp_path)
        with pytest.raises(
            BlockingIOError, match=rf"is being written by process {holder.pid} on .*: wait until it has"
        ):
            put(tmp_path / "link" / "model")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    put(tmp_path / "model")
    assert contents(tmp_path / "model") == dict.fromkeys(NEW, "new")


def test_a_full_disk_leaves_neither_a_lock_nor_a_folder(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match=r"No space left on device\), nothing was done: pass another folder"):
            put(tmp_path / "model")
    assert not [*tmp_path.iterdir()]
    put(tmp_path / "model")  # which nobody holds
    assert contents(tmp_path / "model") == dict.fromkeys(NEW, "new")


def test_threads_exclude_each_other_and_one_may_ask_again(tmp_path):
    failures = []

    def other() -> None:
        try:
            put(tmp_path / "model")
        except BlockingIOError as error:
            failures.append(error)

    with locked_output(tmp_path / "model"), locked_output(tmp_path / "model") as folder:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert len(failures) == 1
        write(folder, NEW, "mine")
        install(folder, tmp_path / "model", False)  # by a rename, so the lock has another name now
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(failures) == 2
    assert contents(tmp_path / "model") == dict.fromkeys(NEW, "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_many_at_once_never_mix_their_models(tmp_path):
    def rounds(text: str) -> None:
        for _ in range(20):
            try:
                with locked_output(tmp_path / "model") as folder:
                    discard(folder, True)
                    write(folder, NEW, text)
                    install(folder, tmp_path / "model", True)
                    assert set(contents(tmp_path / "model").values()) == {text}
                    done.append(text)
            except BlockingIOError:
                pass
            except BaseException as error:
                failures.append(error)
                raise

    done, failures = [], []
    threads = [threading.Thread(target=rounds, args=(text,)) for text in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done
    assert not failures


def test_without_locks_there_is_a_warning(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match=r"can't be locked \(No locks available\): don't start two runs into it"):
        put(tmp_path / "model")
    monkeypatch.setattr(output_lock, "fcntl", None)
    with pytest.warns(UserWarning, match="can't be locked"):
        put(tmp_path / "model")

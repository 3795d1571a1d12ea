"""Files that come into a folder, with the process killed at any moment; outputs that are refused; the lock."""

import errno
import fcntl
import itertools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from killed import Killed, killed_at

from optimum_fista.run.checkpoints import installation, output_lock
from optimum_fista.run.checkpoints.installation import discard, install
from optimum_fista.run.checkpoints.output_folder import (
    INSTALLING,
    MODEL_FILES,
    model_files,
    require_output,
    unfinished_folder,
)
from optimum_fista.run.checkpoints.output_lock import locked_output

OLD = ("config.json", "model.safetensors", "README.md", "tokenizer.json", "fista/report.json", "fista/report.html")
NEW = ("config.json", "model-00001-of-00001.safetensors", "README.md", "fista/report.json")


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
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
        except Killed:
            try:
                put(output, overwrite=False)
            except FileExistsError:  # it was finished
                put(output)
            assert contents(output) == foreign | dict.fromkeys(NEW, "new")
            continue
        break
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


def test_an_adapter_of_others_is_not_loaded_with_the_model(tmp_path):
    write(tmp_path / "model", ("adapter_config.json", "adapter_model.safetensors"), "foreign")
    message = refused(tmp_path, "model", overwrite=True, names=MODEL_FILES)
    assert "holds adapter_config.json: from_pretrained would load that adapter, and not the model. Pass" in message


def test_a_new_tokenizer_replaces_all_of_the_old_one(tmp_path, monkeypatch):
    output = write(tmp_path / "model", (*OLD, "vocab.json", "added_tokens.json"), "old")
    monkeypatch.setattr(sys.modules[__name__], "NEW", (*NEW, "tokenizer_config.json"))
    put(output)
    assert set(contents(output).values()) == {"new"}


def test_files_that_belong_to_the_model_are_noted(tmp_path):
    output = tmp_path / "model"
    put(output, also=("vocab.bpe", "tokenizer_config.json"))
    written = {*NEW, "fista/files.json", "vocab.bpe", "tokenizer_config.json"}
    assert model_files(output) == written
    write(output, ("fista/evaluation.json", "vocab.txt"), "later")
    foreign_files(output)
    assert model_files(output) == written | {"fista/evaluation.json"}
    put(output)  # brings no tokenizer, so the old one stays; it is another model, so the evaluation goes
    assert model_files(output) == written
    put(output, also=("tokenizer_config.json", "fista/.files.json.partial"))  # a process was killed while it wrote that
    assert model_files(output) == written - {"vocab.bpe"}
    write(output, ("fista/files.json",), "{}")
    assert "files.json' is damaged (it is not a list): remove it" in refused(tmp_path, "model", overwrite=True)
    (output / "fista" / "files.json").unlink()
    assert model_files(output) == written - {"vocab.bpe", "fista/files.json"}


def test_a_folder_keeps_being_what_it_is(tmp_path):
    write(tmp_path / "disk", OLD, "old").chmod(0o700)
    (tmp_path / "link").symlink_to("disk")
    number = (tmp_path / "disk").stat().st_ino
    put(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "config.json").read_text() == "new"
    assert ((tmp_path / "disk").stat().st_ino, (tmp_path / "disk").stat().st_mode & 0o777) == (number, 0o700)


def test_a_mount_point_is_written_inside(tmp_path):
    output, mount = tmp_path / "volume", ["mount", "-t", "tmpfs", "none", str(tmp_path / "volume")]
    output.mkdir()
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting takes rights that this user does not have")
    try:
        assert unfinished_folder(output).parent == output
        write(output, ("lost+found/notes.txt",), "foreign")
        put(output, overwrite=False)
        assert contents(output) == dict.fromkeys(NEW, "new") | {"lost+found/notes.txt": "foreign"}
        assert [path.name for path in tmp_path.iterdir()] == ["volume"]
    finally:
        subprocess.run(["umount", str(output)], check=True)


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


def refused(tmp_path: Path, name: str, **options) -> str:
    before = contents(tmp_path)
    with pytest.raises((ValueError, OSError)) as raised:
        require_output(Path(name) if name.startswith(".") else tmp_path / name, **options)
    assert contents(tmp_path) == before
    return str(raised.value)


def test_outputs_that_cant_work_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "source", OLD, "old")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "alias").symlink_to("source")
    for name in (".", "..", "../..", "source/.."):
        assert "has no name of its own" in refused(tmp_path, name, overwrite=True)
    for name in ("dangling", "loop"):
        assert "is a link that leads nowhere" in refused(tmp_path, name, overwrite=True)
    for name in ("source", "source/sub/out", "alias", "alias/out"):
        assert "lies in the folder that is read" in refused(tmp_path, name, overwrite=True, source="source")
    assert "is a file: pass a folder" in refused(tmp_path, "source/config.json", overwrite=True)
    assert "already holds a model" in refused(tmp_path, "source", overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_something_else_are_not_replaced(tmp_path, overwrite):
    write(tmp_path / "readme", ("README.md", "tokenizer.json"), "foreign")
    write(tmp_path / "fista", ("fista/report.json",), "foreign")
    write(tmp_path / "elsewhere", ("notes.txt",), "foreign")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "fista").symlink_to(tmp_path / "elsewhere")
    for name, shown in [("readme", "README.md, tokenizer.json"), ("fista", "fista/report.json"), ("linked", "fista")]:
        message = refused(tmp_path, name, overwrite=overwrite, names=MODEL_FILES)
        assert f"holds {shown} of something else" in message
    require_output(tmp_path / "readme", overwrite, names=["config.json"])
    (write(tmp_path / "odd", ("config.json", "model.safetensors"), "old") / "README.md").mkdir()
    if overwrite:
        assert "holds README.md of" in refused(tmp_path, "odd", overwrite=True, names=MODEL_FILES)


@pytest.mark.parametrize(
    "names", [("config.json", "README.md"), ("model-00001-of-00002.safetensors",), ("model.safetensors",)]
)
def test_a_configuration_or_weights_alone_are_no_model_that_is_replaced(tmp_path, names):
    write(tmp_path / "model", names, "foreign")
    with pytest.raises(FileExistsError, match="of something else"):
        put(tmp_path / "model")
    assert contents(tmp_path / "model") == dict.fromkeys(names, "foreign")


def test_a_folder_with_the_name_of_the_journal_is_kept(tmp_path):
    foreign = dict.fromkeys(("journal/lock", "journal/monday.txt"), "foreign")
    put(write(tmp_path / "model", tuple(foreign), "foreign"), overwrite=False)
    assert contents(tmp_path / "model") == foreign | dict.fromkeys(NEW, "new")


def test_the_unfinished_folder_of_another_run_is_no_output(tmp_path):
    write(tmp_path / "model.unfinished", ("journal/lock", "journal/calibration.safetensors"), "process 1 on here")
    assert "has the name of an unfinished run" in refused(tmp_path, "model.unfinished", overwrite=True)


def test_brackets_in_names_stand_for_themselves(tmp_path):
    write(tmp_path / "model", ("notes1.txt",), "foreign")
    require_output(tmp_path / "model", False, names=["notes[1].txt", "*"])
    write(tmp_path / "model", ("notes[1].txt",), "foreign")
    assert "holds notes[1].txt of" in refused(tmp_path, "model", overwrite=False, names=["notes[1].txt"])


def test_a_source_is_known_under_another_mount(tmp_path):
    source, output = write(tmp_path / "source", OLD, "old"), tmp_path / "output"
    output.mkdir()
    if subprocess.run(["mount", "--bind", str(source), str(output)], capture_output=True, check=False).returncode:
        pytest.skip("mounting takes rights that this user does not have")
    try:
        assert "lies in the folder that is read" in refused(tmp_path, "output", overwrite=True, source=source)
    finally:
        subprocess.run(["umount", str(output)], check=True)


def test_a_folder_under_another_mount_has_the_same_lock(tmp_path):
    disk, volume = write(tmp_path / "disk", OLD, "old"), tmp_path / "volume"
    volume.mkdir()
    if subprocess.run(["mount", "--bind", str(disk), str(volume)], capture_output=True, check=False).returncode:
        pytest.skip("mounting takes rights that this user does not have")
    try:
        for first, second in ((disk, volume), (volume, disk)):
            with locked_output(first):
                assert unfinished_folder(first) != unfinished_folder(second)
                with pytest.raises(BlockingIOError, match="by another run, perhaps under another name of the folder"):
                    put(second)
            put(second)
    finally:
        subprocess.run(["umount", str(volume)], check=True)
    assert contents(disk) == dict.fromkeys(NEW, "new") | {"tokenizer.json": "old"}


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


def test_layers_of_a_streamed_run_are_not_thrown_away_unasked(tmp_path):
    write(tmp_path / "model.unfinished", ("journal/fingerprint.json", "model-00001-of-00009.safetensors"), "layers")
    with pytest.raises(FileExistsError, match="holds an unfinished run: give its command again to finish it, delete"):
        put(tmp_path / "model", overwrite=False)
    assert len(contents(tmp_path / "model.unfinished")) == 3
    put(tmp_path / "model")
    assert contents(tmp_path) == {f"model/{name}": "new" for name in NEW}


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

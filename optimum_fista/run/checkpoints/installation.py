"""How the finished files of an unfinished folder come into the output, and how it is emptied."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from optimum_fista.run.checkpoints.atomic import flush, write_text
from optimum_fista.run.checkpoints.checkpoint import CARD_FILE, REPORT_FILE, read_report
from optimum_fista.run.checkpoints.output_folder import (
    FILES_FILE,
    FOLDER,
    INSTALLING,
    LATER,
    LOCK,
    MODEL_FILES,
    TOKENIZER,
    all_names,
    being_installed,
    holds_model,
    is_folder,
    model_files,
    names_in,
    require_output,
)
from optimum_fista.run.reports.card import PACKED_NOTE, PICTURE_FILE, model_card, text_of_card

SAMPLED_TEXTS = "calibration-*.safetensors"
"""In the journal: tokens that a model wrote, a file for each way to write them."""
_OFFLOADED = "offload-*"  # in the journal: weights that a rank of a running run reads again and again


def install(folder: Path, output_dir: Path, overwrite: bool, foreign: Collection[str] = ()) -> None:
    """Bring the whole model in an unfinished folder into `output_dir`, and end the unfinished folder.

    If there is no such folder, it appears by one rename. Otherwise all files are brought there under other names first,
    so that a full disk leaves the old model whole. Then the old configuration goes first and the new one comes last, so
    that nothing loads a mixture of two models; every file comes by one rename. What was begun is written down: after an
    interrupt or an error, `settle` finishes it, at the latest when the output is locked again. `FILES_FILE` says which
    files belong to the model: all that come and are not `foreign`, and a tokenizer that stays.

    Raises:
        OSError: As `require_output`, or if a file can't be written; the old model is still there then, unless the
            message says that the new one is whole.
    """
    output = Path(os.path.realpath(output_dir))
    # What ends in .partial was being written when a process was killed.
    whole = (name for name in all_names(folder) if not name.startswith(f"{FOLDER}/") and not name.endswith(".partial"))
    names = sorted({*whole, FILES_FILE}, key=lambda name: (name == "config.json", name))
    belong = {*names} - {*foreign}
    for name in {*names} - {FILES_FILE}:
        if name.endswith(".safetensors"):  # which safetensors writes for their owner alone
            (folder / name).chmod(folder.stat().st_mode & 0o666)
        flush(folder / name)
    if not output.exists():
        _write_list(folder, belong)
        folder.rename(output)
        flush(output.parent)
        shutil.rmtree(output / FOLDER, ignore_errors=True)  # another process may be at it as well
        return
    require_output(output, overwrite, names=names)
    ours = being_installed(folder)
    old = {name for name in names_in(output, MODEL_FILES + LATER) if not (output / name).is_dir()}
    if not holds_model(output, ours):
        old &= ours
    elif "tokenizer_config.json" not in names:  # a model that brings none keeps the tokenizer that is there
        old -= {*TOKENIZER}
        belong |= model_files(output) - old
    if CARD_FILE in names or not (output / FILES_FILE).exists() or CARD_FILE in model_files(output):
        _keep_edited_card(output)
    else:
        old -= {CARD_FILE}  # the user's: the old model had none, and the new one brings none
    _write_list(folder, belong)
    partials = [_partial(name) for name in names]
    for partial in partials:
        if os.path.lexists(output / partial):
            raise FileExistsError(f"output {str(output_dir)!r} holds {partial}, which is in the way: move it away.")
    ours |= {*partials}
    _note(folder, names, None, ours)
    for name, partial in zip(names, partials, strict=True):
        (output / partial).parent.mkdir(parents=True, exist_ok=True)
        _link(folder / name, output / partial)
        flush(output / partial)
    _note(folder, names, old - {"config.json", *names}, ours | {*names, *old})
    try:
        settle(folder, output)
    except OSError as error:
        message = f"{error.strerror}: the new model is whole in {str(folder)!r}, the next run into the same output"
        raise OSError(error.errno, f"{message} brings it in", error.filename) from error
    discard(folder, True)
    remove_offloaded(folder)


def _keep_edited_card(output: Path) -> None:
    """Copy a model card whose text is not that which a run wrote: it is about to be replaced."""
    card, picture = output / CARD_FILE, output / PICTURE_FILE
    if not card.is_file():
        return
    written = ""
    if (output / REPORT_FILE).is_file():
        try:
            report = read_report(output)
        except ValueError:
            return  # no folder of a run
        with suppress(Exception):  # of a version that reported less: its card can't be told from an edited one
            written = model_card(report, PICTURE_FILE if picture.exists() else None)
    elif not (output / FILES_FILE).is_file() or CARD_FILE in model_files(output):
        return  # it is the user's: no run wrote it
    text = card.read_text(errors="replace").replace(PACKED_NOTE, "")
    kept = [output / "README.before.md", *(output / f"README.before-{number}.md" for number in range(2, 1000))]
    if text_of_card(text) != text_of_card(written):
        shutil.copy2(card, next(path for path in kept if not os.path.lexists(path)))


def settle(folder: Path, output: Path) -> None:
    """Finish what an interrupted `install` began, or take it back if not all files had come yet; often nothing."""
    file = folder / INSTALLING
    if not file.exists():
        return
    noted = json.loads(file.read_text())
    names, ours = noted["names"], {*noted["ours"]}
    partials = {name: output / _partial(name) for name in names}
    if noted["old"] is None:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
        ours -= {_partial(name) for name in names}
    elif os.path.lexists(partials["config.json"]):  # it comes last: without it all is done
        (output / "config.json").unlink(missing_ok=True)
        flush(output)
        for name in noted["old"]:
            (output / name).unlink(missing_ok=True)
        for name, partial in partials.items():
            if os.path.lexists(partial):
                partial.replace(output / name)
                partial.unlink(missing_ok=True)  # renaming one name of a file to another of it does nothing
                flush(partial.parent)
        ours = {*names}
    if ours and is_streamed(folder):  # the run that resumes may replace them
        _note(folder, [], None, ours)
    else:
        file.unlink()


def discard(folder: Path, overwrite: bool, *, keep_texts: bool = False) -> None:
    """Throw away what is in an unfinished folder that is locked; layers of a streamed run only if `overwrite`.

    `keep_texts` leaves the tokens that models wrote: the run that begins may have written them just before.

    Raises:
        FileExistsError: If it holds such layers and `overwrite` is False.
    """
    if is_streamed(folder) and not overwrite:
        raise FileExistsError(
            f"{str(folder)!r} holds an unfinished run: give its command again to finish it, delete the folder, or pass "
            "overwrite=True (--overwrite) to throw its layers away."
        )
    empty(folder)
    kept = [folder / LOCK, *(folder / FOLDER).glob(_OFFLOADED)]
    if keep_texts:
        kept += (folder / FOLDER).glob(SAMPLED_TEXTS)
    _remove(path for path in (folder / FOLDER).glob("*") if path not in kept)


def empty(folder: Path) -> None:
    """Remove all but the journal."""
    _remove(path for path in folder.glob("*") if path.name != FOLDER)


def is_streamed(folder: Path) -> bool:
    """Whether an unfinished folder holds layers of a streamed run."""
    return (folder / FOLDER / "fingerprint.json").exists()


def remove_offloaded(folder: Path) -> None:
    """Remove the weights that ranks of an ended run had put into the journal."""
    _remove((folder / FOLDER).glob(_OFFLOADED))


def _write_list(folder: Path, names: Iterable[str]) -> None:
    (folder / FILES_FILE).parent.mkdir(exist_ok=True)
    write_text(folder / FILES_FILE, json.dumps(sorted(names), indent=1) + "\n")


def _note(folder: Path, names: list[str], old: Iterable[str] | None, ours: Iterable[str]) -> None:
    """Write down which files come, which go (`None` until all have come), and which others of ours may be there."""
    values = {"names": names, "old": None if old is None else sorted(old), "ours": sorted(ours)}
    write_text(folder / INSTALLING, json.dumps(values))


def _partial(name: str) -> str:
    return Path(name).with_name(f".{Path(name).name}.partial").as_posix()


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        shutil.rmtree(path) if is_folder(path) else path.unlink()


def _link(source: Path, target: Path) -> None:
    """A hard link to a file, or a copy if the file system has no hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)

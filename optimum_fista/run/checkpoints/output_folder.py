"""What can become the output of a run, and which files in it are a model's.

A run writes to `NAME.unfinished`, which is its own (`output_lock`). When all files are whole they come into `NAME`
(`installation`): by one rename if there is no such folder, otherwise one after another, so that the folder itself (a
mount point, the target of a link) and every file in it that is not the model's stay what they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

FOLDER = "journal"
"""What an unfinished folder holds besides the files of the model."""
LOCK, INSTALLING = f"{FOLDER}/lock", f"{FOLDER}/installing.json"
_UNFINISHED = ".unfinished"  # how its name ends

# Weights that `from_pretrained` finds by name: those of another model would be loaded instead of the new ones.
WEIGHTS = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]
WEIGHTS += ["packed.safetensors", "packed-*-of-*.safetensors", "packed.safetensors.index.json"]
WEIGHTS += ["pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"]
TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
TOKENIZER += ["chat_template.jinja", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"]
_BESIDE = ["README.md", "generation_config.json", "fista/masks.safetensors", "fista/report.json"]
FILES_FILE = "fista/files.json"  # names of the files that belong to the model, tokenizers' unusual ones included
_BESIDE += ["fista/relative_error.png", FILES_FILE]
LATER = ["fista/report.html", "fista/evaluation.json"]  # what other commands wrote about the model
MODEL_FILES = ["config.json", *WEIGHTS, *TOKENIZER, *_BESIDE]
"""Names of the files that a run writes, as patterns."""


def unfinished_folder(output_dir: Path) -> Path:
    """Where a run keeps what it has written until it is complete: beside `output_dir`, or inside a mount point."""
    output = Path(os.path.realpath(output_dir))
    name = f"{output.name}{_UNFINISHED}"
    inside = output.is_dir() and (os.path.ismount(output) or not os.access(output.parent, os.W_OK))
    return output / name if inside else output.with_name(name)


def folder_beside(source: str | Path, ending: str) -> Path:
    """Where a command writes what it makes of a model if nothing else is said: the model's name and `ending`."""
    path = Path(source) if Path(source).name not in ("", "..") else Path(source).resolve()
    return path.with_name(f"{path.name}{ending}") if path.is_dir() else Path(f"{path.name}{ending}")


def require_output(
    output_dir: Path, overwrite: bool, *, source: str | Path | None = None, names: Iterable[str] = ()
) -> None:
    """Refuse an output folder that can't work, or in which a file would be lost.

    Args:
        output_dir: The output folder.
        overwrite: Whether a model in it may be replaced.
        source: The model that is read; the output must not be its folder or lie in it.
        names: Names, or patterns of names, that are about to be written.

    Raises:
        FileExistsError: If it is a file, holds an adapter, holds a model and `overwrite` is False, or holds a file
            that is not a model's under one of the names.
        FileNotFoundError: If it is a link that leads nowhere.
        ValueError: If it has no name of its own, lies in the folder that is read, or its `FILES_FILE` is damaged.
    """
    shown = f"output {str(output_dir)!r}"
    if output_dir.name in ("", ".."):
        raise ValueError(f"{shown} has no name of its own: pass a folder by its name, such as 'model-50'.")
    if os.path.realpath(output_dir).endswith(_UNFINISHED):
        raise ValueError(f"{shown} has the name of an unfinished run: pass a name that doesn't end in {_UNFINISHED!r}.")
    if output_dir.is_symlink() and not output_dir.exists():
        raise FileNotFoundError(f"{shown} is a link that leads nowhere: pass a folder, or remove the link.")
    output, unfinished = Path(os.path.realpath(output_dir)), unfinished_folder(output_dir)
    if source is not None and Path(source).is_dir():
        places = [path for place in (output, unfinished) for path in (place, *place.parents)]
        if any(path.exists() and path.samefile(source) for path in places):  # whatever names and mounts lead there
            raise ValueError(f"{shown} lies in the folder that is read, {str(source)!r}: pass a folder outside of it.")
    if not output.exists():
        return
    if not output.is_dir():
        raise FileExistsError(f"{shown} is a file: pass a folder.")
    if os.path.lexists(output / "adapter_config.json"):
        raise FileExistsError(
            f"{shown} holds adapter_config.json: from_pretrained would load that adapter, and not the model. Pass "
            "another folder, or move it away."
        )
    names = list(names)
    ours = being_installed(unfinished)
    if holds_model(output, ours):
        if not overwrite:
            raise FileExistsError(
                f"{shown} already holds a model: pass another folder, or overwrite=True (--overwrite)."
            )
        model_files(output)  # a damaged list is refused now, and not after the run
        taken = [name for name in names_in(output, names) if (output / name).is_dir()]
    else:
        taken = [name for name in names_in(output, {*names, "config.json", *WEIGHTS}) if name not in ours]
    # A link is never written through, and no folder takes the place of a file.
    above = {parent for name in names for parent in Path(name).parents if parent.name}
    taken += [str(p) for p in sorted(above) if os.path.lexists(output / p) and not is_folder(output / p)]
    if taken:
        more = f" and {len(taken) - 3} more" if len(taken) > 3 else ""
        raise FileExistsError(
            f"{shown} holds {', '.join(taken[:3])}{more} of something else, which the model would replace: pass "
            "another folder, or move them away."
        )


def model_files(folder: Path) -> set[str]:
    """Names of the files in a folder that belong to its model: those that a run wrote down, and what commands added.

    In a folder that no run of this version wrote, those of known names.

    Raises:
        ValueError: If the list is damaged.
    """
    file, found = folder / FILES_FILE, all_names(folder)
    if not file.exists():
        return {name for name in found if is_model_file(name)}
    try:
        noted = json.loads(file.read_text())
        if not isinstance(noted, list):
            raise TypeError("it is not a list")
        return {*found} & {*noted, *LATER}
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{str(file)!r} is damaged ({error}): remove it, and files of known names count as the model's."
        ) from error


def all_names(folder: Path) -> list[str]:
    """Names of all files below a folder, links included."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not is_folder(path))


def is_model_file(name: str) -> bool:
    """Whether a name is one of a model's files, or of what other commands wrote about it."""
    return any(fnmatch(name, pattern) for pattern in MODEL_FILES + LATER)


def being_installed(folder: Path) -> set[str]:
    """Names in the output that a run which was killed may have written, by its unfinished folder."""
    file = folder / INSTALLING
    return set(json.loads(file.read_text())["ours"]) if file.exists() else set()


def is_folder(path: Path) -> bool:
    """Whether it is a folder, and not a link to one."""
    return path.is_dir() and not path.is_symlink()


def holds_model(output: Path, ours: set[str]) -> bool:
    """Whether there are a configuration and weights; one alone is somebody's file."""
    found = {*names_in(output, ["config.json", *WEIGHTS])} - ours
    return "config.json" in found and len(found) > 1


def names_in(output: Path, names: Iterable[str]) -> list[str]:
    """Those of the names, or patterns of names, that a folder has; links that lead nowhere are there as well.

    Only `WEIGHTS` are patterns: in a name of a user's file, `[` and `*` are letters.
    """
    names = list(names)
    patterns = [name for name in names if name in WEIGHTS]
    listed = [path.name for path in output.iterdir()]
    if (output / "fista").is_dir():
        listed += [f"fista/{path.name}" for path in (output / "fista").iterdir()]
    found = [name for name in listed if any(fnmatch(name, pattern) for pattern in patterns)]
    return sorted({*found, *(name for name in names if os.path.lexists(output / name))})

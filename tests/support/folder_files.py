"""The files of a pruned model's folder, to compare them byte for byte, and copies with a changed report."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

_MEASURED = re.compile(r'seconds|_bytes|\| time \||"(total|allocation)": \d')


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a folder; without the times and the memory in the two that tell them, and what follows from them."""
    files = bytes_of(folder)
    files["fista/files.json"] = str(sorted(json.loads(files["fista/files.json"]))).encode()
    for name in ("README.md", "fista/report.json"):
        lines = files[name].decode().splitlines()
        files[name] = "\n".join(line for line in lines if not _MEASURED.search(line)).encode()
    return files


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """The weights in the files of a model folder."""
    return dict(
        item for file in folder.glob("model*.safetensors") for item in load_file(file).items()
    )


def with_changed_report(folder: Path, copy: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a pruned folder in whose report `edit` has changed the first down projection."""
    shutil.copytree(folder, copy)
    file = copy / "fista" / "report.json"
    values = json.loads(file.read_text())
    edit(next(o for o in values["operators"] if o["name"].endswith("down_proj.weight")))
    file.write_text(json.dumps(values))
    return copy

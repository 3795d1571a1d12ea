"""The files of a pruned model's folder, to compare them byte for byte."""

import re
from pathlib import Path

_MEASURED = re.compile(r'seconds|_bytes|\| time \||"(total|allocation)": \d')


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a folder; without the times and the memory in the two that tell them."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for name in ("README.md", "fista/report.json"):
        lines = files[name].decode().splitlines()
        files[name] = "\n".join(line for line in lines if not _MEASURED.search(line)).encode()
    return files

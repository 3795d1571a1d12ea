"""What a streamed run has written."""

import re
from pathlib import Path

TIMED = ("README.md", "fista/report.json")  # they tell how long it took


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a folder; without the times in the two that tell them."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for name in TIMED:
        lines = files[name].decode().splitlines()
        timed = re.compile(r'seconds|\| time \||"(total|allocation)": \d')
        files[name] = "\n".join(line for line in lines if not timed.search(line)).encode()
    return files

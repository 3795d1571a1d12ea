"""Memory and time to read a long text as token ids, from a `.txt` file and from a `.jsonl` file.

TEXT is repeated until it has enough tokens; in the `.jsonl` file each document has 4,000 characters. Each file is read
in a process of its own, in the way that `recover` reads it. Its memory is its largest resident set, less that before
the text is read.

    python benchmarks/long_text.py MODEL --calibration TEXT --tokens 10000000 --output runs/long_text.json
"""

from __future__ import annotations

import json
import multiprocessing
import re
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from shared import parse_arguments, save

from optimum_fista.environment import processor_name
from optimum_fista.folder.card import markdown_lines
from optimum_fista.source.loading import require_tokenizer
from optimum_fista.text.sources import load_text
from optimum_fista.text.windows import calibration_windows

_DOCUMENT = 4000  # characters


def write_long_text(arguments: Namespace, folder: Path) -> dict[str, Path]:
    """Write the text into a `.txt` and a `.jsonl` file, and return both by the ends of their names."""
    text = Path(arguments.calibration).read_text(encoding="utf-8")
    tokenizer = require_tokenizer(arguments.model)
    tokens_of_text = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    text *= arguments.tokens // tokens_of_text + 1

    files = {"txt": folder / "long.txt", "jsonl": folder / "long.jsonl"}
    files["txt"].write_text(text, encoding="utf-8")
    with files["jsonl"].open("w", encoding="utf-8") as lines:
        for start in range(0, len(text), _DOCUMENT):
            lines.write(json.dumps({"text": text[start : start + _DOCUMENT]}) + "\n")
    return files


def read(model: str, file: Path, num_tokens: int, sequence_length: int) -> dict[str, Any]:
    """Read a file as windows of token ids, in this process, and return what that took."""
    tokenizer = require_tokenizer(model)
    tokenizer("Imports that are made late are made now.")
    before = peak_memory()
    started = time.process_time()
    windows = calibration_windows(
        tokenizer,
        load_text(str(file), "calibration"),
        num_samples=num_tokens // sequence_length,
        sequence_length=sequence_length,
        seed=0,
        held_out=1,
    )
    seconds = time.process_time() - started
    return {
        "file": file.suffix,
        "file_bytes": file.stat().st_size,
        "tokens": windows.numel(),
        "bytes": peak_memory() - before,
        "processor_seconds": seconds,
        "processor": processor_name(),
    }


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes. Linux only."""
    status = Path("/proc/self/status").read_text()
    (kibibytes,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return 1024 * int(kibibytes)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Make a line for each file."""
    lines = []
    for row in rows:
        sizes = [f"{row[key] / 1e6:,.0f}" for key in ("file_bytes", "bytes")]
        lines.append([row["file"], f"{row['tokens']:,}", *sizes, f"{row['processor_seconds']:.0f}"])
    return markdown_lines(["file", "tokens", "MB of the file", "MB of memory", "seconds"], lines)


def main() -> None:
    """Write the files, read each in a process of its own, and print the table."""
    arguments = parse_arguments(
        __doc__,
        "model",
        calibration=str,
        tokens=10_000_000,
        sequence_length=512,
        output=Path("runs/long_text.json"),
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for file in write_long_text(arguments, Path(folder)).values():
            settings = (arguments.model, file, arguments.tokens, arguments.sequence_length)
            with multiprocessing.get_context("spawn").Pool(1) as process:
                rows.append(process.apply(read, settings))
            save(arguments, {"rows": rows})
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()

"""What the checks of a packed product's arguments cost at batch 1, on narrow and wide matrices.

The packed package as it was in the last commit without them is taken from the repository and compiled beside this one.
Both multiply the same matrices in turn in one process, the order changing each round; medians are compared.

    python benchmarks/checks.py
"""

from __future__ import annotations

import argparse
import importlib
import io
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from packed_kernels import sparse_weight

from optimum_fista.packed import operation
from optimum_fista.packed.format import pack

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-pthread", "-shared", "-fPIC"]  # those of setup.py


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default="8d97608", help="the last one without checks")
    parser.add_argument("--shapes", default="64x64,256x64,64x4096,4096x64,1024x1024,4096x4096", help="rows x columns")
    parser.add_argument("--seconds", type=float, default=5, help="time for one line of the table")
    return parser.parse_args()


def operation_of(commit: str, folder: Path) -> ModuleType:
    """The module `packed.operation` of a commit, under the name `unchecked`, so that both live in one process."""
    archive = subprocess.run(
        ["git", "archive", commit, "optimum_fista/packed"], cwd=ROOT, check=True, capture_output=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    package = (folder / "optimum_fista").rename(folder / "unchecked") / "packed"
    for file in (path for path in package.rglob("*") if path.is_file()):
        file.write_text(file.read_text().replace("optimum_fista", "unchecked"))
    source, library = package / "csrc" / "packed_linear.cpp", package / "_kernels.so"
    subprocess.run(["c++", *FLAGS, str(source), "-o", str(library)], check=True)
    sys.path.insert(0, str(folder))
    return importlib.import_module("unchecked.packed.operation")


def medians(runs: list[Callable[[], object]], seconds: float) -> list[float]:
    """Median seconds of each, in turn; a time is that of as many calls as take about a millisecond."""
    times: list[list[float]] = [[] for _ in runs]
    calls, took = 1, 0.0
    while took < 1e-3:
        calls, took = 2 * calls, timed(runs[0], 2 * calls)
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends or len(times[0]) < 9:
        order = list(range(len(runs)))
        for number in order if len(times[0]) % 2 else reversed(order):
            times[number].append(timed(runs[number], calls) / calls)
    return [statistics.median(found) for found in times]


def timed(run: Callable[[], object], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - started


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        before = operation_of(arguments.commit, Path(folder))
        print("| weight | unchecked, us | checked, us | difference, us | unchecked / checked |\n|---|---|---|---|---|")
        for shape in arguments.shapes.split(","):
            rows, columns = (int(size) for size in shape.split("x"))
            weight, mask = sparse_weight(rows, columns, "50%")
            packed = pack(weight, mask)
            given = (torch.randn(1, columns).bfloat16(), packed.values, packed.mask, operation.row_starts(packed.mask))
            torch.testing.assert_close(operation.packed_linear(*given), before.packed_linear(*given))
            products = [lambda of=of, given=given: of.packed_linear(*given) for of in (before, operation)]
            old, new = (1e6 * found for found in medians(products, arguments.seconds))
            print(f"| {rows} x {columns} | {old:.2f} | {new:.2f} | {new - old:+.2f} | {old / new:.3f} |", flush=True)


if __name__ == "__main__":
    main()

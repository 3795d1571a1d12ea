"""Packed products beside PyTorch's bfloat16 linear, a dense kernel of our own, and memory that is only read.

All are measured in turn, over and over, in one run; the median of each is reported. If a dense matrix is larger than
`--cache`, other memory is read before each of them, so that none finds in the cache what another has left there. On a
machine shared with others the ratios of one run mean something, times do not.

    python benchmarks/packed_kernels.py --output benchmarks/results/kernels.json
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from shared import parse_arguments, save
from torch import Tensor
from torch.nn.functional import linear

from optimum_fista.folder.card import markdown_lines
from optimum_fista.packed.format import pack
from optimum_fista.packed.kernels import Kernels, find_library
from optimum_fista.packed.operation import packed_linear, row_starts
from optimum_fista.solve.patterns import Unstructured, parse_pattern

KINDS = {"50%": Unstructured(0.5), "70%": Unstructured(0.7), "2:4": parse_pattern("2:4")}


def sparse_weight(rows: int, columns: int, kind: str) -> tuple[Tensor, Tensor]:
    mask = KINDS[kind].mask(torch.rand(rows, columns))
    return torch.randn(rows, columns).masked_fill(~mask, 0).bfloat16(), mask


def medians(
    runs: dict[str, Callable[[], object]],
    seconds: float,
    before: Callable[[], object] | None = None,
) -> dict[str, float]:
    """Median seconds of each, measured in turn, with `before` run before each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends or len(times[next(iter(runs))]) < 9:
        for name, run in runs.items():
            if before is not None:
                before()
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in times.items()}


def dense_kernel(library: ctypes.CDLL, weight: Tensor, x: Tensor) -> Callable[[], object]:
    y = torch.empty(weight.shape[0], dtype=torch.bfloat16)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (weight, x, y)]
    sizes = [ctypes.c_int64(size) for size in weight.shape]

    def run() -> Tensor:
        if library.optimum_fista_measure_dense(*sizes, *pointers, torch.get_num_threads()):
            raise SystemExit(
                "This CPU has neither AVX2 nor AVX-512, one of which the dense kernel needs."
            )
        return y

    torch.testing.assert_close(run(), linear(x, weight)[0], rtol=2e-2, atol=2e-1)
    return run


def reading(library: ctypes.CDLL, num_bytes: int) -> Callable[[], object]:
    data = torch.ones(num_bytes // 4096 * 1024, dtype=torch.int32)
    result = torch.zeros(256, dtype=torch.int64)
    arguments = [
        ctypes.c_void_p(data.data_ptr()),
        ctypes.c_int64(data.numel() * 4),
        ctypes.c_void_p(result.data_ptr()),
    ]

    def run() -> tuple[Tensor, Tensor]:
        library.optimum_fista_measure_read(*arguments, torch.get_num_threads())
        return data, result  # both stay alive as long as this function

    return run


def measure(
    rows: int,
    columns: int,
    batches: list[int],
    threads: list[int],
    seconds: float,
    cache_bytes: int,
) -> list[dict]:
    library = ctypes.CDLL(str(find_library()))
    operators, num_bytes = {}, 0
    for kind in KINDS:
        weight, mask = sparse_weight(rows, columns, kind)
        packed = pack(weight, mask)
        operators[kind] = (packed.values, packed.mask, row_starts(packed.mask))
        if kind == "50%":
            dense, num_bytes = weight, packed.values.numel() * 2 + packed.mask.numel()
    emptied = reading(library, 4 * cache_bytes) if 2 * rows * columns > cache_bytes else None
    lines = []
    for count in threads:
        torch.set_num_threads(count)
        for batch in batches:
            x = torch.randn(batch, columns).bfloat16()
            runs: dict[str, Callable[[], object]] = {"PyTorch": lambda x=x: linear(x, dense)}
            if batch == 1:
                runs["own dense"] = dense_kernel(library, dense, x)
                runs["reading the bytes of 50%"] = reading(library, num_bytes)
            for kind, operator in operators.items():
                runs[kind] = lambda x=x, operator=operator: packed_linear(x, *operator)
            found = medians(runs, seconds, emptied)
            lines.append(
                {"shape": f"{rows}x{columns}", "threads": count, "batch": batch, "seconds": found}
            )
    return lines


def table(lines: list[dict], threads: int) -> list[str]:
    """Times as fast as the dense products, with `threads` threads."""
    found = []
    for line in lines:
        if line["threads"] == threads:
            seconds = line["seconds"]
            times = [f"{seconds['PyTorch'] / seconds[kind]:.2f}x" for kind in KINDS]
            dense = ["", ""]
            if "own dense" in seconds:
                dense[0] = f"{seconds['own dense'] / seconds['50%']:.2f}x"
                dense[1] = f"{seconds['reading the bytes of 50%'] / seconds['50%']:.0%}"
            found.append((line["shape"].replace("x", " x "), line["batch"], *times, *dense))
    return markdown_lines(
        ("weight", "inputs", *KINDS, "50%: own dense kernel", "50%: reading"), found
    )


def main() -> None:
    settings = {
        "shapes": ["14336x4096", "4096x14336", "2048x1024"],
        "batches": [1, 4, 16, 512],
        "threads": [1, 2],
    }
    helps = {
        "shapes": "rows x columns",
        "seconds": "time for one line of the table",
        "cache": "MiB of the last cache",
    }
    output = Path("runs/kernels.json")
    arguments = parse_arguments(
        __doc__, helps=helps, **settings, seconds=3.0, cache=32, output=output
    )
    if find_library() is None:
        raise SystemExit(
            "The kernels are not compiled: install the package where there is a C++ compiler."
        )
    torch.manual_seed(0)
    lines = []
    with torch.no_grad():
        for shape in arguments.shapes:
            rows, columns = (int(size) for size in shape.split("x"))
            lines += measure(
                rows,
                columns,
                arguments.batches,
                arguments.threads,
                arguments.seconds,
                arguments.cache * 2**20,
            )
    for count in arguments.threads:
        print(f"\n{count} threads\n", *table(lines, count), sep="\n")
    save(arguments, {"path": Kernels(find_library()).path, "lines": lines})


if __name__ == "__main__":
    main()

"""Work: what methods ask for, counted while they prune a small matrix, and what a device does in a second."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from optimum_fista.model.products import compute_dtype_of, quick_products, quick_products_in
from optimum_fista.solve.blocks import SCALE_ON_DEVICES, block_share, rows_in_block
from optimum_fista.solve.method import PruningMethod
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import LayerProblem
from optimum_fista.solve.statistics import InputStatistics

_FORMULAS = flop_registry | {torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}
_CUBES = {"cholesky": 2, "linalg_inv": 2, "eigh": 40}
"""Factorisations of a matrix [n, n], by a part of their names, in n^3 operations of products that take as long."""
_WIDTH = 192
"""Inputs of the small matrices that methods are tried on."""
_DISK = 5e8
"""Bytes a second that a disk is assumed to write; nothing is written to measure it."""
LAYER_CALL = 4e-4
"""Seconds that Python takes to run a decoder layer on few tokens, measured on a CPU while text is sampled."""
CALL = 3e-6
"""Seconds that Python takes for a call of PyTorch, measured on SparseGPT, which makes many a column."""
_SECONDS = 1.2
"""Time for all measurements of a device."""


def work(
    model_products: float = 0.0,
    products: float = 0.0,
    moved_bytes: float = 0.0,
    large_bytes: float = 0.0,
    file_bytes: float = 0.0,
    python: float = 0.0,
) -> np.ndarray:
    """An amount of work, or what a device does in a second: amounts over rates, added up, are seconds.

    Args:
        model_products: Floating-point operations of products in the model's dtype.
        products: Those of float32 products.
        moved_bytes: Bytes that all other operations read and write.
        large_bytes: Those of operations whose result is a block that is taken from the system anew.
        file_bytes: Bytes hashed and written to files.
        python: Seconds of Python.
    """
    return np.array([model_products, products, moved_bytes, large_bytes, file_bytes, python], float)


class Meter(TorchDispatchMode):
    """As a context: counts `products`, `moved_bytes` and `calls`, and the most that tensors made inside hold.

    What operations move that make a block of at least `large` bytes is counted in `large_bytes` instead.
    """

    def __init__(self, large: float = math.inf) -> None:
        super().__init__()
        self.products, self.moved_bytes, self.large_bytes, self.calls, self.peak_bytes = 0.0, 0.0, 0.0, 0, 0
        self._large = large
        self._held: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.calls += 1
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        for value in inputs:
            self._hold(value, made=False)
        output = function(*args, **kwargs)
        outputs = [value for value in tree_leaves(output) if isinstance(value, Tensor)]
        made = [self._hold(value, made=True) for value in outputs]
        if not any(made) and not function._schema.is_mutable:
            return output  # a view
        cubes = sum(factor for name, factor in _CUBES.items() if name in function.overloadpacket.__name__)
        if (formula := _FORMULAS.get(function.overloadpacket)) is not None:
            self.products += formula(*args, **kwargs, out_val=output)
        elif cubes:
            self.products += cubes * float(inputs[0].shape[-1]) ** 3
        else:
            moved = sum(value.numel() * value.element_size() for value in inputs + outputs)
            if any(new and value.nbytes >= self._large for new, value in zip(made, outputs, strict=True)):
                self.large_bytes += moved
            else:
                self.moved_bytes += moved
        return output

    def _hold(self, tensor: Tensor, *, made: bool) -> bool:
        """Note memory until it is freed, as nothing if it was made outside; True if it was not known."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._held:
            return False
        self._held[storage._cdata] = storage.nbytes() if made else 0
        weakref.finalize(storage, self._held.pop, storage._cdata, None)
        self.peak_bytes = max(self.peak_bytes, sum(self._held.values()))
        return True


def measure_method(
    method: PruningMethod,
    pattern: SparsityPattern,
    rows: Sequence[int],
    columns: int,
    on_cpu: bool,
    large: float = math.inf,
) -> tuple[np.ndarray, float]:
    """What pruning operators with the same inputs takes, learnt by pruning random ones of the same proportions.

    Products grow with the third power of the width, matrices and what moves with the second. Calls of PyTorch grow with
    the first, or not at all, which a second pruning at half the width tells. Real operators may need another number of
    steps than random ones. `rows` are their outputs, `columns` their inputs. Blocks of rows are larger if the run's
    device is not the CPU. Blocks of `large` bytes are taken from the system anew.

    Returns:
        Work, and the most bytes held at a time besides the problems themselves, results included.
    """
    width, meter = _prune_small(method, pattern, rows, columns, on_cpu, _WIDTH, large)
    half, fewer = _prune_small(method, pattern, rows, columns, on_cpu, _WIDTH // 2, large)
    scale, calls = columns / width, float(meter.calls)
    if half < width:
        calls += max(0, meter.calls - fewer.calls) * (columns - width) / (width - half)
    moved = {"moved_bytes": meter.moved_bytes * scale**2, "large_bytes": meter.large_bytes * scale**2}
    return work(products=meter.products * scale**3, python=calls * CALL, **moved), meter.peak_bytes * scale**2


def _prune_small(
    method: PruningMethod,
    pattern: SparsityPattern,
    rows: Sequence[int],
    columns: int,
    on_cpu: bool,
    about: int,
    large: float,
) -> tuple[int, Meter]:
    """Prune random operators with about so many inputs; returns how many these are, and what it took."""
    pattern, width = pattern.in_miniature(columns, about)
    scale, generator = columns / width, torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    # Inputs whose spectrum falls as in trained models. If it were flat, FISTA's search would give up early at 2:4.
    rotation = torch.linalg.qr(normal(width, width))[0] * width**0.5
    dense = normal(4 * width, width) * torch.logspace(0, -1.5, width) @ rotation + 0.3
    inputs = dense + 0.2 * normal(4 * width, width)  # those of the pruned network
    given, problems = InputStatistics(inputs.T @ inputs, 4 * width, inputs.mean(0)), []
    for count in rows:
        weight = normal(max(1, round(count / scale)), width)
        outputs = dense @ weight.T
        problems.append(LayerProblem(weight, given, outputs.T @ inputs, outputs.double().square().sum(0)))
    share = rows_in_block(max(rows), columns, 1 if on_cpu else SCALE_ON_DEVICES) / max(rows)
    with block_share(share), Meter(large / scale**2) as meter:
        results = method.prune_sharing(problems, [pattern] * len(rows))
    del results
    return width, meter


def measure_device(
    device: torch.device, dtype: torch.dtype, columns: int, compute_dtype: str, large: float = math.inf
) -> np.ndarray:
    """What a device does in a second, with a model of this dtype whose widest operator has so many inputs.

    Blocks of `large` bytes are taken from the system anew; infinity: none are.
    """
    products_dtype = compute_dtype_of(compute_dtype, device)

    def rate(amount: float, call: Callable[[], object]) -> float:
        """Amount a second; a run meets the machine as it usually is, so the median of the times counts."""
        return amount / median_seconds(call, device, _SECONDS / 6)

    square = torch.randn(512, 512, device=device)
    rough = rate(2 * 512**3, lambda: square @ square)
    side = min(columns, int((rough * _SECONDS / 60) ** (1 / 3)))  # as large as time allows
    square = torch.randn(side, side, device=device)
    narrow, block = square.to(dtype), bytes(2**23)
    with quick_products_in(products_dtype), quick_products():
        model_products = rate(2 * side**3, lambda: nn.functional.linear(narrow, narrow))
    few = torch.randn(2**19, device=device)  # 2 MiB, which the C library has at hand
    moved = rate(16 * 2**18, lambda: few * 2)
    many = torch.randn(0 if math.isinf(large) else int(large / 3), device=device)
    return work(
        model_products=model_products,
        products=rate(2 * side**3, lambda: square @ square),
        moved_bytes=moved,
        large_bytes=rate(8 * many.numel(), lambda: many * 2) if many.numel() else moved,
        python=1,
        file_bytes=1 / (1 / rate(2**23, lambda: hashlib.sha256(block)) + 1 / _DISK),
    )


def median_seconds(call: Callable[[], object], device: torch.device, about: float = 0.2) -> float:
    """The median time of some calls, after two to warm up; they take about so many seconds together."""
    times: list[float] = []
    until = time.perf_counter() + about
    while len(times) < 7 or time.perf_counter() < until:
        started = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])

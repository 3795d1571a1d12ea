"""What the machine can do."""

from __future__ import annotations

import statistics
import time

import torch


def matrix_rate() -> float:
    """Measured rate of float32 matrix products, FLOP/s."""
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    times = []
    for _ in range(9):
        started = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - started)
    return 2 * 2048**3 / statistics.median(times)

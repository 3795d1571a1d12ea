"""What this machine can do, measured in a few seconds."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from optimum_fista.model.gram import GramAccumulator
from optimum_fista.run.checkpoints.loading import usable_device
from optimum_fista.run.planning.model import PlannedModel
from optimum_fista.run.planning.settings import PlanSettings

SECONDS = 10.0
_DISK = 5e8  # bytes a second; a plan writes nothing, so this is not measured


@dataclass(frozen=True)
class MachineRates:
    """Rates of a machine, per second.

    Attributes:
        model_products: Floating-point operations of products in the model's dtype.
        attention: Those of attention in the model's dtype.
        float_products: Those of float32 products.
        gram_products: Those of Gram matrices, half a product each.
        factor_products: Those of a Cholesky factorisation and an inverse.
        moved_bytes: Bytes read and written by elementwise operations.
        operation_seconds: Time of an operation on almost nothing.
        file_bytes: Bytes digested and written; the disk is assumed to write 500 MB a second.
    """

    model_products: float
    attention: float
    float_products: float
    gram_products: float
    factor_products: float
    moved_bytes: float
    operation_seconds: float
    file_bytes: float

    @classmethod
    def of(cls, products: float, moved_bytes: float) -> MachineRates:
        """A machine known by two numbers: float32 and model products at one rate, and memory bandwidth."""
        return cls(products, products, products, products, products, moved_bytes, 5e-6, _DISK)


def measure_machine(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int],
    batch_tokens: int,
    head: tuple[int, int],
    seconds: float,
) -> MachineRates:
    """Measure a device for about `seconds`, at the shapes of a model or as large as time allows.

    Args:
        device: The device.
        dtype: The model's dtype.
        shape: (out, in) of its largest operator.
        batch_tokens: Tokens of a batch.
        head: Number and width of attention heads.
        seconds: Time for all measurements.
    """
    share = seconds / 8
    clock = _Clock(device, share)
    rough = _rough_rate(clock, device)
    side = max(64, int((rough * share / 4 / 2) ** (1 / 3)))  # the largest square product of a quarter of the time
    rows, columns = min(shape[0], side), min(shape[1], side)
    tokens = min(batch_tokens, side)
    weight = torch.randn(rows, columns, device=device)
    gram = torch.randn(columns, columns, device=device)
    inputs = torch.randn(tokens, columns, device=device)
    narrow, own = inputs.to(dtype), weight.to(dtype)
    gram = gram @ gram.T + columns * torch.eye(columns, device=device)
    accumulator = GramAccumulator(columns, device)
    heads, width = head
    query = torch.randn(1, heads, tokens, width, device=device, dtype=dtype)
    small = torch.zeros(8, device=device)
    digested = bytes(2**23)
    digest = 2**23 / clock(lambda: hashlib.sha256(digested), fraction=0.2)
    return MachineRates(
        model_products=2 * tokens * rows * columns / clock(lambda: nn.functional.linear(narrow, own)),
        attention=4 * heads * tokens**2 * width / 2 / clock(lambda: _attention(query)),
        float_products=2 * rows * columns**2 / clock(lambda: weight @ gram),
        gram_products=tokens * columns**2 / clock(lambda: accumulator.add(inputs)),
        factor_products=columns**3 / clock(lambda: torch.cholesky_inverse(torch.linalg.cholesky(gram))),
        moved_bytes=8 * rows * columns / clock(lambda: weight * 2),  # in new memory, as in a run
        operation_seconds=clock(lambda: _many(small)) / 1000,
        file_bytes=1 / (1 / digest + 1 / _DISK),
    )


def measure_for(
    planned: PlannedModel, settings: PlanSettings, device: str | None
) -> tuple[MachineRates | None, str | None]:
    """Measure the device of a plan; `None` and the reason where there is no such device here."""
    try:
        target = usable_device(device)
    except ValueError as error:
        return None, f"time is not estimated: {error}"
    if target.type == "meta":
        return None, "time is not estimated: the meta device computes nothing."
    shapes = [o.shape for kind in planned.kinds for group in kind.probe.groups for o in group]
    text = planned.model.config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None) or 1
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    shape = max(shapes, key=lambda shape: shape[0] * shape[1])
    return measure_machine(target, planned.model.dtype, shape, settings.batch_tokens, (heads, width), SECONDS), None


class _Clock:
    """Shortest time of a call: that of the machine left alone."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds

    def __call__(self, call: Callable[[], object], fraction: float = 1.0) -> float:
        call()
        times: list[float] = []
        while sum(times) < self.seconds * fraction or len(times) < 3:
            self._wait()
            started = time.perf_counter()
            call()
            self._wait()
            times.append(time.perf_counter() - started)
        return min(times)

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def _rough_rate(clock: _Clock, device: torch.device) -> float:
    square = torch.randn(768, 768, device=device)
    return 2 * 768**3 / clock(lambda: square @ square, fraction=0.2)


def _attention(query: torch.Tensor) -> torch.Tensor:
    return nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)


def _many(small: torch.Tensor) -> None:
    for _ in range(1000):
        small.add_(1)

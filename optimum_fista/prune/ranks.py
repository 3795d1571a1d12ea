"""Processes that prune or recover one model together, started by `accelerate launch` or `torchrun`."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import get_int_from_env

from optimum_fista.config import FistaPruningConfig
from optimum_fista.folder.loading import default_device

T = TypeVar("T")
logger = logging.getLogger(__name__)

_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # those that Accelerate reads
_PATIENCE = timedelta(days=7)  # a rank that is done waits for the slowest; one that is gone is noticed at once


class RankError(RuntimeError):
    """Another process of the run failed or is gone."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that work on one model; by default it is alone."""

    index: int = 0  # rank 0 finishes the folder
    count: int = 1
    device: str | None = None  # where this process computes; None: not decided
    group: dist.ProcessGroup | None = None  # where they wait for each other: on the CPU (gloo) whatever the device

    def each(self, work: Callable[[], T]) -> T:
        """Do this process's part and wait for the others to do theirs; only then raise what failed in this one."""
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            if self.count == 1:
                raise
            failure = error
            logger.error("rank %d failed, and waits for the others: %s", self.index, _line(error))
        try:
            failures = self.gather(failure and _line(failure))
        except RankError as error:
            raise failure or error from error
        if failure is not None:
            raise failure
        if failed := [f"rank {index} of {self.count} failed: {text}" for index, text in enumerate(failures) if text]:
            raise RankError("; ".join(failed))
        return cast(T, result)

    def first(self, work: Callable[[], T]) -> T:
        """Have rank 0 do it, and hand the result to all; fails as `each` does."""
        return cast(T, self.gather(self.each(work if self.index == 0 else lambda: None))[0])

    def gather(self, value: T) -> list[T]:
        """What all processes have, by rank, in every process; fails as `exchanging` does."""
        found = [value] * self.count
        if self.count > 1:
            with self.exchanging():
                dist.all_gather_object(found, value, group=self.group)
        return found

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Wait for tensors of other processes inside; what fails in this one is raised at once."""
        try:
            yield
        except RuntimeError as error:
            is_lost_connection = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
            if self.count == 1 or isinstance(error, RankError) or not is_lost_connection:
                raise
            gone = f"has lost the others: one has ended ({_line(error)[:200]})"
            raise RankError(f"rank {self.index} of {self.count} {gone}") from error


def launched_processes() -> int:
    """Number of processes that were launched together with this one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(get_int_from_env(_COUNTS, 1))


@contextmanager
def joined_ranks(device: str | None) -> Iterator[Ranks]:
    """This process among those it was launched with, which all come here; computes on `device`, or on Accelerate's."""
    count = launched_processes()
    if count == 1:
        yield Ranks(device=device)
        return
    kind = torch.device(device or default_device()).type
    # Accelerate can't start processes on an accelerator that PyTorch has no backend for; gloo does on any machine.
    state = PartialState(cpu=kind == "cpu" or kind not in dist.Backend.default_device_backend_map)
    if state.num_processes != count:
        raise ValueError(
            f"the environment names {count} processes and Accelerate finds {state.num_processes}: start them by "
            "`accelerate launch` or `torchrun`."
        )
    group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_PATIENCE))
    try:
        yield Ranks(state.process_index, count, device or str(state.device), group)
    finally:
        dist.destroy_process_group(group)


def require_independent_layers(config: FistaPruningConfig, count: int) -> None:
    """Refuse several processes (ValueError) if every decoder layer waits for the one before."""
    correction = config.resolved().error_correction
    if count > 1 and config.correction.carry == "full":
        raise ValueError(
            f"error_correction={correction!r} prunes every decoder layer on the outputs of the pruned ones before it, "
            f"so {count} processes can't share them: pass error_correction='intra' (--error-correction intra) or "
            "'none', or start one process."
        )


def share_layers(unfinished: Sequence[int], pruning_costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Share the unfinished decoder layers, so that the rank that takes longest takes least; the last may get none.

    Shares are contiguous, because a rank runs the dense network up to its last layer only:

        cost of a share = 1 + (last layer in it that is pruned) + sum of its pruning costs, in forward passes of a layer
    """

    def cost(share: Sequence[int]) -> float:
        pruned = [index for index in share if pruning_costs[index] > 0]  # others need no hidden states
        return 1 + pruned[-1] + sum(pruning_costs[index] for index in pruned) if pruned else 0.0

    def fill(limit: float) -> list[list[int]]:
        """As many layers in every share as the limit allows, rank after rank."""
        shares: list[list[int]] = [[]]
        for index in unfinished:
            if shares[-1] and cost([*shares[-1], index]) > limit:
                shares.append([])
            shares[-1].append(index)
        return shares

    limits = sorted({cost(unfinished[i:j]) for i in range(len(unfinished)) for j in range(i + 1, len(unfinished) + 1)})
    enough = bisect_left(limits, True, key=lambda limit: len(fill(limit)) <= num_ranks)
    shares = fill(limits[enough]) if limits else []
    return shares + [[] for _ in range(num_ranks - len(shares))]


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"

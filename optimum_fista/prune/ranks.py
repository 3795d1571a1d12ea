"""Processes that prune or recover one model together, started by `accelerate launch` or `torchrun`.

All processes run the same code. A rank is the number of a process, from 0. `joined_ranks` joins them; then `Ranks.each`
lets each do a step, and `Ranks.first` lets rank 0 do it for all. Decoder layers are shared by `share_layers`.
"""

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
from optimum_fista.devices import default_device

T = TypeVar("T")
logger = logging.getLogger(__name__)

# Environment variables with the number of processes, as Accelerate reads them.
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# Finished ranks wait so long for the slowest; a rank that ended is noticed at once.
_PATIENCE = timedelta(days=7)


class RankError(RuntimeError):
    """Another process of the run failed or is gone."""


@dataclass(frozen=True)
class Ranks:
    """The processes that work on one model, and the number of this one; by default there is only one.

    Attributes:
        index: The rank of this process; rank 0 finishes the folder.
        count: The number of processes.
        device: Where this process computes; `None`: not decided.
        group: To wait for each other, always on the CPU (gloo); `None` if there is one process.
    """

    index: int = 0
    count: int = 1
    device: str | None = None
    group: dist.ProcessGroup | None = None

    def each(self, work: Callable[[], T]) -> T:
        """Do this process's work, wait for the others to do theirs, and return the result of this one.

        An error of this process (its rank is `self.index`) is raised only after the others are done. If another one
        failed, a RankError says which. With one process (`self.count` is 1), this just calls `work`.
        """
        result: T | None = None
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            if self.count == 1:
                raise
            failure = error
            logger.error("rank %d failed, and waits for the others: %s", self.index, _line(error))
        own_failure = None if failure is None else _line(failure)
        try:
            # The errors of all processes, by rank. Here this process waits for the others.
            failures = self.gather(own_failure)
        except RankError as error:  # another process has ended
            if failure is not None:
                raise failure from error
            raise
        if failure is not None:
            raise failure
        failed = [
            f"rank {index} of {self.count} failed: {text}"
            for index, text in enumerate(failures)
            if text is not None
        ]
        if failed:
            raise RankError("; ".join(failed))
        return cast(T, result)

    def first(self, work: Callable[[], T]) -> T:
        """Let rank 0 do the work, and give its result to all ranks.

        The rank of this process is `self.index`. The other ranks get a copy: the result is pickled. An error of the
        work is raised in rank 0; the other ranks then raise a `RankError`.
        """

        def do_or_wait() -> T | None:
            """Do the work in rank 0 alone."""
            return work() if self.index == 0 else None

        of_ranks = self.gather(self.each(do_or_wait))
        return cast(T, of_ranks[0])

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank, in every process; errors are raised as by `exchanging`.

        All of the `self.count` processes must call this with their own `value`, and wait here for the last one. Values
        are pickled. `self.group` is PyTorch's group of the processes.
        """
        values = [value] * self.count  # places for those of the others
        if self.count > 1:
            with self.exchanging():
                dist.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Inside, processes exchange values; a lost connection becomes a RankError that says so.

        An error of this process (its rank is `self.index`) is raised as it is, and so is every error if `self.count` is
        1.
        """
        try:
            yield
        except RuntimeError as error:
            # Errors of PyTorch's processes have a class of their own, or only name the backend.
            is_lost_connection = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
            if self.count == 1 or isinstance(error, RankError) or not is_lost_connection:
                raise
            raise RankError(
                f"rank {self.index} of {self.count} stops: another process of this run has ended or can't be reached; "
                f"see what that one wrote before (this one saw only: {_line(error)[:200]})"
            ) from error


def launched_processes() -> int:
    """Number of processes that were launched together with this one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(get_int_from_env(_COUNTS, 1))


@contextmanager
def joined_ranks(device: str | None) -> Iterator[Ranks]:
    """Join the processes that were launched together (all must call this), and yield them; leave them at the end.

    What is yielded is a `Ranks`, with the number of this process. `device` is where the user wants to compute, such as
    "cpu" or "cuda"; `None`: where Accelerate says. With several processes, Accelerate starts PyTorch's process group,
    and this adds a group to wait in. At the end only the added one is destroyed: Accelerate and its group stay.
    """
    count = launched_processes()
    if count == 1:
        yield Ranks(device=device)
        return
    kind = torch.device(device or default_device()).type  # such as "cuda"
    # Accelerate can't start processes on an accelerator without a PyTorch backend; gloo works on any machine.
    has_backend = kind in dist.Backend.default_device_backend_map
    computes_on_cpu = kind == "cpu"
    # This starts the process group, with gloo if `cpu`. An accelerator without a backend still computes if the user
    # named it (`device`): then only what the processes say to each other goes through the CPU.
    state = PartialState(cpu=computes_on_cpu or not has_backend)
    if state.num_processes != count:
        raise ValueError(
            f"the environment names {count} processes and Accelerate finds {state.num_processes}: start them by "
            "`accelerate launch` or `torchrun`."
        )
    # Ranks that are finished wait in it for the slowest one, for days if need be.
    group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_PATIENCE))
    try:
        yield Ranks(
            index=state.process_index,
            count=count,
            device=device or str(state.device),
            group=group,
        )
    finally:
        dist.destroy_process_group(group)


def require_independent_layers(config: FistaPruningConfig, count: int) -> None:
    """Refuse several processes (ValueError) if every decoder layer waits for the one before.

    `count` is their number. Changes nothing: `config` is only read.
    """
    correction = config.resolved().error_correction
    if count > 1 and config.correction.carry == "full":
        raise ValueError(
            f"error_correction={correction!r}: decoder layers wait for earlier ones, so {count} processes can't share "
            "them: pass error_correction='intra' (--error-correction intra) or 'none', or start one process."
        )


def share_layers(
    unfinished: Sequence[int], pruning_costs: Sequence[float], num_ranks: int
) -> list[list[int]]:
    """Share the unfinished decoder layers so that the slowest rank ends as early as possible; the last may get none.

    `unfinished` are rising indices, and `pruning_costs` the costs of all decoder layers (`Plan.costs`). Returns the
    indices of each of the `num_ranks` processes.

    Shares are contiguous, because a rank runs the dense network only up to its last layer:

        cost of a share = 1 + (last layer in it that is pruned) + sum of its pruning costs, in forward passes of a layer
    """
    # The least limit is the cost of some contiguous share, so these are all that have to be tried.
    possible = {
        _cost_of_share(unfinished[start:end], pruning_costs)
        for start in range(len(unfinished))
        for end in range(start + 1, len(unfinished) + 1)
    }
    limits = sorted(possible)
    shares: list[list[int]] = []
    if limits:
        # With a higher limit there are fewer shares. So a bisection finds the first limit that gives no more shares
        # than there are ranks (True).
        enough = bisect_left(
            limits,
            True,
            key=lambda limit: len(_shares_within(limit, unfinished, pruning_costs)) <= num_ranks,
        )
        shares = _shares_within(limits[enough], unfinished, pruning_costs)
    num_idle = num_ranks - len(shares)
    return shares + [[] for _ in range(num_idle)]


def _cost_of_share(share: Sequence[int], pruning_costs: Sequence[float]) -> float:
    """Compute the cost of a share, rising indices of layers, by the formula of `share_layers`.

    A layer whose entry in `pruning_costs` is 0 is not pruned, and needs no hidden states.
    """
    pruned = [index for index in share if pruning_costs[index] > 0]
    if not pruned:
        return 0.0
    return 1 + pruned[-1] + sum(pruning_costs[index] for index in pruned)


def _shares_within(
    limit: float, unfinished: Sequence[int], pruning_costs: Sequence[float]
) -> list[list[int]]:
    """Cut the unfinished layers into shares that each cost at most `limit`, and return as many as are needed.

    A layer that costs more than the limit has a share of its own.
    """
    shares: list[list[int]] = [[]]
    for index in unfinished:
        if shares[-1] and _cost_of_share([*shares[-1], index], pruning_costs) > limit:
            shares.append([])
        shares[-1].append(index)
    return shares


def _line(error: BaseException) -> str:
    """Write an error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"

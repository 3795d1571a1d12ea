"""Processes that find each other as those of `torchrun` do, forked from a server that has imported everything."""

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from tiny_llama import tiny_tokens

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.run.streamed import journal

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["launched", "transformers.models.llama.modeling_llama"])


def launch(count: int, work: Callable[..., Any], *arguments: Any) -> list[BaseProcess]:
    """Start `work(rank, *arguments)` in `count` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [FORKS.Process(target=_run, args=(r, count, port, work, *arguments)) for r in range(count)]
    for process in processes:
        process.start()
    return processes


def exit_codes(processes: list[BaseProcess]) -> list[int | None]:
    """Wait for the processes; `None` for one that does not end."""
    for process in processes:
        process.join(300)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def _run(rank: int, count: int, port: int, work: Callable[..., Any], *arguments: Any) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    work(rank, *arguments)


def prune(rank: int, source: Path, output: Path, config: FistaPruningConfig, log: Path | None = None) -> None:
    """Prune from files to files; what goes wrong is written to `log` followed by the rank."""
    try:
        FistaPruner(config, progress=False).prune(source, tiny_tokens().split(4), output_dir=output)
    except Exception as error:
        if log is not None:
            log.with_name(f"{log.name}-{rank}").write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(3) from error


def begin(source: Path, output: Path) -> BaseProcess:
    """A process of its own that has begun to prune."""
    begun = FORKS.Event()
    process = FORKS.Process(target=_prune_alone, args=(begun, source, output))
    process.start()
    assert begun.wait(300)
    return process


def _prune_alone(begun: Any, source: Path, output: Path) -> None:
    torch.set_num_threads(1)
    begun.set()
    FistaPruner(progress=False).prune(source, tiny_tokens().split(4), output_dir=output)


def prune_until(rank: int, how: str, victim: int, layers: int, *arguments: Any) -> None:
    """The same; once `victim` has finished as many layers, it is killed, or fails, in the next."""
    keep, kept = journal.Journal.keep_layer, []

    def cut(self: journal.Journal, index: int, *parts: Any) -> None:
        if len(kept) == layers and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if len(kept) == layers:
            raise RuntimeError("no more of this")
        kept.append(index)
        keep(self, index, *parts)

    if rank == victim:
        journal.Journal.keep_layer = cut  # type: ignore[method-assign]
    prune(rank, *arguments)


def prune_other_tokens(rank: int, source: Path, output: Path, config: FistaPruningConfig, log: Path) -> None:
    """Prune with calibration batches that differ by rank, as a sharded loader gives them."""
    try:
        tokens = tiny_tokens()[rank::2]
        FistaPruner(config, progress=False).prune(source, tokens.split(4), output_dir=output)
    except Exception as error:
        log.with_name(f"{log.name}-{rank}").write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(3) from error

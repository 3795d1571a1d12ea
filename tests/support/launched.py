"""Processes forked from a server that has imported everything: alone, or such as find each other under `torchrun`."""

import functools
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import DistributedType, PartialState
from tiny_llama import tiny_tokens
from torch.distributed import run as torch_run
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig, masked_training, recover, save_masked
from optimum_fista.prune import journal
from optimum_fista.prune.ranks import joined_ranks
from optimum_fista.train import distillation
from optimum_fista.train.training import find_masks, local


@functools.cache
def forks() -> Any:
    """The server that processes are forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["launched", "transformers.models.llama.modeling_llama"])
    with (
        pytest.MonkeyPatch.context() as patched
    ):  # without this some Pythons import nothing, and say nothing
        patched.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return context


def launch(count: int, work: Callable[..., Any], *arguments: Any) -> list[BaseProcess]:
    """Start `work(rank, *arguments)` in `count` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        forks().Process(target=_run, args=(r, count, port, work, *arguments)) for r in range(count)
    ]
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


def start_code(code: str, *arguments: Any, streams: Path) -> BaseProcess:
    """Run Python code with arguments as `python -c` does; what it prints goes to `stdout` and `stderr` in `streams`."""
    process = forks().Process(target=_run_code, args=(code, arguments, streams))
    process.start()
    return process


def run_code(code: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """The same, to its end."""
    with tempfile.TemporaryDirectory() as streams:
        (exit_code,) = exit_codes([start_code(code, *arguments, streams=Path(streams))])
        assert exit_code is not None
        return subprocess.CompletedProcess(
            [code], exit_code, *(Path(streams, s).read_text() for s in STREAMS)
        )


STREAMS = ("stdout", "stderr")


def _run_code(code: str, arguments: tuple[Any, ...], streams: Path) -> None:
    for number, stream in enumerate(STREAMS, start=1):
        os.dup2(os.open(streams / stream, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["-c", *map(str, arguments)]
    exec(code, {"__name__": "__main__"})


def torchrun(options: list[str], work: Callable[..., Any], *arguments: Any) -> int | None:
    """The exit code of `torchrun` with these options, whose ranks are forked to call a function, and run no script."""
    process = forks().Process(target=_torchrun, args=(options, work, arguments))
    process.start()
    return exit_codes([process])[0]


def _torchrun(options: list[str], work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    def launch_forked(config: LaunchConfig, entrypoint: Any) -> Callable[..., Any]:
        config.start_method = "fork"
        return lambda *_: elastic_launch(config, work)(*arguments)

    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # see docs/ranks.md
    torch_run.elastic_launch = launch_forked  # the process ends after this
    torch_run.run(torch_run.get_args_parser().parse_args([*options, "no script"]))


def prune_killed_once(
    source: Path, output: Path, config: FistaPruningConfig, attempts: Path
) -> None:
    """A rank of a run whose first attempt ends with the death of rank 1 in its second layer."""
    rank, attempt = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
    (attempts / f"{attempt}-{rank}").touch()
    torch.set_num_threads(1)
    if attempt == "0":
        prune_until(rank, "killed", 1, 1, source, output, config)
    prune(rank, source, output, config)
    (attempts / f"{attempt}-{rank}").write_text("finished")


def _run(rank: int, count: int, port: int, work: Callable[..., Any], *arguments: Any) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    work(rank, *arguments)


def prune(
    rank: int,
    source: Path,
    output: Path,
    config: FistaPruningConfig,
    log: Any = None,
    tokens: Any = None,
) -> None:
    """Prune from files to files; what goes wrong is written to `log` followed by the rank."""
    try:
        tokens = tiny_tokens() if tokens is None else tokens
        FistaPruner(config, progress=False).prune(source, tokens.split(4), output_dir=output)
    except Exception as error:
        if log is not None:
            log.with_name(f"{log.name}-{rank}").write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(3) from error


def begin(source: Path, output: Path) -> BaseProcess:
    """A process of its own that has begun to prune."""
    begun = forks().Event()
    process = forks().Process(target=_prune_alone, args=(begun, source, output))
    process.start()
    assert begun.wait(300)
    return process


def _prune_alone(begun: Any, source: Path, output: Path) -> None:
    torch.set_num_threads(1)
    begun.set()
    FistaPruner(progress=False).prune(source, tiny_tokens().split(4), output_dir=output)


def prune_until(rank: int, how: str, victim: int, layers: int, *arguments: Any) -> None:
    """Prune; once `victim` has finished as many layers, it is killed, or fails, in the next."""
    if rank == victim:
        cut_after(how, layers)
    prune(rank, *arguments)


def cut_after(how: str, layers: int) -> None:
    """This process is killed, or fails, in the decoder layer after as many."""
    keep, kept = journal.Journal.keep_layer, []

    def cut(self: journal.Journal, index: int, *parts: Any) -> None:
        if len(kept) == layers and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if len(kept) == layers:
            raise RuntimeError("no more of this")
        kept.append(index)
        keep(self, index, *parts)

    journal.Journal.keep_layer = cut  # type: ignore[method-assign]


def recover_together(rank: int, calls: list[dict[str, Any]], log: Path) -> None:
    """Recover with these arguments, one call after another; `log` followed by call and rank gets what goes wrong.

    Besides arguments of `recover` there is `stop = (how, victim, step)`: states are saved after every step, and after
    this one a rank is killed, or fails. And `sharded`: by FSDP2, which Accelerate has for accelerators only. And
    `rank_1`: what rank 1 is called with instead.
    """
    on_step_end, codes, start = distillation.Watch.on_step_end, {0}, PartialState.__init__
    for number, given in enumerate(calls):
        how, victim, last = given.get("stop", (None, None, None))
        given |= given.pop("rank_1", {}) if rank else {}
        sharded = given.get("sharded", False)
        wrapping = {
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_RESHARD_AFTER_FORWARD": "true",
        }
        os.environ.update({"ACCELERATE_USE_FSDP": str(sharded), "FSDP_VERSION": "2"} | wrapping)

        def started(self: Any, *found: Any, sharded: bool = sharded, **named: Any) -> None:
            start(self, *found, **named)
            if sharded:
                self.distributed_type = DistributedType.MULTI_GPU

        PartialState.__init__ = started  # type: ignore[method-assign]

        def stopped(
            self: Any,
            *found: Any,
            how: Any = how,
            at: Any = (victim, last),
            sharded: bool = sharded,
            **named: Any,
        ) -> None:
            on_step_end(self, *found, **named)
            assert all(
                isinstance(parameter, DTensor) == sharded
                for parameter in named["model"].parameters()
            )
            if (rank, found[1].global_step) == at and how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if (rank, found[1].global_step) == at:
                raise RuntimeError("no more of this")

        distillation.Watch.on_step_end = stopped  # type: ignore[method-assign]
        distillation._SAVE_SECONDS = -1.0 if how else 120.0
        try:
            recover(
                **{
                    name: value
                    for name, value in given.items()
                    if name not in ("stop", "sharded", "rank_1")
                }
            )
        except Exception as error:
            codes.add(3)
            log.with_name(f"{log.name}-{number}-{rank}").write_text(
                f"{type(error).__name__}: {error}"
            )
    raise SystemExit(max(codes))


def train_sharded(rank: int, folder: Path) -> None:
    """Train a pruned model by hand, its weights sharded by `fully_shard`, and as a whole: the same comes of it."""
    with joined_ranks("cpu") as ranks:
        whole, sharded = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
        for module in (*sharded.model.layers, sharded):
            fully_shard(module)
        assert 2 * sum(p.to_local().numel() for p in sharded.parameters()) == whole.num_parameters()
        with pytest.raises(
            ValueError, match="is sharded, so its zeros are not all here: pass the folder"
        ):
            find_masks(sharded)
        for model in (whole, sharded):
            optimizer = torch.optim.AdamW(
                model.parameters(), lr=1e-2, weight_decay=0.1, fused=model is sharded
            )
            masks = find_masks(model, folder)
            with masked_training(model, folder):
                for ids in tiny_tokens().split(4):
                    share = ids if model is whole else ids.chunk(2)[ranks.index]
                    model(share, labels=share).loss.backward()
                    for name, mask in masks.items():
                        gradient = local(model.get_parameter(name).grad)
                        assert gradient[mask].any()
                        assert not gradient[~mask].any()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    optimizer.zero_grad()
                assert len(masks) == 14
                for name, mask in masks.items():
                    state = optimizer.state[model.get_parameter(name)]
                    for value in (
                        model.get_parameter(name).data,
                        state["exp_avg"],
                        state["exp_avg_sq"],
                    ):
                        assert not local(value)[~mask].any()
        with pytest.raises(
            ValueError,
            match=r"model has sharded weights: put them together by .*get_model_state_dict",
        ):
            save_masked(sharded, folder.with_name("sharded"), folder)
        together = get_model_state_dict(
            sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        for name, weight in together.items():
            torch.testing.assert_close(
                weight, whole.get_parameter(name).detach(), rtol=1e-3, atol=1e-4
            )
        assert ranks.index or len(together) == len(whole.state_dict())


def train_and_recover(rank: int, folder: Path, *arguments: Any) -> None:
    """Both, one after the other."""
    train_sharded(rank, folder)
    recover_together(rank, *arguments)


def prune_other_tokens(
    rank: int, source: Path, output: Path, config: FistaPruningConfig, log: Path
) -> None:
    """Prune with calibration batches that differ by rank, as a sharded loader gives them."""
    prune(rank, source, output, config, log, tiny_tokens()[rank::2])

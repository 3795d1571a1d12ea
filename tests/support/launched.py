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
from optimum_fista.train import distillation, stored_teacher
from optimum_fista.train.training import find_masks, local


@functools.cache
def forks() -> Any:
    """The server that processes are forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["launched", "transformers.models.llama.modeling_llama"])
    # without this some Pythons import nothing, and say nothing
    with pytest.MonkeyPatch.context() as patched:
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
    rank = int(os.environ["RANK"])
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
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
    keep = journal.Journal.keep_layer
    kept = []

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
    this one a rank is killed, or fails. And `sharded`: by FSDP2, which Accelerate has for accelerators only; and
    `checkpointed`: Accelerate wraps decoder layers so that they compute their activations twice. And `rank_1`: what
    rank 1 is called with instead. And `tokens_of_shard`: of the teacher's stored predictions.
    """
    code = 0
    for number, call in enumerate(calls):
        arguments = dict(call)
        stop = arguments.pop("stop", None)
        sharded = arguments.pop("sharded", False)
        checkpointed = arguments.pop("checkpointed", False)
        of_rank_1 = arguments.pop("rank_1", {})
        stored_teacher._TOKENS_OF_SHARD = arguments.pop("tokens_of_shard", 2**14)
        if rank == 1:
            arguments |= of_rank_1

        shard_weights(sharded, checkpointed)
        stop_after(rank, stop, sharded)
        try:
            recover(**arguments)
        except Exception as error:
            code = 3
            file = log.with_name(f"{log.name}-{number}-{rank}")
            file.write_text(f"{type(error).__name__}: {error}")
    raise SystemExit(code)


_START = PartialState.__init__
_ON_STEP_END = distillation.Watch.on_step_end


def shard_weights(sharded: bool, checkpointed: bool) -> None:
    """Have the next recovery of this process shard its weights by FSDP2, or not; `checkpointed`: it wraps layers."""
    os.environ["ACCELERATE_USE_FSDP"] = str(sharded)
    os.environ["FSDP_VERSION"] = "2"
    os.environ["FSDP_AUTO_WRAP_POLICY"] = "TRANSFORMER_BASED_WRAP"
    os.environ["FSDP_RESHARD_AFTER_FORWARD"] = "true"
    os.environ["FSDP_ACTIVATION_CHECKPOINTING"] = str(checkpointed)

    def started(self: Any, *given: Any, **named: Any) -> None:
        _START(self, *given, **named)
        if sharded:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = started  # type: ignore[method-assign]


def stop_after(rank: int, stop: tuple[str, int, int] | None, sharded: bool) -> None:
    """Have the next recovery of this process end as `stop = (how, victim, step)` says, if `rank` is the victim.

    Each step checks that the weights are `sharded`, or not.
    """
    how, victim, last_step = stop or (None, None, None)
    distillation._SAVE_SECONDS = 120.0 if stop is None else -1.0

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **given: Any) -> None:
        _ON_STEP_END(self, args, state, control, **given)
        for parameter in given["model"].parameters():
            assert isinstance(parameter, DTensor) == sharded
        if rank == victim and state.global_step == last_step:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("no more of this")

    distillation.Watch.on_step_end = on_step_end  # type: ignore[method-assign]


def masked_steps(model: Any, folder: Path, batches: Any, *, fused: bool) -> None:
    """Train a pruned model on these batches under the masks of its folder, and check gradients and moments."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=fused)
    masks = find_masks(model, folder)
    assert len(masks) == 14
    with masked_training(model, folder):
        for ids in batches:
            model(ids, labels=ids).loss.backward()
            for name, mask in masks.items():
                gradient = local(model.get_parameter(name).grad)
                assert gradient[mask].any()
                assert not gradient[~mask].any()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()

        for name, mask in masks.items():
            weight = model.get_parameter(name)
            state = optimizer.state[weight]
            for value in (weight.data, state["exp_avg"], state["exp_avg_sq"]):
                assert not local(value)[~mask].any()


def train_sharded(rank: int, folder: Path) -> None:
    """Train a pruned model by hand, its weights sharded by `fully_shard`, and as a whole: the same comes of it."""
    with joined_ranks("cpu") as ranks:
        whole = AutoModelForCausalLM.from_pretrained(folder)
        sharded = AutoModelForCausalLM.from_pretrained(folder)
        for module in (*sharded.model.layers, sharded):
            fully_shard(module)
        num_local = sum(parameter.to_local().numel() for parameter in sharded.parameters())
        assert 2 * num_local == whole.num_parameters()
        with pytest.raises(
            ValueError, match="is sharded, so its zeros are not all here: pass the folder"
        ):
            find_masks(sharded)

        batches = tiny_tokens().split(4)
        of_this_rank = [ids.chunk(2)[ranks.index] for ids in batches]
        masked_steps(whole, folder, batches, fused=False)
        masked_steps(sharded, folder, of_this_rank, fused=True)

        with pytest.raises(
            ValueError,
            match=r"model has sharded weights: put them together by .*get_model_state_dict",
        ):
            save_masked(sharded, folder.with_name("sharded"), folder)
        together = get_model_state_dict(
            sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        for name, weight in together.items():
            expected = whole.get_parameter(name).detach()
            torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-4)
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

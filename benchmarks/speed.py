"""Decoding speed, prefill and memory of a pruned model, and of the model before it was pruned.

    python benchmarks/speed.py DIR --original MODEL --threads 2 --output speed.json
    python benchmarks/speed.py benchmarks/results/smaller_smollm2.json

The second command shows rows that were measured before. Each variant runs in a process of its own, so that its memory
is that model's alone, and all are measured in turn: greedy `generate` on random prompts, one forward pass of a long
prompt, resident memory. Close other programs: times of a busy machine mean little.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
import warnings
from argparse import Namespace
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from shared import parse_arguments, save
from torch import Tensor, nn

from optimum_fista.environment import processor_name
from optimum_fista.folder.card import markdown_lines
from optimum_fista.memory import module_that_counts, release_memory
from optimum_fista.source.loading import read_model
from optimum_fista.versions import device_name

HELPS = {
    "model": "pruned model folder; or the JSON file of an earlier call, to show it again",
    "variants": "pruned or original with bfloat16, float32 or float16; the first is the baseline; none: some",
    "original": "folder of the model before it was pruned",
}


class Runner:
    """A model in one variant, such as `"pruned bfloat16"`, and what is measured of it."""

    def __init__(self, variant: str, folder: Path, device: str, threads: int) -> None:
        """Load the model of a folder in the dtype of `variant`; sets the number of threads of the process."""
        torch.set_num_threads(threads)
        torch.randn(64, 64) @ torch.randn(64, 64)
        self._before = psutil.Process().memory_info().rss
        dtype = variant.split()[1]
        model: Any = read_model(str(folder), dtype=getattr(torch, dtype))
        self.model: Any = nn.Module.to(model, device).eval()
        self.device = torch.device(device)
        release_memory(collect=True)

    def sizes(self) -> tuple[int, int]:
        """Return the entries of the vocabulary, and the bytes of all tensors of the state, each counted once."""
        tensors = {}
        for tensor in self.model.state_dict().values():
            # Tied tensors have one address. On the meta device no tensor has an address.
            is_meta = tensor.device.type == "meta"
            tensors[id(tensor) if is_meta else tensor.data_ptr()] = tensor
        num_entries = self.model.get_input_embeddings().weight.shape[0]
        return num_entries, sum(tensor.nbytes for tensor in tensors.values())

    def memory(self) -> int:
        """Return the bytes that the model has added since it was loaded: on the device, or resident in this process."""
        device_module = module_that_counts(self.device)
        if device_module is not None:
            return int(device_module.max_memory_allocated(self.device))
        release_memory(collect=True)
        return int(psutil.Process().memory_info().rss) - self._before

    def generate(self, prompt: Tensor, new_tokens: int) -> tuple[float, Tensor]:
        """Decode greedily; returns the seconds, and the tokens [batch, new_tokens]. `prompt` is [batch, tokens]."""
        ids = prompt.to(self.device)
        started = self._now()
        length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0}
        output = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1, **length
        )
        return self._now() - started, output[:, ids.shape[1] :].cpu()

    def prefill(self, prompt: Tensor) -> tuple[float, Tensor]:
        """Run one forward pass; returns the seconds, and the next tokens [batch]. `prompt` is [batch, tokens]."""
        ids = prompt.to(self.device)
        started = self._now()
        with torch.no_grad():
            logits = self.model(ids, logits_to_keep=1, use_cache=True).logits[:, -1]
        return self._now() - started, logits.argmax(-1).cpu()

    def _now(self) -> float:
        """Return the time when the device has done what it was asked to do."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


def serve(connection: Connection, *model: Any) -> None:
    """Call what the other process asks of a `Runner`, until it is gone."""
    warnings.simplefilter("ignore")
    with suppress(EOFError, OSError, KeyboardInterrupt):
        runner = Runner(*model)
        while True:
            name, *arguments = connection.recv()
            connection.send(getattr(runner, name)(*arguments))


def measure(arguments: Namespace) -> dict[str, Any]:
    """Measure all variants in turn; the prompts are random tokens. Returns what `--output` gets."""
    folders = {"pruned": Path(arguments.model), "original": arguments.original}
    variants = arguments.variants or ["pruned bfloat16"]
    if arguments.original and not arguments.variants:
        variants = ["original bfloat16", "pruned bfloat16"]
    threads = arguments.threads or torch.get_num_threads()

    pipes = {}
    for name in variants:
        which, _ = name.split()  # and its dtype
        pipes[name] = start_runner(name, folders[which], arguments.device, threads)
    sizes = {name: ask(pipes[name], "sizes") for name in variants}

    num_tokens = min(entries for entries, _ in sizes.values())
    random = partial(torch.randint, num_tokens, generator=torch.manual_seed(0))
    questions: dict[str, tuple[Any, ...]] = {}  # method of `Runner`, and its arguments
    for size in arguments.batch_sizes:
        prompts = random((size, arguments.prompt_tokens))
        questions[f"batch {size}"] = ("generate", prompts, arguments.new_tokens)
    questions["prefill"] = ("prefill", random((1, arguments.prefill_tokens)))
    seconds = take_times(pipes, questions, arguments.rounds)

    measured = {}
    for name in variants:
        median = {key: statistics.median(values) for key, values in seconds[name].items()}
        rates = {}
        for size in arguments.batch_sizes:
            rates[str(size)] = size * arguments.new_tokens / median[f"batch {size}"]
        _, weight_bytes = sizes[name]
        measured[name] = {
            "tokens_per_second": rates,
            "prefill_tokens_per_second": arguments.prefill_tokens / median["prefill"],
            "memory_bytes": ask(pipes[name], "memory"),
            "weight_bytes": weight_bytes,
            "seconds": seconds[name],
        }
    settings = vars(arguments) | {"variants": variants, "threads": threads}
    for name in ("model", "original", "output"):
        del settings[name]
    return {
        "model": folders["pruned"].resolve().name,
        "settings": settings,
        "variants": measured,
        "machine": {
            "processor": processor_name(),
            "device": device_name(torch.device(arguments.device)),
            "threads": threads,
        },
    }


def start_runner(variant: str, folder: Path | None, device: str, threads: int) -> Connection:
    """Start a process with a `Runner` of these arguments; returns the pipe on which `ask` reaches it.

    The process ends with this one.
    """
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    arguments = (end, variant, folder, device, threads)
    context.Process(target=serve, args=arguments, daemon=True).start()
    end.close()
    return pipe


def take_times(
    pipes: dict[str, Connection], questions: dict[str, tuple[Any, ...]], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Ask all runners all questions in turn, and return the seconds of each round, by variant and by question.

    One more round before these warms up.
    """
    seconds: dict[str, dict[str, list[float]]] = {
        name: {key: [] for key in questions} for name in pipes
    }
    for turn in range(rounds + 1):
        is_warming_up = turn == 0
        print("warming up" if is_warming_up else f"round {turn} of {rounds}", flush=True)
        for key, question in questions.items():
            for name, pipe in pipes.items():
                took, _ = ask(pipe, *question)
                if not is_warming_up:
                    seconds[name][key].append(took)
    return seconds


def ask(pipe: Connection, *question: Any) -> Any:
    """What the process of a variant answers; `EOFError` if it has ended, which may be for want of memory."""
    pipe.send(question)
    return pipe.recv()


def table(report: dict[str, Any]) -> list[str]:
    """Tokens a second, memory and weights of each variant, and how many times those of the first."""
    batch_sizes = [str(size) for size in report["settings"]["batch_sizes"]]
    head = [report["model"], *(f"batch {size}, tokens/s" for size in batch_sizes)]
    head += [f"prefill {report['settings']['prefill_tokens']}, tokens/s"]
    head += ["memory, MiB", "weights, MiB"]

    speeds = {}
    for name, measured in report["variants"].items():
        rates = [measured["tokens_per_second"][size] for size in batch_sizes]
        speeds[name] = [*rates, measured["prefill_tokens_per_second"]]

    rows = []
    baseline = next(iter(report["variants"]))
    for name, measured in report["variants"].items():
        cells = [name]
        for speed, base in zip(speeds[name], speeds[baseline], strict=True):
            cells.append(f"{speed:.1f} ({speed / base:.2f}x)")
        for key in ("memory_bytes", "weight_bytes"):
            size, base = measured[key], report["variants"][baseline][key]
            cells.append(f"{size / 2**20:,.0f} ({size / max(1, base):.2f}x)")
        rows.append(cells)

    machine = report["machine"]
    place = machine["device"]
    if place == "cpu":
        place = f"{machine['processor']}, {machine['threads']} threads"
    origin = f"{place}; torch {report['versions']['torch']}; medians of rounds in turn"
    return [*markdown_lines(head, rows), "", origin]


def main() -> None:
    """Measure, unless the model is a file of an earlier call, and print the table."""
    arguments = parse_arguments(
        __doc__,
        "model",
        helps=HELPS,
        output=Path("runs/speed.json"),
        variants=[],
        original=Path,
        batch_sizes=[1, 4, 16],
        device="cpu",
        new_tokens=32,
        prompt_tokens=16,
        prefill_tokens=512,
        rounds=5,
        threads=int,
    )
    file = Path(arguments.model)
    if not file.is_file():
        file = arguments.output
        save(arguments, measure(arguments))
    print("\n".join(table(json.loads(file.read_text()))))


if __name__ == "__main__":
    main()

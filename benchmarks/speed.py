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
        torch.set_num_threads(threads)
        torch.randn(64, 64) @ torch.randn(64, 64)
        self._before = psutil.Process().memory_info().rss
        dtype = variant.split()[1]
        model: Any = read_model(str(folder), dtype=getattr(torch, dtype))
        self.model: Any = nn.Module.to(model, device).eval()
        self.device = torch.device(device)
        release_memory(collect=True)

    def sizes(self) -> tuple[int, int]:
        """Entries of the vocabulary, and bytes of all tensors of the state, each counted once."""
        tensors = {
            t.data_ptr() if t.device.type != "meta" else id(t): t
            for t in self.model.state_dict().values()
        }
        return self.model.get_input_embeddings().weight.shape[0], sum(
            t.nbytes for t in tensors.values()
        )

    def memory(self) -> int:
        """Bytes that loading and running the model have added: on the device, or resident in this process."""
        device_module = module_that_counts(self.device)
        if device_module is not None:
            return int(device_module.max_memory_allocated(self.device))
        release_memory(collect=True)
        return int(psutil.Process().memory_info().rss) - self._before

    def generate(self, prompt: Tensor, new_tokens: int) -> tuple[float, Tensor]:
        """Seconds of greedy decoding, and the tokens [batch, new_tokens]."""
        ids, started = prompt.to(self.device), self._now()
        length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0}
        output = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1, **length
        )
        return self._now() - started, output[:, ids.shape[1] :].cpu()

    def prefill(self, prompt: Tensor) -> tuple[float, Tensor]:
        """Seconds of one forward pass, and the next tokens [batch]."""
        ids, started = prompt.to(self.device), self._now()
        with torch.no_grad():
            logits = self.model(ids, logits_to_keep=1, use_cache=True).logits[:, -1]
        return self._now() - started, logits.argmax(-1).cpu()

    def _now(self) -> float:
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
    context = multiprocessing.get_context("spawn")
    for name in variants:
        pipes[name], end = context.Pipe()
        folder = folders[name.split()[0]]
        model = (name, folder, arguments.device, threads)
        context.Process(target=serve, args=(end, *model), daemon=True).start()
        end.close()
    sizes = {name: ask(pipes[name], "sizes") for name in variants}

    num_tokens = min(entries for entries, _ in sizes.values())
    random = partial(torch.randint, num_tokens, generator=torch.manual_seed(0))
    questions: dict[str, tuple[Any, ...]] = {}
    for size in arguments.batch_sizes:
        prompts = random((size, arguments.prompt_tokens))
        questions[f"batch {size}"] = ("generate", prompts, arguments.new_tokens)
    questions["prefill"] = ("prefill", random((1, arguments.prefill_tokens)))

    seconds: dict[str, dict[str, list[float]]] = {
        name: {key: [] for key in questions} for name in variants
    }
    for turn in range(arguments.rounds + 1):
        is_warming_up = turn == 0
        print("warming up" if is_warming_up else f"round {turn} of {arguments.rounds}", flush=True)
        for key, question in questions.items():
            for name in variants:
                took, _ = ask(pipes[name], *question)
                if not is_warming_up:
                    seconds[name][key].append(took)

    measured = {}
    for name in variants:
        median = {key: statistics.median(values) for key, values in seconds[name].items()}
        rates = {}
        for size in arguments.batch_sizes:
            rates[str(size)] = size * arguments.new_tokens / median[f"batch {size}"]
        measured[name] = {
            "tokens_per_second": rates,
            "prefill_tokens_per_second": arguments.prefill_tokens / median["prefill"],
            "memory_bytes": ask(pipes[name], "memory"),
            "weight_bytes": sizes[name][1],
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
    options: dict[str, Any] = {
        "variants": [],
        "original": Path,
        "batch_sizes": [1, 4, 16],
        "device": "cpu",
    }
    options |= {
        "new_tokens": 32,
        "prompt_tokens": 16,
        "prefill_tokens": 512,
        "rounds": 5,
        "threads": int,
    }
    arguments = parse_arguments(
        __doc__, "model", helps=HELPS, output=Path("runs/speed.json"), **options
    )
    file = Path(arguments.model)
    if not file.is_file():
        file = arguments.output
        save(arguments, measure(arguments))
    print("\n".join(table(json.loads(file.read_text()))))


if __name__ == "__main__":
    main()

"""Decoding speed, prefill and memory of a pruned model: dense, packed, and before it was pruned.

    python benchmarks/speed.py DIR --original MODEL --threads 2 --output speed.json
    python benchmarks/speed.py benchmarks/results/decoding.json

The second command shows rows that were measured before. Each variant runs in a process of its own, so that its memory
is that model's alone, and all are measured in turn: greedy `generate` on random prompts, one forward pass of a long
prompt, resident memory. Close other programs: times of a busy machine mean little.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
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
from optimum_fista.folder.checkpoint import read_report
from optimum_fista.folder.packed_folder import is_packed, pack_folder, unpack_folder
from optimum_fista.memory import device_counts, release_memory
from optimum_fista.packed.kernels import kernels
from optimum_fista.packed.quantizer import FistaPackedConfig
from optimum_fista.report import device_name
from optimum_fista.source.loading import read_model

HELPS = {
    "model": "pruned model folder, packed or not; or the JSON file of an earlier call, to show it again",
    "variants": "dense, packed or original with bfloat16, float32 or float16; the first is the baseline; none: some",
    "original": "folder of the model before it was pruned",
}


class Runner:
    """A model in one variant, such as `"packed bfloat16"`, and what is measured of it."""

    def __init__(self, variant: str, folder: Path, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.randn(64, 64) @ torch.randn(64, 64)
        self._before = psutil.Process().memory_info().rss
        runtime, dtype = variant.split()
        config = (
            {"quantization_config": FistaPackedConfig(runtime="packed")}
            if runtime == "packed"
            else {}
        )
        model: Any = read_model(str(folder), dtype=getattr(torch, dtype), **config)
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
        if (counts := device_counts(self.device)) is not None:
            return int(counts.max_memory_allocated(self.device))
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
    """Measure all variants in turn; the prompts are random tokens."""
    given = Path(arguments.model)
    packed = ["packed bfloat16"] if read_report(given).totals["num_zeros"] else []
    usual = (
        ["original bfloat16", "dense bfloat16"]
        if arguments.original
        else ["dense bfloat16", "dense float32"]
    )
    variants = arguments.variants or (usual if arguments.original else usual + packed)
    threads, pipes = arguments.threads or torch.get_num_threads(), {}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="optimum-fista-") as temporary:
        here, other = ("packed", "dense") if is_packed(given) else ("dense", "packed")
        folders = {here: given, other: Path(temporary) / other, "original": arguments.original}
        if any(name.startswith(other) for name in variants):
            (pack_folder if other == "packed" else unpack_folder)(given, folders[other])
        for name in variants:
            pipes[name], end = context.Pipe()
            model = name, folders[name.split()[0]], arguments.device, threads
            context.Process(target=serve, args=(end, *model), daemon=True).start()
            end.close()
        sizes = {name: ask(pipes[name], "sizes") for name in variants}
    random = partial(
        torch.randint, min(entries for entries, _ in sizes.values()), generator=torch.manual_seed(0)
    )
    length, new_tokens = arguments.prompt_tokens, arguments.new_tokens
    asked = {
        f"batch {n}": ("generate", random((n, length)), new_tokens) for n in arguments.batch_sizes
    }
    asked["prefill"] = "prefill", random((1, arguments.prefill_tokens))
    seconds: dict[str, dict[str, list[float]]] = {
        name: {key: [] for key in asked} for name in variants
    }
    outputs: dict[str, dict[str, Tensor]] = {name: {} for name in variants}
    for turn in range(arguments.rounds + 1):  # the first one warms up
        print(f"round {turn} of {arguments.rounds}" if turn else "warming up", flush=True)
        for key, question in asked.items():
            for name in variants:
                took, outputs[name][key] = ask(pipes[name], *question)
                seconds[name][key] += [took] * bool(turn)
    found = {}
    for name in variants:
        median = {key: statistics.median(values) for key, values in seconds[name].items()}
        rates = {
            str(size): size * new_tokens / median[f"batch {size}"] for size in arguments.batch_sizes
        }
        dense = outputs.get(name.replace("packed", "dense"), {}) if "packed" in name else {}
        same = [(outputs[name][key] == dense[key]).flatten() for key in dense if key != "prefill"]
        found[name] = {
            "tokens_per_second": rates,
            "prefill_tokens_per_second": arguments.prefill_tokens / median["prefill"],
            "memory_bytes": ask(pipes[name], "memory"),
            "weight_bytes": sizes[name][1],
            "same_tokens": torch.cat(same).float().mean().item() if same else None,
            "seconds": seconds[name],
        }
    settings = {
        name: value
        for name, value in vars(arguments).items()
        if name not in ("model", "original", "output")
    }
    place, compiled = device_name(torch.device(arguments.device)), kernels()
    machine = {"processor": processor_name(), "device": place, "threads": threads}
    return {
        "model": given.resolve().name,
        "settings": settings | {"variants": variants, "threads": threads},
        "variants": found,
        "machine": machine | {"kernels": compiled.path if compiled else "none"},
    }


def ask(pipe: Connection, *question: Any) -> Any:
    """What the process of a variant answers; `EOFError` if it has ended, which may be for want of memory."""
    pipe.send(question)
    return pipe.recv()


def table(report: dict[str, Any]) -> list[str]:
    """Tokens a second, memory and weights of each variant, and how many times those of the first."""
    sizes = [str(size) for size in report["settings"]["batch_sizes"]]
    head = [report["model"], *(f"batch {size}, tokens/s" for size in sizes)]
    head += [
        f"prefill {report['settings']['prefill_tokens']}, tokens/s",
        "memory, MiB",
        "weights, MiB",
        "same text",
    ]
    speeds = {
        name: [
            *(found["tokens_per_second"][size] for size in sizes),
            found["prefill_tokens_per_second"],
        ]
        for name, found in report["variants"].items()
    }
    rows, (first, *_) = [], report["variants"]
    for name, found in report["variants"].items():
        cells = [
            f"{value:.1f} ({value / base:.2f}x)"
            for value, base in zip(speeds[name], speeds[first], strict=True)
        ]
        sizes = (
            (found[key], report["variants"][first][key]) for key in ("memory_bytes", "weight_bytes")
        )
        cells += [f"{size / 2**20:,.0f} ({size / max(1, base):.2f}x)" for size, base in sizes]
        rows.append(
            [name, *cells, "" if found["same_tokens"] is None else f"{found['same_tokens']:.0%}"]
        )
    machine = report["machine"]
    where = (
        machine["device"]
        if machine["device"] != "cpu"
        else f"{machine['processor']}, {machine['threads']} threads"
    )
    origin = f"{where}; kernels: {machine['kernels']}; torch {report['versions']['torch']}; medians of rounds in turn"
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

"""The same pruning run in several ways, in turn: seconds of each, and whether all have the same weights.

`memory` loads, prunes and saves; `files` prunes from files to files with one thread, `threads` with two, `processes` in
two processes of one thread each. Every run has a process of its own, whose imports are not counted. Processor seconds
are those of the process that used most; with one thread they hardly depend on other programs. Ways of one thread a
process must give the same weights. Without `--model` it is a random Llama; a GGUF file is first written as a model
folder in `--dtype`.

    python benchmarks/ways.py --ways files,threads,processes --error-correction intra
"""

from __future__ import annotations

import statistics
import tempfile
from argparse import Namespace
from pathlib import Path

import torch
from shared import finish, matrix_rate, parse_arguments, prune_apart, save, save_llama
from transformers import AutoConfig

from optimum_fista.source.loading import gguf_file, load_model
from optimum_fista.source.model_folder import checkpoint_files, read_tensors

_WAYS = {"memory": (1, 1), "files": (1, 1), "threads": (1, 2), "processes": (2, 1)}
"""Processes, and threads of each."""


def run(arguments: Namespace, way: str, source: Path, output: Path) -> dict[str, float]:
    """Prune once; returns the seconds it took."""
    ranks, threads = _WAYS[way]
    config = {"method": arguments.method, "error_correction": arguments.error_correction}
    process = prune_apart(
        ranks=ranks,
        threads=threads,
        source=source,
        output=output,
        samples=arguments.num_samples,
        length=arguments.sequence_length,
        vocabulary=min(40000, AutoConfig.from_pretrained(source).vocab_size),
        config=config,
        in_memory=way == "memory",
    )
    told = finish(process)
    processor = max(seconds["processor"] for seconds in told)
    print(f"{way}: {told[0]['wall']:.1f} s, processor {processor:.1f} s", flush=True)
    return {
        "seconds": told[0]["wall"],
        "allocation": told[0].get("allocation", 0.0),
        "processor_seconds": processor,
    }


def require_same(left: Path, right: Path) -> None:
    """End the program if two model folders differ in a weight."""
    files, others = checkpoint_files(left), checkpoint_files(right)
    names = sorted(files)
    if names != sorted(others):
        raise SystemExit(f"{left.name} and {right.name} hold other tensors")
    for (name, one), (_, other) in zip(
        read_tensors(files, names), read_tensors(others, names), strict=True
    ):
        if not torch.equal(one, other):
            raise SystemExit(f"{name} differs between {left.name} and {right.name}")


def main() -> None:
    model = {"model": str, "dtype": "float32", "layers": 8, "hidden": 512, "ffn": 1408}
    settings = {
        "method": "obs_admm",
        "error_correction": str,
        "num_samples": 8,
        "sequence_length": 512,
        "rounds": 3,
    }
    helps = {
        "ways": f"some of {', '.join(_WAYS)}",
        "model": "a model folder or a folder with one GGUF file",
    }
    files = {"output": Path("runs/ways.json")}
    arguments = parse_arguments(
        __doc__, helps=helps, ways=["memory", "files"], **model, **settings, **files
    )
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in arguments.ways}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = folder / "source" if arguments.model is None else Path(arguments.model)
        if arguments.model is None:
            sizes = arguments.hidden, arguments.ffn, arguments.layers, arguments.dtype
            save_llama(source, *sizes, vocab_size=1024)
        elif gguf_file(source) is not None:
            loaded, tokenizer = load_model(source, device="cpu", dtype=arguments.dtype)
            source = folder / "source"
            loaded.save_pretrained(source)
            tokenizer.save_pretrained(source)
            del loaded
        for index in range(arguments.rounds):
            for way in arguments.ways:
                runs[way].append(run(arguments, way, source, folder / f"{way} {index}"))
            first, *others = [
                folder / f"{way} {index}" for way in arguments.ways if _WAYS[way][1] == 1
            ]
            for other in others:
                require_same(first, other)
    medians = {
        way: {key: statistics.median(m[key] for m in found) for key in found[0]}
        for way, found in runs.items()
    }
    for way, found in medians.items():
        print(f"{way}: " + ", ".join(f"{key} {value:.1f}" for key, value in found.items()))
    save(arguments, {"matrix_rate": matrix_rate(), "runs": runs, "medians": medians})


if __name__ == "__main__":
    main()

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

# Processes of each way, and threads of each process.
_WAYS = {"memory": (1, 1), "files": (1, 1), "threads": (1, 2), "processes": (2, 1)}


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
    seconds_of_ranks = finish(process)
    first_rank = seconds_of_ranks[0]
    processor_seconds = max(seconds["processor"] for seconds in seconds_of_ranks)
    print(f"{way}: {first_rank['wall']:.1f} s, processor {processor_seconds:.1f} s", flush=True)
    return {
        "seconds": first_rank["wall"],
        "allocation": first_rank.get("allocation", 0.0),
        "processor_seconds": processor_seconds,
    }


def require_same(left: Path, right: Path) -> None:
    """End the program if two model folders differ in a weight."""
    left_files = checkpoint_files(left)
    right_files = checkpoint_files(right)
    names = sorted(left_files)
    if names != sorted(right_files):
        raise SystemExit(f"{left.name} and {right.name} hold other tensors")
    left_tensors = read_tensors(left_files, names)
    right_tensors = read_tensors(right_files, names)
    for (name, one), (_, other) in zip(left_tensors, right_tensors, strict=True):
        if not torch.equal(one, other):
            raise SystemExit(f"{name} differs between {left.name} and {right.name}")


def main() -> None:
    """Run all ways in turn, compare their results, and write the seconds."""
    helps = {
        "ways": f"some of {', '.join(_WAYS)}",
        "model": "a model folder or a folder with one GGUF file",
    }
    arguments = parse_arguments(
        __doc__,
        helps=helps,
        ways=["memory", "files"],
        model=str,
        dtype="float32",
        layers=8,
        hidden=512,
        ffn=1408,
        method="obs_admm",
        error_correction=str,
        num_samples=8,
        sequence_length=512,
        rounds=3,
        output=Path("runs/ways.json"),
    )
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in arguments.ways}
    # Threads add in another order, so their weights may differ in the last bit.
    of_one_thread = [way for way in arguments.ways if _WAYS[way][1] == 1]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = source_folder(arguments, folder / "source")
        for index in range(arguments.rounds):
            for way in arguments.ways:
                runs[way].append(run(arguments, way, source, folder / f"{way} {index}"))
            first, *others = [folder / f"{way} {index}" for way in of_one_thread]
            for other in others:
                require_same(first, other)

    medians = {}
    for way, runs_of_way in runs.items():
        medians[way] = {
            key: statistics.median(measured[key] for measured in runs_of_way)
            for key in runs_of_way[0]
        }
        shown = ", ".join(f"{key} {value:.1f}" for key, value in medians[way].items())
        print(f"{way}: {shown}")
    save(arguments, {"matrix_rate": matrix_rate(), "runs": runs, "medians": medians})


def source_folder(arguments: Namespace, new_folder: Path) -> Path:
    """Return the folder of the dense model; a random Llama and the model of a GGUF file are written to `new_folder`."""
    if arguments.model is None:
        save_llama(
            new_folder,
            arguments.hidden,
            arguments.ffn,
            arguments.layers,
            arguments.dtype,
            vocab_size=1024,
        )
        return new_folder
    source = Path(arguments.model)
    if gguf_file(source) is None:
        return source
    model, tokenizer = load_model(source, device="cpu", dtype=arguments.dtype)
    model.save_pretrained(new_folder)
    tokenizer.save_pretrained(new_folder)
    return new_folder


if __name__ == "__main__":
    main()

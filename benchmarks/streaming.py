"""What pruning from files to files costs against pruning in memory: interleaved, medians, each in a process of its own.

In memory: load, prune, save. From files: `prune(name, output_dir=)`. Both give the same weights. A folder with a
GGUF file is first written as a model folder in `--dtype`. Processor seconds are those of one thread.

    python benchmarks/streaming.py MODEL --output benchmarks/results/streaming.json
"""

from __future__ import annotations

import statistics
import tempfile
from argparse import Namespace
from pathlib import Path

import torch
from shared import finish, matrix_rate, parse_arguments, prune_apart, save
from transformers import AutoConfig

from optimum_fista.run.checkpoints.checkpoint import checkpoint_files, read_tensors
from optimum_fista.run.checkpoints.loading import gguf_file, load_model

_WAYS = ("in memory", "from files")


def run(arguments: Namespace, way: str, source: str, output: Path) -> dict[str, float]:
    """Prune once, and say what it took."""
    process = prune_apart(
        source=source,
        output=output,
        samples=arguments.num_samples,
        length=arguments.sequence_length,
        vocabulary=min(40000, AutoConfig.from_pretrained(source).vocab_size),
        config={"method": arguments.method},
        in_memory=way == "in memory",
    )
    (seconds,) = finish(process)
    print(f"{way}: {seconds['wall']:.1f} s, processor {seconds['processor']:.1f} s", flush=True)
    return {"seconds": seconds["wall"], "processor_seconds": seconds["processor"]}


def require_same(left: Path, right: Path) -> None:
    files, others = checkpoint_files(left), checkpoint_files(right)
    names = sorted(files)
    if names != sorted(others):
        raise SystemExit("the folders hold other tensors")
    for (name, one), (_, other) in zip(read_tensors(files, names), read_tensors(others, names), strict=True):
        if not torch.equal(one, other):
            raise SystemExit(f"{name} differs")


def main() -> None:
    settings = {"num_samples": 8, "sequence_length": 512, "method": "obs_admm", "rounds": 3}
    helps = {"dtype": "of a GGUF model"}
    arguments = parse_arguments(
        __doc__, "model", helps=helps, dtype="bfloat16", **settings, output=Path("runs/streaming.json")
    )
    measured: dict[str, list[dict[str, float]]] = {way: [] for way in _WAYS}
    with tempfile.TemporaryDirectory() as temporary:
        folder, source = Path(temporary), arguments.model
        if gguf_file(source) is not None:
            model, tokenizer = load_model(source, device="cpu", dtype=arguments.dtype)
            source = str(folder / "source")
            model.save_pretrained(source)
            tokenizer.save_pretrained(source)
            del model
        for index in range(arguments.rounds):
            for way in _WAYS:
                measured[way].append(run(arguments, way, source, folder / f"{way} {index}"))
            require_same(folder / f"in memory {index}", folder / f"from files {index}")
    medians = {way: {key: statistics.median(m[key] for m in runs) for key in runs[0]} for way, runs in measured.items()}
    ratios = {key: medians["from files"][key] / value for key, value in medians["in memory"].items()}
    print(
        f"from files takes {ratios['seconds']:.2f}x, {ratios['processor_seconds']:.2f}x of processor time; same weights"
    )
    save(arguments, {"gigaflops": matrix_rate() / 1e9, "measured": measured, "ratios": ratios})


if __name__ == "__main__":
    main()

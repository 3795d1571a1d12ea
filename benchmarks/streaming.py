"""What pruning from files to files costs against pruning in memory: interleaved, medians, each in a process of its own.

In memory: load, prune, save. From files: `prune(name, output_dir=)`. Both give the same weights. A folder with a
GGUF file is first written as a model folder in `--dtype`. Processor seconds are those of one thread.

    python benchmarks/streaming.py MODEL --output benchmarks/results/streaming.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from machine import matrix_rate

from optimum_fista.run.checkpoints.checkpoint import checkpoint_files, read_tensors
from optimum_fista.run.checkpoints.loading import gguf_file, load_model

_RUN = """
import sys, time, torch
from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.run.checkpoints.loading import load_model
way, source, output, sequences, length, method = sys.argv[1:]
tokens = torch.randint(0, 40000, (int(sequences), int(length)), generator=torch.Generator().manual_seed(0))
pruner = FistaPruner(FistaPruningConfig(method=method), progress=False)
wall, processor = time.perf_counter(), time.process_time()
if way == "in memory":
    model, tokenizer = load_model(source, device="cpu")
    pruner.prune(model, tokens.split(1))
    pruner.save_pretrained(model, output, tokenizer)
else:
    pruner.prune(source, tokens.split(1), output_dir=output, device="cpu")
print(time.perf_counter() - wall, time.process_time() - processor)
"""
_WAYS = ("in memory", "from files")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder, or a folder with one GGUF file")
    parser.add_argument("--dtype", default="bfloat16", help="of a GGUF model (default bfloat16)")
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--method", default="obs_admm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/streaming.json"))
    return parser.parse_args()


def run(arguments: argparse.Namespace, way: str, source: str, output: Path) -> dict[str, float]:
    values = [way, source, output, arguments.num_samples, arguments.sequence_length, arguments.method]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _RUN, *map(str, values)]
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    wall, processor = map(float, done.stdout.split())
    print(f"{way}: {wall:.1f} s, processor {processor:.1f} s", flush=True)
    return {"seconds": wall, "processor_seconds": processor}


def require_same(left: Path, right: Path) -> None:
    files, others = checkpoint_files(left), checkpoint_files(right)
    names = sorted(files)
    if names != sorted(others):
        raise SystemExit("the folders hold other tensors")
    for (name, one), (_, other) in zip(read_tensors(files, names), read_tensors(others, names), strict=True):
        if not torch.equal(one, other):
            raise SystemExit(f"{name} differs")


def main() -> None:
    arguments = parse_arguments()
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
    ratios = {
        key: statistics.median(m[key] for m in measured["from files"])
        / statistics.median(m[key] for m in measured["in memory"])
        for key in ("seconds", "processor_seconds")
    }
    print(
        f"from files takes {ratios['seconds']:.2f}x, {ratios['processor_seconds']:.2f}x of processor time; same weights"
    )
    settings = {k: v for k, v in vars(arguments).items() if k not in ("output", "model")}
    settings["model"] = Path(arguments.model).name
    values = {"settings": settings, "gigaflops": matrix_rate() / 1e9, "measured": measured, "ratios": ratios}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()

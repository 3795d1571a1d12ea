"""Two processes of one thread each against one process with two threads, and with one.

Prunes a random Llama (or `--model`) from files to files with intra-layer correction, each way once a round, and gives
medians of the seconds between reading the first weight and the finished folder, imports excluded. The files of two
processes must be those of one process with one thread. Processor seconds are those of the process that used most; with
one thread a process they hardly depend on other programs. Cores that other programs used meanwhile are told (Linux).

    python benchmarks/ranks.py --output benchmarks/results/ranks.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from machine import matrix_rate
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

_TIMED = ("README.md", "fista/report.json")
_RUN = """
import sys, time, torch
from optimum_fista import FistaPruner, FistaPruningConfig
source, output, vocabulary, sequences, length, method = sys.argv[1:]
tokens = torch.randint(0, int(vocabulary), (int(sequences), int(length)), generator=torch.Generator().manual_seed(0))
config = FistaPruningConfig(method=method, error_correction="intra")
before = time.process_time()
FistaPruner(config, progress=False).prune(source, tokens.split(1), output_dir=output, device="cpu")
print(time.process_time() - before, flush=True)
"""
_WAYS = {
    "one process, one thread": (1, 1),
    "one process, two threads": (1, 2),
    "two processes, one thread each": (2, 1),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder or Hub id instead of the random Llama")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=1408)
    parser.add_argument("--num-samples", type=int, default=24)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--method", default="obs_admm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/ranks.json"))
    return parser.parse_args()


def save_random(arguments: argparse.Namespace, folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.ffn,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        vocab_size=1024,
        max_position_embeddings=max(2048, arguments.sequence_length),
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def run(arguments: argparse.Namespace, source: str, output: Path, way: str) -> dict[str, float]:
    processes, threads = _WAYS[way]
    script = output.with_suffix(".py")
    script.write_text(_RUN)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    vocabulary = AutoConfig.from_pretrained(source).vocab_size
    values = [source, output, vocabulary, arguments.num_samples, arguments.sequence_length, arguments.method]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    started, busy, own = time.perf_counter(), busy_seconds(), own_seconds()
    command = [*launcher, str(script), *map(str, values)]
    output_of = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    done = subprocess.run(command, check=True, env=environment, **output_of)
    wall = time.perf_counter() - started
    others = busy_seconds() - busy - (own_seconds() - own)
    seconds = json.loads((output / "fista" / "report.json").read_text())["seconds"]
    return {
        "seconds": seconds["total"],
        "allocation": seconds["allocation"],
        "processor_seconds": max(map(float, done.stdout.split())),
        "wall": wall,
        "others": others / wall,
    }


def busy_seconds() -> float:
    """What all processes of the machine have computed, in seconds of one core."""
    user, nice, system, *_ = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """What the processes that this one started and that have ended have computed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def files_of(folder: Path) -> dict[str, bytes]:
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: data for name, data in files.items() if name not in _TIMED}


def main() -> None:
    arguments = parse_arguments()
    measured: dict[str, list[dict[str, float]]] = {way: [] for way in _WAYS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.model is None:
            save_random(arguments, folder / "source")
        source = arguments.model or str(folder / "source")
        for index in range(arguments.rounds):
            written = {}
            for way in _WAYS:
                output = folder / f"{index}-{'-'.join(map(str, _WAYS[way]))}"
                measured[way].append(run(arguments, source, output, way))
                found = measured[way][-1]
                busy = f"processor {found['processor_seconds']:.1f} s, others used {found['others']:.2f} cores"
                print(f"{way}: {found['seconds']:.1f} s, {busy}", flush=True)
                written[way] = files_of(output)
            alone, _, together = written.values()
            if alone != together:
                raise SystemExit("two processes wrote other files than one")
    medians = {way: statistics.median(m["seconds"] for m in runs) for way, runs in measured.items()}
    alone, threads, together = medians.values()
    ratio, speedup = together / threads, alone / together
    print(f"two processes take {ratio:.2f}x of two threads; {speedup:.2f}x as fast as one thread; same files")
    settings = {k: str(v) for k, v in vars(arguments).items() if k != "output"}
    result = {"settings": settings, "matrix_rate": matrix_rate(), "runs": measured, "medians": medians}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result | {"ratio": ratio, "speedup": speedup}, indent=1))


if __name__ == "__main__":
    main()

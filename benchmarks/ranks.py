"""Two processes of one thread each against one process with two threads, and with one.

Prunes a random Llama (or `--model`) from files to files with intra-layer correction, each way once a round, and gives
medians of the seconds between reading the first weight and the finished folder, imports excluded. The files of two
processes must be those of one process with one thread. Processor seconds are those of the process that used most; with
one thread a process they hardly depend on other programs. It also prints how many cores other programs used
meanwhile (Linux).

    python benchmarks/ranks.py --output benchmarks/results/ranks.json
"""

from __future__ import annotations

import os
import resource
import statistics
import tempfile
import time
from argparse import Namespace
from pathlib import Path

from shared import files_of, finish, matrix_rate, parse_arguments, prune_apart, save, save_llama
from transformers import AutoConfig

_WAYS = {
    "one process, one thread": (1, 1),
    "one process, two threads": (1, 2),
    "two processes, one thread each": (2, 1),
}


def run(arguments: Namespace, source: str, output: Path, way: str) -> dict[str, float]:
    """Prune once, and say what it took."""
    ranks, threads = _WAYS[way]
    process = prune_apart(
        ranks=ranks,
        threads=threads,
        source=source,
        output=output,
        samples=arguments.num_samples,
        length=arguments.sequence_length,
        vocabulary=AutoConfig.from_pretrained(source).vocab_size,
        config={"method": arguments.method, "error_correction": "intra"},
    )
    started, busy, own = time.perf_counter(), busy_seconds(), own_seconds()
    told = finish(process)
    wall = time.perf_counter() - started
    others = busy_seconds() - busy - (own_seconds() - own)
    return {
        "seconds": told[0]["total"],
        "allocation": told[0]["allocation"],
        "processor_seconds": max(seconds["processor"] for seconds in told),
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


def main() -> None:
    sizes = {"layers": 8, "hidden": 512, "ffn": 1408, "num_samples": 24, "sequence_length": 512}
    arguments = parse_arguments(
        __doc__, model=str, **sizes, method="obs_admm", rounds=3, output=Path("runs/ranks.json")
    )
    measured: dict[str, list[dict[str, float]]] = {way: [] for way in _WAYS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = arguments.model or str(folder / "source")
        if arguments.model is None:
            save_llama(folder / "source", arguments.hidden, arguments.ffn, arguments.layers, "float32", vocab_size=1024)
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
    result = {"matrix_rate": matrix_rate(), "runs": measured, "medians": medians}
    save(arguments, result | {"ratio": ratio, "speedup": speedup})


if __name__ == "__main__":
    main()

"""Kill a streamed run at random moments until it is done, again and again, and compare the bytes.

Each round prunes a tiny random Llama from files to files in a process that is killed (SIGKILL) at a random moment and
started again, until it finishes. All files must be those of a run that was not killed, but for the times they tell.

With `--ranks` two or more processes of `torchrun` share the decoder layers, and one of them is killed (torchrun then
stops the others).

    python benchmarks/kills.py --kills 50
    python benchmarks/kills.py --kills 20 --ranks 2
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

_TIMED = ("README.md", "fista/report.json")
_RUN = """
import sys, torch
torch.set_num_threads(1)
from optimum_fista import FistaPruner, FistaPruningConfig
tokens = torch.randint(0, 256, (16, 64), generator=torch.Generator().manual_seed(0))
print("ready", flush=True)
config = FistaPruningConfig(error_correction=sys.argv[3] if sys.argv[3:] else None)
FistaPruner(config, progress=False).prune(sys.argv[1], tokens.split(4), output_dir=sys.argv[2], device="cpu")
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def start(source: Path, output: Path, ranks: int = 1, correction: str = "") -> subprocess.Popen:
    arguments = [str(source), str(output), *([correction] if correction else [])]
    command = [sys.executable, "-c", _RUN, *arguments]
    if ranks > 1:
        script = output.parent / "run.py"
        script.write_text(_RUN)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *launcher, str(script), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    for _ in range(ranks):
        process.stdout.readline()
    return process


def kill_one(process: subprocess.Popen, ranks: int, generator: random.Random) -> bool:
    """Kill the process, or one of its ranks; whether it was still there."""
    if ranks == 1:
        process.send_signal(signal.SIGKILL)
        return True
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    if len(children) < ranks:
        return False
    os.kill(int(generator.choice(children)), signal.SIGKILL)
    return True


def files_of(folder: Path) -> dict[str, bytes]:
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: data for name, data in files.items() if name not in _TIMED}


def main() -> None:
    arguments = parse_arguments()
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=arguments.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=256,
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "source")
        started = time.perf_counter()
        correction = "intra" if arguments.ranks > 1 else ""
        assert start(folder / "source", folder / "whole", 1, correction).wait() == 0
        longest = time.perf_counter() - started
        expected = files_of(folder / "whole")
        kills = rounds = 0
        while kills < arguments.kills:
            output = folder / f"pruned-{rounds}"
            while not output.exists():
                process = start(folder / "source", output, arguments.ranks, correction)
                delay = generator.uniform(0, longest / 2 if kills < arguments.kills else 10 * longest)
                try:
                    process.wait(delay)
                except subprocess.TimeoutExpired:
                    kills += kill_one(process, arguments.ranks, generator)
                    process.wait()
            rounds += 1
            found = files_of(output)
            different = [name for name in expected | found if expected.get(name) != found.get(name)]
            print(f"{kills} kills, {rounds} models finished: {different or 'identical'}", flush=True)
            if different:
                raise SystemExit(1)


if __name__ == "__main__":
    main()

"""Kill a streamed run at random moments until it is done, again and again, and compare the bytes.

Each round prunes a tiny random Llama from files to files in a process that is killed (SIGKILL) at a random moment and
started again, until it finishes. All files must be those of a run that was not killed, but for the times they tell.

With `--ranks` two or more processes of `torchrun` share the decoder layers, and one of them is killed (torchrun then
stops the others).

    python benchmarks/kills.py --kills 50
    python benchmarks/kills.py --kills 20 --ranks 2
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from shared import files_of, finish, parse_arguments, prune_apart, save_llama, start


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


def main() -> None:
    arguments = parse_arguments(__doc__, kills=50, layers=8, ranks=1, seed=0)
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_llama(folder / "source", 64, 128, arguments.layers, num_attention_heads=4, num_key_value_heads=2)
        options = {"source": folder / "source", "samples": 16, "length": 64, "batch": 4}
        if arguments.ranks > 1:
            options["config"] = {"error_correction": "intra"}
        process, started = prune_apart(output=folder / "whole", **options), time.perf_counter()
        finish(process)
        longest = time.perf_counter() - started
        expected = files_of(folder / "whole")
        kills = rounds = 0
        while kills < arguments.kills:
            output = folder / f"pruned-{rounds}"
            while not output.exists():
                process = prune_apart(output=output, ranks=arguments.ranks, **options)
                if arguments.ranks == 1:
                    start(process)
                try:
                    process.wait(generator.uniform(0, longest) if kills < arguments.kills else None)
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

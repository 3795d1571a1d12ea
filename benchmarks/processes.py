"""Held-out losses of a recovery by step, in one process and in two.

    python benchmarks/processes.py PRUNED --teacher MODEL --calibration TEXT --output runs/processes.json
    python benchmarks/processes.py runs/processes.json

PRUNED is a folder that `optimum-fista prune` has made of MODEL. Each training is `optimum-fista recover` on the CPU
with the same options, in processes of one thread each. Weights that processes share (FSDP2) can't be measured so:
Accelerate shards them on accelerators only. The second command shows what was measured before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from shared import parse_arguments, save

from optimum_fista.environment import processor_name
from optimum_fista.folder.card import markdown_lines
from optimum_fista.folder.checkpoint import read_report

LAUNCHERS: dict[str, list[str]] = {
    "one": [],
    "two": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
}
"""By the name of each row: what starts its processes. `accelerate launch --cpu` would start only one."""


def recover(arguments: Namespace, launcher: list[str], output: Path) -> dict[str, Any]:
    """Train in new processes, and return the held-out losses and what else the report has of the training."""
    options = {
        "--output": output,
        "--teacher": arguments.teacher,
        "--calibration": arguments.calibration,
        "--device": "cpu",
        "--tokens": arguments.tokens,
        "--sequence-length": arguments.sequence_length,
        "--accumulate": arguments.accumulate,
        "--compute-dtype": "float32",
    }
    command = [sys.executable, *launcher, "-m", "optimum_fista", "recover", arguments.model]
    for flag, value in options.items():
        command += [flag, str(value)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    trained = read_report(output).recoveries[-1]
    return {
        "steps": [step for step, _, _ in trained.evaluations],
        "losses": [loss for _, _, loss in trained.evaluations],
        "seconds": trained.seconds,
        "processor": processor_name(),
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Make a line for each step, with the loss of each number of processes."""
    losses_by_step = zip(*(row["losses"] for row in rows), strict=True)
    lines = [
        [str(step), *(f"{loss:.6f}" for loss in losses)]
        for step, losses in zip(rows[0]["steps"], losses_by_step, strict=True)
    ]
    return markdown_lines(["step", *(row["processes"] for row in rows)], lines)


def main() -> None:
    """Train with each number of processes, or read an earlier record; print the table."""
    arguments = parse_arguments(
        __doc__,
        "model",
        helps={"model": "pruned folder, or the JSON file of an earlier call"},
        teacher="",
        calibration="c4",
        tokens=16_384,
        sequence_length=128,
        accumulate=4,
        output=Path("runs/processes.json"),
    )
    file = Path(arguments.model)
    if file.is_file():
        print("\n".join(table(json.loads(file.read_text())["rows"])))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, launcher in LAUNCHERS.items():
            row = recover(arguments, launcher, Path(folder) / name)
            rows.append({"processes": name} | row)
            save(arguments, {"rows": rows})
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()

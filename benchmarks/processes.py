"""Held-out losses of a recovery by step: in one process, in two, and in two that share the weights (FSDP2).

    python benchmarks/processes.py PRUNED --teacher MODEL --calibration TEXT --output runs/processes.json
    python benchmarks/processes.py runs/processes.json

PRUNED is a folder that `optimum-fista prune` has made of MODEL. Each training is `optimum-fista recover` on the CPU
with the same options, in processes of one thread each that `accelerate launch` starts. The second command shows what
was measured before.
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

WAYS = {
    "one": [],
    "two": ["--num_processes", "2"],
    "two, shared weights": [
        "--num_processes", "2", "--use_fsdp", "--fsdp_version", "2",
        "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP",
    ],
}  # fmt: skip
"""By the name of each row: what `accelerate launch` gets."""


def recover(arguments: Namespace, launched: list[str], output: Path) -> dict[str, Any]:
    """Train in new processes, and return the held-out losses and what else the report has of the training."""
    command = [sys.executable]
    if launched:
        command += ["-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1", *launched]
    command += [
        "-m", "optimum_fista", "recover", arguments.model, "--output", str(output),
        "--teacher", arguments.teacher, "--calibration", arguments.calibration, "--device", "cpu",
        "--tokens", str(arguments.tokens), "--sequence-length", str(arguments.sequence_length),
        "--accumulate", str(arguments.accumulate), "--compute-dtype", "float32",
    ]  # fmt: skip
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    trained = read_report(output).recoveries[-1]
    return {
        "steps": [step for step, _, _ in trained.evaluations],
        "losses": [loss for _, _, loss in trained.evaluations],
        "seconds": trained.seconds,
        "processor": processor_name(),
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Make a line for each step, with the loss of each way."""
    losses_by_step = zip(*(row["losses"] for row in rows), strict=True)
    lines = [
        [str(step), *(f"{loss:.6f}" for loss in losses)]
        for step, losses in zip(rows[0]["steps"], losses_by_step, strict=True)
    ]
    return markdown_lines(["step", *(row["processes"] for row in rows)], lines)


def main() -> None:
    """Train in each way, or read an earlier record; print the table."""
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
        for number, (name, launched) in enumerate(WAYS.items()):
            row = recover(arguments, launched, Path(folder) / str(number))
            rows.append({"processes": name} | row)
            save(arguments, {"rows": rows})
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()

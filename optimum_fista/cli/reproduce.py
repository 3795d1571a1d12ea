"""`optimum-fista reproduce`."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
Prune a model again as its folder says, and compare the two results.

DIR/fista/reproduce.json says how the folder was made. What differs now is said first: versions, processor, arithmetic,
and the model's configuration. If the model or the calibration tokens are not the same, the command ends before it
prunes. It exits with 0 if all tensors are bit-equal, with 3 if they differ as results of different processors do
(docs/howto/reproduce.md), with 1 otherwise.

examples:
  optimum-fista reproduce ./model-50
  optimum-fista reproduce ./model-50 --model ./model --calibration texts.jsonl --output again
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("folder", metavar="DIR", type=Path, help="folder saved by optimum-fista")
    add("--output", "-o", type=Path, metavar="DIR", help="keep the second result in this folder")
    add("--model", metavar="PATH", help="where the dense model lies now, if not where the run found it")
    add("--calibration", metavar="SOURCE", help="where the calibration text lies now, as for prune")
    add("--device", help="cpu, cuda, cuda:1 (default: the kind of device that the run used)")


def run(arguments: argparse.Namespace) -> int:
    """Say what differs, prune, compare."""
    from optimum_fista.run.reproduction import reproduce

    options = {name: getattr(arguments, name) for name in ("model", "calibration", "device")}
    found = reproduce(arguments.folder, arguments.output, **options, say=lambda line: print(f"differs: {line}"))
    print(f"{arguments.folder}: {found}")
    return 0 if found.bit_equal else 3 if found.nearly_equal else 1

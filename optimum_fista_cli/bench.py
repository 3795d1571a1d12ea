"""`optimum-fista bench`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

DESCRIPTION = """\
Measure how fast a pruned model decodes, dense and packed, and what memory it takes.

Each variant runs in a process of its own, and all are measured in turn: greedy `generate` on random prompts, one
forward pass of a long prompt, resident memory. Close other programs: times of a busy machine mean little.

example:
  optimum-fista bench ./model-50 --output bench.json --plot bench.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("model", metavar="DIR", type=Path, help="pruned model folder, packed or not")
    add(
        "--variants",
        default="dense bfloat16,dense float32,packed bfloat16",
        help="what to measure; the first is the baseline (default: dense bfloat16,dense float32,packed bfloat16; also "
        "packed float32, dense float16, packed float16)",
    )
    add("--batch-sizes", default="1,4,16", help="sequences decoded together (default 1,4,16)")
    add("--new-tokens", type=int, default=32, help="tokens to decode (default 32)")
    add("--prompt-tokens", type=int, default=16, help="tokens of the prompt (default 16)")
    add("--prefill-tokens", type=int, default=512, help="tokens of the long prompt (default 512)")
    add("--rounds", type=int, default=5, help="times each is measured, in turn (default 5)")
    add("--threads", type=int, help="threads on the CPU (default: PyTorch's)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 (default cpu)")
    add("--output", "-o", type=Path, metavar="FILE", help="write all figures there, JSON")
    add("--plot", type=Path, metavar="FILE", help="write a picture there (needs matplotlib)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the table, and write what was asked for."""
    from optimum_fista.run.checkpoints.loading import usable_device
    from optimum_fista.run.speed.measure import measure_speed
    from optimum_fista.run.speed.speed_report import SpeedSettings, draw_speed, speed_table

    try:
        batch_sizes = [int(size) for size in arguments.batch_sizes.split(",")]
    except ValueError:
        raise ValueError(f"--batch-sizes {arguments.batch_sizes}: pass numbers such as 1,4,16.") from None
    if arguments.plot is not None:
        import matplotlib  # noqa: F401, fails before anything is measured
    names = ("new_tokens", "prompt_tokens", "prefill_tokens", "rounds", "threads")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    variants, device = [name.strip() for name in arguments.variants.split(",")], str(usable_device(arguments.device))
    settings = SpeedSettings(variants=variants, batch_sizes=batch_sizes, device=device, **given)
    report = measure_speed(arguments.model, settings, progress=_show)
    _show("")
    print(speed_table(report))
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    if arguments.plot is not None:
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        draw_speed(report, arguments.plot)
    return 0


def _show(line: str) -> None:
    """The current step, on one line of a terminal that is overwritten."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
    elif line:
        print(line, file=sys.stderr, flush=True)

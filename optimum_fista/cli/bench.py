"""`optimum-fista bench`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

DESCRIPTION = """\
Measure how fast a pruned model decodes, dense, packed, and before it was pruned, and what memory it takes.

Each variant runs in a process of its own, and all are measured in turn: greedy `generate` on random prompts, one
forward pass of a long prompt, resident memory. Close other programs: times of a busy machine mean little.

examples:
  optimum-fista bench ./model-50 --output bench.json --plot bench.png
  optimum-fista bench ./smaller --original ./model
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("model", metavar="DIR", type=Path, help="pruned model folder, packed or not")
    add(
        "--variants",
        help="what to measure, the first as the baseline: dense, packed or original, each with bfloat16, float32 or "
        "float16 (default: dense bfloat16,dense float32 and, if there are zeros, packed bfloat16; with --original: "
        "original bfloat16,dense bfloat16)",
    )
    add("--original", type=Path, metavar="DIR", help="folder of the model before it was pruned, to compare with")
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
    from optimum_fista.run.checkpoints.atomic import require_writable
    from optimum_fista.run.checkpoints.checkpoint import read_report
    from optimum_fista.run.checkpoints.loading import usable_device
    from optimum_fista.run.speed.measure import measure_speed
    from optimum_fista.run.speed.speed_report import SpeedSettings, draw_speed, speed_table

    try:
        batch_sizes = [int(size) for size in arguments.batch_sizes.split(",")]
    except ValueError:
        raise ValueError(f"--batch-sizes {arguments.batch_sizes}: pass numbers such as 1,4,16.") from None
    if arguments.plot is not None:
        import matplotlib  # noqa: F401, fails before anything is measured
    for file in filter(None, (arguments.output, arguments.plot)):
        require_writable(file)
    names = ("new_tokens", "prompt_tokens", "prefill_tokens", "rounds", "threads")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.variants is not None:
        given["variants"] = [name.strip() for name in arguments.variants.split(",")]
    elif arguments.original is not None:
        given["variants"] = ["original bfloat16", "dense bfloat16"]
    elif not read_report(arguments.model).totals["num_zeros"]:
        given["variants"] = ["dense bfloat16", "dense float32"]  # there is nothing to pack
    settings = SpeedSettings(batch_sizes=batch_sizes, device=str(usable_device(arguments.device)), **given)
    report = measure_speed(arguments.model, settings, progress=_show, original=arguments.original)
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

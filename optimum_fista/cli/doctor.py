"""`optimum-fista doctor`."""

from __future__ import annotations

import argparse

DESCRIPTION = """\
Describe this machine and check that every device prunes as the CPU does.

Prints versions, devices and memory, the compiler and the packed kernels, and how fast each device multiplies; prunes a
random model of two decoder layers on each. It takes less than a minute and needs no network. Paste all of it into an
issue report. Exits with 1 if a check fails.

example:
  optimum-fista doctor
"""


def add_arguments(_: argparse.ArgumentParser) -> None:
    """The command has no arguments."""


def run(_: argparse.Namespace) -> int:
    """Check, and say what failed."""
    from optimum_fista.run.diagnosis import diagnose

    failed = diagnose(lambda line: print(line, flush=True))
    print(f"\nchecks that failed: {failed}" if failed else "\nall checks passed")
    return 1 if failed else 0

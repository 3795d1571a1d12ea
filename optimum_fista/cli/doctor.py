"""`optimum-fista doctor`."""

import argparse

DESCRIPTION = """\
Describe this machine and check that every device prunes as the CPU does.

It prints versions, devices and memory. Then it prunes a random model of two decoder layers on
each device. It takes less than a minute, needs no network, and exits with 1 if a check fails. Paste the whole output
into an issue report.
"""


def add_arguments(_: argparse.ArgumentParser) -> None:
    """The command has no arguments."""


def run(_: argparse.Namespace) -> int:
    """Describe the machine, prune a small model on each of its devices, and print both; returns 1 if a check fails.

    The command has no flags.
    """
    from optimum_fista.diagnosis import diagnose

    num_failed = diagnose(lambda line: print(line, flush=True))
    if num_failed > 0:
        print(f"\nchecks that failed: {num_failed}")
        return 1
    print("\nall checks passed")
    return 0

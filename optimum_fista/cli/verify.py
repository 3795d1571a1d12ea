"""`optimum-fista verify`: check the files of a pruned model, and say what was proven."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optimum_fista.evaluate.verification import Verification

DESCRIPTION = """\
Prove from the files that a pruned model keeps its sparsity pattern.

It reads the weights, the masks and the report again, and checks exact counts, the pattern in every group or row, zeros
outside the masks, and the totals of the report. With --dense it also proves that all other tensors equal those of the
dense model, without the parts that were removed. If a check fails, it names the first operator or tensor, and exits
with 1.

examples:
  optimum-fista verify ./model-24
  optimum-fista verify ./smaller --dense ./model
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser."""
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder saved by optimum-fista")
    parser.add_argument(
        "--dense", metavar="MODEL", help="the model before it was pruned, to compare with"
    )


def run(arguments: argparse.Namespace) -> int:
    """Verify a folder and print the result; returns the exit code, 1 if a check fails. The folder is only read.

    `arguments` are those that `add_arguments` describes. A dense model of the Hub is downloaded into its cache.
    """
    from optimum_fista.folder.checkpoint import read_report

    read_report(arguments.folder)  # a folder without a report is refused before the slow imports
    # These imports take seconds, and `--help` must not wait for them.
    from optimum_fista.bars import tqdm
    from optimum_fista.evaluate.verification import VerificationError, verify_checkpoint
    from optimum_fista.plain_text import spell_out_controls

    try:
        with tqdm(desc="Verifying", unit="tensor") as bar:
            proven = verify_checkpoint(
                arguments.folder,
                lambda _: bar.update(),  # called with the name of each operator or tensor
                dense=arguments.dense,
            )
    except VerificationError as error:
        # Names in it come from files of other people.
        print(f"{arguments.folder}: BROKEN: {spell_out_controls(str(error))}", file=sys.stderr)
        return 1

    print(f"{arguments.folder}: {_summary(proven)}")
    if proven.num_equal is not None:
        print(f"{proven.num_equal} tensors that were not pruned equal those of {arguments.dense}")
    if proven.num_parameters is None:
        print(
            "its parameters were not counted: Transformers can't make a model of its class without weights"
        )
    return 0


def _summary(proven: "Verification") -> str:
    """Say in one line which numbers were proven.

    `proven.removed` says in words which parts the model lost; it is empty if it lost none.
    """
    mixtures = ""
    if proven.num_mixtures:
        mixtures = f" and {proven.num_mixtures} mixtures"
    numbers = []
    if proven.removed:
        numbers.append(proven.removed)
    # A model may have lost parts, have zeros, or both. Without lost parts the zeros are shown even if there are none.
    if proven.num_zeros or not proven.removed:
        share = proven.num_zeros / max(1, proven.num_weights)
        numbers.append(f"{proven.num_zeros:,} of {proven.num_weights:,} weights zero ({share:.4%})")
    return f"{proven.num_operators} operators{mixtures} keep their pattern, {'; '.join(numbers)}"

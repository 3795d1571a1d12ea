"""`optimum-fista verify`."""

import argparse
import sys
from pathlib import Path

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
    add = parser.add_argument
    add("folder", metavar="DIR", type=Path, help="folder saved by optimum-fista")
    add("--dense", metavar="MODEL", help="the model before it was pruned, to compare with")


def run(arguments: argparse.Namespace) -> int:
    from tqdm.auto import tqdm

    from optimum_fista.evaluate.verification import VerificationError, verify_checkpoint

    try:
        with tqdm(desc="Verifying", unit="tensor") as bar:
            proven = verify_checkpoint(
                arguments.folder, lambda _: bar.update(), dense=arguments.dense
            )
    except VerificationError as error:
        print(f"{arguments.folder}: BROKEN: {error}", file=sys.stderr)
        return 1
    found = [proven.removed] if proven.removed else []
    if proven.num_zeros or not found:  # there may be removed parts, zeros, or both
        share = proven.num_zeros / max(1, proven.num_weights)
        found.append(f"{proven.num_zeros:,} of {proven.num_weights:,} weights zero ({share:.4%})")
    mixtures = f" and {proven.num_mixtures} mixtures" if proven.num_mixtures else ""
    print(
        f"{arguments.folder}: {proven.num_operators} operators{mixtures} keep their pattern, {'; '.join(found)}"
    )
    if proven.num_equal is not None:
        print(f"{proven.num_equal} tensors that were not pruned equal those of {arguments.dense}")
    if proven.num_parameters is None:
        print(
            "its parameters were not counted: Transformers can't make a model of its class without weights"
        )
    return 0

"""`optimum-fista pack`."""

import argparse
from collections.abc import Callable
from pathlib import Path

DESCRIPTION = """\
Pack a pruned model folder: its pruned weights are stored without their zeros.

At 50% or 2:4 the pruned weights take 0.56 of their bytes in 16 bits. After `import optimum_fista.packed`,
from_pretrained loads a packed folder as a dense model, bit for bit. Other loaders find no weights in the folder.
`optimum-fista unpack` makes it dense again.

example:
  optimum-fista pack ./model-50 --output ./model-50-packed
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `pack` to its parser; `unpack` has the same."""
    parser.add_argument("folder", metavar="DIR", type=Path, help="model folder")
    parser.add_argument(
        "--output", "-o", required=True, type=Path, metavar="DIR", help="folder to write"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a model that --output already holds"
    )


def run(arguments: argparse.Namespace) -> int:
    """Pack a folder, and print the sizes; returns the exit code."""
    from optimum_fista.folder.packed_folder import pack_folder

    return convert(arguments, pack_folder, "Packing")


def convert(arguments: argparse.Namespace, write: Callable[..., object], title: str) -> int:
    """Write the folder `arguments.output` from `arguments.folder`, and print the sizes; returns the exit code.

    Args:
        arguments: Those of `pack` or `unpack` (`add_arguments`).
        write: `pack_folder` or `unpack_folder`. It returns the sizes of the packed weights, which print as one line.
        title: Of the progress bar.
    """
    from optimum_fista.bars import tqdm

    with tqdm(desc=title, unit="file", leave=False) as bar:
        sizes = write(
            arguments.folder,
            arguments.output,
            overwrite=arguments.overwrite,
            progress=lambda _: bar.update(),  # called with the name of each file
        )
    print(sizes)
    print(f"saved to {arguments.output}")
    return 0

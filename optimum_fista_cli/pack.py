"""`optimum-fista pack`."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
Pack a pruned model folder: its pruned weights are stored without their zeros.

At 50% or 2:4 the pruned weights take 0.56 of their bytes in 16 bits. `import optimum_fista` before from_pretrained
loads a packed folder as a dense model, bit for bit; no other loader finds weights in it. `optimum-fista unpack` is
the inverse.

example:
  optimum-fista pack ./model-50 --output ./model-50-packed
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", metavar="DIR", type=Path, help="model folder")
    parser.add_argument("--output", "-o", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that --output already holds")


def run(arguments: argparse.Namespace) -> int:
    """Pack, and print what it saved."""
    from tqdm.auto import tqdm

    from optimum_fista.run.packed_folders.packed_folder import pack_folder

    with tqdm(desc="Packing", unit="file", delay=1) as bar:
        packed = pack_folder(
            arguments.folder, arguments.output, overwrite=arguments.overwrite, progress=lambda _: bar.update()
        )
    print(packed)
    print(f"saved to {arguments.output}")
    return 0

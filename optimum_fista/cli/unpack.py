"""`optimum-fista unpack`."""

import argparse

from optimum_fista.cli import pack

DESCRIPTION = """\
Make a packed model folder dense again, bit for bit, so that every loader reads it.

example:
  optimum-fista unpack ./model-50-packed --output ./model-50
"""

add_arguments = pack.add_arguments


def run(arguments: argparse.Namespace) -> int:
    """Unpack a folder, and print the sizes; returns the exit code."""
    from optimum_fista.folder.packed_folder import unpack_folder

    return pack.convert(arguments, unpack_folder, "Unpacking")

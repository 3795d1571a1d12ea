"""`optimum-fista gguf`."""

import argparse
from pathlib import Path

DESCRIPTION = """\
Write a model folder as a GGUF file for llama.cpp, by llama.cpp's own converter.

A model that lost tokens can be written, too: the converter, which does not know its smaller tokenizer, is told the one
that the model had before. The converter is convert_hf_to_gguf.py in llama.cpp's source (--converter), or the package
convert-hf-to-gguf.

examples:
  optimum-fista gguf ./smaller --output smaller.gguf --type q8_0
  optimum-fista gguf ./smaller --output smaller.gguf --converter ./llama.cpp
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser."""
    add = parser.add_argument
    add("folder", metavar="DIR", type=Path, help="model folder, pruned or not; not packed")
    add("--output", "-o", required=True, type=Path, metavar="FILE", help="file to write")
    add(
        "--type",
        default="auto",
        metavar="TYPE",
        help="f32, f16, bf16, q8_0, or auto: 16 bits (default); for fewer bits, run llama-quantize afterwards",
    )
    add(
        "--converter",
        type=Path,
        metavar="DIR",
        help="folder of llama.cpp's source (default: the installed module convert_hf_to_gguf)",
    )
    add(
        "--tokenizer",
        metavar="MODEL",
        help="the model before tokens were removed, if the folder lacks what the converter needs of it",
    )
    add("--overwrite", action="store_true", help="replace --output if it is a GGUF file already")


def run(arguments: argparse.Namespace) -> int:
    """Write the file, and print its name and size; returns the exit code. `arguments` are those of `add_arguments`."""
    from optimum_fista.folder.gguf_file import write_gguf

    write_gguf(
        arguments.folder,
        arguments.output,
        kind=arguments.type,
        converter=arguments.converter,
        tokenizer=arguments.tokenizer,
        overwrite=arguments.overwrite,
    )
    num_bytes = arguments.output.stat().st_size
    print(f"saved to {arguments.output} ({num_bytes / 1e6:,.1f} MB)")
    return 0

"""`optimum-fista rotate`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

DESCRIPTION = """\
Save a dense model that computes the same as MODEL, and that loses less when it is pruned to 2:4.

The weights that write the hidden states between decoder layers apply a rotation, and those that read them undo it. The
rotation is trained to make the error of 2:4 small. If the head shares the weights of the embedding, it gets a copy of
its own. The folder is an ordinary dense model; prune it as any other, with the same --pattern.

The whole model is in memory, in float32. At 50% zeros without a pattern a rotation gained nothing.

examples:
  optimum-fista rotate ./model --calibration texts.txt
  optimum-fista prune ./model-rotated --pattern 2:4 --calibration texts.txt
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments, those of every day first."""
    parser.usage = "%(prog)s MODEL [options]"
    add = parser.add_argument
    add("model", metavar="MODEL", help="Hub id, model folder, or folder with one GGUF file")
    add("--output", "-o", type=Path, metavar="DIR", help="folder to write to (default: MODEL's name and -rotated)")
    add("--pattern", default="2:4", metavar="PATTERN", help="the pattern that you will prune to (default 2:4)")
    add("--sparsity", type=float, help="the fraction of zeros of --pattern unstructured (default 0.5)")
    sources = "self (the model writes it; default), a .txt or .jsonl file, wikitext2, c4, ptb, pydoc"
    add("--calibration", default="self", metavar="SOURCE", help=sources)
    add("--tokens", type=int, default=4096, metavar="N", help="calibration tokens, in whole sequences (default 4096)")
    add("--device", help="cpu, cuda, cuda:1 (default: the accelerator unless it is mps, otherwise the CPU)")
    stored = "dtype to save in: float32, bfloat16, float16 or auto, as stored (default)"
    add("--dtype", default="auto", help=stored)
    add("--overwrite", action="store_true", help="replace a model that --output already holds")
    add = parser.add_argument_group("advanced").add_argument
    add("--sequence-length", type=int, metavar="N", help="tokens a sequence (default: 512, at most the model's limit)")
    products = "dtype of products while it measures and trains (default auto: bfloat16 if the device is fast in it)"
    add("--compute-dtype", choices=("auto", "float32", "bfloat16"), default="auto", help=products)
    add("--steps", type=int, default=200, metavar="N", help="steps of the training (default 200)")
    add("--learning-rate", type=float, default=1e-3, metavar="RATE", help="largest learning rate (default 0.001)")
    drawn = "decides which text is drawn, and which weights a step looks at (default 0)"
    add("--seed", type=int, default=0, help=drawn)


def run(arguments: argparse.Namespace) -> int:
    """Rotate, and say what is next."""
    from optimum_fista.cli.overview import argument
    from optimum_fista.run.checkpoints.output_folder import folder_beside
    from optimum_fista.run.rotation import rotate

    output = arguments.output or folder_beside(arguments.model, "-rotated")
    names = "pattern sparsity calibration tokens sequence_length steps learning_rate seed device dtype overwrite"
    names += " compute_dtype"
    print(rotate(arguments.model, output, **{name: getattr(arguments, name) for name in names.split()}))
    print(f"saved to {output}")
    pattern = "" if arguments.pattern == "unstructured" else f" --pattern {shlex.quote(arguments.pattern)}"
    zeros = "" if arguments.sparsity is None else f" --sparsity {arguments.sparsity:g}"
    text = "" if arguments.calibration == "self" else f" --calibration {argument(arguments.calibration)}"
    print(f"next:\n  optimum-fista prune {argument(output)}{pattern}{zeros}{text}")
    return 0

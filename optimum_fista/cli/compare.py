"""`optimum-fista compare`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optimum_fista.run.comparison.comparison import Comparison

DESCRIPTION = """\
Prune a model by several methods, measure every result, and write one table and plots.

Every row (method, pattern, seed) is kept in --output; the same command given again resumes where it was interrupted.
A method is name:option=value:..., with the options of FistaPruningConfig or of the method; name may
be a recipe too: default, fast, paper. See docs/compare.md.

examples:
  optimum-fista compare facebook/opt-125m --output opt --calibration c4 --texts wikitext2,c4,ptb --bos start
  optimum-fista compare ./model --output out --methods wanda,default:allocation=uniform --seeds 0,1,2
  optimum-fista compare ./model --output out --patterns 0.5,0.6,0.7 --tasks arc_easy,lambada_openai --held-out 16
  optimum-fista compare --render out/table.json --output again
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="Hub id, model folder, or folder with one GGUF file")
    add("--output", "-o", type=Path, required=True, metavar="DIR", help="folder for rows, table, plots")
    add("--render", type=Path, metavar="FILE", help="only table and plots of a table.json; no MODEL")
    add = parser.add_argument_group("what to compare").add_argument
    add("--methods", type=words, metavar="A,B", help="default magnitude,wanda,sparsegpt,fista,default")
    kinds = "fractions of zeros, or what prune --pattern takes (default 0.5,2:4)"
    add("--patterns", type=_patterns, metavar="A,B", help=f"{kinds}; separate them by ; if a pattern has a comma")
    add("--seeds", type=_numbers, metavar="A,B", help="mean and deviation over several (default 0)")
    add = parser.add_argument_group("what to measure").add_argument
    add(
        "--texts",
        type=words,
        metavar="A,B",
        help="perplexity on .txt or .jsonl files, wikitext2, c4, ptb, pydoc (default wikitext2; '' for none)",
    )
    add("--tasks", type=words, metavar="A,B", help="zero-shot accuracy on tasks of lm-eval")
    add("--include-path", type=Path, metavar="DIR", help="folder of further task files (YAML)")
    add("--limit", type=int, help="only the first documents of every task")
    add("--sequence-length", type=int, help="tokens a window (default: 2048 or the model's context if shorter)")
    add("--max-windows", type=int, help="only the first windows of every text")
    add("--held-out", type=int, metavar="N", help="also measure on N windows left out of calibration, and on N in it")
    add(
        "--bos",
        choices=("auto", "every", "start", "none"),
        help="BOS in every window, at the start of a text only (as SparseGPT's and Wanda's scripts), or nowhere "
        "(default auto: in every window if the tokenizer starts texts with it)",
    )
    add = parser.add_argument_group("calibration").add_argument
    add("--calibration", metavar="SOURCE", help="self (default), a .txt or .jsonl file, wikitext2, c4, ptb, pydoc")
    add("--num-samples", type=int, help="calibration sequences (default 128)")
    add("--calibration-length", type=int, help="tokens a sequence (default: those of a window)")
    add = parser.add_argument_group("machine").add_argument
    add("--batch-size", type=int, help="sequences, windows or answers a forward pass (default 1)")
    add("--device", help="cpu, cuda, cuda:1 (default: the accelerator unless it is mps, otherwise the CPU)")
    add("--device-map", metavar="MAP", help="Accelerate's, such as auto, for models larger than a GPU")
    add("--dtype", help="float32, bfloat16, float16 or auto, as stored (default)")
    add("--storage-device", metavar="PLACE", help="where activations wait: see prune --help")


def run(arguments: argparse.Namespace) -> int:
    """Compare, or render a finished comparison; 1 if a row failed."""
    from optimum_fista.run.checkpoints.output import locked_output
    from optimum_fista.run.comparison.comparison import Comparison

    if arguments.render is not None:
        if arguments.model is not None:
            raise ValueError("--render takes everything from its file: pass it without MODEL.")
        comparison = Comparison.read(arguments.render)
        with locked_output(arguments.output):
            Comparison.require_own(arguments.output)
            comparison.write_tables(arguments.output)
            comparison.write_plots(arguments.output)
    else:
        comparison = _compare(arguments)
    print(comparison.to_markdown(), end="")
    print(f"\nwritten to {arguments.output}")
    for failure in comparison.failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if comparison.failures else 0


def _compare(arguments: argparse.Namespace) -> Comparison:
    from optimum_fista.run.comparison.compare import compare
    from optimum_fista.run.comparison.settings import ComparisonSettings

    if arguments.model is None:
        raise ValueError("MODEL is missing: pass a Hub id or a model folder, or --render FILE.")
    given = {field.name: getattr(arguments, field.name) for field in fields(ComparisonSettings)}
    settings = ComparisonSettings(**{name: value for name, value in given.items() if value is not None})
    return compare(settings, arguments.output)


def words(text: str) -> list[str]:
    """What commas separate, without the spaces around it."""
    return [word for word in map(str.strip, text.split(",")) if word]


def _patterns(text: str) -> list[str]:
    return [pattern for pattern in text.split(";") if pattern] if ";" in text else words(text)


def _numbers(text: str) -> list[int]:
    return [int(word) for word in words(text)]

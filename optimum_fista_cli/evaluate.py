"""`optimum-fista evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
Measure the perplexity of a model on a text.

Non-overlapping windows from the start of the text, the mean negative log likelihood of all predicted tokens: the
protocol of the pruning literature. Use the same windows to compare models.

example:
  optimum-fista evaluate ./model-50 --text wikitext2 --sequence-length 2048 --output ./model-50/fista/evaluation.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="Hub id, model folder, or folder with one GGUF file")
    add("--text", required=True, metavar="SOURCE", help="a .txt or .jsonl file, wikitext2, c4, ptb, pydoc")
    add("--sequence-length", type=int, default=1024, help="tokens a window (default 1024)")
    add("--max-windows", type=int, help="stop after this many windows (default: the whole text)")
    add("--batch-size", type=int, default=1, help="windows a forward pass (default 1)")
    add("--device", help="cpu, cuda, cuda:1 (default: the accelerator, otherwise the CPU)")
    add("--dtype", default="auto", help="float32, bfloat16, float16 or auto, as stored (default)")
    add(
        "--output",
        "-o",
        type=Path,
        metavar="FILE.json",
        help="add the result to this file; `report DIR` looks for DIR/fista/evaluation.json",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    from optimum_fista.run.checkpoints.loading import load_model
    from optimum_fista.run.evaluation.evaluation_file import Evaluation, add_evaluation, read_evaluations
    from optimum_fista.run.evaluation.perplexity import evaluate_perplexity
    from optimum_fista.run.texts.text import load_text
    from optimum_fista.run.texts.windows import evaluation_windows

    if arguments.output is not None and arguments.output.exists():
        read_evaluations(arguments.output)  # a file that can't be added to is refused before the work
    text = load_text(arguments.text, "test")
    model, tokenizer = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    windows = evaluation_windows(tokenizer, text, arguments.sequence_length, arguments.max_windows)
    result = evaluate_perplexity(model, windows, batch_size=arguments.batch_size, text=text)
    print(
        f"perplexity {result.perplexity:.3f} on {arguments.text}: {result.num_windows} windows of "
        f"{result.sequence_length} tokens, {result.num_tokens} predicted, {result.seconds:.1f} s"
    )
    if arguments.output is not None:
        add_evaluation(arguments.output, Evaluation.of(arguments.model, result))
    return 0

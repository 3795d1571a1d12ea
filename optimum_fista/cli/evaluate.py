"""`optimum-fista evaluate`."""

from __future__ import annotations

import argparse
from itertools import chain
from pathlib import Path
from typing import Any

from optimum_fista.cli.flags import DEVICE, DTYPE

DESCRIPTION = """\
Measure the perplexity of a model on a text, its zero-shot accuracy on tasks, or both.

Perplexity is measured on windows of the text that do not overlap, from its start, and averages the negative log
likelihood over all predicted tokens. This is the protocol of the pruning literature. Use the same windows to compare
models. Accuracy is measured by lm-eval, without examples in the prompt, and has a standard error.

examples:
  optimum-fista evaluate ./model-50 --text wikitext2 --sequence-length 2048 --output ./model-50/fista/evaluation.json
  optimum-fista evaluate ./model-50 --tasks arc_easy,lambada_openai --output ./model-50/fista/evaluation.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="Hub id, model folder, or folder with one GGUF file")
    add("--text", metavar="SOURCE", help="perplexity on a .txt or .jsonl file, wikitext2, c4, ptb, pydoc")
    add("--sequence-length", type=int, default=1024, help="tokens in a window (default 1024)")
    add("--max-windows", type=int, help="stop after this many windows (default: the whole text)")
    add("--tasks", type=_words, metavar="A,B", help="zero-shot accuracy on tasks of lm-eval")
    add("--include-path", type=Path, metavar="DIR", help="folder of further task files (YAML)")
    add("--limit", type=int, help="measure at most this many documents of every task")
    add("--batch-size", type=int, default=1, help="windows or answers in a forward pass (default 1)")
    add("--device", **DEVICE)
    add("--dtype", **DTYPE)
    add("--output", "-o", type=Path, metavar="FILE.json", help="add to it (`report` reads DIR/fista/evaluation.json)")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    from optimum_fista.evaluate.evaluation_file import Evaluation, TaskResult, add_evaluation, require_addable
    from optimum_fista.evaluate.perplexity import evaluate_perplexity
    from optimum_fista.evaluate.tasks import TaskSuite
    from optimum_fista.folder.loading import load_model
    from optimum_fista.text.sources import load_text
    from optimum_fista.text.windows import evaluation_windows

    if not arguments.text and not arguments.tasks:
        raise ValueError("nothing to measure: pass --text SOURCE for the perplexity, or --tasks A,B for the accuracy.")
    if arguments.output is not None:
        require_addable(arguments.output)  # before hours of measuring
    options = {name: getattr(arguments, name) for name in ("include_path", "limit", "batch_size")}
    suite = TaskSuite(arguments.tasks, **options) if arguments.tasks else None  # refuses unknown tasks first
    perplexities: list[Any] = []
    text = load_text(arguments.text, "test") if arguments.text else None
    model, tokenizer = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    if text is not None:
        windows = evaluation_windows(tokenizer, text, arguments.sequence_length, arguments.max_windows)
        perplexities.append(evaluate_perplexity(model, windows, batch_size=arguments.batch_size, text=text))
    for result in chain(perplexities, suite.measure(model, tokenizer) if suite is not None else ()):
        if isinstance(result, TaskResult):
            for metric, score in result.scores.items():
                error = "" if score.stderr is None else f" ± {score.stderr:.4f}"
                print(f"{metric} {score.value:.4f}{error} on {result.task}: {result.num_documents} documents")
        else:
            place = f"{result.num_windows} windows of {result.sequence_length} tokens, {result.num_tokens} predicted"
            print(f"perplexity {result.perplexity:.3f} on {arguments.text}: {place}, {result.seconds:.1f} s")
        if arguments.output is not None:  # at once: the next task may fail
            add_evaluation(arguments.output, Evaluation.of(arguments.model, result))
    return 0


def _words(text: str) -> list[str]:
    return [word for word in map(str.strip, text.split(",")) if word]

"""`optimum-fista evaluate`: measure the perplexity of a model on a text."""

import argparse
from typing import TYPE_CHECKING

from optimum_fista.cli.flags import DEVICE, DTYPE

if TYPE_CHECKING:
    from optimum_fista.evaluate.perplexity import PerplexityResult

_USUAL_LENGTH = 1024  # tokens in a window

DESCRIPTION = """\
Measure the perplexity of a model on a text.

Perplexity is measured on windows of the text that do not overlap, from its start, and averages the negative log
likelihood over all predicted tokens. This is the protocol of the pruning literature. Use the same windows to compare
models. Bits per byte compare models with different vocabularies, on the same stretch of text.

With --loops the model also continues 64 pieces of the text by 128 tokens, always the most likely one. Counted are the
continuations that end in a cycle of at most 64 tokens, three times or more. Damaged models repeat themselves often.

examples:
  optimum-fista evaluate ./model-50 --text wikitext2 --sequence-length 2048
  optimum-fista evaluate ./model-50 --text notes.txt --loops
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="Hub id, model folder, or folder with one GGUF file")
    add(
        "--text",
        required=True,
        metavar="SOURCE",
        help="a .txt or .jsonl file (text or messages), wikitext2, c4, ptb, pydoc, or OWNER/NAME of the Hub",
    )
    add(
        "--sequence-length",
        type=int,
        help=f"tokens in a window (default: {_USUAL_LENGTH}, or the model's limit)",
    )
    add("--max-windows", type=int, help="stop after this many windows (default: the whole text)")
    add("--batch-size", type=int, default=1, help="windows in a forward pass (default 1)")
    add(
        "--loops",
        action="store_true",
        help="also continue 64 pieces of the text greedily, and count those that end in a loop",
    )
    add("--device", **DEVICE)
    add("--dtype", **DTYPE)


def run(arguments: argparse.Namespace) -> int:
    """Measure a model and print one line, with `--loops` a second one; returns the exit code.

    `arguments` are those that `add_arguments` describes. Texts and models from the Hub are downloaded to its cache.
    """
    from optimum_fista.source.model_folder import require_name
    from optimum_fista.text.sources import load_text

    # What can't be read is refused before the slow imports below.
    require_name(arguments.model)
    text = load_text(arguments.text, split="test")

    from optimum_fista.evaluate.perplexity import evaluate_perplexity
    from optimum_fista.source.loading import load_model
    from optimum_fista.text.calibration_tokens import usual_length
    from optimum_fista.text.windows import evaluation_windows

    model, tokenizer = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    text = text.written_by(tokenizer)  # conversations
    length = arguments.sequence_length
    if length is None:
        length = min(_USUAL_LENGTH, usual_length(model.config))
    windows = evaluation_windows(tokenizer, text, length, arguments.max_windows)
    # The text and the tokenizer say how many bytes the windows stand for, for the bits per byte.
    result = evaluate_perplexity(
        model, windows, batch_size=arguments.batch_size, text=text, tokenizer=tokenizer
    )
    print(_summary(result, arguments.text))
    if arguments.loops:
        from optimum_fista.text.loops import count_loops
        from optimum_fista.text.loss import cut_stretches

        stretches = cut_stretches(text.joined)
        (loops,) = count_loops(model, tokenizer, [stretches], progress=True)
        print(
            f"loops in {loops.num_loops} of {loops.num_prompts} greedy continuations of {loops.num_new_tokens} tokens "
            f"({loops.num_loops / loops.num_prompts:.1%})"
        )
    return 0


def _summary(result: "PerplexityResult", text_name: str) -> str:
    """Say in one line what was measured, on the text called `text_name`."""
    bits_per_byte = ""
    if result.bits_per_byte is not None:
        bits_per_byte = f", {result.bits_per_byte:.4f} bits per byte"
    return (
        f"perplexity {result.perplexity:.3f}{bits_per_byte} on {text_name}: {result.num_windows} windows of "
        f"{result.sequence_length} tokens, {result.num_tokens} predicted, {result.seconds:.1f} s"
    )

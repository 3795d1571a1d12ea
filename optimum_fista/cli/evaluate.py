"""`optimum-fista evaluate`."""

import argparse

from optimum_fista.cli.flags import DEVICE, DTYPE

DESCRIPTION = """\
Measure the perplexity of a model on a text.

Perplexity is measured on windows of the text that do not overlap, from its start, and averages the negative log
likelihood over all predicted tokens. This is the protocol of the pruning literature. Use the same windows to compare
models. Bits per byte compare models with different vocabularies, on the same stretch of text.

example:
  optimum-fista evaluate ./model-50 --text wikitext2 --sequence-length 2048
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="Hub id, model folder, or folder with one GGUF file")
    add(
        "--text",
        required=True,
        metavar="SOURCE",
        help="a .txt or .jsonl file, wikitext2, c4, ptb or pydoc",
    )
    add("--sequence-length", type=int, default=1024, help="tokens in a window (default 1024)")
    add("--max-windows", type=int, help="stop after this many windows (default: the whole text)")
    add("--batch-size", type=int, default=1, help="windows in a forward pass (default 1)")
    add("--device", **DEVICE)
    add("--dtype", **DTYPE)


def run(arguments: argparse.Namespace) -> int:
    from optimum_fista.evaluate.perplexity import evaluate_perplexity
    from optimum_fista.source.loading import load_model
    from optimum_fista.text.sources import load_text
    from optimum_fista.text.windows import evaluation_windows

    text = load_text(arguments.text, "test")
    model, tokenizer = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    windows = evaluation_windows(tokenizer, text, arguments.sequence_length, arguments.max_windows)
    found = evaluate_perplexity(
        model, windows, batch_size=arguments.batch_size, text=text, tokenizer=tokenizer
    )
    place = f"{found.num_windows} windows of {found.sequence_length} tokens, {found.num_tokens} predicted"
    per_byte = "" if found.bits_per_byte is None else f", {found.bits_per_byte:.4f} bits per byte"
    print(
        f"perplexity {found.perplexity:.3f}{per_byte} on {arguments.text}: {place}, {found.seconds:.1f} s"
    )
    return 0

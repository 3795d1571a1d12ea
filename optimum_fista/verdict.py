"""The verdict on a pruned model, in a few words, from its perplexity and that of the dense model.

The terminal, the model card and the page print the same verdict. Its limits are rules of thumb; docs/report.md lists
them.
"""

from __future__ import annotations

LEAST_TOKENS = 4096
"""Held-out sequences are taken until they hold this many tokens; a perplexity on fewer says little."""

OWN_TEXT = "self"
"""The source of text that the model wrote itself (`--calibration self`). It is too easy for the model."""

_WORDS_BY_RATIO = {
    1.1: "close to the dense model",
    1.5: "usable as it is",
    3.0: "clearly worse, training would help",
}
"""The verdict up to each ratio of the two perplexities, in rising order."""


def verdict(
    *, dense: float | None, pruned: float, num_tokens: int, text: str | None, vocabulary: int
) -> str:
    """Say in a few words how much worse a model became, such as "usable as it is", or why nothing can be said.

    Args:
        dense: Perplexity of the dense model; `None` if it is not known on this text.
        pruned: Perplexity of the pruned model, on the same tokens.
        num_tokens: How many tokens both were measured on.
        text: Name of the text, such as `"c4"`; `None` if it has none.
        vocabulary: Number of tokens that the models know. The perplexity of a guess is this number.
    """
    if num_tokens < LEAST_TOKENS:
        return f"no verdict on fewer than {LEAST_TOKENS:,} tokens"
    if text == OWN_TEXT:  # which the model wrote itself, so it is too easy for the model
        return "no verdict on text of its own"
    if dense is None:
        return "no verdict: the perplexity of the dense model is not known on this text"
    # A model that knows a little more than a guess can hardly become worse, so the ratio would say nothing.
    if dense > vocabulary / 2:
        return "no verdict: the dense model is no better than chance"

    # The ratios rise, so the first one that fits says most.
    for highest_ratio, words in _WORDS_BY_RATIO.items():
        if pruned <= highest_ratio * dense:
            return words
    return "broken: prune less"

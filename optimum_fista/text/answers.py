"""Which tokens of a conversation are of answers: what the model itself writes.

An *answer* is a turn of the role "assistant". The model's chat template writes a conversation as one text, with special
tokens around the turns. A template may mark what the model writes by `{% generation %}`. If it does not, the
conversation is written turn by turn, and an answer is what its turn adds after the words that ask for it, such as
"<|im_start|>assistant". The token that ends the turn is a part of the answer, and white space after it is not.

`text.windows.windows_with_answers` calls `answer_spans` for each conversation, and `tokens_in_spans` for its tokens.
"""

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from optimum_fista import internals
from optimum_fista.text.text_source import Conversation

ROLE_OF_ANSWERS = "assistant"
# As Transformers looks for it.
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def answer_spans(
    tokenizer: PreTrainedTokenizerBase, turns: Conversation, written: str
) -> list[tuple[int, int]]:
    """Find the answers of a conversation in its text: pairs of the first character and the one after the last.

    Args:
        tokenizer: The model's, whose chat template has written the text.
        turns: The turns of the conversation.
        written: The text.

    Raises:
        ValueError: If the template does not show where an answer is.
    """
    template = tokenizer.get_chat_template()
    if _MARK.search(template):
        return internals.marked_spans(tokenizer, turns)
    return [
        _span_of_turn(tokenizer, turns, number, written)
        for number, turn in enumerate(turns)
        if turn["role"] == ROLE_OF_ANSWERS
    ]


def tokens_in_spans(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> Tensor:
    """Tell which tokens have characters in some of the spans, booleans [tokens].

    `offsets` are the first character of each token and the one after its last, in the same text as `spans`. White space
    that a tokenizer leaves out of them belongs to the token after it.
    """
    offsets = _with_space_before(offsets)
    num_characters = max((end for _, end in [*offsets, *spans]), default=0)
    is_inside = torch.zeros(num_characters, dtype=torch.int64)
    for start, end in spans:
        is_inside[start:end] = 1
    # How many characters of spans stand before each place of the text. A token has some if its two ends differ in that.
    num_before = pad(is_inside.cumsum(0), (1, 0))
    ends = torch.tensor(offsets, dtype=torch.int64).view(-1, 2)  # this shape also without tokens
    return num_before[ends[:, 1]] > num_before[ends[:, 0]]


def _with_space_before(offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Let each token begin where the token before it ends, unless it begins earlier; `offsets` stay as they are.

    Some tokenizers leave white space out of the offsets (`trim_offsets`), so that tokens of spaces would have no
    character. Tokens that are parts of one character have the same offsets.
    """
    spans = list[tuple[int, int]]()
    end_before = 0
    for start, end in offsets:
        spans.append((min(start, end_before), end))
        end_before = end
    return spans


def _span_of_turn(
    tokenizer: PreTrainedTokenizerBase, turns: Conversation, number: int, written: str
) -> tuple[int, int]:
    """Find the answer in the turn with this number: what the turn adds to the text of the turns before it.

    The answer begins after the template's generation prompt, the words that ask the model for an answer. If the
    template has none, or writes an answer without it, the answer begins with the content of the turn: where the text
    changes if the content is another. `written` is the text of all `turns`. ValueError if the answer is not found.
    """
    text_before = _write(tokenizer, turns[:number])
    text_through_turn = _write(tokenizer, turns[: number + 1])
    is_prefix = text_through_turn.startswith(text_before) and written.startswith(text_through_turn)
    if not is_prefix:
        raise ValueError(
            "the model's chat template writes a turn otherwise when others follow, so it is not known where the answer "
            f"in turn {number + 1} is: pass conversations with one answer each, or a model whose template marks "
            "answers by {% generation %}."
        )

    text_with_prompt = _write(tokenizer, turns[:number], add_generation_prompt=True)
    has_prompt = len(text_with_prompt) > len(text_before)
    if has_prompt and text_through_turn.startswith(text_with_prompt):
        start = len(text_with_prompt)
    else:
        content = turns[number]["content"].strip()
        # A search would also find the content in what the template writes before it, such as "assistant".
        other_content = "1" if content.startswith("0") else "0"
        other_turn = {**turns[number], "content": other_content}
        other_text = _write(tokenizer, (*turns[:number], other_turn))
        start = _num_equal_characters(text_through_turn, other_text)
        is_content_there = text_through_turn[start:].lstrip().startswith(content)
        if start < len(text_before) or not is_content_there:
            raise ValueError(
                f"the model's chat template changes the answer in turn {number + 1}, so it is not found in the text: "
                "pass a model whose template marks answers by {% generation %}."
            )
    return start, len(text_through_turn.rstrip())


def _num_equal_characters(text: str, other: str) -> int:
    """Count the characters with which both texts begin."""
    pairs = zip(text, other, strict=False)  # up to the end of the shorter one
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _write(tokenizer: PreTrainedTokenizerBase, turns: Conversation, **options: Any) -> str:
    """Return some turns as the chat template writes them; nothing for no turn, which templates may refuse.

    ValueError if the template refuses these turns, which are the first ones of a conversation.
    """
    if not turns:
        return ""
    try:
        return str(tokenizer.apply_chat_template(list(turns), tokenize=False, **options))
    except Exception as error:  # of the template, which is code of other people
        raise ValueError(
            f"the model's chat template refuses the first {len(turns)} turns without the others "
            f"({type(error).__name__}: {error}), so it is not known where an answer is: remove or change the "
            "conversation, or pass a model whose template marks answers by {% generation %}."
        ) from error

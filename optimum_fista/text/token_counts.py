"""Count the tokens of documents, and hold some of the text out: text that nothing is counted on.

`HeldOutText.counted` takes some pieces out of documents and passes the rest on; `count_tokens` counts the tokens of
that rest. Afterwards, `HeldOutText.pieces` is text to measure on what the counts are worth.
"""

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

# Characters of a part of a document that is tokenised alone.
_PART_CHARACTERS = 1 << 13
# Parts that are tokenised in one call, in parallel: 1 million characters, whose encodings need about 100 MB.
_PARTS_TOGETHER = 128
# A place between words or lines, which hardly any token crosses.
_BORDER = re.compile(r"(?<=\w)(?= \w)|(?<=\n)(?=\S)")

# Characters of a held-out piece: about a thousand tokens.
_PIECE_CHARACTERS = 4096
# Characters that are held out at most: between this and half of it are left of a long text.
_MOST_CHARACTERS = 16 * _PIECE_CHARACTERS
# Share of the text that is held out at most.
_SHARE = 0.1


def count_tokens(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], size: int) -> Tensor:
    """Count each token in documents, without special tokens around them: int64, [size].

    Args:
        tokenizer: A fast one, of Transformers.
        documents: Texts of any length, read once, one after the other.
        size: Rows of the model's embedding.

    Raises:
        ValueError: If the tokenizer is not a fast one, or has an id that is not less than `size`.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer={type(tokenizer).__name__} is not a fast one: pass one that has a tokenizer.json."
        )

    counts = torch.zeros(size, dtype=torch.int64)
    for parts in _parts_together(documents):
        encoded = tokenizer(
            parts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids = torch.tensor(
            [token for part in encoded["input_ids"] for token in part], dtype=torch.int64
        )
        if len(ids) and int(ids.max()) >= size:
            raise ValueError(
                f"size={size}, but the tokenizer has the id {int(ids.max())}: pass the rows of the model."
            )
        counts += torch.bincount(ids, minlength=size)
    return counts


class HeldOutText:
    """Pieces of documents that are held out, spread evenly over all of the text.

    At most a tenth of the text is held out. Of a long text, pieces are released again (then they are counted), so that
    a few dozen thousand characters stay held out, from its beginning to its end.
    """

    def __init__(self) -> None:
        self.pieces: list[str] = []  # in the order of the text; complete when `counted` has ended
        self.num_characters = 0  # of the whole text, so far
        self._share = _SHARE  # becomes half as large when pieces are released

    def counted(self, documents: Iterable[str]) -> Iterator[str]:
        """Yield the text that is not held out: parts of the documents, and at the end pieces that were released.

        Changes `pieces`. A text of which less than one piece could be held out is yielded whole.
        """
        for document in documents:
            for part in _parts(document):
                yield from self._counted_of(part)

        if self._num_held_out() < _PIECE_CHARACTERS:
            yield from self.pieces
            self.pieces = []

    def _counted_of(self, part: str) -> Iterator[str]:
        """Hold the beginning of a part out if that is due, and yield the rest; yields pieces that are released too."""
        self.num_characters += len(part)
        end = len(part)
        if len(part) > _PIECE_CHARACTERS:
            border = _BORDER.search(part, _PIECE_CHARACTERS)
            end = len(part) if border is None else border.end()

        is_due = self._num_held_out() + end <= self._share * self.num_characters
        if not is_due:
            yield part
            return
        self.pieces.append(part[:end])
        if end < len(part):
            yield part[end:]

        if self._num_held_out() > _MOST_CHARACTERS:
            released = self.pieces[1::2]
            self.pieces = self.pieces[::2]
            self._share /= 2
            yield from released

    def _num_held_out(self) -> int:
        """Characters that are held out now."""
        return sum(map(len, self.pieces))


def _parts_together(documents: Iterable[str]) -> Iterator[list[str]]:
    """Yield lists of parts of documents, each list for one call of a tokenizer."""
    parts = list[str]()
    for document in documents:
        for part in _parts(document):
            parts.append(part)
            if len(parts) == _PARTS_TOGETHER:
                yield parts
                parts = []
    if parts:
        yield parts


def _parts(document: str) -> Iterator[str]:
    """Cut a document at borders of words or lines into parts of `_PART_CHARACTERS` or a little more; none if empty."""
    start = 0
    while start < len(document):
        border = _BORDER.search(document, start + _PART_CHARACTERS)
        end = len(document) if border is None else border.end()
        yield document[start:end]
        start = end

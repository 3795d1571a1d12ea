"""Count the tokens of documents, and hold some of the text out: text that nothing is counted on.

`HeldOutText.counted` takes some *pieces* out of documents and passes the rest on; `count_tokens` counts the tokens of
that rest. Afterwards, `HeldOutText.pieces` is text to measure on what the counts are worth. A *part* is a stretch of a
document that is short enough to be tokenised alone; a piece is the beginning of a part.
"""

import itertools
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
        # verbose=False: a text longer than the model's context is no mistake here.
        encoded = tokenizer(
            parts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids_of_parts = itertools.chain.from_iterable(encoded["input_ids"])
        ids = torch.tensor(list(ids_of_parts), dtype=torch.int64)
        largest_id = int(ids.max()) if len(ids) else 0
        if largest_id >= size:
            raise ValueError(
                f"size={size}, but the tokenizer has the id {largest_id}: pass the rows of the model."
            )
        counts += torch.bincount(ids, minlength=size)
    return counts


class HeldOutText:
    """Pieces of documents that are held out, spread evenly over all of the text.

    At most a tenth of the text is held out. Of a long text, pieces are released again (then they are counted), so that
    a few dozen thousand characters stay held out, from its beginning to its end.

    Attributes:
        pieces: The text that is held out, in its order; complete when `counted` has ended.
        num_characters: Those of the whole text that `counted` has read so far.
    """

    def __init__(self) -> None:
        """Hold out nothing yet."""
        self.pieces: list[str] = []
        self.num_characters = 0
        self._share = _SHARE  # becomes half as large when pieces are released

    def counted(self, documents: Iterable[str]) -> Iterator[str]:
        """Yield the text that is not held out: parts of the documents, and pieces that were held out for a time only.

        Meanwhile, `_counted_of` fills `self.pieces` with the text that is held out, and counts the characters of all
        text (`self.num_characters`). If less than a usual piece of `_PIECE_CHARACTERS` characters was held out at the
        end, that is yielded, too, and `self.pieces` is empty.
        """
        for document in documents:
            for part in _parts(document):
                yield from self._counted_of(part)

        is_too_little = self._num_held_out() < _PIECE_CHARACTERS
        if is_too_little:
            yield from self.pieces
            self.pieces = []

    def _counted_of(self, part: str) -> Iterator[str]:
        """Hold the beginning of a part out if less than the share of the text is held out, and yield the rest.

        Adds to `self.num_characters` and `self.pieces`. If the pieces have become too many, every second one is
        released (yielded, to be counted after all), and `self._share`, the share that is held out (0 to 1), is halved.
        """
        self.num_characters += len(part)
        end = len(part)  # of the piece that may be held out
        if len(part) > _PIECE_CHARACTERS:
            end = _border_after(part, 0, _PIECE_CHARACTERS)

        may_be_held_out = self._num_held_out() + end <= self._share * self.num_characters
        if not may_be_held_out:
            yield part
            return
        self.pieces.append(part[:end])
        if end < len(part):
            yield part[end:]

        are_too_many = self._num_held_out() > _MOST_CHARACTERS
        if are_too_many:
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
    """Cut a document at borders of words or lines into parts of `_PART_CHARACTERS` to twice as many characters.

    A stretch without a border, such as Chinese or minified code, is cut at the most characters. Together the parts are
    the document. An empty document has none.
    """
    start = 0
    while start < len(document):
        end = _border_after(document, start, _PART_CHARACTERS)
        yield document[start:end]
        start = end


def _border_after(text: str, start: int, characters: int) -> int:
    """Return the first border of words or lines that is `characters` or more after `start`; at most twice as many."""
    latest = min(start + 2 * characters, len(text))
    border = _BORDER.search(text, start + characters, latest)
    return latest if border is None else border.end()

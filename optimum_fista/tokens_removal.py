"""The request to remove tokens from a model's vocabulary: `pattern="vocab:0.35"` of a configuration, as an object.

Tokens are no pattern of zeros in a matrix: a run that removes them loads no decoder layer to prune, and takes texts.
`FistaPruningConfig.tokens_removal` makes the request, and `removal.tokens.remove_tokens` does what it says.
"""

import re
from dataclasses import dataclass
from typing import Self

# A share as `float` reads it, or "unused"; then the divisor of the number of tokens that stay.
_TEXT = re.compile(r"vocab:(?:((?:\d+\.?\d*|\.\d+)(?:e-\d+)?)|unused)(?:/(\d+))?")
# Kernels of matrix products are fast for matrices whose sizes are multiples of 64.
_USUAL_MULTIPLE = 64


@dataclass(frozen=True)
class TokensRemoval:
    """Which share of a model's tokens is removed, and which tokens stay whatever the text says."""

    # of the rows of the embedding, in (0, 1); None: the tokens that the text never has are removed
    share: float | None
    # the number of tokens that stay is a multiple of it; None: of 64
    multiple_of: int | None = None
    # ids, or texts whose tokens stay, such as "zebra"
    keep: tuple[str | int, ...] = ()

    @classmethod
    def read(cls, text: str, keep: tuple[str | int, ...] = ()) -> Self | None:
        """Read `"vocab:0.35"`, `"vocab:unused"`, or one of them with a multiple, `"vocab:0.35/128"`.

        Returns `None` if the text is a pattern of another kind; ValueError if it names tokens and makes no sense.
        `keep` are ids, or texts whose tokens stay whatever the text says: the field of this name.
        """
        parts = text.split("+")
        if not any(part.startswith("vocab:") for part in parts):
            return None
        if len(parts) > 1:
            raise ValueError(
                f"pattern={text!r}: remove tokens first, in a run of its own, and then the other parts."
            )

        share: float | None = None
        multiple_of: int | None = None
        match = _TEXT.fullmatch(text)
        if match is not None:
            share_text, multiple_text = match.groups()
            if share_text is not None:
                share = float(share_text)
            if multiple_text is not None:
                multiple_of = int(multiple_text)

        is_share = share is None or 0 < share < 1
        if match is None or not is_share or multiple_of == 0:
            raise ValueError(
                f"pattern={text!r}: pass a share of the tokens in (0, 1) and a multiple of at least 1, such as "
                "'vocab:0.25' or 'vocab:0.25/64', or 'vocab:unused'."
            )
        return cls(share, multiple_of, keep)

    @classmethod
    def keeping(cls, num_kept: int, number: int) -> Self:
        """Make the request that leaves `num_kept` of `number` tokens, with a share of as few digits as possible.

        `num_kept` has to be a multiple of `step(number)`, which is 64 for more than 64 tokens.
        """
        exact = 1 - num_kept / number  # may need 17 digits
        # The number that a share leaves is rounded to the nearest multiple of the step (`_nearest`). So fewer digits do
        # if that still is `num_kept`.
        for digits in range(2, 9):
            request = cls(round(exact, digits))
            if request._nearest(number) == num_kept:
                return request
        return cls(exact)

    def __str__(self) -> str:
        """The text that `read` takes."""
        share = "unused" if self.share is None else f"{self.share}"
        multiple = "" if self.multiple_of is None else f"/{self.multiple_of}"
        return f"vocab:{share}{multiple}"

    def step(self, number: int) -> int:
        """Return what the number of tokens that stay is a multiple of, if the model has `number` tokens."""
        if self.multiple_of is not None:
            return self.multiple_of
        return _USUAL_MULTIPLE if number > _USUAL_MULTIPLE else 1

    def num_kept(self, number: int) -> int:
        """Count the tokens that stay of `number`, for a request with a share; ValueError if none or all would stay.

        The count is a multiple of `step`, the nearest one to what the share leaves.
        """
        step = self.step(number)
        num_kept = self._nearest(number)
        most = (number - 1) // step * step  # the largest multiple that is not all
        if not 1 <= num_kept < number:
            raise ValueError(
                f"pattern={str(self)!r}: {num_kept} of {number} tokens would stay (a multiple of {step}); pass a "
                f"share for which {step} to {most} stay."
            )
        return num_kept

    def _nearest(self, number: int) -> int:
        """The multiple of the step that is nearest to what the share leaves of `number` tokens: possibly 0 or all."""
        assert self.share is not None
        step = self.step(number)
        return step * round((1 - self.share) * number / step)

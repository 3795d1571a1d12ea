"""Sparsity patterns, found by the list below."""

import re
from dataclasses import replace

from optimum_fista.solve.pattern import Scope, SparsityPattern
from optimum_fista.solve.patterns.columns import Columns
from optimum_fista.solve.patterns.n_of_m import NOfM
from optimum_fista.solve.patterns.pairs import Pairs
from optimum_fista.solve.patterns.unstructured import Unstructured
from optimum_fista.solve.patterns.whole_parts import PartShare, WholeParts

PATTERNS: tuple[type[SparsityPattern], ...] = (Unstructured, NOfM, Pairs, Columns, WholeParts)

__all__ = ["PATTERNS", "Columns", "NOfM", "Pairs", "PartShare", "Unstructured", "WholeParts", "parse_pattern"]


def parse_pattern(
    text: str = "unstructured", sparsity: float | None = None, scope: Scope = "matrix"
) -> SparsityPattern:
    """Build a pattern from its text, one of `form` of `PATTERNS`; inverse of `SparsityPattern.text`.

    Whole parts, a comma, and the pattern or fraction of zeros of what stays are a pattern too: `"channels:0.25,2:4"`.

    Raises:
        ValueError: If the text has none of the forms or makes no sense, if `sparsity` is outside [0, 1), or if both
            are given and disagree.
    """
    if scope not in ("matrix", "row"):
        raise ValueError(f"scope={scope!r}: pass 'matrix' or 'row'.")
    if sparsity is not None and (isinstance(sparsity, bool) or not 0 <= float(sparsity) < 1):
        raise ValueError(f"sparsity={sparsity!r} is outside [0, 1): pass the fraction of zeros, such as 0.5.")
    if "," in str(text):
        found: SparsityPattern | None = _parts_then_zeros(str(text), sparsity, scope)
    else:
        found = next((pattern for kind in PATTERNS if (pattern := kind.read(str(text), sparsity, scope))), None)
    if found is None:
        raise ValueError(f"pattern={text!r}: pass {' or '.join(kind.form for kind in PATTERNS)}.")
    if sparsity is not None and abs(float(sparsity) - found.sparsity) > 1e-9:
        meaning, advice = f"{text} means a sparsity of {found.sparsity:g}", "Pass only one of them."
        if isinstance(found, WholeParts) and found.then is None:
            advice = f"For zeros in what stays pass pattern='{text},{sparsity!r}' alone."
        raise ValueError(f"sparsity={sparsity!r} and pattern={text!r} disagree: {meaning}. {advice}")
    return found


def _parts_then_zeros(text: str, sparsity: float | None, scope: Scope) -> WholeParts:
    """The pattern of a text with a comma.

    Raises:
        ValueError: If it makes no sense to remove what is before the comma, and to make zeros as after it.
    """
    parts, _, rest = text.partition(",")
    if re.fullmatch(r"(\d+\.?\d*|\.\d+)(e-\d+)?", rest):
        rest, sparsity = "unstructured", float(rest)
    first, then = (parse_pattern(parts), parse_pattern(rest, sparsity, scope)) if parts and rest else (None, None)
    if not isinstance(first, WholeParts) or then is None or isinstance(then, WholeParts) or not then.sparsity:
        raise ValueError(
            f"pattern={text!r}: before a comma pass whole parts, all joined by '+', and after it the pattern or the "
            "fraction of zeros of what stays, such as 'channels:0.25+heads:0.5,2:4' or 'channels:0.25,0.5'."
        )
    return replace(first, sparsity=then.sparsity, scope=scope, then=then)

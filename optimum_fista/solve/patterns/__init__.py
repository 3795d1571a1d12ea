"""Sparsity patterns, found by the list below."""

import re

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
    """Build a pattern from its text, which one of `PATTERNS` reads; inverse of `SparsityPattern.text`."""
    if scope not in ("matrix", "row"):
        raise ValueError(f"scope={scope!r}: pass 'matrix' or 'row'.")
    if sparsity is not None and (isinstance(sparsity, bool) or not 0 <= float(sparsity) < 1):
        raise ValueError(f"sparsity={sparsity!r} is outside [0, 1): pass the fraction of zeros, such as 0.5.")
    before, comma, after = str(text).partition(",")
    if comma:
        raise ValueError(
            f"pattern={text!r}: one run removes parts or sets zeros. Prune with {before!r}, and then prune the smaller "
            f"model with {after!r}."
        )
    found = next((pattern for kind in PATTERNS if (pattern := kind.read(str(text), sparsity, scope))), None)
    if found is None:
        usual = "'unstructured', '2:4' or 'channels:0.25' (`optimum-fista prune --help` names all patterns)"
        if n_of_m := re.fullmatch(r"(\d+)of(\d+)", str(text)):
            usual = f"'{n_of_m[1]}:{n_of_m[2]}'"
        elif re.fullmatch(r"0?\.\d+", str(text)):
            usual = f"sparsity={text} (--sparsity {text}) for this share of zeros"
        raise ValueError(f"pattern={text!r}: pass {usual}.")
    if sparsity is not None and abs(float(sparsity) - found.sparsity) > 1e-9:
        meaning, advice = f"{text} means a sparsity of {found.sparsity:g}", "Pass only one of them"
        if isinstance(found, WholeParts):
            advice += ", and for zeros as well prune the smaller model again"
        raise ValueError(f"sparsity={sparsity!r} and pattern={text!r} disagree: {meaning}. {advice}.")
    return found

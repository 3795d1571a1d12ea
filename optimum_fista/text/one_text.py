"""Whether two sources of text are one text: then a run would be tested on the text that it was fitted to.

A *source* is what a user names, such as "c4" or "code.txt" (`text.sources`).

- `require_different` compares sources to calibrate on, before they are read.
- `require_different_texts` compares them after they were read.
- `require_held_out` compares sources to measure on with those to calibrate on.
"""

import filecmp
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from optimum_fista.text.hub_texts import name_of_set
from optimum_fista.text.text_source import TextSource


def require_different(sources: Sequence[str]) -> None:
    """Refuse sources of calibration text, such as ("c4", "code.txt"), of which two are one text (ValueError).

    No text is read, so files with equal content are not noticed (`require_different_texts`).
    """
    for index, source in enumerate(sources):
        for earlier in sources[:index]:
            # `_are_one_text` says no if the source to measure on names no split. Of two sources to calibrate on, either
            # may name one, so both orders are tried.
            are_one_text = (
                source == earlier
                or _are_one_text(source, calibrated=earlier)
                or _are_one_text(earlier, calibrated=source)
            )
            if are_one_text:
                raise ValueError(
                    f"calibration (--calibration) has the text {source!r} twice: pass it once."
                )


def require_different_texts(sources: Sequence[str], texts: Sequence[TextSource]) -> None:
    """Refuse two sources of calibration text with equal content (ValueError).

    Experts are refitted to all texts but one, and tested on that one. Tokens are counted on one part of the text, and
    the loss without the others is measured on another part. A training holds out a part of each text. `texts` are those
    of the sources, in their order.
    """
    first_sources = dict[str, str]()  # by the digest of the text
    for source, text in zip(sources, texts, strict=True):
        first_source = first_sources.setdefault(text.sha256, source)
        if first_source != source:
            raise ValueError(
                f"--calibration {source} has the same text as {first_source}: pass one of the two."
            )


def require_held_out(measured: Iterable[str], calibrated: Iterable[str]) -> None:
    """Refuse texts to measure on that are among the calibration text, too (ValueError).

    A copy of a file is the same text: files of equal size are read and compared.

    Args:
        measured: The sources of `--measure` and `--protect`, such as "code.txt" or "wikitext2".
        calibrated: The sources of the calibration text.
    """
    sources = list(calibrated)
    for source in measured:
        is_calibrated_on = any(
            _are_one_text(source, calibrated=other) or _have_same_content(source, other)
            for other in sources
        )
        if is_calibrated_on:
            raise ValueError(
                f"--measure or --protect: {source!r} is among the calibration text, so it is not held out: pass "
                "another text."
            )


def _are_one_text(source: str, *, calibrated: str) -> bool:
    """Tell whether a source to measure on is the text of a source to calibrate on: one file, or both `pydoc`.

    Paths may differ, but files with equal content are two texts. A data set of the Hub is the same text only if the
    split to measure on is named ("OWNER/NAME:SPLIT"): otherwise other rows are measured than those of the calibration.
    """
    if source == calibrated == "pydoc":
        return True

    measured_set = name_of_set(source)
    calibrated_set = name_of_set(calibrated)
    if measured_set is not None and calibrated_set is not None:
        if measured_set[:2] != calibrated_set[:2]:  # repository and configuration
            return False
        if measured_set.split is None:
            return False
        if calibrated_set.split is None:
            # The calibration takes a split whose name begins so.
            return measured_set.split.startswith("train")
        return measured_set.split == calibrated_set.split

    are_files = Path(source).is_file() and Path(calibrated).is_file()
    return are_files and os.path.samefile(source, calibrated)


def _have_same_content(source: str, other: str) -> bool:
    """Tell whether two sources are files with the same bytes. Only files of equal size are read."""
    are_files = Path(source).is_file() and Path(other).is_file()
    return are_files and filecmp.cmp(source, other, shallow=False)

"""Text sources for calibration and for perplexity: local files, Python's own documentation, Hub data sets.

The texts of the Hub are cut and joined as in the scripts of SparseGPT and Wanda, so that perplexities can be compared
with published ones.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from optimum_fista.installing import install_command
from optimum_fista.report import HUB_DATASETS

Split = Literal["calibration", "test"]

_SEPARATOR = "\n\n"
_ACCEPTED_SOURCES = (
    "a path that ends in .txt (one document) or .jsonl (field 'text' in every line), 'pydoc' (Python's own "
    "documentation, no download), 'wikitext2', 'c4' or 'ptb' (from the Hub, with the package `datasets`), "
    "or, for calibration only and not read from a text, 'self' (the model writes its own tokens)"
)


@dataclass(frozen=True)
class TextSource:
    """Documents to tokenise."""

    name: str  # of the file, or the data set's usual name
    documents: tuple[str, ...]
    separator: str  # between two documents when the source is read as one text
    origin: str = ""  # where the documents come from and how they are joined, for people
    max_windows: int | None = None  # that perplexity is measured on, by the literature's protocol; None = all

    @property
    def joined(self) -> str:
        """The documents as one text."""
        return self.separator.join(self.documents)

    @property
    def sha256(self) -> str:
        """Hex digest of the joined text in UTF-8: equal for equal texts, whatever file they came from."""
        return hashlib.sha256(self.joined.encode("utf-8", "surrogatepass")).hexdigest()


# Arguments of `_read_hub`, as in SparseGPT's datautils.py and Wanda's lib/data.py, under the names that the data sets
# have on today's Hub. C4's files are shuffled: the first documents of one (10 million tokens) represent all and fit in
# memory; its test text ends after 256 windows there. PTB's main branch is a script, which `datasets` 4 refuses; the Hub
# keeps a parquet copy of its configuration `penn_treebank` under another revision.
_WIKITEXT = {"repository": HUB_DATASETS["wikitext2"], "name": "wikitext-2-raw-v1"}
_C4_DOCUMENTS = {"repository": HUB_DATASETS["c4"], "max_rows": 20_000, "are_documents": True}
_C4_TEXT = {"repository": HUB_DATASETS["c4"], "max_rows": 1100, "max_windows": 256}
_PTB = {"repository": HUB_DATASETS["ptb"], "revision": "refs/convert/parquet", "column": "sentence"}
_HUB: dict[tuple[str, Split], dict[str, Any]] = {
    ("wikitext2", "calibration"): _WIKITEXT | {"split": "train"},
    ("wikitext2", "test"): _WIKITEXT | {"split": "test", "separator": "\n\n"},
    ("c4", "calibration"): _C4_DOCUMENTS | {"split": "train", "file": "en/c4-train.00000-of-01024.json.gz"},
    ("c4", "test"): _C4_TEXT | {"split": "validation", "file": "en/c4-validation.00000-of-00008.json.gz"},
    ("ptb", "calibration"): _PTB | {"split": "train", "file": "penn_treebank/train/0000.parquet"},
    ("ptb", "test"): _PTB | {"split": "test", "file": "penn_treebank/test/0000.parquet"},
}


def require_source(source: str) -> None:
    """Refuse a source that can't be read here; no text is read for this, and nothing is asked of the Hub.

    Raises:
        ValueError: If the source is unknown.
        FileNotFoundError: If a path ends in .txt or .jsonl and no such file exists.
        ImportError: If a Hub data set is asked for and the package `datasets` is missing.
    """
    if source == "pydoc":
        return
    if source in HUB_DATASETS:
        if find_spec("datasets") is None:
            raise ImportError(
                f"source={source!r} needs the package `datasets`, which is not installed: "
                f"run {install_command('datasets')}, or pass a local .txt or .jsonl file."
            )
    elif Path(source).suffix not in (".txt", ".jsonl"):
        raise ValueError(f"source={source!r} is not known; pass {_ACCEPTED_SOURCES}.")
    elif not Path(source).is_file():
        raise FileNotFoundError(f"source={source!r}: there is no such file; pass {_ACCEPTED_SOURCES}.")


def usual_texts() -> tuple[str, str]:
    """Texts to measure and to calibrate on: the literature's, or Python's own pages without the package for them."""
    return ("wikitext2", "c4") if find_spec("datasets") else ("pydoc", "pydoc")


def load_text(source: str, split: Split) -> TextSource:
    """Read a text source.

    Local files and `pydoc` have one split: "calibration" and "test" give the same text, so do not measure on
    the source you calibrated on. `pydoc` changes with the Python version; compare `sha256`.

    Args:
        source: A path to a `.txt` or `.jsonl` file, `pydoc`, `wikitext2`, `c4` or `ptb`.
        split: "calibration" or "test".

    Raises:
        ValueError: If the source or the split is unknown, or a file is empty, not UTF-8 or not as described.
        FileNotFoundError: If a path ends in .txt or .jsonl and no such file exists.
        ImportError: If a Hub data set is asked for and the package `datasets` is missing.
        ConnectionError: If a Hub data set cannot be loaded.
    """
    require_source(source)
    if split not in get_args(Split):
        raise ValueError(f"split={split!r} is not known; pass 'calibration' or 'test'.")
    if source in HUB_DATASETS:
        return _read_hub(source, **_HUB[source, split])
    if source == "pydoc":
        from pydoc_data.topics import topics

        origin = f"Python {platform.python_version()}'s help topics joined by {_SEPARATOR!r}"
        return TextSource("pydoc", tuple(topics[key] for key in sorted(topics)), _SEPARATOR, origin)
    return _read_file(Path(source))


def _read_file(path: Path) -> TextSource:
    where = f"source={str(path)!r}"
    try:
        content = path.read_bytes().decode("utf-8")  # not read_text, which would turn \r\n into \n
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 ({error}); save it as UTF-8.") from error
    documents: tuple[str, ...] = (content,)
    if path.suffix == ".jsonl":
        lines = enumerate(content.split("\n"), start=1)  # not splitlines, which ends lines at U+2028 too
        documents = tuple(_document(line, f"{where}, line {number}") for number, line in lines if line.strip())
    if not any(map(str.strip, documents)):
        raise ValueError(f'{where} is empty; pass a file with text (in a .jsonl file under "text").')
    joined = f", {len(documents)} documents joined by {_SEPARATOR!r}" if path.suffix == ".jsonl" else ""
    return TextSource(path.name, documents, _SEPARATOR, f"file {path.name}{joined}")


def _document(line: str, place: str) -> str:
    advice = 'every line must be a JSON object with a string under "text"'
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error}); {advice}.") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f"{place}: found {line.strip()[:80]}; {advice}.")
    return record["text"]


def _read_hub(
    source: str,
    *,
    repository: str,
    split: str,
    column: str = "text",
    separator: str = " ",
    file: str | None = None,
    max_rows: int | None = None,
    are_documents: bool = False,
    max_windows: int | None = None,
    **options: str,
) -> TextSource:
    """The first rows of one column, joined to one document unless each is one; `options` are `load_dataset`'s."""
    from datasets import load_dataset  # which takes seconds to import

    try:
        files = {} if file is None else {"data_files": {split: file}}
        texts = tuple(load_dataset(repository, split=split, **options, **files)[:max_rows][column])
    except Exception as error:  # the Hub, the network and `datasets` have no common base class
        raise ConnectionError(
            f"source={source!r}: could not load {repository!r} from the Hub ({type(error).__name__}: {error}). "
            "If the Hub cannot be reached, pass a local .txt or .jsonl file."
        ) from error
    place = " ".join(part for part in (repository, *options.values(), file) if part)
    rows = "all rows" if max_rows is None else f"first {max_rows} rows"
    origin = f"{place}, split {split}, {rows} joined by {separator!r}"
    return TextSource(source, texts if are_documents else (separator.join(texts),), separator, origin, max_windows)

"""Text sources for calibration and for perplexity: local files, Python's own documentation, Hub data sets."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Split = Literal["calibration", "test"]

_SEPARATOR = "\n\n"

FILE_SUFFIXES = (".txt", ".jsonl")
ACCEPTED_SOURCES = (
    "a path that ends in .txt (one document) or .jsonl (field 'text' in every line), 'pydoc' (Python's own "
    "documentation, no download), 'wikitext2', 'c4' or 'ptb' (from the Hub, with the package `datasets`), "
    "or, for calibration only and not read from a text, 'self' (the model writes its own tokens)"
)


@dataclass(frozen=True)
class TextSource:
    """Documents to tokenise.

    Attributes:
        name: Short name for reports: the file's name, or the data set's usual name.
        documents: At least one text.
        separator: What stands between two documents when the source is read as one text.
        origin: Where the documents come from and how they are joined, for people.
        max_windows: Windows that perplexity is measured on at most, by the literature's protocol; None = all.
    """

    name: str
    documents: tuple[str, ...]
    separator: str
    origin: str = ""
    max_windows: int | None = None

    @property
    def joined(self) -> str:
        """The documents as one text."""
        return self.separator.join(self.documents)

    @property
    def sha256(self) -> str:
        """Hex digest of the joined text in UTF-8: equal for equal texts, whatever file they came from."""
        return hashlib.sha256(self.joined.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class HubRecipe:
    """How one split of a Hub data set becomes text.

    Attributes:
        repository: Data set repository on the Hub.
        split: Split of the data set.
        column: Column that holds the text.
        separator: What joins the rows.
        options: Further arguments of `datasets.load_dataset`.
        max_rows: Use only the first rows; None = all.
        rows_are_documents: False when the rows are lines of one running text, which become one document.
        max_windows: Windows that perplexity is measured on at most; None = all.
    """

    repository: str
    split: str
    column: str
    separator: str
    options: Mapping[str, Any]
    max_rows: int | None = None
    rows_are_documents: bool = False
    max_windows: int | None = None

    def __str__(self) -> str:
        """For people: repository, files, split, rows and how they are joined."""
        files = self.options.get("data_files", {}).get(self.split)
        parts = [self.repository, self.options.get("name"), self.options.get("revision"), files]
        rows = "all rows" if self.max_rows is None else f"first {self.max_rows} rows"
        place = " ".join(part for part in parts if part)
        return f"{place}, split {self.split}, {rows} joined by {self.separator!r}"


def _wikitext2(split: str, separator: str) -> HubRecipe:
    return HubRecipe("Salesforce/wikitext", split, "text", separator, {"name": "wikitext-2-raw-v1"})


def _c4(
    split: str, file: str, max_rows: int, *, rows_are_documents: bool = False, max_windows: int | None = None
) -> HubRecipe:
    options = {"data_files": {split: file}}
    return HubRecipe("allenai/c4", split, "text", " ", options, max_rows, rows_are_documents, max_windows)


def _ptb(split: str) -> HubRecipe:
    # The repository's main branch is a script, which `datasets` 4 refuses; the Hub keeps a parquet copy of
    # its configuration `penn_treebank` under this revision.
    files = {split: f"penn_treebank/{split}/0000.parquet"}
    options = {"revision": "refs/convert/parquet", "data_files": files}
    return HubRecipe("ptb-text-only/ptb_text_only", split, "sentence", " ", options)


# As in SparseGPT's datautils.py and Wanda's lib/data.py, under the names the data sets have on today's Hub.
# C4's files are shuffled: the first documents of one (10 million tokens) represent all and fit in memory. Its test
# text ends after 256 windows there.
HUB_RECIPES: dict[tuple[str, Split], HubRecipe] = {
    ("wikitext2", "calibration"): _wikitext2("train", " "),
    ("wikitext2", "test"): _wikitext2("test", "\n\n"),
    ("c4", "calibration"): _c4("train", "en/c4-train.00000-of-01024.json.gz", 20_000, rows_are_documents=True),
    ("c4", "test"): _c4("validation", "en/c4-validation.00000-of-00008.json.gz", 1100, max_windows=256),
    ("ptb", "calibration"): _ptb("train"),
    ("ptb", "test"): _ptb("test"),
}


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
    if split not in get_args(Split):
        raise ValueError(f"split={split!r} is not known; pass 'calibration' or 'test'.")
    if source == "pydoc":
        return _read_pydoc()
    if (source, split) in HUB_RECIPES:
        return _read_hub(source, HUB_RECIPES[source, split])
    path = Path(source)
    if path.suffix not in FILE_SUFFIXES:
        raise ValueError(f"source={source!r} is not known; pass {ACCEPTED_SOURCES}.")
    if not path.is_file():
        raise FileNotFoundError(f"source={source!r}: there is no such file; pass {ACCEPTED_SOURCES}.")
    return _read_jsonl(path) if path.suffix == ".jsonl" else _read_txt(path)


def _read_pydoc() -> TextSource:
    from pydoc_data.topics import topics

    documents = tuple(topics[key] for key in sorted(topics))
    origin = f"Python {platform.python_version()}'s help topics joined by {_SEPARATOR!r}"
    return TextSource("pydoc", documents, _SEPARATOR, origin)


def _read_txt(path: Path) -> TextSource:
    content = _decode(path)
    if not content.strip():
        raise ValueError(f"source={str(path)!r} is empty; pass a file with text.")
    return TextSource(path.name, (content,), _SEPARATOR, f"file {path.name}")


def _read_jsonl(path: Path) -> TextSource:
    lines = _decode(path).split("\n")
    documents = tuple(
        _document(line, f"source={str(path)!r}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    )
    if not any(document.strip() for document in documents):
        raise ValueError(f'source={str(path)!r} holds no text; pass a file with text under "text" in its lines.')
    origin = f"file {path.name}, {len(documents)} documents joined by {_SEPARATOR!r}"
    return TextSource(path.name, documents, _SEPARATOR, origin)


def _document(line: str, place: str) -> str:
    advice = 'every line must be a JSON object with a string under "text"'
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error}); {advice}.") from error
    if not isinstance(record, dict) or "text" not in record:
        found = f"an object with {sorted(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
        raise ValueError(f"{place}: found {found}; {advice}.")
    if not isinstance(record["text"], str):
        raise ValueError(f'{place}: "text" is a {type(record["text"]).__name__}; {advice}.')
    return record["text"]


def _decode(path: Path) -> str:
    try:
        # Not read_text, which would turn \r\n into \n.
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"source={str(path)!r} is not UTF-8 ({error}); save it as UTF-8.") from error


def _read_hub(name: str, recipe: HubRecipe) -> TextSource:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"source={name!r} needs the package `datasets`, which is not installed: "
            "pip install 'optimum-fista[datasets]', or pass a local .txt or .jsonl file."
        ) from error
    try:
        rows = load_dataset(recipe.repository, split=recipe.split, **recipe.options)
        texts = tuple(rows[: recipe.max_rows][recipe.column])
    except Exception as error:  # the Hub, the network and `datasets` have no common base class
        raise ConnectionError(
            f"source={name!r}: could not load {recipe.repository!r} from the Hub "
            f"({type(error).__name__}: {error}). If the Hub cannot be reached, pass a local .txt or "
            ".jsonl file."
        ) from error
    documents = texts if recipe.rows_are_documents else (recipe.separator.join(texts),)
    return TextSource(name, documents, recipe.separator, str(recipe), recipe.max_windows)

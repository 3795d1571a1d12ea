"""Texts of the Hub: three with short names, cut as the literature does, and any data set by its name.

`wikitext2`, `c4` and `ptb` are cut and joined as in the scripts of SparseGPT and Wanda, so that perplexities can be
compared with published ones (`read_hub_text`). Any other data set is streamed from its beginning (`read_hub_set`). The
package `datasets` reads both; `text.sources` calls them after it has found that the package is installed.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from optimum_fista.public_names import HUB_DATASETS
from optimum_fista.text.text_source import Conversation, Split, TextSource, read_turns

# A data set of the Hub: OWNER/NAME[/CONFIGURATION][:[SPLIT][:COLUMN]].
_NAME_OF_SET = re.compile(
    r"(?P<repository>[\w-][\w.-]*/[\w.-]+)(/(?P<configuration>[\w.-]+))?(:(?P<split>[\w.-]*)(:(?P<column>[\w.-]+))?)?"
)
# How the split of a data set begins that is calibrated or measured on, the best first.
_BEGINNINGS_OF_SPLITS: dict[Split, tuple[str, ...]] = {
    "calibration": ("train",),
    "test": ("test", "valid", "eval", "dev"),
}
# Characters that are read of a data set of the Hub: about 10 million tokens, and half a million to measure on.
_MOST_CHARACTERS: dict[Split, int] = {"calibration": 40_000_000, "test": 2_000_000}
_USUAL_COLUMNS = ("text", "messages", "content")
# Seconds in which the Hub has to answer one request.
_HUB_TIMEOUT = 10


@dataclass(frozen=True)
class _HubText:
    """Where a text of the Hub lies, and how its rows become documents, as in SparseGPT's datautils.py and Wanda's."""

    split: str
    # further arguments of `load_dataset`
    options: dict[str, str]
    # of the repository, to read this one only
    file: str | None = None
    column: str = "text"
    separator: str = " "
    # rows that are read; None: all
    max_rows: int | None = None
    # whether the rows are joined to one document
    whole: bool = True
    # `TextSource.max_windows`
    max_windows: int | None = None


_WIKITEXT = {"name": "wikitext-2-raw-v1"}
# PTB's main branch is a script, which `datasets` 4 refuses; the Hub keeps a parquet copy under another revision.
_PTB = {"revision": "refs/convert/parquet"}
_HUB_TEXTS: dict[tuple[str, Split], _HubText] = {
    ("wikitext2", "calibration"): _HubText("train", _WIKITEXT),
    ("wikitext2", "test"): _HubText("test", _WIKITEXT, separator="\n\n"),
    # C4's files are shuffled: the first documents of one, 10 million tokens, represent all and fit in memory.
    ("c4", "calibration"): _HubText(
        "train", {}, file="en/c4-train.00000-of-01024.json.gz", max_rows=20_000, whole=False
    ),
    ("c4", "test"): _HubText(
        "validation",
        {},
        file="en/c4-validation.00000-of-00008.json.gz",
        max_rows=1100,
        max_windows=256,
    ),
    ("ptb", "calibration"): _HubText(
        "train", _PTB, file="penn_treebank/train/0000.parquet", column="sentence"
    ),
    ("ptb", "test"): _HubText(
        "test", _PTB, file="penn_treebank/test/0000.parquet", column="sentence"
    ),
}


def read_hub_text(source: str, split: Split) -> TextSource:
    """Read a text of the Hub, or of the cache if the Hub can't be reached; ConnectionError if neither has it.

    `source` is a key of `HUB_DATASETS`, such as "c4". Downloads the file into the cache.
    """
    from datasets import load_dataset  # which takes seconds to import

    text = _HUB_TEXTS[source, split]  # which split, file and column of the data set
    repository = HUB_DATASETS[source]  # such as "allenai/c4"
    files = {} if text.file is None else {"data_files": {text.split: text.file}}
    try:
        with _offline_without_hub(repository):
            rows = load_dataset(repository, split=text.split, **text.options, **files)
        columns = rows[: text.max_rows]  # a dictionary: a list of values for each column
        documents = tuple(columns[text.column])
    except Exception as error:  # those of the Hub, the network and `datasets` have no common base
        raise ConnectionError(
            f"source={source!r}: could not load {repository!r} from the Hub ({type(error).__name__}: {error}). "
            "If the Hub cannot be reached, pass a local .txt or .jsonl file."
        ) from error
    if text.whole:
        documents = (text.separator.join(documents),)
    return TextSource(
        name=source,
        documents=documents,
        separator=text.separator,
        max_windows=text.max_windows,
    )


class SetName(NamedTuple):
    """A data set of the Hub as a user names it; what is `None` is found."""

    repository: str  # such as "HuggingFaceH4/ultrachat_200k"
    configuration: str | None
    split: str | None
    column: str | None


def name_of_set(source: str) -> SetName | None:
    """Read OWNER/NAME[/CONFIGURATION][:[SPLIT][:COLUMN]]; `None` if a source is no such name. Asks nobody.

    A path of something that exists is no name, nor is one that ends in .txt or .jsonl.
    """
    match = _NAME_OF_SET.fullmatch(source)
    if match is None or Path(source).exists() or Path(source).suffix in (".txt", ".jsonl"):
        return None
    return SetName(
        repository=match["repository"],
        configuration=match["configuration"],
        split=match["split"] or None,
        column=match["column"] or None,
    )


def read_hub_set(source: str, name: SetName, split: Split) -> TextSource:
    """Stream the first documents of a data set of the Hub: texts, or conversations.

    `source` is what the user named, and `name` its parts. ConnectionError if the Hub can't be reached, or lacks the
    data set. ValueError that says what to pass if a split or column is not there, or can't be found.
    """
    from datasets import load_dataset  # which takes seconds to import

    try:
        with _offline_without_hub(name.repository):
            splits: Any = load_dataset(name.repository, name.configuration, streaming=True)
            rows = splits[_split_of(source, name, list(splits), split)]
            return _documents_of(source, name, rows, _MOST_CHARACTERS[split])
    except _SourceError as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # those of the Hub, the network and `datasets` have no common base
        message = " ".join(str(error).split())  # in one line
        raise ConnectionError(
            f"source={source!r}: could not load {name.repository!r} from the Hub ({type(error).__name__}: "
            f"{message}). If it has several configurations, pass one: OWNER/NAME/CONFIGURATION. If the Hub cannot be "
            "reached, pass a local .txt or .jsonl file."
        ) from error


class _SourceError(Exception):
    """A data set of the Hub lacks what the user named, or what is looked for; the message is a whole sentence."""


def _split_of(source: str, name: SetName, splits: list[str], split: Split) -> str:
    """Choose one of the `splits` that a data set has: the user's, or one to train or to measure on.

    `source` is what the user named, for errors, and `name` its parts. _SourceError if there is none.
    """
    if name.split is not None:
        if name.split in splits:
            return name.split
        raise _SourceError(
            f"source={source!r}: {name.repository!r} has no split {name.split!r}: pass one of {', '.join(splits)}."
        )
    for beginning in _BEGINNINGS_OF_SPLITS[split]:
        for candidate in splits:
            if candidate.startswith(beginning):
                return candidate
    raise _SourceError(
        f"source={source!r}: none of the splits of {name.repository!r} has a usual name: name one of "
        f"{', '.join(splits)}, such as '{name.repository}:{splits[0]}'."
    )


def _documents_of(source: str, name: SetName, rows: Any, most_characters: int) -> TextSource:
    """Read rows of a data set, dictionaries by column, until there are `most_characters` characters of text.

    `rows` is an iterable of `datasets`, which is read once. `source` is what the user named, and `name` its parts.
    _SourceError if the rows have no column of texts or conversations, or other values there.
    """
    column = name.column
    documents = list[str]()
    conversations = list[Conversation]()
    num_characters = 0
    for number, row in enumerate(rows, start=1):
        if column is None:
            column = _column_of(source, name, row)
        if column not in row:
            raise _SourceError(
                f"source={source!r}: {name.repository!r} has no column {column!r}: pass one of {', '.join(row)}."
            )
        value = row[column]
        if not value:  # no text
            continue
        if isinstance(value, str):
            document = value
            turns: Conversation = ()
        else:
            try:
                document, turns = read_turns(value, f"source={source!r}, row {number}")
            except ValueError as error:
                raise _SourceError(str(error)) from error
        documents.append(document)
        conversations.append(turns)
        num_characters += len(document)
        if num_characters >= most_characters:
            break
    if not documents:
        raise _SourceError(f"source={source!r}: the split has no text: pass another one.")
    return TextSource(
        name=source,
        documents=tuple(documents),
        conversations=tuple(conversations) if any(conversations) else (),
    )


def _column_of(source: str, name: SetName, row: dict[str, Any]) -> str:
    """Find the column with the text: a usual name, or the only one with texts. `row` is the first row.

    _SourceError that lists the columns if that is not clear. `source` and `name` are as in `_documents_of`.
    """
    for column in _USUAL_COLUMNS:
        if column in row:
            return column
    columns_of_text = [column for column, value in row.items() if isinstance(value, str)]
    if len(columns_of_text) == 1:
        return columns_of_text[0]
    raise _SourceError(
        f"source={source!r}: it is not clear which column of {name.repository!r} has the text: name one of "
        f"{', '.join(row)}, such as '{name.repository}:{name.split or ''}:{next(iter(row))}'."
    )


@contextmanager
def _offline_without_hub(repository: str) -> Iterator[None]:
    """Let `datasets` look in the cache alone if the Hub does not answer one request for a data set.

    Otherwise `datasets` would repeat every request for half a minute. The global settings of `huggingface_hub` and
    `datasets` that say whether there is a network are changed inside the block, and put back at its end. `repository`
    is the name of the data set, such as "allenai/c4".
    """
    if _hub_answers(repository):
        yield
        return

    import datasets

    hub_before = constants.HF_HUB_OFFLINE
    datasets_before = datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = hub_before
        datasets.config.HF_HUB_OFFLINE = datasets_before


def _hub_answers(repository: str) -> bool:
    """Ask the Hub once for the data set `repository`, such as "allenai/c4"; an error of the Hub is an answer too.

    Waits `_HUB_TIMEOUT` seconds at most. Nothing is downloaded.
    """
    try:
        HfApi().dataset_info(repository, timeout=_HUB_TIMEOUT)
    except HfHubHTTPError:
        return True
    except Exception:  # no network, or no answer: their errors have no common base class
        return False
    return True

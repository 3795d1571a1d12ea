"""Text sources for calibration and for perplexity: local files, Python's own documentation, Hub data sets.

A *source* is what a user names (`--calibration`): a path, `pydoc`, `wikitext2`, `c4` or `ptb`. `require_source` checks
it, and `load_text` reads it as a `TextSource`, whose documents `text.windows` cuts into windows of tokens. The texts of
the Hub are cut and joined as in the scripts of SparseGPT and Wanda, so that perplexities can be compared with published
ones.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from optimum_fista.installing import install_command
from optimum_fista.public_names import HUB_DATASETS

Split = Literal["calibration", "test"]

_ACCEPTED_SOURCES = (
    "a path that ends in .txt (one document) or .jsonl (field 'text' in every line), 'pydoc', 'wikitext2', "
    "'c4' or 'ptb' (from the Hub, with the package `datasets`), or, for calibration only, 'self' (the model writes it)"
)
# How keys for images, sounds and videos begin in the bytes of a .jsonl file.
_BEGINNINGS_OF_MEDIA_KEYS = (b'"image', b'"audio', b'"video')
# Seconds in which the Hub has to answer one request.
_HUB_TIMEOUT = 10


class UsualTexts(NamedTuple):
    """Sources that are used if a user names none."""

    to_measure_on: str
    to_calibrate_on: str


@dataclass(frozen=True)
class TextSource:
    """Documents to tokenise."""

    name: str  # of the file, or the data set's usual name
    documents: tuple[str, ...]
    # between two documents when the source is read as one text
    separator: str = "\n\n"
    # that perplexity is measured on, by the literature's protocol; None: all
    max_windows: int | None = None
    # image files of each document; () if no document has any
    images: tuple[tuple[Path, ...], ...] = ()

    @property
    def joined(self) -> str:
        """The documents as one text."""
        return self.separator.join(self.documents)

    @property
    def sha256(self) -> str:
        """Hex digest of the joined text in UTF-8: equal for equal texts, whatever file they came from."""
        # surrogatepass: a text that was made in Python may hold half of a surrogate pair
        return hashlib.sha256(self.joined.encode("utf-8", "surrogatepass")).hexdigest()


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


def require_source(source: str, *, with_images: bool = False) -> bool:
    """Refuse a source that can't be read here, without asking the Hub; returns whether its documents have images.

    Changes nothing; local files are read. A `.jsonl` file with keys for images is parsed whole. If other files are
    damaged, this is noticed later (`load_text`).

    Args:
        source: What the user names: "pydoc", a key of `HUB_DATASETS` such as "c4", or a path to a .txt or .jsonl file.
        with_images: Whether the caller can use images. If not, a text with images is refused.

    Raises:
        ValueError: If the source is unknown, has images that are refused, or is a damaged file with keys for images.
        FileNotFoundError: If the file, or a file of an image, does not exist.
        ImportError: If a package that reads it is not installed.
    """
    if source == "pydoc":
        return False
    if source in HUB_DATASETS:
        if find_spec("datasets") is None:
            raise ImportError(
                f"source={source!r} needs the package `datasets`, which is not installed: run "
                f"{install_command('datasets')}, or pass a local .txt or .jsonl file."
            )
        return False

    path = Path(source)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"source={source!r} is not known; pass {_ACCEPTED_SOURCES}.")
    if not path.is_file():
        raise FileNotFoundError(
            f"source={source!r}: there is no such file; pass {_ACCEPTED_SOURCES}."
        )
    if path.suffix != ".jsonl":
        return False
    content = path.read_bytes()
    may_have_images = any(beginning in content for beginning in _BEGINNINGS_OF_MEDIA_KEYS)
    if not may_have_images:
        return False
    text = _read_file(path)  # parses all lines, and raises the errors that are promised above
    if not text.images:
        return False
    if not with_images:
        raise ValueError(
            f"source={source!r} has images, which only the calibration of optimum-fista prune takes: pass lines "
            'without "image".'
        )
    if find_spec("PIL") is None:
        raise ImportError(
            f"source={source!r} has images, which need the package Pillow: run `pip install pillow`."
        )
    return True


def usual_texts() -> UsualTexts:
    """Texts to measure and to calibrate on: those of the literature, or `pydoc` if `datasets` is not installed."""
    if find_spec("datasets") is None:
        return UsualTexts(to_measure_on="pydoc", to_calibrate_on="pydoc")
    return UsualTexts(to_measure_on="wikitext2", to_calibrate_on="c4")


def load_text(source: str, split: Split, *, with_images: bool = False) -> TextSource:
    """Read a text: a path to a `.txt` or `.jsonl` file, `pydoc`, `wikitext2`, `c4` or `ptb`.

    A line of a `.jsonl` file may name images, which are refused unless `with_images`. Local files and `pydoc` have one
    split: "calibration" and "test" give the same text, so do not measure on the source you calibrated on. `pydoc`
    changes with the Python version; compare `sha256`. A text of the Hub is downloaded into the cache. If the Hub can't
    be reached and the text is not in the cache, this is a `ConnectionError`. A source that can't be read gives the
    errors of `require_source`.
    """
    require_source(source, with_images=with_images)
    if split not in get_args(Split):
        raise ValueError(f"split={split!r} is not known; pass 'calibration' or 'test'.")
    if source in HUB_DATASETS:
        where_it_lies = _HUB_TEXTS[source, split]  # which split, file and column of the data set
        return _read_hub(source, where_it_lies)
    if source == "pydoc":
        from pydoc_data.topics import topics

        return TextSource("pydoc", tuple(topics[key] for key in sorted(topics)))
    return _read_file(Path(source))


def _read_file(path: Path) -> TextSource:
    """Read a `.txt` file as one document, or a `.jsonl` file with a document in each line.

    ValueError that names the file, and the line, if the file has no text or can't be read as text. FileNotFoundError if
    a line names an image file that does not exist.
    """
    try:
        content = path.read_bytes().decode("utf-8")  # not read_text, which would turn \r\n into \n
    except UnicodeDecodeError as error:
        raise ValueError(
            f"source={str(path)!r} is not UTF-8 ({error}); save it as UTF-8."
        ) from error

    documents = [content]
    images = list[tuple[Path, ...]]()  # image files of each document
    if path.suffix == ".jsonl":
        documents = []
        # Not splitlines, which ends lines at U+2028 too.
        for number, line in enumerate(content.split("\n"), start=1):
            if line.strip():
                place = f"source={str(path)!r}, line {number}"
                text, files = _read_line(line, place, path.parent)
                documents.append(text)
                images.append(files)
    has_text = any(document.strip() for document in documents)
    if not has_text:
        raise ValueError(
            f'source={str(path)!r} is empty; pass a file with text (in a .jsonl file under "text").'
        )
    has_images = any(images)  # at least one document has some
    return TextSource(path.name, tuple(documents), images=tuple(images) if has_images else ())


def _read_line(line: str, place: str, folder: Path) -> tuple[str, tuple[Path, ...]]:
    """Return the text of a line of a `.jsonl` file, and its image files, whose paths are relative to `folder`.

    `place` names file and line, for errors. An image file that does not exist is a FileNotFoundError; any other mistake
    in the line is a ValueError. Images are not read.
    """
    item: Any = None
    with suppress(ValueError):  # no JSON: refused below, because it has no text
        item = json.loads(line)
    if not isinstance(item, dict):
        item = {}
    text = item.get("text")
    # One path, or a list of them, under either key; an empty value is like none.
    paths = item.get("image") or item.get("images") or []
    if isinstance(paths, str):
        paths = [paths]

    are_paths = isinstance(paths, list) and all(isinstance(path, str) for path in paths)
    if not isinstance(text, str) or not are_paths:
        raise ValueError(
            f'{place}: found {line.strip()[:80]}; every line must be a JSON object with a string under "text", and a '
            'path, or a list, under "image".'
        )
    try:
        text.encode()  # only to find characters that UTF-8 can't write
    except UnicodeEncodeError as error:  # JSON may escape half of a surrogate pair
        raise ValueError(
            f"{place}: character {error.start + 1} of the text, {text[error.start]!a}, is half of a surrogate pair, "
            "which no tokenizer takes: write the whole character, or remove it."
        ) from error
    for key in ("audio", "video"):
        if item.get(key):
            raise ValueError(
                f'{place}: {key!r} cannot be read from files: pass lines with "text" and "image" only.'
            )
    files = tuple(folder / path for path in paths)
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{place}: there is no image {str(file)!r}; paths are relative to the .jsonl file."
            )
    return text, files


def _read_hub(source: str, text: _HubText) -> TextSource:
    """Read a text of the Hub, or of the cache if the Hub can't be reached; ConnectionError if neither has it.

    `source` is a key of `HUB_DATASETS`, such as "c4", and `text` says where in its data set the text lies. Downloads
    the file into the cache.
    """
    from datasets import load_dataset  # which takes seconds to import

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

"""Text sources for calibration and for perplexity: local files, Python's own documentation, Hub data sets.

The texts of the Hub are cut and joined as in the scripts of SparseGPT and Wanda, so that perplexities can be compared
with published ones.
"""

import hashlib
import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from optimum_fista.installing import install_command
from optimum_fista.public_names import HUB_DATASETS

Split = Literal["calibration", "test"]

_ACCEPTED_SOURCES = (
    "a path that ends in .txt (one document) or .jsonl (field 'text' in every line), 'pydoc', 'wikitext2', "
    "'c4' or 'ptb' (from the Hub, with the package `datasets`), or, for calibration only, 'self' (the model writes it)"
)
_MEDIA = (
    b'"image',
    b'"audio',
    b'"video',
)  # what the keys of lines begin with that are not only text


@dataclass(frozen=True)
class TextSource:
    """Documents to tokenise."""

    name: str  # of the file, or the data set's usual name
    documents: tuple[str, ...]
    separator: str = "\n\n"  # between two documents when the source is read as one text
    max_windows: int | None = (
        None  # that perplexity is measured on, by the literature's protocol; None = all
    )
    images: tuple[tuple[Path, ...], ...] = ()  # files of each document; () if none has any

    @property
    def joined(self) -> str:
        """The documents as one text."""
        return self.separator.join(self.documents)

    @property
    def sha256(self) -> str:
        """Hex digest of the joined text in UTF-8: equal for equal texts, whatever file they came from."""
        # surrogatepass: JSON may escape half of a surrogate pair
        return hashlib.sha256(self.joined.encode("utf-8", "surrogatepass")).hexdigest()


# Arguments of `load_dataset` and treatment of the rows, as in SparseGPT's datautils.py and Wanda's lib/data.py.
_WIKITEXT = {"name": "wikitext-2-raw-v1"}
# PTB's main branch is a script, which `datasets` 4 refuses; the Hub keeps a parquet copy under another revision.
_PTB = {"revision": "refs/convert/parquet"}
_HUB: dict[tuple[str, Split], tuple[str, dict[str, str], str | None, dict[str, Any]]] = {
    ("wikitext2", "calibration"): ("train", _WIKITEXT, None, {}),
    ("wikitext2", "test"): ("test", _WIKITEXT, None, {"separator": "\n\n"}),
    # C4's files are shuffled: the first documents of one, 10 million tokens, represent all and fit in memory.
    ("c4", "calibration"): (
        "train",
        {},
        "en/c4-train.00000-of-01024.json.gz",
        {"max_rows": 20_000, "whole": False},
    ),
    ("c4", "test"): (
        "validation",
        {},
        "en/c4-validation.00000-of-00008.json.gz",
        {"max_rows": 1100, "windows": 256},
    ),
    ("ptb", "calibration"): (
        "train",
        _PTB,
        "penn_treebank/train/0000.parquet",
        {"column": "sentence"},
    ),
    ("ptb", "test"): ("test", _PTB, "penn_treebank/test/0000.parquet", {"column": "sentence"}),
}


def require_source(source: str, *, with_images: bool = False) -> bool:
    """Refuse a source that can't be read here, without asking the Hub; returns whether its documents have images.

    Images are refused unless `with_images`. If a `.jsonl` file has some, their files must exist.
    """
    if source == "pydoc":
        return False
    if source in HUB_DATASETS:
        if find_spec("datasets") is None:
            run = f"run {install_command('datasets')}, or pass a local .txt or .jsonl file"
            raise ImportError(
                f"source={source!r} needs the package `datasets`, which is not installed: {run}."
            )
    elif Path(source).suffix not in (".txt", ".jsonl"):
        raise ValueError(f"source={source!r} is not known; pass {_ACCEPTED_SOURCES}.")
    elif not Path(source).is_file():
        raise FileNotFoundError(
            f"source={source!r}: there is no such file; pass {_ACCEPTED_SOURCES}."
        )
    elif Path(source).suffix == ".jsonl" and any(
        word in Path(source).read_bytes() for word in _MEDIA
    ):
        has_images = bool(_read_file(Path(source)).images)
        if has_images and not with_images:
            why = "which only the calibration of optimum-fista prune takes"
            raise ValueError(f'source={source!r} has images, {why}: pass lines without "image".')
        if has_images and find_spec("PIL") is None:
            need = "which need the package Pillow: run `pip install pillow`"
            raise ImportError(f"source={source!r} has images, {need}.")
        return has_images
    return False


def usual_texts() -> tuple[str, str]:
    """Texts to measure and to calibrate on: those of the literature, or `pydoc` if `datasets` is not installed."""
    return ("wikitext2", "c4") if find_spec("datasets") else ("pydoc", "pydoc")


def load_text(source: str, split: Split, *, with_images: bool = False) -> TextSource:
    """Read a text: a path to a `.txt` or `.jsonl` file, `pydoc`, `wikitext2`, `c4` or `ptb`.

    A line of a `.jsonl` file may name images, which are refused unless `with_images`. Local files and `pydoc` have one
    split: "calibration" and "test" give the same text, so do not measure on the source you calibrated on. `pydoc`
    changes with the Python version; compare `sha256`. If the Hub can't be reached, this is a `ConnectionError`.
    """
    require_source(source, with_images=with_images)
    if split not in get_args(Split):
        raise ValueError(f"split={split!r} is not known; pass 'calibration' or 'test'.")
    if source in HUB_DATASETS:
        hub_split, options, file, made = _HUB[source, split]
        return _read_hub(source, hub_split, options, file, **made)
    if source == "pydoc":
        from pydoc_data.topics import topics

        return TextSource("pydoc", tuple(topics[key] for key in sorted(topics)))
    return _read_file(Path(source))


def _read_file(path: Path) -> TextSource:
    where = f"source={str(path)!r}"
    try:
        content = path.read_bytes().decode("utf-8")  # not read_text, which would turn \r\n into \n
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 ({error}); save it as UTF-8.") from error
    documents, images = (content,), ((),)  # type: tuple[tuple[str, ...], tuple[tuple[Path, ...], ...]]
    if path.suffix == ".jsonl":
        lines = enumerate(
            content.split("\n"), start=1
        )  # not splitlines, which ends lines at U+2028 too
        read = [
            _document(line, f"{where}, line {n}", path.parent) for n, line in lines if line.strip()
        ]
        documents, images = tuple(text for text, _ in read), tuple(files for _, files in read)
    if not any(map(str.strip, documents)):
        raise ValueError(
            f'{where} is empty; pass a file with text (in a .jsonl file under "text").'
        )
    return TextSource(path.name, documents, images=images if any(images) else ())


def _document(line: str, place: str, folder: Path) -> tuple[str, tuple[Path, ...]]:
    """The text of a line, and its image files, whose paths are relative to `folder`."""
    try:
        item = json.loads(line)
        text, found = item["text"], item.get("image") or item.get("images") or []
    except (ValueError, TypeError, KeyError, AttributeError):  # no JSON, no object, another key
        item, text, found = {}, None, []
    paths = [found] if isinstance(found, str) else found
    if (
        not isinstance(text, str)
        or not isinstance(paths, list)
        or not all(isinstance(p, str) for p in paths)
    ):
        advice = 'every line must be a JSON object with a string under "text", and a path, or a list, under "image"'
        raise ValueError(f"{place}: found {line.strip()[:80]}; {advice}.")
    if ignored := [key for key in ("audio", "video") if item.get(key)]:
        raise ValueError(
            f'{place}: {ignored[0]!r} cannot be read from files: pass lines with "text" and "image" only.'
        )
    files = tuple(folder / path for path in paths)
    if missing := [str(file) for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"{place}: there is no image {missing[0]!r}; paths are relative to the .jsonl file."
        )
    return text, files


def _read_hub(
    source: str,
    split: str,
    options: dict[str, str],
    file: str | None,
    *,
    column: str = "text",
    separator: str = " ",
    max_rows: int | None = None,
    whole: bool = True,
    windows: int | None = None,
) -> TextSource:
    """The first rows of one column, joined to one document if the source is read `whole`."""
    from datasets import load_dataset  # which takes seconds to import

    repository, files = HUB_DATASETS[source], {} if file is None else {"data_files": {split: file}}
    try:
        texts = tuple(load_dataset(repository, split=split, **options, **files)[:max_rows][column])
    except Exception as error:  # the Hub, the network and `datasets` have no common base class
        raise ConnectionError(
            f"source={source!r}: could not load {repository!r} from the Hub ({type(error).__name__}: {error}). "
            "If the Hub cannot be reached, pass a local .txt or .jsonl file."
        ) from error
    return TextSource(source, (separator.join(texts),) if whole else texts, separator, windows)

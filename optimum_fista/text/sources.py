"""Text sources for calibration and for perplexity: local files, Python's own documentation, Hub data sets.

A *source* is what a user names (`--calibration`): a path, `pydoc`, `wikitext2`, `c4`, `ptb` or the name of a data set
of the Hub (`text.hub_texts`). `require_source` checks it, and `load_text` reads it as a `TextSource`, whose documents
`text.windows` cuts into windows of tokens. `text_of_model` reads it for a model that is given by name.
"""

import json
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, get_args

from optimum_fista.installing import install_command
from optimum_fista.public_names import HUB_DATASETS
from optimum_fista.text.hub_texts import name_of_set, read_hub_set, read_hub_text
from optimum_fista.text.text_source import Conversation, Split, TextSource, read_turns

_ACCEPTED_SOURCES = (
    "a path that ends in .txt (one document) or .jsonl (field 'text' or 'messages' in every line), 'pydoc', "
    "'wikitext2', 'c4', 'ptb' or the name of a data set such as 'HuggingFaceH4/ultrachat_200k' (from the Hub, with the "
    "package `datasets`), or, for calibration only, 'self' (the model writes it)"
)
# How keys for images, sounds and videos begin in the bytes of a .jsonl file.
_BEGINNINGS_OF_MEDIA_KEYS = (b'"image', b'"audio', b'"video')


class UsualTexts(NamedTuple):
    """Sources that are used if a user names none."""

    to_measure_on: str
    to_calibrate_on: str


def require_source(source: str, *, with_images: bool = False) -> bool:
    """Refuse a source that can't be read here, without asking the Hub; returns whether its documents have images.

    Changes nothing; local files are read. A `.jsonl` file with keys for images is parsed whole. If other files are
    damaged, this is noticed later (`load_text`).

    Args:
        source: What the user names: "pydoc", a key of `HUB_DATASETS` such as "c4", the name of another data set of the
            Hub, or a path to a .txt or .jsonl file.
        with_images: Whether the caller can use images. If not, a text with images is refused.

    Raises:
        ValueError: If the source is unknown, has images that are refused, or is a damaged file with keys for images.
        FileNotFoundError: If the file, or a file of an image, does not exist.
        ImportError: If a package that reads it is not installed.
    """
    if source == "pydoc":
        return False
    if source in HUB_DATASETS or name_of_set(source) is not None:
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
    """Read a text: a path to a `.txt` or `.jsonl` file, `pydoc`, `wikitext2`, `c4`, `ptb` or a data set of the Hub.

    A line of a `.jsonl` file has a `text`, or `messages`: turns of a conversation, which a chat template writes as text
    (`TextSource.written_by`; functions that take a tokenizer do it). A line may name images, which are refused unless
    `with_images`. Local files and `pydoc` have one split: "calibration" and "test" give the same text, so do not
    measure on the source you calibrated on. `pydoc` changes with the Python version; compare `sha256`.

    A data set of the Hub is named OWNER/NAME, or OWNER/NAME/CONFIGURATION:SPLIT:COLUMN, each of the last three if it is
    needed. Its beginning is streamed: 40 million characters, or 2 million to measure on. Those of the Hub with short
    names are downloaded into the cache. If the Hub can't be reached and the text is not in the cache, this is a
    `ConnectionError`. A source that can't be read gives the errors of `require_source`.
    """
    require_source(source, with_images=with_images)
    if split not in get_args(Split):
        raise ValueError(f"split={split!r} is not known; pass 'calibration' or 'test'.")
    if source in HUB_DATASETS:
        return read_hub_text(source, split)
    name = name_of_set(source)
    if name is not None:
        return read_hub_set(source, name, split)
    if source == "pydoc":
        from pydoc_data.topics import topics

        return TextSource("pydoc", tuple(topics[key] for key in sorted(topics)))
    return _read_file(Path(source))


def text_of_model(name: str, source: str, split: Split) -> TextSource:
    """Read a text as `load_text` does, with its conversations written by the chat template of a model.

    `name` is a folder or Hub id of the model, whose tokenizer is loaded only if there are conversations.
    """
    text = load_text(source, split)
    if not text.conversations:
        return text
    # This module imports Transformers, which takes seconds: all other functions here do without it.
    from optimum_fista.source.loading import require_tokenizer

    return text.written_by(require_tokenizer(name))


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
    conversations = list[Conversation]()  # turns of each document
    if path.suffix == ".jsonl":
        documents = []
        # Not splitlines, which ends lines at U+2028 too.
        for number, line in enumerate(content.split("\n"), start=1):
            if line.strip():
                place = f"source={str(path)!r}, line {number}"
                text, files, turns = _read_line(line, place, path.parent)
                documents.append(text)
                images.append(files)
                conversations.append(turns)
    has_text = any(document.strip() for document in documents)
    if not has_text:
        raise ValueError(
            f'source={str(path)!r} is empty; pass a file with text (in a .jsonl file under "text" or "messages").'
        )
    has_images = any(images)  # at least one document has some
    has_conversations = any(conversations)
    if has_images and has_conversations:
        raise ValueError(
            f'source={str(path)!r} has lines with "messages" and lines with images: pass two files. A line with images '
            'has its text under "text".'
        )
    return TextSource(
        path.name,
        tuple(documents),
        images=tuple(images) if has_images else (),
        conversations=tuple(conversations) if has_conversations else (),
    )


def _read_line(line: str, place: str, folder: Path) -> tuple[str, tuple[Path, ...], Conversation]:
    """Return the text of a line of a `.jsonl` file, its image files, and its turns if it is a conversation.

    The text of a conversation are the contents of its turns. Paths of images are relative to `folder`. `place` names
    file and line, for errors. An image file that does not exist is a FileNotFoundError; any other mistake in the line
    is a ValueError. Images are not read.
    """
    item: Any = None
    with suppress(ValueError):  # no JSON: refused below, because it has no text
        item = json.loads(line)
    if not isinstance(item, dict):
        item = {}
    text = item.get("text")
    turns: Conversation = ()
    if text is None and "messages" in item:
        text, turns = read_turns(item["messages"], place)
    # One path, or a list of them, under either key; an empty value is like none.
    paths = item.get("image") or item.get("images") or []
    if isinstance(paths, str):
        paths = [paths]

    are_paths = isinstance(paths, list) and all(isinstance(path, str) for path in paths)
    if not isinstance(text, str) or not are_paths:
        raise ValueError(
            f'{place}: found {line.strip()[:80]}; every line must be a JSON object with a string under "text", or a '
            'conversation under "messages", and a path, or a list, under "image".'
        )
    _require_whole_characters(text, place)
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
    return text, files, turns


def _require_whole_characters(text: str, place: str) -> None:
    """Refuse a text with half of a surrogate pair, which JSON may escape; `place` names file and line."""
    try:
        text.encode()  # only to find characters that UTF-8 can't write
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}: character {error.start + 1} of the text, {text[error.start]!a}, is half of a surrogate pair, "
            "which no tokenizer takes: write the whole character, or remove it."
        ) from error

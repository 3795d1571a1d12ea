"""Texts of three domains for `mixtures.py`: web text, Python and German, each to train on and held out.

- `web`: the web text that is passed, cut in two as in `known_texts.py`.
- `python`: the modules of the interpreter's own library (PSF licence). One in ten is held out, by the hash of its name.
- `german`: pages of Debian's package manpages-de (GPL), without the list of translators at their ends. One page in ten
  is held out, by the hash of its name. Pages that are there under several names count once.

Held-out modules and pages are cut to 3,000 characters, so that a short stretch of the file has many of them.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sysconfig
from pathlib import Path
from typing import Any

from known_texts import (
    HELD_OUT_CHARACTERS,
    digest,
    german_pages,
    is_held_out,
    python_texts,
    split_web,
)

DOMAINS = ("web", "python", "german")
_TRANSLATORS = "\nÜBERSETZUNG\n"  # the last section of a German page


def text_file(folder: Path, domain: str, role: str) -> Path:
    """The file of a domain's text; `role` is "trained" or "held-out"."""
    return folder / f"{domain}-{role}.txt"


def make_texts(web: Path, folder: Path) -> None:
    """Write the texts of all domains and `texts.json` to a folder, unless they are there.

    `web` is a text file of web documents. The German pages are downloaded by `apt-get`.
    """
    record_file = folder / "texts.json"
    if record_file.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    library = Path(sysconfig.get_path("stdlib"))
    modules, held_out_modules = python_texts(library, calibration_characters=10**9)
    texts = {
        "web": split_web(web.read_text(encoding="utf-8")),
        "python": (_joined(modules), _joined(held_out_modules)),
        "german": split_pages(german_pages()),
    }

    record: dict[str, Any] = {"python": platform.python_version()}
    for domain, pair in texts.items():
        for role, text in zip(("trained", "held-out"), pair, strict=True):
            file = text_file(folder, domain, role)
            file.write_bytes(text.encode())
            sha256 = hashlib.sha256(text.encode()).hexdigest()[:16]
            record[file.name] = {"characters": len(text), "sha256": sha256}
    record_file.write_text(json.dumps(record, indent=1) + "\n")


def split_pages(pages: dict[str, str]) -> tuple[str, str]:
    """Texts of manual pages by name, as one text to train on and one that is held out."""
    trained = dict[str, str]()
    held_out = dict[str, str]()
    seen = set[str]()
    for name in sorted(pages, key=digest):
        page = pages[name].partition(_TRANSLATORS)[0]
        if page in seen:
            continue
        seen.add(page)
        if is_held_out(name):
            held_out[name] = page[:HELD_OUT_CHARACTERS]
        else:
            trained[name] = page
    return _joined(trained), _joined(held_out)


def _joined(texts: dict[str, str]) -> str:
    """Texts one after the other, with an empty line between them."""
    return "\n\n".join(texts.values())

"""Texts for `known_models.py`: web text and Python, to calibrate on and held out; and German, if it can be had.

    python benchmarks/known_texts.py --web openwebtext.txt --wikitext2 wikitext2-test.txt --folder runs/texts

Files that are written to `--folder`:

- `web-calibration.txt`, `web.txt`: the web text up to the first blank line after 3,700,000 characters, and the rest.
- `python-calibration.txt`, `python.txt`: modules of the library of the interpreter that runs this script. Test suites,
  tables of data and files above 200,000 bytes are left out. The hash of a module's name says to which of the two files
  it goes, and its place there: about one in ten is held out. Of a held-out module the text begins at the first function
  or class and has at most 3,000 characters, so that a short stretch of the file has many modules.
- `mixed-calibration.txt`: as many characters of the Python text as of the web text, web text first.
- `wikitext2.txt`: a copy of the text that was passed.
- `german.txt` (with `--german`): pages of Debian's package manpages-de without their markup.
- `texts.json`: of every file the bytes, characters and hash, and the names of the modules.

All files are the same for the same inputs and the same version of Python.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import platform
import re
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from shared import parse_arguments

WEB_CALIBRATION_CHARACTERS = 3_700_000
HELD_OUT_CHARACTERS = 3_000  # of a module
MOST_BYTES = 200_000  # of a module: longer ones are mostly tables
# Folders of the library that are no hand-written code of the interpreter, and tables that are.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "lib2to3", "encodings", "__pycache__"}
LEFT_OUT |= {"pydoc_data", "ensurepip", "turtledemo"}
GERMAN_CHARACTERS = 400_000


def split_web(text: str) -> tuple[str, str]:
    """Cut a text of documents at the first blank line after `WEB_CALIBRATION_CHARACTERS`.

    Raises:
        SystemExit: If no blank line follows.
    """
    end = text.find("\n\n", WEB_CALIBRATION_CHARACTERS)
    if end < 0:
        raise SystemExit(
            f"--web has {len(text):,} characters and no blank line after the first "
            f"{WEB_CALIBRATION_CHARACTERS:,}; pass a longer text."
        )
    return text[:end] + "\n", text[end:].lstrip("\n")


def digest(name: str) -> str:
    """The hash that says where a module goes: it does not depend on the machine."""
    return hashlib.sha256(name.encode()).hexdigest()


def library_modules(library: Path) -> list[str]:
    """Names of the library's modules, such as `json/decoder.py`, in the order of their hashes."""
    names = list[str]()
    for file in library.rglob("*.py"):
        name = file.relative_to(library)
        is_small = file.stat().st_size <= MOST_BYTES
        is_left_out = not LEFT_OUT.isdisjoint(name.parts)
        # config-3.11-x86_64-linux-gnu/ and _sysconfigdata__linux_x86_64-linux-gnu.py
        is_of_the_machine = name.parts[0].startswith(("config-", "_sysconfigdata"))
        if is_small and not is_left_out and not is_of_the_machine:
            names.append(name.as_posix())
    return sorted(names, key=digest)


def is_held_out(name: str) -> bool:
    """Whether a module is measured on: one in ten, by its hash, which is read from its end."""
    return int(digest(name)[-8:], 16) % 10 == 0


def code_of(text: str) -> str:
    """At most `HELD_OUT_CHARACTERS` of a module, from its first function or class to the end of a line; "" if none."""
    first = re.search(r"^(def|class|@|async def) ?", text, flags=re.MULTILINE)
    if first is None:
        return ""
    stretch = text[first.start() : first.start() + HELD_OUT_CHARACTERS]
    return stretch[: stretch.rfind("\n") + 1]


def python_texts(
    library: Path, calibration_characters: int
) -> tuple[dict[str, str], dict[str, str]]:
    """Texts of modules by name: those to calibrate on, as many as have so many characters, and those held out."""
    calibration = dict[str, str]()
    held_out = dict[str, str]()
    for name in library_modules(library):
        text = (library / name).read_text(encoding="utf-8", errors="ignore")
        if is_held_out(name):
            code = code_of(text)
            if code:
                held_out[name] = code
        elif sum(map(len, calibration.values())) < calibration_characters:
            calibration[name] = text
    return calibration, held_out


def plain_manual_page(source: str) -> str:
    """The words of a manual page: lines of macros without arguments and comments go, escapes are replaced."""
    replaced = {r"\-": "-", r"\&": "", r"\(aq": "'", r"\(lq": "„", r"\(rq": "“", r"\e": "\\"}
    lines = list[str]()
    for line in source.splitlines():
        if line.startswith((".\\", "'\\")):
            continue
        words = re.sub(r"^[.'][A-Za-z]+ ?", "", line)
        words = re.sub(r"\\f(\[\w*\]|\(..|.)|\\s[-+]?\d", "", words)
        for escape, character in replaced.items():
            words = words.replace(escape, character)
        words = re.sub(r"\\(\[\w+\]|\(..)", "", words)
        if words.strip():
            lines.append(words)
    return "\n".join(lines) + "\n"


def german_pages() -> dict[str, str]:
    """The words of all pages of Debian's manpages-de, which `apt-get download` fetches, by the names of their files."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", "manpages-de"], cwd=folder, check=True)
        (package,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", package, "package"], cwd=folder, check=True)
        pages = (Path(folder) / "package").glob("usr/share/man/de/man*/*.gz")
        return {
            page.name: plain_manual_page(gzip.decompress(page.read_bytes()).decode("utf-8"))
            for page in pages
        }


def german_text() -> str:
    """The first `GERMAN_CHARACTERS` of German manual pages, in the order of their names' hashes."""
    pages = german_pages()
    texts = list[str]()
    for name in sorted(pages, key=digest):
        if sum(map(len, texts)) >= GERMAN_CHARACTERS:
            break
        texts.append(pages[name])
    return "\n\n".join(texts)


def main() -> None:
    """Write all texts and `texts.json`."""
    helps = {
        "web": "text file of web documents",
        "wikitext2": "text file of WikiText-2's test split",
        "folder": "folder to write",
        "german": "also write german.txt, from the Debian package manpages-de",
    }
    arguments = parse_arguments(__doc__, "web", "wikitext2", "folder", helps=helps, german=False)
    folder = Path(arguments.folder)
    folder.mkdir(parents=True, exist_ok=True)

    web_calibration, web = split_web(Path(arguments.web).read_text(encoding="utf-8"))
    library = Path(sysconfig.get_path("stdlib"))
    calibration_modules, held_out_modules = python_texts(library, len(web_calibration))
    python_calibration = "\n\n".join(calibration_modules.values())
    web_share = web_calibration[: len(python_calibration)]

    texts = {
        "web-calibration": web_calibration,
        "web": web,
        "python-calibration": python_calibration,
        "python": "\n\n".join(held_out_modules.values()),
        "mixed-calibration": web_share + "\n\n" + python_calibration[: len(web_calibration)],
        "wikitext2": Path(arguments.wikitext2).read_text(encoding="utf-8"),
    }
    if arguments.german:
        texts["german"] = german_text()

    record: dict[str, Any] = {"python": platform.python_version()}
    for name, text in texts.items():
        data = text.encode()
        (folder / f"{name}.txt").write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        record[name] = {"bytes": len(data), "characters": len(text), "sha256": sha256[:16]}
    record["python-calibration"]["modules"] = list(calibration_modules)
    record["python"]["modules"] = list(held_out_modules)
    (folder / "texts.json").write_text(json.dumps(record, indent=1) + "\n")
    for name, text in texts.items():
        print(f"{name}.txt: {len(text):,} characters")


if __name__ == "__main__":
    main()

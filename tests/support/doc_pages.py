"""The pages of the documentation, and the code and commands in them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "docs" / "quickstart.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def code_blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block, and ("bash", text) of indented lines that begin with a program."""
    text = page.read_text()
    fenced = re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S)
    indented = re.findall(r"^ {4}(?:python|make|optimum-fista) .*\n(?:^ {4}.*\n)*", text, re.M)
    return fenced + [("bash", block) for block in indented]


def python_snippets(page: Path) -> list[str]:
    return [text for language, text in code_blocks(page) if language == "python"]


def commands(page: Path) -> list[str]:
    """Shell commands without comments and with their continuation lines, and `optimum-fista` ones within sentences."""
    lines = []
    for language, text in code_blocks(page):
        if language == "bash":
            joined = re.sub(r"\\\n\s*", "", re.sub(r"(^|\s)#.*", "", text))
            lines += [line.strip() for line in joined.splitlines() if line.strip()]
    inline = re.findall(
        r"`(optimum-fista \w+ [^`.]+)`",
        re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S),
    )
    return lines + inline

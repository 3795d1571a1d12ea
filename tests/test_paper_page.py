"""docs/paper.md: tables are made of rows, and numbers in sentences stand in a table or are computed from rows."""

import json
import re

import pytest
from doc_pages import ROOT

PAGE = ROOT / "docs" / "paper.md"
# What rows are of, and not what they measured: sparsities, sizes of calibration and texts, layers, steps, versions.
SETTINGS = {
    "models": {"1.5", "40", "70"},
    "zeros": {"5", "10", "20", "50", "60", "70"},
    "windows and tokens": {"8", "16", "24", "32", "128", "512", "1024", "2048", "16384"},
    "layers": {"3", "9", "15", "26"},
    "steps and trials": {"20", "30", "80", "0.9", "0.003"},
    "bits": {"4", "8"},
    "published by the authors": {"12"},
    "date": {"1", "2026"},
}


@pytest.fixture(scope="module")
def results():
    import paper_rows

    folder = ROOT / "benchmarks" / "results"
    record = json.loads((folder / "reviewers.json").read_text())
    return paper_rows.Results(record["rows"], folder)


def sections():
    _, *others = re.split(r"^## ", PAGE.read_text(), flags=re.M)
    return {section.partition("\n")[0]: section for section in others}


def numbers_in(text):
    """Numbers that stand alone, without commas and percent signs: not those in names such as WikiText-2 or 2:4."""
    words = re.split(r"[\s/|()±]+", text)
    stripped = [word.strip('.,;:!?"*').removesuffix("%") for word in words]
    return {w.replace(",", "") for w in stripped if re.fullmatch(r"[\d,]+(\.\d+)?", w)}


def test_the_tables_of_the_page_are_those_of_its_rows(results):
    import paper_tables

    page = PAGE.read_text()

    assert paper_tables.tables_in(page, results) == page
    shown = re.findall(r"<!-- table: (\S+) -->", page)
    tables = [name for question in paper_tables.QUESTIONS.values() for name in question.tables]
    assert sorted(shown) == sorted([*tables, "minutes"])


@pytest.mark.parametrize("heading", sections())
def test_numbers_in_sentences_are_those_of_rows(heading, results):
    import paper_tables

    section = sections()[heading]
    tables = re.findall(r"<!-- table: (\S+) -->", section)
    facts = set()
    for question in paper_tables.QUESTIONS.values():
        if set(question.tables) & set(tables):
            facts |= set(question.facts(results).values())
    table_lines = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    prose = re.sub(r"^(\||    |!|<!--).*$", "", section, flags=re.M)  # without tables and commands
    prose = re.sub(r"\]\([^)]*\)|`[^`]*`", "", prose)  # without addresses and code

    allowed = facts | numbers_in(table_lines) | set().union(*SETTINGS.values())
    assert numbers_in(prose) - allowed == set()

"""The page docs/paper.md: which tables and numbers each of its sections has, and how they get into the page.

The page has the name of each table in a comment, `<!-- table: NAME -->`, and an end after it. `tables_in` writes the
tables between them. Numbers in the page's sentences are those of a table in the same section, or of `facts` of its
question. A test holds both. If no row of a table was measured, it has the line `NOT_MEASURED`.

`paper_method.py`, `paper_competitors.py` and `paper_settings.py` make the tables and facts, from rows that
`paper_rows.py` reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import paper_competitors
import paper_method
import paper_settings
from paper_rows import Results

from optimum_fista.folder.card import markdown_lines

NOT_MEASURED = "*Not measured.*"

_PARTS_OF_QUESTIONS = {
    "correction and parts": ("models",),
    "sgd": ("descents", "blocks"),
    "search": ("searches",),
    "start": ("starts",),
    "competitors": ("swaps", "retrained", "adapted"),
    "structured": ("structured",),
    "samples": ("samples", "sampled"),
    "quantize": ("quantized",),
}


def minutes(results: Results) -> list[str]:
    """Make the table of the time that rows took, in minutes of the processor."""
    lines = []
    for question, parts in _PARTS_OF_QUESTIONS.items():
        for part in parts:
            # The first row of each unit has the time of the unit.
            units = [row for row in results.part(part) if "unit_seconds" in row]
            if units:
                total = sum(row["unit_seconds"] for row in units) / 60
                lines.append([question, part, len(units), f"{total:.1f}"])
    return markdown_lines(["question", "part", "units in the rows", "minutes"], lines)


@dataclass(frozen=True)
class Question:
    """A section of the page: its tables by name, and numbers of its sentences that no table has."""

    tables: dict[str, Callable[[Results], list[str]]]
    facts: Callable[[Results], dict[str, str]] = lambda _: {}

    def table(self, results: Results) -> list[str]:
        """Make all tables, one after the other, and the facts, a line each."""
        lines = []
        for name, make in self.tables.items():
            lines += [f"{name}:", "", *make(results), ""]
        lines += [f"{name}: {number}" for name, number in self.facts(results).items()]
        return lines


QUESTIONS: dict[str, Question] = {
    "correction": Question(
        {
            "published-correction": paper_method.published_correction,
            "correction": paper_method.own_correction,
            "small-correction": paper_method.small_correction,
        },
        paper_method.correction_facts,
    ),
    "sgd": Question({"descents": paper_method.descents, "blocks": paper_method.blocks}),
    "search": Question(
        {"searches": paper_method.searches, "earlier-searches": paper_method.earlier_searches},
        paper_method.search_facts,
    ),
    "start": Question(
        {"earlier-starts": paper_method.earlier_starts, "starts": paper_method.starts},
        paper_method.start_facts,
    ),
    "parts": Question(
        {
            "parts-of-solvers": paper_method.parts_of_solvers,
            "parts-of-models": paper_method.parts_of_models,
            "parts-of-small-models": paper_method.parts_of_small_models,
        }
    ),
    "competitors": Question(
        {
            "dsnot": paper_competitors.dsnot,
            "swaps": paper_competitors.swaps,
            "trained-parts": paper_competitors.trained_parts,
            "retrained": paper_competitors.retrained,
        },
        paper_competitors.dsnot_facts,
    ),
    "structured": Question(
        {
            "structured": paper_competitors.structured,
            "structured-trained": paper_competitors.structured_trained,
        },
        paper_competitors.structured_facts,
    ),
    "samples": Question(
        {
            "samples": paper_settings.samples,
            "sampled": paper_settings.sampled,
            "whole-samples": paper_settings.whole_samples,
        },
        paper_settings.samples_facts,
    ),
    "families": Question(
        {"families": paper_settings.families, "newer-models": paper_settings.newer_models},
        paper_settings.families_facts,
    ),
    "size": Question({"size": paper_settings.size}, paper_settings.size_facts),
    "two-of-four": Question(
        {"two-of-four": paper_competitors.two_of_four}, paper_competitors.two_of_four_facts
    ),
    "quantize": Question(
        {
            "quantized-parts": paper_settings.quantized_parts,
            "quantized": paper_settings.quantized,
        },
        paper_settings.quantize_facts,
    ),
}
_TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def tables_in(page: str, results: Results) -> str:
    """Return the text of the page with its tables made anew; names of tables that do not exist are an error."""
    tables = {
        name: make for question in QUESTIONS.values() for name, make in question.tables.items()
    }
    tables["minutes"] = minutes

    def table(match: re.Match[str]) -> str:
        """Make the table that a comment names."""
        begin, name, end = match.groups()
        lines = tables[name](results)
        has_rows = len(lines) > 2  # besides headings and their rule
        if not has_rows:
            lines = [NOT_MEASURED]
        # Markdown wants an empty line around a table; `begin` ends with a line end of its own.
        return "\n".join([begin, *lines, "", end])

    return _TABLE.sub(table, page)

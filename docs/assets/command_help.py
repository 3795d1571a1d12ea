"""Puts what `--help` prints of every command into the page of the command line."""

import argparse
import os

from optimum_fista.cli.main import build_parser

_PLACE = "<!-- commands -->"
_WIDTH = "100"


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace the place on the page by a section a command."""
    return markdown.replace(_PLACE, _sections()) if _PLACE in markdown else markdown


def _sections() -> str:
    os.environ["COLUMNS"] = _WIDTH
    parser = build_parser()
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    return "\n".join(
        f"## {name}\n\n```text\n{command.format_help(everything=True)}```\n" for name, command in commands.items()
    )

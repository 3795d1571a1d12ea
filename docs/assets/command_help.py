"""Puts the help of every command into the page of the command line, and the options of a run into that of Python."""

import argparse
import dataclasses
import os

from optimum_fista.cli.main import build_parser
from optimum_fista.options import PruningOptions
from optimum_fista.train.recovery_options import RecoveryOptions

_WIDTH = "100"


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace the places on the pages by a section a command, and by a line an option."""
    for place, kind in (
        ("<!-- options -->", PruningOptions),
        ("<!-- recovery -->", RecoveryOptions),
    ):
        markdown = markdown.replace(place, _options(kind))
    return markdown.replace("<!-- commands -->", _sections())


def _sections() -> str:
    os.environ["COLUMNS"] = _WIDTH
    parser = build_parser()
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    return "\n".join(
        f"## {name}\n\n```text\n{command.format_help()}```\n" for name, command in commands.items()
    )


def _options(kind: type) -> str:
    return "\n".join(
        f"- `{f.name}: {f.type}`: {f.metadata['help']}" for f in dataclasses.fields(kind)
    )

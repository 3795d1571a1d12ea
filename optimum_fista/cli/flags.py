"""Flags of a command, made from the fields of a dataclass that declares its options.

`add_options` adds them to a parser. `given_options` takes the values of those that the user has passed from the parsed
arguments. Each field is declared by `optimum_fista.options.option`, whose metadata has the help and the group.
"""

import argparse
from collections.abc import Mapping
from dataclasses import Field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from optimum_fista.options import kinds_of

# Keyword arguments of `add_argument` for two flags that several commands have.
DEVICE: dict[str, Any] = {
    "help": "cpu, cuda, cuda:1 (default: the accelerator unless it is mps, otherwise the CPU)"
}
DTYPE: dict[str, Any] = {
    "default": "auto",
    "help": "dtype of the weights: float32, bfloat16, float16, or auto: as they are stored (default)",
}
_METAVARS = {int: "N", float: "NUMBER", str: "NAME", Path: "DIR"}  # what the help shows for a value


def add_options(parser: argparse.ArgumentParser, options: type) -> dict[str, Any]:
    """Add a flag to `parser` for each field of the dataclass `options`, such as `PruningOptions`.

    A flag has the help and the choices of its field, and the help names the default. A field that is a mapping gets no
    flag. Returns the argument groups of rarely used options, by their titles; a command may add its own flags to them.
    """
    groups: dict[str, Any] = {}
    hints = get_type_hints(options)
    for field in fields(options):
        # The types that the option takes besides None, such as [float] or [Literal["none", "full"], float].
        kinds = kinds_of(hints[field.name])
        if get_origin(kinds[0]) is Mapping:
            continue  # only for Python and --config files
        # The title of its group of rarely used options; None: an option of every day.
        title = field.metadata["advanced"]
        if title is not None and title not in groups:
            groups[title] = parser.add_argument_group(f"advanced: {title}")
        flag, settings = _flag_of(field, kinds)
        group_or_parser = parser if title is None else groups[title]
        group_or_parser.add_argument(flag, dest=field.name, **settings)
    return groups


def _flag_of(field: Field, kinds: list[Any]) -> tuple[str, dict[str, Any]]:
    """Return the flag of an option, such as "--max-iterations", and the keyword arguments of `add_argument` for it.

    `kinds` are the types that the option takes besides None, such as `[Literal["none", "full"], float]`. An option that
    the user does not pass is parsed as None.
    """
    flag = field.name.replace("_", "-")
    text = field.metadata["help"]
    kind = kinds[0]
    origin = get_origin(kind)
    settings: dict[str, Any]
    if kind is bool:
        settings = {"action": "store_const", "const": not field.default}
        if field.default:  # the flag switches the option off
            flag = f"no-{flag}"
            text = f"do not {text}"
    elif origin is tuple:
        # A flag for each name pattern, or for each text or id of a token (`tuple[str | int, ...]`).
        is_name_pattern = get_args(kind)[0] is str
        settings = {"action": "append", "metavar": "GLOB" if is_name_pattern else "TEXT"}
    elif origin is Literal and len(kinds) == 1:
        settings = {"choices": get_args(kind)}
    elif origin is not None:  # some words, or a number
        settings = {"type": _word_or_number, "metavar": _METAVARS[str]}
    else:
        settings = {"type": kind, "metavar": _METAVARS[kind]}

    shows_default = not isinstance(field.default, bool | tuple | NoneType)
    if shows_default:
        text += f" (default {field.default})"
    settings["help"] = text.replace("%", "%%")  # argparse fills in %
    return f"--{flag}", settings


def given_options(arguments: argparse.Namespace, options: type) -> dict[str, Any]:
    """Return the options whose flags the user has passed, by the names of the fields of the dataclass `options`."""
    values = {field.name: getattr(arguments, field.name, None) for field in fields(options)}
    return {name: value for name, value in values.items() if value is not None}


def _word_or_number(text: str) -> str | float:
    """Return a text as a number if it is one, and as it is if not."""
    try:
        return float(text)
    except ValueError:
        return text

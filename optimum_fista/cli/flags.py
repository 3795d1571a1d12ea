"""Flags of a command, made from the fields of a dataclass that declares its options."""

import argparse
from collections.abc import Mapping
from dataclasses import Field, fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from optimum_fista.options import kinds_of

DEVICE: dict[str, Any] = {
    "help": "cpu, cuda, cuda:1 (default: the accelerator unless it is mps, otherwise the CPU)"
}
DTYPE: dict[str, Any] = {
    "default": "auto",
    "help": "dtype of the weights: float32, bfloat16, float16, or auto: as they are stored (default)",
}
_NAMES = {int: "N", float: "NUMBER", str: "NAME"}


def add_options(parser: argparse.ArgumentParser, options: type) -> dict[str, Any]:
    """Add a flag for each field of the dataclass `options` that is not a mapping, with its help, choices and default.

    Returns the groups of rarely used options, by their titles; a command may add its own flags to them.
    """
    groups: dict[str, Any] = {}
    hints = get_type_hints(options)
    for field in fields(options):
        kinds = kinds_of(hints[field.name])
        if get_origin(kinds[0]) is Mapping:
            continue  # only for Python and --config files
        title = field.metadata["advanced"]
        if title is not None and title not in groups:
            groups[title] = parser.add_argument_group(f"advanced: {title}")
        flag, settings = _flag_of(field, kinds)
        groups.get(title, parser).add_argument(flag, dest=field.name, **settings)
    return groups


def _flag_of(field: Field, kinds: list[Any]) -> tuple[str, dict[str, Any]]:
    """The flag of an option that takes these types, and what argparse is told of it; None if it is not given."""
    flag = field.name.replace("_", "-")
    text = field.metadata["help"]
    kind = kinds[0]
    origin = get_origin(kind)
    settings: dict[str, Any]
    if kind is bool:
        settings = {"action": "store_const", "const": not field.default}
        if field.default:
            flag = f"no-{flag}"
            text = f"do not {text}"
    elif origin is tuple:
        settings = {"action": "append", "metavar": "GLOB"}  # a flag for each pattern
    elif origin is Literal and len(kinds) == 1:
        settings = {"choices": get_args(kind)}
    elif origin is not None:  # some words, or a number
        settings = {"type": _word_or_number, "metavar": _NAMES[str]}
    else:
        settings = {"type": kind, "metavar": _NAMES[kind]}
    if not isinstance(field.default, bool | tuple | NoneType):
        text += f" (default {field.default})"
    settings["help"] = text.replace("%", "%%")  # argparse fills in %
    return f"--{flag}", settings


def given(arguments: argparse.Namespace, options: type) -> dict[str, Any]:
    """The options of the dataclass `options` whose flags were given, by the names of their fields."""
    values = {field.name: getattr(arguments, field.name, None) for field in fields(options)}
    return {name: value for name, value in values.items() if value is not None}


def _word_or_number(text: str) -> str | float:
    """Read a number if the text is one."""
    try:
        return float(text)
    except ValueError:
        return text

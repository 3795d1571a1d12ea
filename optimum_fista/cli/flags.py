"""Flags of a command, made from the fields of a dataclass that declares its options."""

import argparse
from collections.abc import Mapping
from dataclasses import fields
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
    """Add a flag for each field that is not a mapping, with its help, choices and default.

    Returns the groups of options that the fields name; a command may add its own flags to them.
    """
    groups, hints = dict[str, Any](), get_type_hints(options)
    for field in fields(options):
        title = field.metadata["advanced"]  # of the group; None for an everyday option
        kinds = kinds_of(hints[field.name])
        kind, origin = kinds[0], get_origin(kinds[0])
        if origin is Mapping:
            continue  # only for Python and --config files
        text, flag, settings = field.metadata["help"], field.name.replace("_", "-"), {}
        if kind is bool:
            settings = {
                "action": "store_const",
                "const": not field.default,
            }  # None if the flag is not given
            flag, text = (f"no-{flag}", f"do not {text}") if field.default else (flag, text)
        elif origin is tuple:
            settings = {"action": "append", "metavar": "GLOB"}  # a flag for each pattern
        elif origin is Literal and len(kinds) == 1:
            settings = {"choices": get_args(kind)}
        else:
            settings = {
                "type": _word_or_number if origin else kind,
                "metavar": _NAMES[str if origin else kind],
            }
        if not isinstance(field.default, bool | tuple | NoneType):
            text += f" (default {field.default})"
        if title is not None and title not in groups:
            groups[title] = parser.add_argument_group(f"advanced: {title}")
        settings |= {"dest": field.name, "help": text.replace("%", "%%")}  # argparse fills in %
        groups.get(title, parser).add_argument(f"--{flag}", **settings)
    return groups


def given(arguments: argparse.Namespace, options: type) -> dict[str, Any]:
    """The options whose flags were given."""
    values = {field.name: getattr(arguments, field.name, None) for field in fields(options)}
    return {name: value for name, value in values.items() if value is not None}


def _word_or_number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text

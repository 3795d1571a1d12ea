"""Fields of dataclasses: they hold the types that are declared, also when they are read from JSON."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_types_of: Callable[[Any], dict[str, Any]] = functools.cache(get_type_hints)


def as_record(kind: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass from what JSON has of it: the inverse of `dataclasses.asdict`."""
    types = _types_of(kind)
    record = kind(**{name: _as_declared(value, types.get(name)) for name, value in values.items()})
    wrong = wrong_field(record)
    if wrong is not None:
        raise TypeError(wrong)
    return record


def _as_declared(value: Any, hint: Any) -> Any:
    """A value as its field holds it: JSON has lists for tuples, objects for dataclasses, and text for all keys."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _as_declared(value, inner[0])  # the other is None
    if isinstance(value, dict) and dataclasses.is_dataclass(hint):
        return as_record(hint, value)  # type: ignore[arg-type]
    if isinstance(value, dict) and inner:
        return {int(k) if inner[0] is int else k: _as_declared(v, inner[1]) for k, v in value.items()}
    if isinstance(value, list) and inner:
        return (tuple if origin is tuple else list)(_as_declared(part, inner[0]) for part in value)
    return value


_WORDS = {Any: "anything", int: "a whole number", float: "a number", str: "text", bool: "True or False"}


def wrong_field(record: Any) -> str | None:
    """What to say of the first field of a dataclass that holds another type than declared, a word that is no choice, or
    a number outside of the `limits` in its metadata; `None` if none does.
    """
    hints = _types_of(type(record))
    for field in dataclasses.fields(record):
        value, hint = getattr(record, field.name), hints[field.name]
        least, most = field.metadata.get("limits") or (None, None)
        limited = least is not None and isinstance(value, int | float)
        if not _fits(value, hint) or (limited and not least <= value <= (most or math.inf)):
            limits = "" if least is None else f" of at least {least}" if most is None else f" from {least} to {most}"
            return f"{field.name}={value!r}: pass {_words(hint)}{limits}."
    return None


def kinds_of(hint: Any) -> list[Any]:
    """The types that a field takes, but for None."""
    return [t for t in (get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint]) if t is not NoneType]


def _words(hint: Any) -> str:
    """What a field takes, in words."""
    words: list[str] = []
    for kind in kinds_of(hint):
        origin, inner = get_origin(kind), get_args(kind)
        if origin is Literal:
            words += map(repr, inner)
        elif origin in (Mapping, tuple):
            one = " to ".join(_words(part) for part in inner if part is not ...)
            words.append(f"a {'tuple' if origin is tuple else 'dictionary'} of {one}")
        else:
            words.append(_WORDS.get(kind, str(getattr(kind, "__name__", kind))))
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _fits(value: object, hint: Any) -> bool:
    """Whether a value, as it is or as JSON has it, is of a declared type."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, kind) for kind in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple and inner[1:] != (...,):
        return isinstance(value, tuple) and len(value) == len(inner) and all(map(_fits, value, inner))
    if origin in (tuple, list, Sequence):
        return isinstance(value, origin) and all(_fits(part, inner[0]) for part in value)
    if origin is not None:
        return isinstance(value, origin) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, hint)

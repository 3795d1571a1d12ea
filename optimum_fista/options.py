"""The options of a pruning run, each declared once: its type, choices, limits, default and help.

An option is a field of `PruningOptions`, made by `option`. Its type hint says which values it takes: a `Literal` lists
the choices. Three things are made from the fields: `FistaPruningConfig` checks the values that a user passes, `prune`
has a flag for each, and the documentation lists them.

Records of a run, such as reports, are dataclasses as well. `as_record` reads them from JSON, and checks their fields in
the same way. This module loads neither torch nor transformers, so that `--help` is quick.

A *hint* is the type hint of a field as `typing.get_type_hints` returns it, such as `tuple[str, ...]` or `int | None`.
*Limits* are the least and the largest number that an option takes; `None` as the largest: there is none.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

ErrorCorrection = Literal["none", "after_attention", "intra", "full"] | float
Allocation = Literal["uniform", "fisher"]
Limits = tuple[float, float | None]
SEEDS = (0, 2**64 - 1)  # least and largest seed of torch.manual_seed

# Groups of rarely used flags, which only `prune --help-all` shows.
_OPERATORS = "which operators"
_METHOD = "method"
_MACHINE = "calibration and machine"


def option(
    default: Any, text: str, *, limits: Limits | None = None, advanced: str | None = None
) -> Any:
    """Declare an option of a dataclass; returns its `dataclasses.field`, whose metadata other functions here read.

    Args:
        default: Its default, or a function that makes the default, such as `dict`.
        text: Its help.
        limits: Its least and largest number; None as the largest: there is none.
        advanced: The group of rarely used flags that it belongs to; None: a flag of every day.
    """
    metadata = {"help": text, "limits": limits, "advanced": advanced}
    if callable(default):
        # It is called for each object, so that no two configurations share one dictionary.
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def require_seed(seed: int) -> None:
    """Refuse a seed that PyTorch can't take."""
    if not SEEDS[0] <= seed <= SEEDS[1]:
        raise ValueError(f"seed={seed}: pass a whole number from {SEEDS[0]} to {SEEDS[1]}.")


@dataclass(frozen=True)
class PruningOptions:
    """The fields of `FistaPruningConfig`. If an option is `None`, the method chooses it (`MethodDefaults`)."""

    sparsity: float | None = option(
        None, "share of weights to set to zero, in [0, 1) (default 0.5, or the pattern's)"
    )
    pattern: str = option(
        "unstructured",
        "2:4 keeps 2 of every 4 consecutive inputs of a row; 4:8-pairs keeps 2 whole pairs of every 4; channels:0.25, "
        "heads:0.5, experts:0.25, expert_channels:0.25 or layers:0.1, or several joined by +, remove whole parts; "
        "vocab:0.35 removes tokens that the text rarely has, vocab:unused those that it never has (docs/smaller.md)",
    )
    scope: Literal["matrix", "row"] | None = option(
        None,
        "matrix: the rows of an operator share its zeros; row: all rows have as many zeros (default: by method)",
        advanced=_OPERATORS,
    )
    method: str = option(
        "obs_admm", "obs_admm, fista, magnitude, wanda, dsnot, sparsegpt, admm, alps or flap"
    )
    error_correction: ErrorCorrection | None = option(
        None,
        "compensate for the errors of operators that were pruned before: none; intra: those in the same decoder layer; "
        "after_attention: as intra, but not inside of the attention, which takes less time; full: also those in all "
        "earlier decoder layers; a number from 0 to 1: as full, but only for this share of the error (docs/method.md; "
        "default: by method; for obs_admm after_attention for at most half zeros, intra for more and for patterns such "
        "as 2:4, and 0.5 if whole parts are removed)",
        limits=(0, 1),
        advanced=_METHOD,
    )
    residual_correction: float | None = option(
        None,
        "share of the error in the rest of a decoder layer's output for which its last operator compensates (default: "
        "1 for obs_admm if whole parts are removed, otherwise 0)",
        limits=(0, 1),
        advanced=_METHOD,
    )
    allocation: Allocation | None = option(
        None,
        "uniform: every operator gets the same sparsity; fisher: operators share the zeros so that the loss rises "
        "least, as its gradients predict it (default: fisher for obs_admm, uniform for others)",
        advanced=_OPERATORS,
    )
    allocation_tokens: int | None = option(
        None,
        "calibration tokens to compute the loss and its gradients on (default: 1024, the first 128 of each sequence, "
        "or more of each if there are fewer than eight; or 2048, to choose decoder layers)",
        limits=(2, None),
        advanced=_MACHINE,
    )
    held_out: int = option(
        0,
        "further sequences to measure errors on; no weight is fitted to them",
        limits=(0, None),
        advanced=_MACHINE,
    )
    warm_start: str | None = option(
        None, "how FISTA gets its first weights: auto, wanda or sparsegpt", advanced=_METHOD
    )
    max_iterations: int | None = option(
        None, "maximum number of iterations of the method", advanced=_METHOD
    )
    tolerance: float | None = option(
        None, "relative change at which the method stops", advanced=_METHOD
    )
    method_options: Mapping[str, Any] = option(dict, "further options of the method, by name")
    include: tuple[str, ...] = option(
        (), "prune only operators whose names match; repeatable", advanced=_OPERATORS
    )
    exclude: tuple[str, ...] = option(
        (), "leave operators whose names match dense; repeatable", advanced=_OPERATORS
    )
    overrides: Mapping[str, float | str] = option(
        dict,
        "sparsity or pattern of operators whose names match; the first match counts, 0 leaves an operator dense",
    )
    keep_tokens: tuple[str | int, ...] = option(
        (),
        "for vocab: a token, or a text whose tokens must all stay, also after a space; repeatable",
        advanced=_OPERATORS,
    )
    expert_refit: bool = option(
        True,
        "refit the experts that stay if others are removed and the calibration has several texts",
        advanced=_METHOD,
    )
    keep_divisible: int | None = option(
        None,
        "for experts: keep a number of them that this divides, such as 8 for expert parallelism on 2, 4 or 8 devices",
        limits=(1, None),
        advanced=_OPERATORS,
    )
    reorder_channels: bool = option(
        False,
        "for n:m: reorder MLP channels to keep larger weights; existing adapters no longer fit",
        advanced=_METHOD,
    )
    compute_dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "dtype in which float32 matrices are multiplied in forward passes, gradients and sums over tokens; bfloat16 "
        "means TensorFloat-32 on CUDA; auto: what is fastest on the device and keeps the perplexity, and 16-bit "
        "matrices are multiplied in float32 if it is slow in their dtype; weights are solved for in float32, but in "
        "bfloat16 and TensorFloat-32 the default method rounds changes of them before it multiplies",
        advanced=_MACHINE,
    )
    seed: int = option(0, "seed of all random choices", limits=SEEDS, advanced=_MACHINE)


T = TypeVar("T")
# Type hints of a dataclass by field; slow to find, and needed for every record.
_types_of: Callable[[Any], dict[str, Any]] = functools.cache(get_type_hints)


def as_record(kind: type[T], values: Mapping[str, Any]) -> T:
    """Make an object of the dataclass `kind` from its JSON values: the inverse of `dataclasses.asdict`.

    `values` has a JSON value by the name of each field; fields with defaults may be missing. It stays as it is.
    TypeError if a value does not fit its field, or if there is no such field.
    """
    types = _types_of(kind)
    fields = {name: _from_json(value, types.get(name)) for name, value in values.items()}
    record = kind(**fields)
    message = wrong_field(record)
    if message is not None:
        raise TypeError(message)
    return record


def _from_json(value: Any, hint: Any) -> Any:
    """Convert a JSON value to its field's type `hint`, as far as JSON has another one; `value` stays as it is.

    JSON has lists for tuples, objects for dataclasses, and text for the keys of dictionaries. A value that does not fit
    its hint is returned as it is, and refused later (`wrong_field`).
    """
    # Of `dict[str, int]`, for example, `dict` and `(str, int)`.
    origin = get_origin(hint)
    inner = get_args(hint)
    if origin in (Union, UnionType):
        return _from_json(value, inner[0])  # the other type is None, which needs no conversion
    if isinstance(value, dict) and dataclasses.is_dataclass(hint):
        return as_record(hint, value)  # type: ignore[arg-type]
    if isinstance(value, dict) and inner:
        key_type, value_type = inner
        converted = {}
        for key, item in value.items():
            key_of_field = int(key) if key_type is int else key
            converted[key_of_field] = _from_json(item, value_type)
        return converted
    if isinstance(value, list) and inner:
        items = [_from_json(item, inner[0]) for item in value]
        return tuple(items) if origin is tuple else items
    return value


def wrong_field(record: Any) -> str | None:
    """Return a message about the first field with a wrong type, choice or number; `None` if all are as declared.

    `record` is an object of a dataclass, such as `PruningOptions` or a report; it is only read. The type hints of its
    fields say which values are right. Fields made by `option` have limits, too.
    """
    hints = _types_of(type(record))
    for declared in dataclasses.fields(record):
        value = getattr(record, declared.name)
        hint = hints[declared.name]
        limits = declared.metadata.get("limits")
        if not _fits(value, hint) or not _is_within(value, limits):
            return f"{declared.name}={value!r}: pass {_words(hint)}{_words_of_limits(limits)}."
    return None


def _is_within(value: Any, limits: Limits | None) -> bool:
    """Tell whether `value` is within its limits, both included; a value that is no number has none."""
    if limits is None or not isinstance(value, int | float):
        return True
    least, most = limits
    if most is None:
        most = math.inf
    return least <= value <= most  # NaN is within nothing


def _words_of_limits(limits: Limits | None) -> str:
    """Say in words which numbers an option takes: " of at least 1", " from 0 to 1", or nothing."""
    if limits is None:
        return ""
    least, most = limits
    return f" of at least {least}" if most is None else f" from {least} to {most}"


def kinds_of(hint: Any) -> list[Any]:
    """Return the types that a field with this type hint takes, without None: `[int]` for `int | None`."""
    is_union = get_origin(hint) in (Union, UnionType)
    kinds = get_args(hint) if is_union else (hint,)
    return [kind for kind in kinds if kind is not NoneType]


_WORDS = {
    Any: "anything",
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "True or False",
    Path: "a path",
}


def _words(hint: Any) -> str:
    """Say in words what a field with this type hint takes, such as "'uniform', 'fisher' or a number".

    `hint` is a type hint, such as `Literal["uniform", "fisher"] | float`.
    """
    words: list[str] = []
    for kind in kinds_of(hint):
        origin = get_origin(kind)
        inner = get_args(kind)
        if origin is Literal:
            words += [repr(choice) for choice in inner]
        elif origin in (Mapping, tuple):
            # `tuple[str, ...]` is "a tuple of text": there are no words for `...`. `Mapping[str, float]` is
            # "a dictionary of text to a number".
            items = " to ".join(_words(part) for part in inner if part is not ...)
            container = "tuple" if origin is tuple else "dictionary"
            words.append(f"a {container} of {items}")
        else:
            name = str(getattr(kind, "__name__", kind))  # of a type without words of its own
            words.append(_WORDS.get(kind, name))
    if len(words) == 1:
        return words[0]
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _fits(value: Any, hint: Any) -> bool:
    """Tell whether a value, with all that it contains, has the type of a type hint such as `dict[str, int]`."""
    origin = get_origin(hint)
    inner = get_args(hint)  # types of the contents, choices of a Literal, or members of a union
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, kind) for kind in inner)
    if origin is Literal:
        return value in inner
    has_type_for_each_place = origin is tuple and inner[1:] != (...,)  # not `tuple[str, ...]`
    if has_type_for_each_place:
        has_length = isinstance(value, tuple) and len(value) == len(inner)
        return has_length and all(map(_fits, value, inner))
    if origin in (tuple, list, Sequence):
        return isinstance(value, origin) and all(_fits(item, inner[0]) for item in value)
    if origin is not None:  # no other kind of hint is used: this is a dictionary
        key_type, value_type = inner
        return isinstance(value, origin) and all(
            _fits(key, key_type) and _fits(item, value_type) for key, item in value.items()
        )
    if hint in (int, float):
        # For Python True is an int, but it is refused here. And 1 is no float, but it is taken as one.
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, hint)

"""The options of a pruning run, each declared once: its type, choices, limits, default and help.

`FistaPruningConfig` checks values against these declarations. They also give the flags of `optimum-fista prune`, and
the documentation lists them. A `Literal` gives the choices. Records of a run are dataclasses too: `as_record` reads
them from JSON and checks them in the same way. This module loads neither torch nor transformers: `--help` is quick.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

ErrorCorrection = Literal["none", "intra", "full"] | float
Allocation = Literal["uniform", "fisher"]
Limits = tuple[float, float | None]
SEEDS = (0, 2**64 - 1)  # least and largest seed of torch.manual_seed

_WHICH, _METHOD, _MACHINE = "which operators", "method", "calibration and machine"


def option(
    default: Any, text: str, *, limits: Limits | None = None, advanced: str | None = None
) -> Any:
    """Declare an option of a dataclass: its default (or a function that makes the default), its help, its least and
    largest number (`None`: any), and its group if it is rarely used.
    """
    kind = (
        "default_factory" if callable(default) else "default"
    )  # dict, so that no two configurations share one
    return field(**{kind: default}, metadata={"help": text, "limits": limits, "advanced": advanced})


def require_seed(seed: int) -> None:
    """Refuse a seed that PyTorch can't take."""
    if not SEEDS[0] <= seed <= SEEDS[1]:
        raise ValueError(f"seed={seed}: pass a whole number from {SEEDS[0]} to {SEEDS[1]}.")


@dataclass(frozen=True)
class PruningOptions:
    """The fields of `FistaPruningConfig`. If an option is `None`, the method chooses it (`PruningMethod.defaults`)."""

    sparsity: float | None = option(
        None, "share of weights to set to zero, in [0, 1) (default 0.5, or the pattern's)"
    )
    pattern: str = option(
        "unstructured",
        "2:4 keeps 2 of every 4 consecutive inputs of a row; 4:8-pairs keeps 2 whole pairs of every 4; channels:0.25, "
        "heads:0.5, experts:0.25 or layers:0.1, or several joined by +, remove whole parts; vocab:0.35 removes tokens "
        "that the text rarely has, vocab:unused those that it never has (docs/smaller.md)",
    )
    scope: Literal["matrix", "row"] | None = option(
        None,
        "matrix: the rows of an operator share its zeros; row: all rows have as many zeros (default: by method)",
        advanced=_WHICH,
    )
    method: str = option(
        "obs_admm", "obs_admm, fista, magnitude, wanda, dsnot, sparsegpt, admm, alps or flap"
    )
    error_correction: ErrorCorrection | None = option(
        None,
        "compensate for the errors of operators that were pruned before: none; intra: those in the same decoder layer; "
        "full: also those in all earlier decoder layers; a number from 0 to 1: as full, but only for this share of the "
        "error (docs/method.md; default: by method, 0.5 for obs_admm)",
        limits=(0, 1),
        advanced=_METHOD,
    )
    residual_correction: float | None = option(
        None,
        "share of the error in the rest of a decoder layer's output for which its last operator compensates (default: "
        "1 for obs_admm, 0 for others)",
        limits=(0, 1),
        advanced=_METHOD,
    )
    allocation: Allocation | None = option(
        None,
        "uniform: every operator gets the same sparsity; fisher: operators share the zeros so that the loss rises "
        "least, as its gradients predict it (default: fisher for obs_admm, uniform for others)",
        advanced=_WHICH,
    )
    allocation_tokens: int = option(
        2048,
        "calibration tokens to compute the loss and its gradients on",
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
        (), "prune only operators whose names match; repeatable", advanced=_WHICH
    )
    exclude: tuple[str, ...] = option(
        (), "leave operators whose names match dense; repeatable", advanced=_WHICH
    )
    overrides: Mapping[str, float | str] = option(
        dict,
        "sparsity or pattern of operators whose names match; the first match counts, 0 leaves an operator dense",
    )
    keep_tokens: tuple[str | int, ...] = option(
        (),
        "for vocab: a token, or a text whose tokens must all stay, also after a space; repeatable",
        advanced=_WHICH,
    )
    expert_refit: bool = option(
        True, "refit the experts that stay if others are removed", advanced=_METHOD
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
        "matrices are multiplied in float32 if it is slow in their dtype; weights are solved for in float32",
        advanced=_MACHINE,
    )
    seed: int = option(0, "seed of all random choices", limits=SEEDS, advanced=_MACHINE)


T = TypeVar("T")
_types_of: Callable[[Any], dict[str, Any]] = functools.cache(
    get_type_hints
)  # slow, and needed for every record


def as_record(kind: type[T], values: Mapping[str, Any]) -> T:
    """Make a dataclass of its JSON values: the inverse of `dataclasses.asdict`."""
    types = _types_of(kind)
    record = kind(**{name: _as_declared(value, types.get(name)) for name, value in values.items()})
    if wrong := wrong_field(record):
        raise TypeError(wrong)
    return record


def _as_declared(value: Any, hint: Any) -> Any:
    """Convert a JSON value to its field's type: JSON has lists for tuples, objects for dataclasses, text for keys."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _as_declared(value, inner[0])  # the other type is None
    if isinstance(value, dict) and dataclasses.is_dataclass(hint):
        return as_record(hint, value)  # type: ignore[arg-type]
    if isinstance(value, dict) and inner:
        return {
            int(k) if inner[0] is int else k: _as_declared(v, inner[1]) for k, v in value.items()
        }
    if isinstance(value, list) and inner:
        return (tuple if origin is tuple else list)(_as_declared(part, inner[0]) for part in value)
    return value


def wrong_field(record: Any) -> str | None:
    """Describe the first field with a wrong type, choice or number; `None` if all fields are as declared."""
    hints = _types_of(type(record))
    for one in dataclasses.fields(record):
        value, hint = getattr(record, one.name), hints[one.name]
        least, most = one.metadata.get("limits") or (None, None)
        limited = least is not None and isinstance(value, int | float)
        # `not least <= value` and not `value < least`: NaN is neither
        if not _fits(value, hint) or (limited and not least <= value <= (most or math.inf)):
            limits = (
                ""
                if least is None
                else f" of at least {least}"
                if most is None
                else f" from {least} to {most}"
            )
            return f"{one.name}={value!r}: pass {_words(hint)}{limits}."
    return None


def kinds_of(hint: Any) -> list[Any]:
    """The types that a field takes, without None."""
    return [
        t
        for t in (get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint])
        if t is not NoneType
    ]


_WORDS = {
    Any: "anything",
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "True or False",
}


def _words(hint: Any) -> str:
    """Say in words what a field takes."""
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
    """Whether a value has the declared type."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, kind) for kind in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple and inner[1:] != (...,):  # one type for each place
        return (
            isinstance(value, tuple) and len(value) == len(inner) and all(map(_fits, value, inner))
        )
    if origin in (tuple, list, Sequence):
        return isinstance(value, origin) and all(_fits(part, inner[0]) for part in value)
    if origin is not None:
        return isinstance(value, origin) and all(
            _fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items()
        )
    if hint in (int, float):  # for Python, True is an int, and 1 is not a float
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, hint)

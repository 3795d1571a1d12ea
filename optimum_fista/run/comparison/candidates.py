"""Methods and patterns as users write them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optimum_fista.run.config import FistaPruningConfig

DENSE = "dense"
NO_PATTERN = "-"


@dataclass(frozen=True)
class Candidate:
    """What one row of a comparison measures.

    Attributes:
        method: The method as the user wrote it, or `DENSE`.
        pattern: The pattern as the user wrote it, or `NO_PATTERN`.
        seed: Seed of the calibration tokens and of the configuration.
        config: The configuration; `None` for the dense model, and if there is none.
        error: Why there is no configuration.
    """

    method: str
    pattern: str
    seed: int
    config: FistaPruningConfig | None = None
    error: str | None = None


def parse_config(method: str, pattern: str, seed: int = 0, held_out: int = 0) -> FistaPruningConfig:
    """A configuration from `name:option=value:...` and a fraction of zeros or a pattern: `0.5`, `2:4`.

    Options are those of `FistaPruningConfig` or of the method, their values JSON or text. `default` is
    `FistaPruningConfig()`, `paper` `FistaPruningConfig.paper()`.

    Raises:
        ValueError: If the method, an option or the pattern is not known, or they don't go together.
    """
    name, *pairs = method.split(":")
    given = dict(_option(method, pair) for pair in pairs)
    if "held_out" in given:
        raise ValueError(f"method={method!r}: held_out is the same for all methods; pass --held-out N instead.")
    options = {"seed": seed, "held_out": held_out} | given
    fields = {field.name for field in dataclasses.fields(FistaPruningConfig)}
    settings: dict[str, Any] = {key: value for key, value in options.items() if key in fields}
    sparsity = sparsity_of(pattern)
    settings |= {"pattern": pattern} if sparsity is None else {"sparsity": sparsity}
    own = {key: value for key, value in options.items() if key not in fields}
    if name == "paper":
        config = FistaPruningConfig.paper(**settings)
        return dataclasses.replace(config, method_options={**config.method_options, **own})
    if name != "default":
        settings["method"] = name
    return FistaPruningConfig(method_options=own, **settings)


def candidates(
    methods: Sequence[str], patterns: Sequence[str], seeds: Sequence[int], held_out: int = 0
) -> list[Candidate]:
    """Every method in every pattern and seed, seeds outermost, so that one seed is complete early.

    `held_out` is an option of all their configurations.

    Raises:
        ValueError: If a method works with none of the patterns, or a pattern with none of the methods.
    """
    found = [
        _candidate(method, pattern, seed, held_out) for seed in seeds for pattern in patterns for method in methods
    ]
    for name, values in (("method", methods), ("pattern", patterns)):
        for value in values:
            those = [candidate for candidate in found if getattr(candidate, name) == value]
            if all(candidate.config is None for candidate in those):
                raise ValueError(f"{name} {value!r}: {those[0].error}")
    return found


def _candidate(method: str, pattern: str, seed: int, held_out: int) -> Candidate:
    try:
        return Candidate(method, pattern, seed, parse_config(method, pattern, seed, held_out))
    except ValueError as error:
        return Candidate(method, pattern, seed, error=str(error))


def _option(method: str, pair: str) -> tuple[str, Any]:
    key, equals, value = pair.partition("=")
    if not equals or not key:
        raise ValueError(f"method={method!r}: {pair!r} is no option; pass name:option=value:option=value.")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def sparsity_of(pattern: str) -> float | None:
    """The fraction of zeros, if the text of a pattern is one."""
    try:
        return float(pattern)
    except ValueError:
        return None

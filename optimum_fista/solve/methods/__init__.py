"""Pruning methods, one a file; importing this package registers those of its folder."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import Any

from optimum_fista.solve.method import METHODS, PruningMethod

__all__ = ["METHODS", "create_method"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def create_method(name: str, **options: Any) -> PruningMethod:
    """Create a method by its name with the given options."""
    if name not in METHODS:
        raise ValueError(f"method={name!r}: pass one of {', '.join(map(repr, sorted(METHODS)))}.")
    known = [field.name for field in dataclasses.fields(METHODS[name])]  # type: ignore[arg-type]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"method {name!r} has no option {', '.join(map(repr, unknown))}: it takes {', '.join(known) or 'none'}."
        )
    return METHODS[name](**options)

"""Pruning methods, one a file; importing this package registers those of its folder."""

import importlib
import pkgutil

from optimum_fista.solve.method import (
    METHODS,
    create_method,
    largest_memory_factors,
    method_class,
)

__all__ = ["METHODS", "create_method", "largest_memory_factors", "method_class"]

for _module in pkgutil.iter_modules(__path__):  # a new method needs no line here
    importlib.import_module(f"{__name__}.{_module.name}")

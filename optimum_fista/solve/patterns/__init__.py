"""Sparsity patterns, one a file; importing this package makes those of its folder known to `parse_pattern`."""

import importlib
import pkgutil

from optimum_fista.solve.pattern import Unstructured, parse_pattern
from optimum_fista.solve.patterns.columns import Columns
from optimum_fista.solve.patterns.whole_parts import PartShare, WholeParts

__all__ = ["Columns", "PartShare", "Unstructured", "WholeParts", "parse_pattern"]

for _module in pkgutil.iter_modules(__path__):  # a new pattern needs no line here
    importlib.import_module(f"{__name__}.{_module.name}")

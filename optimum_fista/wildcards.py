"""Patterns of names, such as "*.mlp.*"."""

from collections.abc import Sequence
from fnmatch import fnmatchcase


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Tell whether `name` matches one of the shell-style patterns, case included."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)

"""A new method, pattern or error correction is one file: nobody outside of its package knows it by name."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "optimum_fista"


def test_patterns_and_corrections_are_told_apart_in_their_own_files():
    for file in PACKAGE.rglob("*.py"):
        parsed = ast.parse(file.read_text())
        names = {node.id for node in ast.walk(parsed) if isinstance(node, ast.Name)}
        words = {node.value for node in ast.walk(parsed) if isinstance(node, ast.Constant)}
        if file.parent.name != "patterns":
            assert not names & {"Unstructured", "NOfM", "Pairs"}, file
        if file.name not in ("correction.py", "config.py", "options.py"):
            assert "intra" not in words, file

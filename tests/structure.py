"""The tree of CONTRIBUTING.md and who imports whom: `python tests/structure.py` writes the tree anew."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
PACKAGES = ("optimum_fista_cli", "optimum_fista")
BEGIN, END = "<!-- The tree is made by `python tests/structure.py`. -->\n", "<!-- End of the tree. -->\n"


def modules() -> dict[str, Path]:
    """Files of the packages by module name, `__init__.py` under the name of its folder."""
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(file: Path) -> set[str]:
    """Every module that a file imports by `from X import Y`, `X.Y` included, in functions and for types as well."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def importers() -> dict[str, set[str]]:
    """For each module that is no `__init__.py`: the modules of the packages that import it."""
    files = modules()
    found: dict[str, set[str]] = {name: set() for name, file in files.items() if file.name != "__init__.py"}
    for name, file in files.items():
        for imported in imports(file) & found.keys():
            found[imported].add(name)
    return found


def first_line(file: Path) -> str:
    """The first sentence of a module's docstring, without its full stop."""
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return text.partition("\n")[0].removesuffix(".")


def tree() -> str:
    """A line a folder and a file, with what its docstring says."""
    lines = []
    for package in PACKAGES:
        for folder in [ROOT / package, *sorted(path for path in (ROOT / package).rglob("*") if path.is_dir())]:
            files = sorted(folder.glob("*.py"))
            if not files:
                continue
            about = first_line(folder / "__init__.py") if (folder / "__init__.py") in files else ""
            lines.append(f"{folder.relative_to(ROOT)}/  {about}".rstrip())
            lines += [f"    {file.name:24} {first_line(file)}" for file in files if file.name != "__init__.py"]
    return "```text\n" + "\n".join(lines) + "\n```\n"


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{tree()}{END}{rest.partition(END)[2]}")

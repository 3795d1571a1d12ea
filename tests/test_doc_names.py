"""Names of modules, classes and functions that the documentation gives exist."""

import importlib
import re

import pytest
from doc_pages import PAGES as SITE
from doc_pages import ROOT

PAGES = [*SITE, ROOT / "CONTRIBUTING.md"]
MODELS = {path.stem for path in (ROOT / "optimum_fista" / "model").glob("*.py")}


def names(text: str) -> list[str]:
    """`run.NAME`, `solve.NAME` and the like in backticks; of `model.NAME` those that name a file of that package."""
    found = re.findall(r"`((?:run|model|solve|packed|cli)(?:\.\w+)+)", text)
    return [name for name in found if not name.startswith("model.") or name.split(".")[1] in MODELS]


def exists(name: str) -> bool:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(["optimum_fista", *parts[:length]]))
        except ImportError:
            continue
        for part in parts[length:]:
            found = getattr(found, part, None)
        return found is not None
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_exist(page):
    missing = [name for name in names(page.read_text()) if not exists(name)]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_exist(page):
    found = re.findall(r"`((?:tests|optimum_fista(?:_cli)?|benchmarks|examples|docs)/[\w./-]+)`", page.read_text())
    assert not [name for name in found if "NAME" not in name and not (ROOT / name).exists()]


def test_names_are_found():
    assert sum(len(names(page.read_text())) for page in PAGES) > 20
    assert names("`run.pruner.FistaPruner` `model.layers.0` `model.operator.X`") == [
        "run.pruner.FistaPruner",
        "model.operator.X",
    ]
    assert exists("run.pruner.FistaPruner.prune")
    assert not exists("run.pruner.FistaPruner.grow")

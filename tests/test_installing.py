"""What messages and pages say to install exists."""

import ast
import re
import tomllib

from doc_pages import ROOT

from optimum_fista.installing import install_command

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def extras_in_advice() -> set[str]:
    """The extras that `install_command` is called with anywhere in the package."""
    extras = set[str]()
    for file in (ROOT / "optimum_fista").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            if is_call and node.func.id == "install_command" and node.args:
                (extra,) = node.args
                assert isinstance(extra, ast.Constant), f"{file}: pass the extra's name itself"
                extras.add(extra.value)
    return extras


def test_extras_that_messages_name_exist():
    extras = extras_in_advice()

    assert {"gguf", "datasets"} <= extras
    assert extras <= {*EXTRAS}


def test_extras_that_texts_name_exist():
    files = [*ROOT.glob("*.md"), ROOT / "Makefile"]
    for folder in ("docs", "optimum_fista", "benchmarks", "examples"):
        files += [*(ROOT / folder).rglob("*.md"), *(ROOT / folder).rglob("*.py")]
    named = set[str]()
    for file in files:
        for extras in re.findall(r"'\.\[([\w,-]+)\]'", file.read_text()):
            named.update(extras.split(","))

    assert named
    assert named <= {*EXTRAS}


def test_the_command_names_extra_and_options():
    assert install_command() == "`pip install .` in a clone of optimum-fista"
    assert install_command("gguf", "--editable") == (
        "`pip install --editable '.[gguf]'` in a clone of optimum-fista"
    )

"""Changes stay in one place: who imports whom, who knows a pattern or a correction, and the tree of the files."""

import ast

import pytest
from structure import BEGIN, END, PAGE, first_line, importers, modules, tree

SINGLE_IMPORTERS = 29
"""Modules of `optimum_fista` that only one other imports, commands, methods and patterns aside."""


def package(name: str) -> str:
    return name.rpartition(".")[0]


def constants(name: str) -> set[str]:
    """Text constants of a module, docstrings aside."""
    parsed = ast.parse(modules()[name].read_text())
    found = {node.value for node in ast.walk(parsed) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    strings = [node.value for node in ast.walk(parsed) if isinstance(node, ast.Expr)]
    return found - {node.value for node in strings if isinstance(node, ast.Constant)}


def test_the_tree_of_contributing_is_that_of_the_files():
    assert BEGIN + tree() + END in PAGE.read_text(), "run python tests/structure.py"


@pytest.mark.parametrize("name", modules())
def test_a_module_says_in_one_line_what_it_is(name):
    assert 0 < len(first_line(modules()[name])) <= 140


@pytest.mark.parametrize("of", ["optimum_fista.solve.patterns", "optimum_fista.solve.methods"])
def test_a_pattern_or_a_method_is_known_to_its_own_package_only(of):
    """A new one is one file: all others find it by the list of its package."""
    found = {name: {package(by) for by in who} - {of, "optimum_fista.solve"} for name, who in importers().items()}
    assert len([name for name in found if package(name) == of]) > 2
    assert [name for name, who in found.items() if package(name) == of and who] == []


def test_patterns_are_told_apart_in_their_own_files_only():
    names = {"Unstructured", "NOfM", "Pairs"}
    for name, file in modules().items():
        if package(name) != "optimum_fista.solve.patterns" and name != "optimum_fista.solve.patterns":
            known = {node.id for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Name)}
            assert not known & names, name


def test_error_corrections_are_told_apart_in_two_files():
    """The words are read once, beside the configuration that accepts them."""
    knowing = {name for name in modules() if constants(name) & {"intra"}}
    assert knowing <= {"optimum_fista.model.correction", "optimum_fista.run.config"}


def test_every_bar_can_be_hidden():
    for name, file in modules().items():
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        bars = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "tqdm"]
        if not name.startswith("optimum_fista_cli"):  # `verify` and others have no option for it
            assert all("disable" in {keyword.arg for keyword in bar.keywords} for bar in bars), name


def test_modules_are_not_cut_into_pieces_for_one_reader():
    own = ("optimum_fista_cli", "optimum_fista.solve.methods", "optimum_fista.solve.patterns")
    single = [name for name, who in importers().items() if len(who) == 1 and not name.startswith(own)]
    assert len(single) <= SINGLE_IMPORTERS, single


def test_every_module_is_imported():
    """Methods aside, which their package imports by the names of the files."""
    unread = {name for name, who in importers().items() if not who and package(name) != "optimum_fista.solve.methods"}
    assert unread == {"optimum_fista.__main__"}

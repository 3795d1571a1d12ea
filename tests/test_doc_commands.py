"""Commands and options that the README and the docs name exist."""

import re
import shlex
import tomllib

import pytest
from doc_pages import PAGES, ROOT, commands

from optimum_fista.cli.main import build_parser

COMMANDS = sorted({command for page in PAGES for command in commands(page)})
OF_OTHERS = {"lm_eval", "vllm", "source", "hf", "echo", "accelerate", "torchrun"}


def parse_own(arguments: list[str]) -> None:
    if arguments[-1:] in (["--help"], ["--help-all"], ["--version"]):
        with pytest.raises(SystemExit, match="0"):
            build_parser().parse_args(arguments)
    else:
        assert callable(build_parser().parse_args(arguments).fista_run)


def extras_exist(arguments: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for names in re.findall(r"\[(.+?)\]", " ".join(arguments)):
        assert set(names.split(",")) <= set(extras)


def targets_exist(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in (word for word in arguments if "=" not in word):
        assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_docs_parse(command):
    # The words of the command, without assignments in front of it.
    words = shlex.split(re.sub(r"^(\w+=(\$\([^)]*\)|\S*)\s*)+", "", command))
    if "optimum_fista" in words:  # what a launcher starts
        words = ["optimum-fista", *words[words.index("optimum_fista") + 1 :]]
    program, *arguments = words or ["source"]
    match program:
        case "optimum-fista":
            parse_own(arguments)
        case "python":
            assert (ROOT / arguments[0]).exists()
        case "pip":
            extras_exist(arguments)
        case "make":
            targets_exist(arguments)
        case _:
            assert program in OF_OTHERS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_options_named_in_sentences_exist(page):
    commands = next(
        a.choices for a in build_parser()._actions if isinstance(a.choices, dict)
    ).values()
    ours = {
        flag
        for command in commands
        for action in command._actions
        for flag in action.option_strings
    }
    for flag in re.findall(r"`(--[\w-]+)", page.read_text()):
        assert flag in ours | {"--machine_rank"}, flag


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / ".ci").iterdir()))
def test_files_that_a_script_of_ci_names_exist(script):
    text = (ROOT / ".ci" / script).read_text()

    named = re.findall(r"\btests/[\w/]+\.py\b", text)

    assert [name for name in named if not (ROOT / name).is_file()] == []

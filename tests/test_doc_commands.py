"""Commands of the README and the docs parse by the programs' own parsers."""

import argparse
import contextlib
import functools
import io
import re
import runpy
import shlex
import sys
import tomllib

import pytest
from accelerate.commands.launch import launch_command_parser
from doc_pages import PAGES, ROOT, commands
from torch.distributed.run import get_args_parser

from optimum_fista.cli.main import build_parser

COMMANDS = sorted({command for page in PAGES for command in commands(page)})
OF_OTHERS = {"source", "hf", "chmod"}


def arguments_of(command: str) -> list[str]:
    """Words of a command without assignments in front of it."""
    return shlex.split(re.sub(r"^(\w+=(\$\([^)]*\)|\S*)\s*)+", "", command))


def parse_own(arguments: list[str]) -> None:
    if arguments[-1:] in (["--help"], ["--help-all"], ["--version"]):
        with pytest.raises(SystemExit, match="0"):
            build_parser().parse_args(arguments)
    else:
        assert callable(build_parser().parse_args(arguments).fista_run)


def parse_launched(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    launched = parser.parse_args(arguments)
    assert launched.module
    assert launched.training_script == "optimum_fista"
    parse_own(launched.training_script_args)


@functools.cache
def help_of(script: str) -> str:
    """What a script answers to `--help`; in a process of its own it would import PyTorch first, each time."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as shown:
        patch.setattr(sys, "argv", [script, "--help"])
        patch.syspath_prepend((ROOT / script).parent)
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    return shown.getvalue()


def parse_script(script: str, *arguments: str) -> None:
    flags = [word for word in arguments if word.startswith("--")]
    if flags:
        assert set(flags) <= set(re.findall(r"--[\w-]+", help_of(script))), script
    assert (ROOT / script).exists()


def extras_exist(arguments: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for names in re.findall(r"\[(.+?)\]", " ".join(arguments)):
        assert set(names.split(",")) <= set(extras)


def targets_exist(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in (word for word in arguments if "=" not in word):
        assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_docs_parse(command):
    program, *arguments = arguments_of(command) or [None]
    match [program, *arguments[:1]]:
        case ["optimum-fista", *_]:
            parse_own(arguments)
        case ["optimum-cli", "fista"]:
            parse_own(arguments[1:])
        case ["accelerate", "launch"]:
            parse_launched(launch_command_parser(), arguments[1:])
        case ["torchrun", *_]:
            parse_launched(get_args_parser(), arguments)
        case ["python", *_]:
            parse_script(*arguments)
        case ["pip", "install"]:
            extras_exist(arguments)
        case ["make", *_]:
            targets_exist(arguments)
        case _:
            assert program in {None, *OF_OTHERS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_options_named_in_sentences_exist(page):
    known = " ".join(source.read_text() for source in (ROOT / "benchmarks").glob("*.py"))
    commands = next(a.choices for a in build_parser()._actions if isinstance(a.choices, dict)).values()
    ours = {flag for command in commands for action in command._actions for flag in action.option_strings}
    for flag in re.findall(r"`(--[\w-]+)", page.read_text()):
        field = flag.removeprefix("--").replace("-", "_")  # benchmarks make some flags from names
        assert flag in ours | {"--max-restarts", "--machine_rank"} or f'"{flag}"' in known or f'"{field}"' in known, (
            flag
        )

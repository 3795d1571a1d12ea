"""The `optimum-fista` command and its subcommands; `optimum-cli fista` has the same.

Each subcommand is a module of this package with a text `DESCRIPTION`, a function `add_arguments(parser)`, and a
function `run(arguments)` that returns the exit code. `main` parses the words of the command line, and `execute` runs
the subcommand.
"""

import argparse
import difflib
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from typing import Any

from safetensors import SafetensorError

from optimum_fista.cli import (
    chat,
    demo,
    doctor,
    evaluate,
    gguf,
    pack,
    prune,
    recover,
    report,
    unpack,
    verify,
)
from optimum_fista.cli.bars_in_log import BarsAsLines
from optimum_fista.plain_text import spell_out_controls

_COMMANDS: dict[str, Any] = {  # modules, by the name of their subcommand
    "prune": prune,
    "recover": recover,
    "evaluate": evaluate,
    "report": report,
    "verify": verify,
    "chat": chat,
    "pack": pack,
    "unpack": unpack,
    "gguf": gguf,
    "demo": demo,
    "doctor": doctor,
}

_DESCRIPTION = """\
Prune large language models after training, in one shot, one linear operator after another.

  optimum-fista prune MODEL --calibration texts.txt --output DIR
  optimum-fista verify DIR
  optimum-fista evaluate DIR --text wikitext2
  optimum-fista recover DIR --teacher MODEL --calibration texts.txt

optimum-fista COMMAND --help shows the options of a command, with examples.
"""


class _Parser(argparse.ArgumentParser):
    """A parser of one command, whose `--help` leaves out the groups of options called "advanced: ..."."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the words `args` of the command line as argparse does, but refuse unknown ones with a suggestion.

        They are refused here, because the main parser does not know the options of a command. The process ends then,
        and also after `--help`, which hides the options `self.rare` from the help of this parser. The values are set in
        `namespace`, which argparse passes.
        """
        if "-h" in args or "--help" in args:
            for action in self.rare:
                action.help = argparse.SUPPRESS
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            # The attribute is a dictionary of argparse, by flag.
            suggestion = _suggestion(flag, self._option_string_actions)
            self.error(f"unknown: {' '.join(unknown)}{suggestion}")
        return namespace, unknown

    @property
    def rare(self) -> list[argparse.Action]:
        """The options that only `--help-all` shows."""
        actions: list[argparse.Action] = []
        for group in self._action_groups:
            if (group.title or "").startswith("advanced: "):
                actions += group._group_actions
        return actions


class _MainParser(argparse.ArgumentParser):
    """The parser of `optimum-fista`, which suggests a command for one that is misspelt."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the words `args` as argparse does (`None`: those of the process), into `namespace` if it is given.

        Ends the process with a message (`self.error`) if the command is not known.
        """
        words = sys.argv[1:] if args is None else list(args)
        # The flags of the program itself (--help, --version) take no value.
        command = next((word for word in words if not word.startswith("-")), None)
        if command is not None and command not in _COMMANDS:
            suggestion = _suggestion(command, _COMMANDS)
            if not suggestion:
                suggestion = f"; pass one of {', '.join(_COMMANDS)}"
            self.error(f"unknown command: {command}{suggestion}")
        return super().parse_known_args(args, namespace)


def _suggestion(word: str, names: Iterable[str]) -> str:
    """Suggest the name that is most like a word, if one is like it; otherwise an empty text."""
    nearest = difflib.get_close_matches(word, list(names), 1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands to a parser, which this changes.

    Arguments that the parser returns have `fista_run`: the function of the subcommand that `execute` calls with them.
    """
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for name, command in _COMMANDS.items():
        summary = _first_sentence(command.DESCRIPTION).replace("%", "%%")  # argparse fills in %
        subparser = subparsers.add_parser(
            name,
            help=summary,
            description=command.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.add_argument("--quiet", action="store_true", help="show no progress bars")
        # Options of groups called "advanced: ...". The parser hides them from `--help`, and not from `--help-all`; both
        # print the same help otherwise.
        if subparser.rare:
            subparser.add_argument(
                "--help-all", action="help", help="show all options, rare ones too"
            )
            subparser.epilog = f"{subparser.prog} --help-all shows the other options."
        subparser.set_defaults(fista_run=command.run)


def _first_sentence(description: str) -> str:
    """Return the first sentence of the description of a command, which may have several lines there, in one line."""
    first_paragraph, _, _ = description.partition("\n\n")
    in_one_line = " ".join(first_paragraph.split())
    sentence, *_ = re.split(r"(?<=\.) ", in_one_line)
    return sentence


def execute(arguments: argparse.Namespace) -> int:
    """Run a parsed command and return its exit code: 1 after an error, printed in one line, 130 after an interrupt.

    `arguments` come from a parser of `add_commands`: `fista_run` is the function of the subcommand, and `quiet` a flag
    that all have. While the command runs, a warning is one line, progress bars that are not in a terminal are lines,
    and with `--quiet` there are no bars. Afterwards these settings of the process are as before.
    """
    format_of_warnings = warnings.formatwarning
    warnings.formatwarning = _warning_line
    stream: Any = sys.stderr
    if not stream.isatty():  # in a terminal bars stay as they are
        stream = BarsAsLines(stream)
    try:
        with redirect_stderr(stream), _bars_hidden_if(arguments.quiet):
            return int(arguments.fista_run(arguments))
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError, SafetensorError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        # It has a message if something is finished all the same (`MeasuringInterrupted`), but not from Python itself.
        message = str(interrupt)
        print(f"interrupted: {message}" if message else "interrupted", file=sys.stderr)
        return 130
    finally:
        warnings.formatwarning = format_of_warnings


def _warning_line(message: Warning | str, *_: Any, **__: Any) -> str:
    """Write a warning in one line; the line of code and other arguments of `warnings.formatwarning` are left out."""
    return f"warning: {spell_out_controls(' '.join(str(message).split()))}\n"


@contextmanager
def _bars_hidden_if(quiet: bool) -> Iterator[None]:
    """Hide all progress bars of the process inside the context, if `quiet`."""
    if not quiet:
        yield
        return
    from optimum_fista.bars import hidden_bars  # loads the Hub's client

    with hidden_bars():
        yield


def _one_line(error: Exception) -> str:
    """Describe an error in one line, with advice if memory is short or a safetensors file is damaged."""
    from optimum_fista.memory import is_out_of_memory

    # Names in it may come from files of other people.
    text = spell_out_controls(" ".join(str(error).split()))
    if is_out_of_memory(error):
        return (
            f"out of memory ({text[:200]}): pass a smaller --batch-size, --sequence-length or --num-samples, "
            "--storage-device or --device cpu."
        )
    if isinstance(error, SafetensorError):
        return f"a safetensors file is damaged, or a pointer of Git LFS ({text}): download it again (git lfs pull)."
    return text or type(error).__name__


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of `optimum-fista`, with all its subcommands."""
    raw = argparse.RawDescriptionHelpFormatter  # the others would join the lines of examples
    parser = _MainParser("optimum-fista", description=_DESCRIPTION, formatter_class=raw)
    parser.add_argument(
        "--version", action="version", version=f"optimum-fista {version('optimum-fista')}"
    )
    add_commands(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these words, such as ["verify", "folder"] (`None`: those of the process).

    Returns the exit code.
    """
    return execute(build_parser().parse_args(arguments))

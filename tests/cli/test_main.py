import copy
import re
import subprocess
import sys

import pytest
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from tiny_llama import QUICK
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

import optimum_fista
from optimum_fista.bars import hidden_bars
from optimum_fista.cli.main import build_parser, execute, main

COMMANDS = (
    "prune",
    "recover",
    "evaluate",
    "report",
    "verify",
    "chat",
    "pack",
    "unpack",
    "gguf",
    "demo",
    "doctor",
)
MANY = ("prune", "recover")


def run(*arguments: str) -> int:
    """Exit code of `optimum-fista`, whether returned or raised by argparse."""
    try:
        return main(arguments)
    except SystemExit as exit:
        return int(exit.code or 0)


def test_help_explains_every_argument_of_every_command():
    (subparsers,) = [
        action for action in build_parser()._actions if isinstance(action.choices, dict)
    ]

    assert (*subparsers.choices,) == COMMANDS
    assert all(
        action.help for command in subparsers.choices.values() for action in command._actions
    )


@pytest.mark.parametrize("command", [*COMMANDS, None])
def test_help_fits_two_screens(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")

    assert run(*filter(None, [command]), "--help") == 0

    shown = capsys.readouterr().out.splitlines()
    assert len(shown) <= 2 * 50
    assert (f"optimum-fista {command} --help-all shows the other options." in shown) == (
        command in MANY
    )


def test_help_tells_patterns_of_names_from_texts_whose_tokens_stay(capsys):
    assert run("prune", "--help-all") == 0

    shown = capsys.readouterr().out
    assert "--exclude GLOB" in shown
    assert "--keep-tokens TEXT" in shown


def test_help_of_the_program_names_every_command(capsys):
    assert run("--help") == 0

    shown = capsys.readouterr().out
    assert all(re.search(rf"^    {command}\s", shown, re.M) for command in COMMANDS)

    assert run("--version") == 0

    assert capsys.readouterr().out.strip() == f"optimum-fista {optimum_fista.__version__}"


def test_help_of_the_program_says_of_every_command_the_first_sentence_of_its_description():
    (subparsers,) = [
        action for action in build_parser()._actions if isinstance(action.choices, dict)
    ]

    summaries = {action.dest: action.help for action in subparsers._choices_actions}

    assert (*summaries,) == COMMANDS
    for name, parser in subparsers.choices.items():
        first_paragraph = " ".join(parser.description.split("\n\n")[0].split())
        first_sentence = first_paragraph.split(". ")[0].rstrip(".")
        assert summaries[name].replace("%%", "%") == f"{first_sentence}."


@pytest.mark.parametrize("flag", ["--sparsty", "--sparsty=0.5"])
def test_a_misspelt_flag_is_answered_with_the_usage_of_its_command(flag, capsys):
    assert run("prune", "model", flag) == 2

    said = capsys.readouterr().err
    assert said.startswith("usage: optimum-fista prune MODEL")
    assert said.endswith(f"unknown: {flag}; did you mean --sparsity?\n")


def test_help_is_quick_because_nothing_heavy_is_imported(tmp_path):
    code = f"""if True:
        import sys
        from optimum_fista.cli.main import main
        for command in {COMMANDS}:
            try:
                main([command, "--help"])
            except SystemExit:
                pass
        print("loaded:", *sorted({{"torch", "transformers", "numpy", "datasets"}} & set(sys.modules)))
    """

    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )

    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == "loaded:"


def test_a_report_is_written_without_transformers(pruned_folder, tmp_path):
    code = f"""if True:
        import sys
        from optimum_fista.cli.main import main
        assert main(["report", {str(pruned_folder)!r}, "--output", "page.html"]) == 0
        print("loaded:", *sorted({{"transformers", "accelerate", "datasets", "scipy"}} & set(sys.modules)))
    """

    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )

    assert process.stdout.splitlines()[-1] == "loaded:", process.stderr


def test_a_page_takes_the_place_of_an_earlier_page_alone(pruned_folder, tmp_path, capsys):
    notes = tmp_path / "notes.html"
    notes.write_text("<!doctype html><title>mine</title>")
    page = tmp_path / "page.html"

    assert main(["report", str(pruned_folder), "--output", str(notes)]) == 1
    assert "is not a page of this command: it would be lost" in capsys.readouterr().err
    assert notes.read_text() == "<!doctype html><title>mine</title>"

    page.touch()
    assert main(["report", str(pruned_folder), "--output", str(page)]) == 0
    assert main(["report", str(pruned_folder), "--output", str(page)]) == 0
    assert page.stat().st_size > 0


@pytest.mark.parametrize(
    "flags",
    [
        ["--sparsity", "2"],
        ["--num-samples", "0"],
        ["--calibration", "nothing.txt"],
        ["-o", "taken"],
    ],
)
def test_flags_that_can_not_work_are_refused_without_transformers(flags, tiny_folder, tmp_path):
    (tmp_path / "taken").touch()
    command = ["prune", str(tiny_folder), *flags]
    code = f"""if True:
        import sys
        from optimum_fista.cli.main import main
        assert main({command!r}) == 1
        print("loaded:", *sorted({{"transformers", "accelerate", "datasets"}} & set(sys.modules)))
    """

    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )

    assert process.stdout == "loaded:\n", process.stderr


@pytest.mark.parametrize("arguments", [["trim"], ["verify"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    assert run(*arguments) == 2
    assert "usage: optimum-fista" in capsys.readouterr().err


def test_optimum_cli_passes_the_exit_code_on(tmp_path, monkeypatch, capsys):
    from optimum.commands.optimum_cli import main as optimum_main

    monkeypatch.setattr(sys, "argv", ["optimum-cli", "fista", "verify", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        optimum_main()
    assert caught.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError("two\nlines"), "error: two lines\n"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate"),
            "error: out of memory (CUDA out of memory. Tried",
        ),
        (MemoryError("no more"), "error: out of memory (no more): pass a smaller --batch-size"),
    ],
)
def test_errors_are_printed_as_one_line_and_exit_with_1(error, shown, monkeypatch, capsys):
    def fail(arguments):
        raise error

    monkeypatch.setattr("optimum_fista.cli.verify.run", fail)

    assert run("verify", "folder") == 1

    assert capsys.readouterr().err.startswith(shown)


def test_an_interrupt_exits_with_130(monkeypatch, capsys):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("optimum_fista.cli.verify.run", interrupt)

    assert run("verify", "folder") == 130

    assert capsys.readouterr().err == "interrupted\n"


def test_an_error_that_is_a_bug_keeps_its_traceback(monkeypatch):
    def fail(arguments):
        raise AttributeError("a bug")

    monkeypatch.setattr("optimum_fista.cli.verify.run", fail)

    with pytest.raises(AttributeError):
        run("verify", "folder")


def test_a_command_that_is_misspelt_is_answered_with_the_nearest(capsys):
    assert run("prun", "model") == 2

    assert capsys.readouterr().err.endswith("unknown command: prun; did you mean prune?\n")

    assert run("xyz") == 2

    assert f"unknown command: xyz; pass one of {COMMANDS[0]}, " in capsys.readouterr().err


@pytest.mark.parametrize("quiet", [False, True])
def test_quiet_hides_all_bars_and_only_while_the_command_runs(
    quiet, pruned_folder, tmp_path, capsys
):
    output = str(tmp_path / "packed")
    flags = ["--quiet"] if quiet else []

    assert main(["pack", str(pruned_folder), "--output", output, *flags]) == 0

    printed = capsys.readouterr()
    assert ("Packing" in printed.err) is not quiet
    assert "saved to" in printed.out
    assert not are_progress_bars_disabled()
    assert is_progress_bar_enabled()


def test_hidden_bars_leave_what_was_hidden_before_as_it_was():
    disable_progress_bars()  # of the Hub's client alone
    try:
        with hidden_bars():
            assert not is_progress_bar_enabled()
        assert is_progress_bar_enabled()
        assert are_progress_bars_disabled()
    finally:
        enable_progress_bars()


def test_quiet_hides_bars_that_the_environment_asks_for(
    pruned_folder, tmp_path, capsys, monkeypatch
):
    # What HF_HUB_DISABLE_PROGRESS_BARS=0 sets when the Hub's client is imported.
    hub_bars = sys.modules["huggingface_hub.utils.tqdm"]
    monkeypatch.setattr(hub_bars, "HF_HUB_DISABLE_PROGRESS_BARS", False)
    output = str(tmp_path / "packed")

    assert main(["pack", str(pruned_folder), "--output", output, "--quiet"]) == 0

    assert capsys.readouterr().err == ""


def test_bars_are_hidden_if_transformers_is_told_to_show_none(pruned_folder, capsys):
    disable_progress_bar()
    try:
        assert main(["verify", str(pruned_folder)]) == 0
    finally:
        enable_progress_bar()

    assert capsys.readouterr().err == ""


def test_parsed_arguments_stay_as_they_are(tiny_folder, text_file, tmp_path):
    flags = ["--output", str(tmp_path / "out"), "--calibration", str(text_file)]
    arguments = build_parser().parse_args(["prune", str(tiny_folder), *flags, *QUICK])
    before = copy.deepcopy(vars(arguments))

    assert execute(arguments) == 0

    assert vars(arguments) == before

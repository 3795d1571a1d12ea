import re
import subprocess
import sys
from pathlib import Path

import pytest

import optimum_fista
from optimum_fista.cli.main import build_parser, main

FLAGS = {
    "prune": (
        "MODEL --output -o --dry-run --overwrite --packed --sparsity --pattern --target-size --drop-unused --scope "
        "--include --exclude --method --recipe --no-expert-refit "
        "--error-correction --residual-correction --allocation "
        "--reorder-channels --warm-start --max-iterations --tolerance --allocation-tokens "
        "--config "
        "--calibration --num-samples --sequence-length "
        "--held-out --batch-size --compute-dtype --seed --device --dtype --storage-device "
        "--push-to-hub --private --help-all"
    ),
    "recover": (
        "DIR --teacher --output -o --calibration --tokens --train --device --compute-dtype --overwrite "
        "--sequence-length --batch-size --accumulate --held-out --learning-rate --label-share --seed "
        "--report-to --help-all"
    ),
    "evaluate": (
        "MODEL --text --sequence-length --max-windows --tasks --include-path --limit --batch-size --device --dtype "
        "--output -o"
    ),
    "report": "DIR --output -o --evaluations",
    "verify": "DIR --dense --same-as",
    "chat": "DIR --beside --max-new-tokens --temperature --seed --device --dtype",
    "doctor": "",
    "demo": "--model --text --output --overwrite",
}


MANY = ("prune", "recover")


def run(*arguments: str) -> int:
    """Exit code of `optimum-fista`, whether returned or raised by argparse."""
    try:
        return main(arguments)
    except SystemExit as exit:
        return int(exit.code or 0)


@pytest.mark.parametrize("command", FLAGS)
def test_help_explains_every_argument(command, capsys):
    assert run(command, "--help-all" if command in MANY else "--help") == 0
    shown = capsys.readouterr().out
    for flag in FLAGS[command].split():
        assert flag in shown
    (subparsers,) = [action for action in build_parser()._actions if isinstance(action.choices, dict)]
    for action in subparsers.choices[command]._actions:
        assert action.help, action.dest
        assert not action.option_strings or set(action.option_strings) & set(f"{FLAGS[command]} -h".split()), action


@pytest.mark.parametrize("command", [*FLAGS, "pack", "unpack", None])
def test_help_fits_two_screens(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert run(*filter(None, [command]), "--help") == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) <= 2 * 50
    assert (f"optimum-fista {command} --help-all shows the other options." in shown) == (command in MANY)


def test_help_of_the_whole_names_every_command(capsys):
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^    {command}\s", shown, re.M) for command in FLAGS)
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == f"optimum-fista {optimum_fista.__version__}"


def test_help_is_quick_because_nothing_heavy_is_imported(tmp_path):
    code = f"""if True:
        import sys
        from optimum_fista.cli.main import main
        for command in {list(FLAGS)}:
            try:
                main([command, "--help"])
            except SystemExit:
                pass
        print("loaded:", *sorted({{"torch", "transformers", "numpy", "datasets"}} & set(sys.modules)))
    """
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == "loaded:"


@pytest.mark.parametrize("arguments", [[], ["trim"], ["verify"], ["evaluate"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    assert run(*arguments) == 2
    assert "usage: optimum-fista" in capsys.readouterr().err


def test_python_dash_m(pruned_folder):
    command = [sys.executable, "-m", "optimum_fista", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=300).stdout.startswith("optimum-fista ")


def test_optimum_cli_has_the_same_commands(pruned_folder):
    command = [str(Path(sys.executable).with_name("optimum-cli")), "fista", "verify", str(pruned_folder)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert "14 operators keep their pattern" in process.stdout


def test_optimum_cli_passes_the_exit_code_on(tmp_path, monkeypatch, capsys):
    from optimum.commands.optimum_cli import main as optimum_main

    monkeypatch.setattr(sys, "argv", ["optimum-cli", "fista", "verify", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        optimum_main()
    assert caught.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("two\nlines"),
        OSError("two\n  lines"),
        ImportError("two lines"),
        RuntimeError("two\nlines"),
        NotImplementedError("two lines"),
    ],
)
def test_errors_are_one_line_and_exit_with_1(error, monkeypatch, capsys):
    def fail(arguments):
        raise error

    monkeypatch.setattr("optimum_fista.cli.verify.run", fail)
    assert run("verify", "folder") == 1
    assert capsys.readouterr().err == "error: two lines\n"


def test_an_interrupt_exits_with_130(monkeypatch, capsys):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("optimum_fista.cli.verify.run", interrupt)
    assert run("verify", "folder") == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_bug_is_not_hidden(monkeypatch):
    def fail(arguments):
        raise AttributeError("a bug")

    monkeypatch.setattr("optimum_fista.cli.verify.run", fail)
    with pytest.raises(AttributeError):
        run("verify", "folder")


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "error: out of memory (CUDA out of memory."),
        (MemoryError("no more"), "error: out of memory (no more): pass a smaller --batch-size"),
    ],
)
def test_running_out_of_memory_is_one_line_of_advice(error, shown, monkeypatch, capsys):
    def run_out(arguments):
        raise error

    monkeypatch.setattr("optimum_fista.cli.verify.run", run_out)
    assert main(["verify", "."]) == 1
    assert shown in capsys.readouterr().err

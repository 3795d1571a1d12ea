import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from hub_standin import assert_pushed, hub_fixture, run_with_hub  # noqa: F401
from killed import interrupted_after
from tiny_llama import QUICK, TEXT, tiny_llama

from optimum_fista.atomic import read_record, write_record
from optimum_fista.cli.main import main
from optimum_fista.cli.prune_request import default_output
from optimum_fista.config import FistaPruningConfig
from optimum_fista.evaluate.verification import verify_checkpoint
from optimum_fista.prune import journal
from optimum_fista.text import self_sampling
from optimum_fista.text.calibration_tokens import calibration_tokens_by_name
from optimum_fista.text.model_writer import ModelWriter


@pytest.fixture
def prune(tiny_folder, text_file, tmp_path):
    """`prune(*flags)` prunes into `tmp_path / "out"` and returns the exit code; flags override the fixture's."""

    def run(*flags: str | Path) -> int:
        text = [] if "--calibration" in flags else ["--calibration", str(text_file)]
        return main(
            [
                "prune",
                str(tiny_folder),
                "--output",
                str(tmp_path / "out"),
                *QUICK,
                *text,
                *map(str, flags),
            ]
        )

    return run


def report_of(folder: Path) -> dict:
    return json.loads((folder / "fista" / "report.json").read_text())


def config_of(folder: Path) -> FistaPruningConfig:
    return FistaPruningConfig.from_dict(report_of(folder)["config"])


def test_flags_reach_the_configuration(prune, tmp_path):
    flags = ["--recipe", "fast", "--pattern", "2:4", "--error-correction", "full", "--seed", "3"]

    assert prune(*flags, "--include", "*.mlp.*", "--include", "*.o_proj", "--exclude", "*.1.*") == 0

    names = {"include": ("*.mlp.*", "*.o_proj"), "exclude": ("*.1.*",)}
    config = FistaPruningConfig.recipe(
        "fast", pattern="2:4", error_correction="full", seed=3, **names
    )
    assert config_of(tmp_path / "out") == config.resolved()
    assert report_of(tmp_path / "out")["totals"]["num_operators"] == 4


def test_flags_override_a_configuration_file(prune, tmp_path):
    file = tmp_path / "config.json"

    saved = FistaPruningConfig(
        pattern="2:4", method="wanda", error_correction="none", exclude=("*.0.*",), seed=2
    )

    file.write_text(json.dumps(saved.to_dict()))

    assert prune("--config", file, "--sparsity", "0.25", "--seed", "4") == 0
    expected = FistaPruningConfig(
        0.25, method="wanda", error_correction="none", exclude=("*.0.*",), seed=4
    )

    assert config_of(tmp_path / "out") == expected.resolved()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sparsity", "1.5"], "sparsity=1.5 is outside [0, 1)"),
        (["--method", "trim"], "method='trim': pass one of"),
        (["--storage-device", "moon"], "device='moon' can't be used"),
        (["--batch-size", "0"], "--batch-size 0: pass at least 1"),
        (["--num-samples", "0"], "--num-samples 0: pass at least 1"),
        (["--device", "moon"], "device='moon' can't be used"),
        (["--calibration", "nothing.txt"], "source='nothing.txt': there is no such file"),
        (["--dtype", "float33"], "float33"),
        (["--private"], "--private makes sense with --push-to-hub"),
        (
            ["--push-to-hub", "tester/tiny"],
            "repo_id='tester/tiny' can't be pushed to, and nothing was done",
        ),
        (["--output", "taken"], "output 'taken' is a file: pass a folder"),
        (
            ["--recipe", "fast", "--config", "config.json"],
            "--recipe fast and --config config.json: pass only one",
        ),
    ],
)
def test_errors_are_printed_as_one_line(prune, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("taken").touch()

    assert prune(*flags) == 1

    said = capsys.readouterr().err.splitlines()
    (error,) = [line for line in said if line.startswith("error: ")]
    assert message in error
    assert said == [error]  # before the plan is printed
    assert not (tmp_path / "out").exists()


def test_what_can_t_be_pruned_is_refused_before_the_model_writes_text(prune, monkeypatch, capsys):
    monkeypatch.setattr("optimum_fista.text.calibration_tokens.sample_text_from_model", None)

    assert prune("--calibration", "self", "--include", "*.nothing") == 1

    assert "error: " in capsys.readouterr().err


def test_a_model_of_the_hub_is_pruned_by_its_id_and_pushed(hub, tiny_folder, text_file, tmp_path):
    arguments = [
        "prune",
        "tester/dense",
        "-o",
        "out",
        "--method",
        "wanda",
        "--calibration",
        str(text_file),
        *QUICK,
    ]
    arguments += ["--push-to-hub", "tester/tiny-50", "--private"]
    code = f"""if True:
        from optimum_fista.prune import journal
        from huggingface_hub import HfApi
        from optimum_fista.cli.main import main
        HfApi().create_repo("tester/dense")
        HfApi().upload_folder(repo_id="tester/dense", folder_path={str(tiny_folder)!r})
        keep = journal.Journal.keep_layer
        def cut(self, index, *arguments):
            keep(self, index, *arguments)
            raise KeyboardInterrupt
        journal.Journal.keep_layer = cut
        assert main({arguments!r}) == 130
        journal.Journal.keep_layer = keep
        raise SystemExit(main({arguments!r}))"""
    process = run_with_hub(hub, code, tmp_path)

    assert_pushed(hub, process, tmp_path / "out", "tester/tiny-50")

    assert verify_checkpoint(tmp_path / "out").num_operators == 14
    assert "base_model: tester/dense" in (tmp_path / "out" / "README.md").read_text()


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_an_interrupted_run_resumes_with_the_text_it_sampled(prune, tmp_path, monkeypatch, capsys):
    with interrupted_after(0):
        assert prune("--calibration", "self", "--method", "wanda") == 130

    assert (
        "\nfinished decoder layers are kept: give the same command again to resume\n"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()

    monkeypatch.setattr("optimum_fista.text.calibration_tokens.sample_text_from_model", None)

    assert prune("--calibration", "self", "--method", "wanda") == 0

    assert "1 of 2 decoder layers are done already\n" in capsys.readouterr().err
    assert verify_checkpoint(tmp_path / "out").num_operators == 14
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_text_that_is_interrupted_goes_on_with_the_next_batch(
    prune, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(self_sampling, "SAMPLED_TOGETHER", 2)
    write = ModelWriter.write
    written = []

    def write_or_stop(*given):
        if len(written) == 3:
            written.append("stopped")
            raise KeyboardInterrupt
        written.append("batch")
        return write(*given)

    monkeypatch.setattr(ModelWriter, "write", write_or_stop)

    assert prune("--calibration", "self", "--method", "wanda") == 130
    assert "After Ctrl-C the same command goes on" in capsys.readouterr().err
    assert prune("--calibration", "self", "--method", "wanda") == 0

    assert written == ["batch", "batch", "batch", "stopped", "batch"]  # of 8 sequences
    assert verify_checkpoint(tmp_path / "out").num_operators == 14


def test_a_model_that_writes_its_own_text_is_measured_on_another_text(prune, tmp_path, capsys):
    assert prune("--method", "wanda", "--calibration", "self") == 0

    perplexity = report_of(tmp_path / "out")["perplexity"]
    assert perplexity["text"] == "pydoc"
    assert perplexity["num_tokens"] == 4096
    bits_per_byte = perplexity["bits_per_byte"]
    bytes_per_token = math.log2(perplexity["dense"]) / bits_per_byte["dense"]
    # A token is a letter, and the text has some that the tokenizer does not know.
    assert 0.8 < bytes_per_token <= 1
    assert math.log2(perplexity["pruned"]) / bits_per_byte["pruned"] == pytest.approx(
        bytes_per_token
    )
    assert "on 4,096 tokens of pydoc that no weight was fitted to" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["cut", "another model"])
def test_sampled_text_that_is_damaged_or_of_another_model_is_sampled_again(
    tiny_folder, tmp_path, change
):
    source = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    keep = tmp_path / "journal"

    def tokens(kept: Path) -> torch.Tensor:
        return calibration_tokens_by_name(str(source), "self", 4, 8, 0, device="cpu", keep_in=kept)

    first = tokens(keep)
    (file,) = keep.iterdir()
    if change == "another model":
        tiny_llama(initializer_range=1.0).save_pretrained(source)
    else:
        file.write_bytes(file.read_bytes()[:-8])

    wanted = tokens(tmp_path / "elsewhere")

    assert torch.equal(first, wanted) == (change != "another model")
    assert torch.equal(tokens(keep), wanted)


def test_a_run_of_other_settings_in_the_same_folder_needs_overwrite(
    prune, tmp_path, monkeypatch, capsys
):
    with interrupted_after(0):
        assert prune("--method", "wanda") == 130

    capsys.readouterr()

    with monkeypatch.context() as patched:  # refused before any text is sampled
        patched.setattr("optimum_fista.text.calibration_tokens.calibration_tokens_by_name", None)
        assert prune("--method", "wanda", "--num-samples", "9") == 1
        assert "was another one (sequences was 8, is 9)" in capsys.readouterr().err
        assert prune("--method", "wanda", "--sparsity", "0.25") == 1

    assert "was another one (config.sparsity was 0.5, is 0.25)" in capsys.readouterr().err

    assert prune("--method", "wanda", "--sparsity", "0.25", "--overwrite") == 0


def test_a_run_of_the_default_method_of_an_older_version_is_told_from_others(
    prune, tmp_path, monkeypatch, capsys
):
    with interrupted_after(0):
        assert prune() == 130
    (file,) = tmp_path.glob("*.unfinished/journal/fingerprint.json")
    run = read_record(file)
    write_record(file, run | {"journal": 10, "config": run["config"] | {"allocation_tokens": 2048}})
    capsys.readouterr()

    for flags in ([], ["--allocation-tokens", "2048"]):
        with monkeypatch.context() as patched:  # refused before any text is sampled
            patched.setattr(
                "optimum_fista.text.calibration_tokens.calibration_tokens_by_name", None
            )
            assert prune(*flags) == 1
        assert "was begun by an older version of optimum-fista" in capsys.readouterr().err


def test_sampled_text_is_kept_if_another_run_is_begun(prune, tmp_path, monkeypatch):
    monkeypatch.setattr(journal.Journal, "keep_budgets", interrupt)
    mine = ["--calibration", "self", "--method", "wanda"]

    assert prune(*mine, "--overwrite") == 130

    (kept,) = (tmp_path / "out.unfinished" / "journal").glob("calibration-*")
    whole = kept.read_bytes()

    assert prune(*mine, "--dtype", "bfloat16") == 130  # another run, which writes its own text
    assert prune(*mine, "--allocation", "fisher", "--overwrite") == 130

    assert kept.read_bytes() == whole


def test_a_resumed_run_uses_the_batch_size_of_its_first_start(prune, text_file, capsys):
    with interrupted_after(0):
        assert prune("--method", "wanda", "--batch-size", "4") == 130
    assert prune("--method", "wanda") == 0

    assert (
        f"8 x 16 tokens of {text_file}, batches of 4"
        in capsys.readouterr().err.split("decoder layers are kept")[1]
    )


def test_the_default_output_is_named_by_the_model_and_the_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("4fe1b2").mkdir()
    Path("my model").symlink_to("4fe1b2")

    assert default_output("my model", FistaPruningConfig(0.625)) == Path("my model-62.5pct")
    assert default_output("owner/Llama-1B", FistaPruningConfig(pattern="2:4")) == Path(
        "Llama-1B-2of4"
    )
    parts = FistaPruningConfig(pattern="channels:0.25/8+heads:0.5")
    assert default_output("model.v2", parts) == Path("model.v2-channels-0.25-8-heads-0.5")


def test_a_short_text_is_used_for_the_calibration_alone(prune, tmp_path, capsys):
    (tmp_path / "short.txt").write_text(TEXT[: 8 * 16])  # a token a letter

    assert prune("--method", "wanda", "--calibration", tmp_path / "short.txt") == 0

    assert report_of(tmp_path / "out")["perplexity"] is None
    assert "perplexity" not in capsys.readouterr().out.split("next:")[0]

"""Only base names leave the machine: no file that `--push-to-hub` uploads holds a path or the name of a user."""

import shutil
from pathlib import Path

import pytest
from tiny_llama import tiny_tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.cli.main import main

QUICK = ["--num-samples", "8", "--sequence-length", "16", "--device", "cpu", "--method", "wanda"]


@pytest.fixture
def home(tiny_folder, text_file, tmp_path, monkeypatch) -> Path:
    """The home of a user, with a model `models/tiny` and a text `texts/sea.txt`."""
    home = tmp_path / "jane.doe"
    shutil.copytree(tiny_folder, home / "models" / "tiny")
    (home / "texts").mkdir()
    shutil.copy(text_file, home / "texts")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    return home


def require_private(folder: Path, home: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"config.json", "README.md", "report.json"} <= {path.name for path in files}
    for path in files:
        for secret in (home.name, str(home), str(home.parent), "models/tiny", "texts/"):
            assert secret.encode() not in path.read_bytes(), (
                f"{path.relative_to(folder)} holds {secret!r}"
            )
    assert b"tiny" in (folder / "fista" / "report.json").read_bytes()


def test_folders_of_a_streamed_run_name_no_private_path(home):
    model = home / "models/tiny"
    text = home / "texts/sea.txt"
    prune = ["prune", str(model), "--calibration", str(text), *QUICK]

    assert main([*prune, "--output", str(home / "dense")]) == 0
    assert main(["report", str(home / "dense")]) == 0
    assert main(["pack", str(home / "dense"), "--output", str(home / "packed")]) == 0
    assert main(["unpack", str(home / "packed"), "--output", str(home / "unpacked")]) == 0
    assert main([*prune, "--output", str(home / "written-packed"), "--packed"]) == 0

    for name in ("dense", "packed", "unpacked", "written-packed"):
        require_private(home / name, home)


def test_the_folder_of_a_model_in_memory_names_no_private_path(home):
    source = home / "models" / "tiny"
    model = AutoModelForCausalLM.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)

    pruner = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)
    report = pruner.prune(
        model, tiny_tokens().split(4), calibration_source=str(home / "texts" / "sea.txt")
    )

    assert (report.model["name"], report.calibration["source"]) == ("tiny", "sea.txt")

    pruner.save_pretrained(model, home / "out", tokenizer)
    require_private(home / "out", home)

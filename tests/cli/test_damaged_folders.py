"""Damaged model folders: one line that says so and exit code 1, whatever is damaged and whatever command reads it."""

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from optimum_fista.cli.main import main

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1234\n"
Damage = Callable[[Path], object]


def weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def cut(share: float) -> Damage:
    """Leave only the first `share` of a file of the weights."""

    def damage(folder: Path) -> None:
        path = weights(folder)
        os.truncate(path, int(share * path.stat().st_size))

    return damage


def tensors(file: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Let `edit` change the tensors of a file, by name; "" is a file of the weights."""

    def damage(folder: Path) -> None:
        path = folder / file if file else weights(folder)
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata()
        weights_by_name = {name: tensor.clone() for name, tensor in load_file(path).items()}
        edit(weights_by_name)
        save_file(weights_by_name, path, metadata=metadata)

    return damage


def name_of_query(weights_by_name: dict[str, torch.Tensor]) -> str:
    return next(name for name in weights_by_name if "q_proj" in name)


def drop(weights_by_name: dict[str, torch.Tensor]) -> None:
    del weights_by_name[name_of_query(weights_by_name)]


def reshape(weights_by_name: dict[str, torch.Tensor]) -> None:
    weights_by_name[name_of_query(weights_by_name)] = torch.ones(7)


def index(text: str) -> Damage:
    """Give the weights an index file with this text, which names other files than there are."""

    def damage(folder: Path) -> None:
        path = weights(folder)
        path.rename(folder / "other.safetensors")
        stem = path.name.partition("-")[0].removesuffix(".safetensors")  # of shards too
        (folder / f"{stem}.safetensors.index.json").write_text(text)

    return damage


def text(file: str, content: str | bytes) -> Damage:
    """Write other content to a file."""
    return lambda folder: (folder / file).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def values(file: str, **changes: Any) -> Damage:
    """Change values of a JSON file."""

    def damage(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def operator(**changes: Any) -> Damage:
    """Change values of the first operator in the report."""

    def damage(folder: Path) -> None:
        path = folder / REPORT
        report = json.loads(path.read_text())
        report["operators"][0] |= changes
        path.write_text(json.dumps(report))

    return damage


CONFIG = "config.json"
REPORT = "fista/report.json"
MASKS = "fista/masks.safetensors"
WEIGHTS = {
    "header cut": cut(0.01),
    "half": cut(0.5),
    "Git LFS": lambda folder: weights(folder).write_text(LFS),
    "absent": lambda folder: weights(folder).unlink(),
    "a tensor is missing": tensors("", drop),
    "a tensor has another shape": tensors("", reshape),
    "index is no JSON": index("{"),
    "index without files": index("{}"),
    "index of absent files": index(
        json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "absent"}})
    ),
}
ANY_CONFIG = {
    "no JSON": text(CONFIG, "{"),
    "a list": text(CONFIG, "[1]"),
    "Git LFS": text(CONFIG, LFS),
    "no text": text(CONFIG, b"\xff\xfe\x00"),
}
MODEL_CONFIG = ANY_CONFIG | {
    "unknown type": values(CONFIG, model_type="nosuch"),
    "size is a word": values(CONFIG, hidden_size="abc"),
    "no heads": values(CONFIG, num_attention_heads=0),
    "unknown activation": values(CONFIG, hidden_act="nope"),
    "unknown dtype": values(CONFIG, dtype="nope"),
    "quantized by a number": values(CONFIG, quantization_config=3),
}
TOKENIZER = {"a list": text("tokenizer_config.json", "[]"), "Git LFS": text("tokenizer.json", LFS)}
REPORTS = {
    "no JSON": text(REPORT, "{"),
    "a list": text(REPORT, "[1]"),
    "no fields": text(REPORT, "{}"),
    "error is a word": operator(fit_error="small"),
    "config is empty": values(REPORT, config={}),
    "no parameters": values(REPORT, model={"class": "LlamaForCausalLM", "num_parameters": 0}),
    "no name": values(REPORT, model={"class": "LlamaForCausalLM", "num_parameters": 1}),
    "calibration is empty": values(REPORT, calibration={}),
    "layers are numbers": values(REPORT, layers=[1]),
}
INDEX = {
    "index of numbers": index(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": 3}})),
    "metadata is a number": index(
        json.dumps({"metadata": 3, "weight_map": {"lm_head.weight": "other"}})
    ),
}
MASK_FILES = {
    "Git LFS": text(MASKS, LFS),
    "a mask is missing": tensors(MASKS, drop),
    "a mask has another shape": tensors(MASKS, reshape),
}
# The kind of folder, the command that reads it, and damages that it must find.
CASES = [
    *(("dense", command, WEIGHTS) for command in ("prune", "evaluate")),
    *(("dense", command, MODEL_CONFIG | TOKENIZER) for command in ("prune", "evaluate")),
    ("dense", "dry run", MODEL_CONFIG),
    *(
        ("pruned", command, WEIGHTS | ANY_CONFIG | REPORTS | MASK_FILES)
        for command in ("verify", "pack")
    ),
    ("pruned", "report", REPORTS),
    *(("packed", command, WEIGHTS | ANY_CONFIG | REPORTS) for command in ("verify", "unpack")),
    ("packed", "evaluate", WEIGHTS),
    ("pruned", "pack", INDEX),
    (
        "packed",
        "unpack",
        INDEX
        | {"no weights": values(CONFIG, quantization_config={"quant_method": "fista_packed"})},
    ),
]


@pytest.fixture(scope="module")
def folders(tiny_folder, pruned_folder, tmp_path_factory) -> dict[str, Path]:
    packed = tmp_path_factory.mktemp("packed") / "model"
    assert main(["pack", str(pruned_folder), "--output", str(packed)]) == 0
    return {"dense": tiny_folder, "pruned": pruned_folder, "packed": packed}


@pytest.fixture
def run(folders, text_file, tmp_path, monkeypatch, capsys):
    """`run(kind, command, damage)` damages a copy and runs a command on it; exit code and lines of errors."""
    folder = tmp_path / "model"
    out = tmp_path / "out"
    quick = ["--num-samples", "4", "--calibration", text_file, "--device", "cpu"]
    evaluate = [
        "--text",
        text_file,
        "--sequence-length",
        "16",
        "--max-windows",
        "2",
        "--device",
        "cpu",
    ]
    arguments = {
        "prune": [
            "prune",
            folder,
            "--output",
            out,
            "--method",
            "magnitude",
            "--sequence-length",
            "16",
            *quick,
        ],
        "dry run": [
            "prune",
            folder,
            "--dry-run",
            "--method",
            "magnitude",
            "--sequence-length",
            "16",
            *quick,
        ],
        "evaluate": ["evaluate", folder, *evaluate],
        "verify": ["verify", folder],
        "report": ["report", folder, "--output", out / "page.html"],
        "pack": ["pack", folder, "--output", out],
        "unpack": ["unpack", folder, "--output", out],
    }

    def contents() -> dict[Path, bytes | None]:
        return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}

    def damaged(kind: str, command: str, damage: Damage) -> tuple[int, list[str]]:
        for path in (folder, out):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(folders[kind], folder)
        damage(folder)
        before = contents()
        code = main(list(map(str, arguments[command])))
        assert contents() == before
        lines = capsys.readouterr().err.splitlines()
        return code, [line for line in lines if line.startswith("error: ") or ": BROKEN: " in line]

    return damaged


@pytest.mark.parametrize(
    ("kind", "command", "damages"), CASES, ids=lambda value: value if type(value) is str else ""
)
def test_each_damage_gives_one_line_of_error_and_exit_code_1(run, kind, command, damages):
    for name, damage in damages.items():
        code, lines = run(kind, command, damage)
        assert (code, len(lines)) == (1, 1), f"{name}: exit code {code}, {lines}"


@pytest.mark.parametrize("command", ["prune", "dry run", "evaluate"])
def test_code_of_a_model_is_never_run_and_no_question_about_it_is_asked(
    run, command, tmp_path, monkeypatch
):
    def evil(folder: Path) -> None:
        classes = {
            "AutoConfig": "code.Config",
            "AutoModelForCausalLM": "code.Model",
            "AutoTokenizer": "code.Tokenizer",
        }
        values(CONFIG, model_type="evil", auto_map=classes)(folder)
        (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")

    answers = io.StringIO("y\n" * 10)
    monkeypatch.setattr("sys.stdin", answers)

    code, lines = run("dense", command, evil)

    assert (code, len(lines)) == (1, 1)
    assert "contains custom code" in lines[0]
    assert answers.tell() == 0
    assert not (tmp_path / "ran").exists()

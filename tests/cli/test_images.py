import json
import shutil
from pathlib import Path

import pytest
import torch
from folder_files import tensors_of
from killed import interrupted_after
from media_models import MARK, save_llava_folder
from PIL import Image

from optimum_fista.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_llava_folder(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def prune(folder, tmp_path, monkeypatch):
    """`prune(lines, *flags)` prunes into `tmp_path / "out"`."""
    monkeypatch.chdir(tmp_path)
    for name, colour in (("red", (255, 9, 0)), ("blue", (0, 9, 255))):
        Image.new("RGB", (9, 7), colour).save(tmp_path / f"{name}.png")

    def run(lines: list, *flags: str) -> int:
        Path("lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
        quick = [
            "--num-samples",
            "3",
            "--sequence-length",
            "32",
            "--device",
            "cpu",
            "--method",
            "wanda",
        ]
        return main(
            ["prune", str(folder), "-o", "out", "--calibration", "lines.jsonl", *quick, *flags]
        )

    return run


def lines(picture: str) -> list[dict]:
    """Four lines of at most 32 tokens, and one whose image comes after them."""
    return [
        {"text": "words 0", "image": f"{picture}.png"},
        {"text": "words 1", "image": f"{picture}.png"},
        {"text": f"{MARK} and {MARK}", "images": ["red.png", f"{picture}.png"]},
        {"text": "none" * 10},
        {"text": 30 * "x" + MARK, "image": "red.png"},
    ]


def test_other_images_give_other_weights_and_do_not_resume_a_run(prune, tmp_path, capsys, caplog):
    with interrupted_after(1):
        assert prune(lines("red")) == 130
    assert prune(lines("blue")) == 1

    assert "was another one (calibration was" in capsys.readouterr().err

    weights = []
    for picture, flags in (("red", []), ("blue", ["--overwrite"])):
        assert prune(lines(picture), *flags) == 0

        report = json.loads((tmp_path / "out" / "fista" / "report.json").read_text())
        assert report["calibration"]["media"] == ["pixel_values"]
        assert report["calibration"]["num_sequences"] == 3
        assert report["calibration"]["held_out"]["num_sequences"] == 1
        assert report["perplexity"]["text"] == "lines.jsonl"
        said = capsys.readouterr().err
        assert "sequences with images of 32 tokens or fewer of lines.jsonl" in said
        assert "and what the encoders of images need" in said
        assert (
            "1 lines of lines.jsonl are skipped: 1 have tokens of an image after token 32"
            in caplog.text
        )
        resumes = picture == "red"
        assert ("2 of 4 decoder layers are done already" in said) == resumes
        weights.append(tensors_of(tmp_path / "out"))

    same = {name for name, tensor in weights[0].items() if torch.equal(tensor, weights[1][name])}
    assert {name for name in weights[0] if "layers" not in name or "vision" in name} <= same
    assert not any(name.endswith("_proj.weight") and "language" in name for name in same)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "a", "image": "gone.png"}, "lines.jsonl', line 1: there is no image 'gone.png'"),
        ({"text": "a", "image": 3}, "line 1: found"),
        ({"text": "a", "audio": "a.wav"}, "line 1: 'audio' cannot be read"),
        (
            {"text": "a", "image": "lines.jsonl"},
            "processor can't read '=a' with lines.jsonl: cannot identify image file",
        ),
        (
            {"text": 30 * "a" + MARK, "image": "red.png"},
            "has 3 lines, of which 3 have tokens of an image after token 32",
        ),
    ],
)
def test_lines_that_can_not_be_used_are_refused_before_the_plan(prune, capsys, line, message):
    assert prune([line] * 3) == 1

    said = capsys.readouterr().err.splitlines()
    assert message in said[-1]
    assert len(said) == 1  # found before the plan
    assert not [path for path in Path().iterdir() if path.suffix not in (".png", ".jsonl")]


def test_images_are_refused_without_a_processor_and_by_commands_that_take_text(
    prune, folder, tiny_folder, capsys
):
    assert prune(lines("red"), "--num-samples", "6") == 1

    assert (
        "has 5 lines, and num_samples=6 needs as many: pass num_samples=5"
        in capsys.readouterr().err
    )

    bare = shutil.copytree(folder, "bare", ignore=shutil.ignore_patterns("processor_config.json"))

    for command in (
        ["prune", str(tiny_folder), "-o", "out", "--calibration", "lines.jsonl"],
        ["prune", str(bare), "-o", "out", "--calibration", "lines.jsonl"],
        ["evaluate", str(tiny_folder), "--text", "lines.jsonl"],
    ):
        assert main(command) == 1

    said = capsys.readouterr().err
    assert "has no processor, so it can't be calibrated with images" in said
    assert "a directory containing a preprocessor_config.json file" in said
    assert not [path for path in Path().iterdir() if path.name.startswith("out")]
    assert (
        "'lines.jsonl' has images, which only the calibration of optimum-fista prune takes" in said
    )

import json
import shlex
import shutil

from optimum_fista.cli.main import main

QUICK = ["--tokens", "64", "--sequence-length", "16", "--steps", "3", "--device", "cpu"]


def test_what_it_says_is_next_works(tiny_folder, text_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(tiny_folder, tmp_path / "my model")
    text = shutil.copy(text_file, tmp_path / "my text.txt")
    assert main(["rotate", str(folder), *QUICK, "--calibration", str(text)]) == 0
    printed = capsys.readouterr()
    assert "rotated for 2:4 in" in printed.out
    assert "the model computes the same: in float32 its logits differ by" in printed.out
    assert "Training the rotation: 100%" in printed.err
    assert "predicted error" in printed.err
    (command,) = printed.out.split("next:\n")[1].splitlines()
    assert shlex.split(command)[:3] == ["optimum-fista", "prune", str(tmp_path / "my model-rotated")]
    quick = ["--num-samples", "8", "--sequence-length", "16", "--device", "cpu", "--method", "wanda"]
    assert main([*shlex.split(command)[1:], *quick]) == 0
    config = json.loads((tmp_path / "my model-rotated-2of4" / "config.json").read_text())
    assert config["fista_pruning"]["pattern"] == config["fista_rotation"]["pattern"] == "2:4"


def test_zeros_without_a_pattern(tiny_folder, tmp_path, capsys):
    flags = ["--pattern", "unstructured", "--sparsity", "0.6", "-o", str(tmp_path / "out")]
    assert main(["rotate", str(tiny_folder), *QUICK, *flags]) == 0
    printed = capsys.readouterr().out
    assert "rotated for 60% zeros in" in printed
    assert printed.rstrip().endswith(f"optimum-fista prune {tmp_path / 'out'} --sparsity 0.6")


def test_an_error_is_one_line(tiny_folder, tmp_path, capsys):
    assert main(["rotate", str(tiny_folder), *QUICK, "--pattern", "heads:0.5", "-o", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: pattern='heads:0.5', sparsity=None: pass a")
    assert not (tmp_path / "out").exists()

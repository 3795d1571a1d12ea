from optimum_fista.cli.main import main
from optimum_fista.evaluate.verification import verify_checkpoint
from optimum_fista.folder.packed_folder import is_packed


def test_there_and_back(pruned_folder, tmp_path, capsys):
    assert main(["pack", str(pruned_folder), "--output", str(tmp_path / "packed")]) == 0
    shown = capsys.readouterr().out
    assert "14 weights: " in shown
    assert ".safetensors" not in shown
    assert shown.endswith(f"saved to {tmp_path / 'packed'}\n")
    assert main(["verify", str(tmp_path / "packed")]) == 0
    assert main(["unpack", str(tmp_path / "packed"), "-o", str(tmp_path / "again")]) == 0
    for file in pruned_folder.rglob("*.safetensors"):
        assert (tmp_path / "again" / file.relative_to(pruned_folder)).read_bytes() == file.read_bytes()


def test_pruning_straight_to_a_packed_folder(tiny_folder, text_file, pruned_folder, tmp_path, capsys):
    quick = ["--num-samples", "8", "--sequence-length", "16", "--device", "cpu", "--calibration", str(text_file)]
    arguments = ["prune", str(tiny_folder), "-o", str(tmp_path / "out"), "--pattern", "2:4", "--method", "wanda"]
    assert main([*arguments, *quick, "--packed"]) == 0
    assert "14 weights: " in capsys.readouterr().out
    assert is_packed(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert verify_checkpoint(tmp_path / "out") == verify_checkpoint(pruned_folder)

from optimum_fista.cli.main import main


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

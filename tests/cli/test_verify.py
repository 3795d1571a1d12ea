import json
import shutil

from safetensors.torch import load_file, save_file

from optimum_fista.cli.main import main


def test_what_was_proven(pruned_folder, capsys):
    assert main(["verify", str(pruned_folder)]) == 0
    expected = "14 operators keep their pattern, 7,680 of 15,360 weights zero (50.0000%)"
    assert capsys.readouterr().out == f"{pruned_folder}: {expected}\n"


def test_a_broken_folder_exits_with_1_and_names_the_operator(pruned_folder, tmp_path, capsys):
    folder = shutil.copytree(pruned_folder, tmp_path / "model")
    name = "model.layers.1.self_attn.o_proj.weight"
    shard = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    weights = load_file(shard)
    weights[name][weights[name] == 0] = 1e-4
    save_file(weights, shard, metadata={"format": "pt"})
    assert main(["verify", str(folder)]) == 1
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1] == f"{folder}: BROKEN: {name} has 512 weights outside its mask that are not zero."
    assert shown.out == ""

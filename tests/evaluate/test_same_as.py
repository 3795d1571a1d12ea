import json
import shutil

import pytest
import torch
from folder_files import tensors_of
from safetensors.torch import save_file
from tiny_llama import save_tiny_folder, tiny_tokens
from transformers import AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.cli.main import main
from optimum_fista.evaluate.comparison import compare_folders
from optimum_fista.folder.packed_folder import pack_folder

DOWN, NORM = "model.layers.1.mlp.down_proj.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The dense model, and the same model pruned from files and in memory."""
    place = tmp_path_factory.mktemp("folders")
    save_tiny_folder(place / "dense")
    pruner, batches = FistaPruner(FistaPruningConfig(method="wanda"), progress=False), tiny_tokens().split(4)
    pruner.prune(place / "dense", batches, output_dir=place / "files", device="cpu")
    model = AutoModelForCausalLM.from_pretrained(place / "dense")
    pruner.prune(model, batches)
    pruner.save_pretrained(model, place / "memory")
    return place


def test_the_report_says_how_the_folder_was_made(folders):
    found, other = (json.loads((folders / name / "fista/report.json").read_text()) for name in ("files", "memory"))
    assert found["environment"] == other["environment"]
    assert found["model"]["sha256"] == other["model"]["sha256"]
    assert found["calibration"]["sha256"] == other["calibration"]["sha256"]
    assert found["environment"]["batches"] == [[2, 4, 16]]
    assert found["environment"]["processor"]["threads"] == torch.get_num_threads()
    assert "--num-samples 8 --sequence-length 16 --batch-size 4 --device cpu --dtype float32" in found["command"]
    assert {"python", "torch", "transformers", "optimum-fista"} <= set(found["versions"])


def test_folders_are_the_same_packed_or_not(folders, tmp_path, capsys):
    pack_folder(folders / "files", tmp_path / "packed")
    for other in (folders / "memory", tmp_path / "packed"):
        assert main(["verify", str(folders / "files"), "--same-as", str(other)]) == 0
    assert "all 21 tensors are equal, and so are the masks" in capsys.readouterr().out


def test_what_differs_is_counted(folders, tmp_path, capsys):
    changed = shutil.copytree(folders / "files", tmp_path / "changed")
    tensors = tensors_of(changed)
    tensors[NORM][0] += 0.5
    tensors[DOWN][0] = 0
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    found = compare_folders(folders / "files", changed)
    assert found.different == [DOWN, NORM]
    assert (found.largest, found.where) == (0.5, NORM)
    lost = int((tensors_of(folders / "files")[DOWN][0] != 0).sum())
    assert found.same_masks == pytest.approx(1 - lost / 15360)
    assert main(["verify", str(folders / "files"), "--same-as", str(changed)]) == 1
    assert "2 of 21 tensors differ, by at most 0.5 (model.norm.weight)" in capsys.readouterr().out
    del tensors[NORM]
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    found = compare_folders(folders / "files", changed)
    assert (found.largest, found.where) == (float("inf"), NORM)

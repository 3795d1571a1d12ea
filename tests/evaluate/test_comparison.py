"""A pruned folder against its dense model, and the record of how it was made."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import prune_and_save
from tiny_llama import save_tiny_folder, tiny_llama, tiny_tokens
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from optimum_fista import FistaPruner, FistaPruningConfig, save_masked
from optimum_fista.evaluate.verification import verify_checkpoint
from optimum_fista.folder.packed_folder import pack_folder

BIASES = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}


def dense_and_pruned(model, folder: Path, **options) -> tuple[Path, Path]:
    """A dense model in bfloat16, whose biases are not zero, and what a run makes of it."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if name.endswith("bias"):
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()) + number)
    model = model.bfloat16()
    model.save_pretrained(folder / "dense")
    prune_and_save(model, folder / "pruned", **options)
    return folder / "dense", folder / "pruned"


@pytest.fixture(scope="module")
def smaller(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("smaller")
    return dense_and_pruned(
        tiny_llama(**BIASES), folder, pattern="channels:0.25/4+heads:0.5", method="wanda"
    )


@pytest.fixture
def copied(smaller, tmp_path) -> tuple[Path, Path]:
    """The dense folder, and a copy of the smaller one to break."""
    return smaller[0], Path(shutil.copytree(smaller[1], tmp_path / "copied"))


def broken(folder: Path, dense: Path) -> str:
    with pytest.raises(ValueError) as caught:
        verify_checkpoint(folder, dense=dense)
    return str(caught.value)


def test_all_that_was_only_cut_is_the_dense_models(smaller):
    dense, folder = smaller
    seen: list[str] = []
    proven = verify_checkpoint(folder, seen.append, dense=dense)
    # Of 16 tensors a decoder layer, two are pruned; the embedding is the head as well, and there is the last norm.
    assert proven.num_equal == 2 * 14 + 2
    assert len(seen) == len(set(seen)) + 4  # the pruned operators are checked, and compared
    assert verify_checkpoint(folder).num_equal is None


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.1.self_attn.k_proj.bias",
        "model.embed_tokens.weight",
    ],
)
def test_a_changed_value_names_its_tensor(copied, name):
    dense, folder = copied
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[3] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert verify_checkpoint(folder).num_equal is None
    assert broken(folder, dense).startswith(f"{name} differs from '{dense}' in 1 of ")


@pytest.mark.parametrize(
    ("part", "cut"), [("mlp.down_proj", "mlp.gate_proj"), ("self_attn.o_proj", "self_attn.q_proj")]
)
def test_other_groups_than_those_that_stayed(copied, part, cut):
    dense, folder = copied
    report = json.loads((folder / "fista" / "report.json").read_text())
    operator = next(o for o in report["operators"] if o["name"] == f"model.layers.1.{part}.weight")
    kept = operator["groups_kept"]
    gone = next(i for i in range(48) if i not in kept)
    operator["groups_kept"] = sorted([gone, *kept[1:]])
    (folder / "fista" / "report.json").write_text(json.dumps(report))
    assert verify_checkpoint(folder)
    assert broken(folder, dense).startswith(f"model.layers.1.{cut}.weight differs from ")


def test_another_dense_model(smaller, tmp_path):
    _, folder = smaller
    for changes, wrong in (
        ({"hidden_size": 64, "head_dim": 8}, "model.embed_tokens.weight has shape (64, 32), from "),
        ({"num_key_value_heads": 1}, "LlamaForCausalLM can't lose heads"),
        ({"initializer_range": 1.0}, "model.embed_tokens.weight differs from "),
    ):
        tiny_llama(**BIASES | changes).save_pretrained(tmp_path / "other")
        assert wrong in broken(folder, tmp_path / "other")
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path / "gpt2")
    assert broken(folder, tmp_path / "gpt2")


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_ordinary_pruned_folders(family, tmp_path):
    dense, folder = dense_and_pruned(
        tiny_model(family), tmp_path, pattern="2:4", method="magnitude"
    )
    assert verify_checkpoint(folder, dense=dense).num_equal > 4
    norm = next(
        name for name in load_file(folder / "model.safetensors") if "norm" in name or "ln_f" in name
    )
    tensors = load_file(folder / "model.safetensors")
    tensors[norm][0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert f" differs from '{dense}' in 1 of " in broken(folder, dense)


def test_packed_and_trained_folders_are_refused(tmp_path):
    dense, folder = dense_and_pruned(tiny_llama(), tmp_path, pattern="2:4", method="magnitude")
    pack_folder(folder, tmp_path / "packed")
    save_masked(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "trained", folder)
    for name, why in (
        ("packed", "is packed, so it can't be compared: unpack it first"),
        ("trained", "was trained, so it can't be compared"),
    ):
        with pytest.raises(ValueError, match=f"dense='{dense}': .* {why}"):
            verify_checkpoint(tmp_path / name, dense=dense)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The dense model, and the same model pruned from files and in memory."""
    place = tmp_path_factory.mktemp("folders")
    save_tiny_folder(place / "dense")
    options = {
        "output_dir": place / "files",
        "device": "cpu",
        "calibration_source": "random tokens",
    }
    FistaPruner(FistaPruningConfig(method="wanda"), progress=False).prune(
        place / "dense", tiny_tokens().split(4), **options
    )
    prune_and_save(
        AutoModelForCausalLM.from_pretrained(place / "dense"), place / "memory", method="wanda"
    )
    return place


def test_the_report_says_how_the_folder_was_made(folders):
    found, other = (
        json.loads((folders / name / "fista/report.json").read_text())
        for name in ("files", "memory")
    )
    assert found["environment"] == other["environment"]
    assert found["model"]["sha256"] == other["model"]["sha256"]
    assert found["calibration"]["sha256"] == other["calibration"]["sha256"]
    assert found["environment"]["batches"] == [[2, 4, 16]]
    assert found["environment"]["processor"]["threads"] == torch.get_num_threads()
    assert found["command"].endswith(
        "--num-samples 8 --sequence-length 16 --batch-size 4 --device cpu"
    )
    assert other["command"] == found["command"]
    assert {"python", "torch", "transformers", "optimum-fista"} <= set(found["versions"])

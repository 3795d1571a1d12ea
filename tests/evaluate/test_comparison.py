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
    """A dense folder, and one without some channels and heads; do not write to them."""
    folder = tmp_path_factory.mktemp("smaller")
    return dense_and_pruned(
        tiny_llama(**BIASES), folder, pattern="channels:0.25/4+heads:0.5", method="wanda"
    )


@pytest.fixture
def copied(smaller, tmp_path) -> tuple[Path, Path]:
    """The dense folder, and a copy of the smaller one to break."""
    return smaller[0], Path(shutil.copytree(smaller[1], tmp_path / "copied"))


def change(folder: Path, name: str, index: int) -> None:
    """Add 1 to one value of a tensor."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[index] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def error_of(folder: Path, dense: Path) -> str:
    """The error of a folder that is not what a run makes of the dense model."""
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


def test_nothing_is_compared_without_a_dense_model(smaller):
    assert verify_checkpoint(smaller[1]).num_equal is None


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

    change(folder, name, index=3)

    verify_checkpoint(folder)  # without the dense model nobody can know
    assert error_of(folder, dense).startswith(f"{name} differs from '{dense}' in 1 of ")


@pytest.mark.parametrize(
    ("part", "cut"), [("mlp.down_proj", "mlp.gate_proj"), ("self_attn.o_proj", "self_attn.q_proj")]
)
def test_other_groups_than_those_that_stayed_differ(copied, part, cut):
    dense, folder = copied
    report = json.loads((folder / "fista" / "report.json").read_text())
    operator = next(o for o in report["operators"] if o["name"] == f"model.layers.1.{part}.weight")
    kept = operator["groups_kept"]
    removed = next(i for i in range(48) if i not in kept)

    operator["groups_kept"] = sorted([removed, *kept[1:]])
    (folder / "fista" / "report.json").write_text(json.dumps(report))

    verify_checkpoint(folder)  # without the dense model nobody can know
    assert error_of(folder, dense).startswith(f"model.layers.1.{cut}.weight differs from ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64, "head_dim": 8}, "model.embed_tokens.weight has shape (64, 32), from "),
        ({"num_key_value_heads": 1}, "LlamaForCausalLM can't lose heads"),
        ({"initializer_range": 1.0}, "model.embed_tokens.weight differs from "),
    ],
)
def test_another_dense_model_of_the_family_is_refused(smaller, tmp_path, changes, message):
    tiny_llama(**BIASES | changes).save_pretrained(tmp_path / "other")

    assert message in error_of(smaller[1], tmp_path / "other")


def test_a_dense_model_of_another_family_is_refused(smaller, tmp_path):
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path / "gpt2")

    assert error_of(smaller[1], tmp_path / "gpt2")


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_zeros_leave_the_other_tensors_as_they_were(family, tmp_path):
    dense, folder = dense_and_pruned(
        tiny_model(family), tmp_path, pattern="2:4", method="magnitude"
    )
    names = load_file(folder / "model.safetensors")
    norm = next(name for name in names if "norm" in name or "ln_f" in name)
    assert verify_checkpoint(folder, dense=dense).num_equal > 4

    change(folder, norm, index=0)

    assert f" differs from '{dense}' in 1 of " in error_of(folder, dense)


def test_packed_and_trained_folders_are_refused(tmp_path):
    dense, folder = dense_and_pruned(tiny_llama(), tmp_path, pattern="2:4", method="magnitude")
    pack_folder(folder, tmp_path / "packed")
    save_masked(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "trained", folder)

    of_packed = error_of(tmp_path / "packed", dense)
    of_trained = error_of(tmp_path / "trained", dense)

    assert of_packed.endswith("is packed, so it can't be compared: unpack it first.")
    assert of_trained.endswith("was trained, so it can't be compared: leave dense out.")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """The dense model, and the same model pruned from files and in memory."""
    folder = tmp_path_factory.mktemp("folders")
    save_tiny_folder(folder / "dense")
    pruner = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)
    pruner.prune(
        folder / "dense",
        tiny_tokens().split(4),
        output_dir=folder / "files",
        device="cpu",
        calibration_source="random tokens",
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "dense")
    prune_and_save(model, folder / "memory", method="wanda")
    return folder


def test_the_report_says_how_the_folder_was_made(folders):
    of_files = json.loads((folders / "files/fista/report.json").read_text())
    of_memory = json.loads((folders / "memory/fista/report.json").read_text())

    assert of_files["environment"] == of_memory["environment"]
    assert of_files["model"]["sha256"] == of_memory["model"]["sha256"]
    assert of_files["calibration"]["sha256"] == of_memory["calibration"]["sha256"]
    assert of_files["environment"]["batches"] == [[2, 4, 16]]
    assert of_files["environment"]["processor"]["threads"] == torch.get_num_threads()
    flags = "--num-samples 8 --sequence-length 16 --batch-size 4 --device cpu"
    assert of_files["command"].endswith(flags)
    assert of_memory["command"] == of_files["command"]
    assert {"python", "torch", "transformers", "optimum-fista"} <= set(of_files["versions"])

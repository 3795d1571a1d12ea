"""Packed folders: bytes, round trips, verification, loading with and without this package."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import rare_tokens
import torch
from folder_files import files_of
from hub_standin import hub_fixture, run_with_hub  # noqa: F401
from safetensors.torch import load_file, save_file
from tiny_llama import tiny_tokens
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.evaluate.verification import VerificationError, verify_checkpoint
from optimum_fista.folder import packed_folder
from optimum_fista.folder.checkpoint import read_report
from optimum_fista.folder.output import model_files
from optimum_fista.folder.packed_folder import (
    is_packed,
    pack_folder,
    packed_masks,
    packed_operators,
    unpack_folder,
)
from optimum_fista.packed.format import pack
from optimum_fista.packed.masks import unpack_bits
from optimum_fista.packed.quantizer import FistaPackedConfig

FAMILIES = ["llama", "gpt2", "mixtral", "gpt_oss", "granitemoe"]


def assert_same_weights(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    """Load a folder, and compare its tensors with those expected, by their names."""
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_folder_is_smaller_and_is_made_dense_again(family, pruned, tmp_path):
    dense = pruned(family)
    packed = tmp_path / "packed"

    packing = pack_folder(dense, packed)
    unpack_folder(packed, tmp_path / "again")

    assert packing.packed_bytes < packing.dense_bytes
    assert is_packed(packed)
    assert not list(packed.glob("model*.safetensors"))
    assert verify_checkpoint(packed) == verify_checkpoint(dense)
    assert files_of(tmp_path / "again") == files_of(dense)


def test_a_fused_tensor_is_read_once_for_the_masks_of_all_its_experts(
    pruned, tmp_path, monkeypatch
):
    packed = tmp_path / "packed"
    pack_folder(pruned("granitemoe"), packed)
    report = read_report(packed)
    names = [operator.name for operator in report.operators]  # expert after expert
    tensors = {name.partition("[")[0] for name in names}
    assert len(tensors) < len(names)

    read = []
    read_packed = packed_folder.read_packed
    monkeypatch.setattr(
        packed_folder,
        "read_packed",
        lambda files, name: read.append(name) or read_packed(files, name),
    )
    masks = packed_masks(packed, names)

    assert masks.keys() == set(names)
    assert sorted(read) == sorted(tensors)

    read.clear()
    assert {operator.name for operator, _, _ in packed_operators(packed, report)} == set(names)
    assert sorted(read) == sorted(tensors)


@pytest.mark.parametrize("pattern", ["vocab:unused", "channels:0.25/4"])
@pytest.mark.filterwarnings("ignore")
def test_zeros_of_an_earlier_run_are_verified_and_packed_after_a_run_that_removed_parts(
    pattern, tmp_path
):
    source = rare_tokens.save(tmp_path / "source")
    batches = tiny_tokens().split(4)
    zeros = FistaPruner(FistaPruningConfig(pattern="2:4", method="wanda"), progress=False)
    zeros.prune(source, batches, output_dir=tmp_path / "zeros")
    if pattern.startswith("vocab"):  # such a run takes no method, and texts in place of batches
        config = FistaPruningConfig(pattern=pattern)
        texts = [rare_tokens.TEXT]
    else:
        config = FistaPruningConfig(pattern=pattern, method="wanda")
        texts = batches
    parts = FistaPruner(config, progress=False)
    report = parts.prune(tmp_path / "zeros", texts, output_dir=tmp_path / "smaller")
    num_weights = sum(operator.shape[0] * operator.shape[1] for operator in report.carried)

    packing = pack_folder(tmp_path / "smaller", tmp_path / "packed")
    unpack_folder(tmp_path / "packed", tmp_path / "again")

    proven = verify_checkpoint(tmp_path / "packed")
    assert proven == verify_checkpoint(tmp_path / "smaller")
    assert proven.num_operators == len(report.carried) == packing.num_tensors == 14
    assert proven.num_weights == num_weights
    assert proven.num_zeros == report.num_zeros > 0.4 * num_weights
    assert packing.packed_bytes < packing.dense_bytes
    assert files_of(tmp_path / "again") == files_of(tmp_path / "smaller")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")
    assert_same_weights(tmp_path / "packed", model.state_dict())


@pytest.mark.filterwarnings("ignore")
def test_a_folder_without_zeros_of_any_run_is_not_packed(tiny_folder, tmp_path):
    pruner = FistaPruner(FistaPruningConfig(pattern="channels:0.25/4"), progress=False)
    pruner.prune(tiny_folder, tiny_tokens().split(4), output_dir=tmp_path / "smaller")

    with pytest.raises(ValueError, match="has no zeros to pack: whole parts of the model were"):
        pack_folder(tmp_path / "smaller", tmp_path / "packed")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_folder_is_loaded_as_the_dense_model_and_saved_as_one(family, pruned, tmp_path):
    expected = AutoModelForCausalLM.from_pretrained(pruned(family)).state_dict()
    pack_folder(pruned(family), tmp_path / "packed")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    loaded = model.state_dict()
    model.save_pretrained(tmp_path / "saved")

    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    assert not is_packed(tmp_path / "saved")
    assert_same_weights(tmp_path / "saved", expected)


@pytest.mark.parametrize("exclude", ["*.down_proj", "*.layers.0.*", "*.experts.[1-9].*"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_that_were_left_dense_are_loaded_as_they_were(family, exclude, pruned, tmp_path):
    folder = pruned(family, exclude=(exclude,))
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()

    pack_folder(folder, tmp_path / "packed")

    assert_same_weights(tmp_path / "packed", expected)


WITHOUT = """
import sys
from transformers import AutoModelForCausalLM, LlamaForCausalLM
for cls in (AutoModelForCausalLM, LlamaForCausalLM):
    for options in ({}, {"use_safetensors": True}, {"device_map": "cpu"}, {"ignore_mismatched_sizes": True}):
        try:
            cls.from_pretrained(sys.argv[1], **options)
        except OSError as error:
            assert "packed, run `import optimum_fista.packed` first" in str(error), error
        else:
            sys.exit(f"{cls.__name__} loaded it with {options}")
assert "optimum_fista" not in sys.modules
print("refused")
"""


def run(code: str, *arguments: Path) -> subprocess.CompletedProcess:
    """Run Python code in a process of its own, with paths in `sys.argv`."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


WITH = """
import sys
from transformers import AutoModelForCausalLM
import torch
found = AutoModelForCausalLM.from_pretrained(sys.argv[1]).state_dict()
expected = AutoModelForCausalLM.from_pretrained(sys.argv[2]).state_dict()
assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
print("equal")
"""


def test_importing_the_package_after_transformers_suffices_to_load_a_packed_folder(
    pruned, tmp_path
):
    """A process can't load a packed folder before it imports this package. (The next test imports it first.)"""
    pack_folder(pruned("llama"), tmp_path / "packed")
    code = f"{WITHOUT}import optimum_fista.packed\n{WITH}"

    result = run(code, tmp_path / "packed", pruned("llama"))

    assert result.stdout == "refused\nequal\n", result.stdout + result.stderr


def test_a_packed_folder_is_pushed_and_loaded_like_any_model(hub, pruned, tmp_path):
    """By name, bit for bit, also if a dense model lay there before."""
    pack_folder(pruned("llama"), tmp_path / "packed")
    folders = [str(pruned("llama")), str(tmp_path / "packed")]
    push = f"""
        from optimum_fista.folder.hub import push_folder

        for folder in {folders}:
            push_folder(folder, "tester/packed")
    """

    pushed = run_with_hub(hub, push, tmp_path)

    assert pushed.returncode == 0, pushed.stderr
    assert "packed.safetensors" in hub.files("tester/packed")
    assert "model.safetensors" not in hub.files("tester/packed")

    load = f"""
        import torch
        import optimum_fista.packed
        from transformers import AutoModelForCausalLM

        found = AutoModelForCausalLM.from_pretrained("tester/packed").state_dict()
        expected = AutoModelForCausalLM.from_pretrained({str(pruned("llama"))!r}).state_dict()
        print(all(torch.equal(found[name], tensor) for name, tensor in expected.items()))
    """
    loaded = run_with_hub(hub, load, tmp_path)
    assert loaded.stdout == "True\n", loaded.stderr


def edit(folder: Path, change) -> None:
    """Change the tensors in the file of a packed folder; `change` gets them by their names."""
    file = folder / "packed.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{NAME}_mask"), "up_proj.weight is packed, but .*_mask is missing"),
        (
            lambda t: t.update({f"{NAME}_values": t[f"{NAME}_values"][:-1].clone()}),
            "up_proj.weight_values holds",
        ),
        (lambda t: t[f"{NAME}_mask"][0, 0].bitwise_xor_(1), "up_proj.weight_values holds"),
        (lambda t: t[f"{NAME}_layout"][-2].fill_(2**62), "up_proj.weight"),
        (
            lambda t: t[f"{NAME}_values"][0].mul_(2),
            r"layers\.1\.mlp\.up_proj\.weight has another checksum",
        ),
    ],
    ids=["part missing", "value less", "bit flipped", "hostile shape", "value changed"],
)
def test_malformed_folders_are_refused_and_named(change, message, pruned, tmp_path):
    pack_folder(pruned("llama"), tmp_path / "packed")
    edit(tmp_path / "packed", change)

    with pytest.raises(VerificationError, match=message):
        verify_checkpoint(tmp_path / "packed")
    with pytest.raises(ValueError, match=message):
        unpack_folder(tmp_path / "packed", tmp_path / "again")
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")

    assert not (tmp_path / "again").exists()


def widened(name):
    """A tensor that is right by itself, of another shape than the model's: its rows end in bits that were padding."""

    def change(tensors):
        mask = tensors[f"{name}_mask"].clone()
        mask[..., -1] = 0xFF
        kept = unpack_bits(mask, mask.shape[-1] * 8)
        tensors.update(pack(kept.to(torch.bfloat16), kept).named(name))

    return change


@pytest.mark.parametrize(
    ("family", "name"), [("llama", NAME), ("gpt2", "transformer.h.1.mlp.c_fc.weight")]
)
def test_a_packed_shape_that_the_model_does_not_have_is_refused(family, name, pruned, tmp_path):
    pack_folder(pruned(family), tmp_path / "packed")
    edit(tmp_path / "packed", widened(name))

    with pytest.raises(ValueError, match=f"{name}_layout says shape"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


@pytest.mark.parametrize(
    "settings",
    [
        {"parameters": ["weight", "(.*)+$"]},
        {"parameters": "weight"},
        {"weights": "../packed.safetensors"},
        {"weights": None},
    ],
)
def test_configured_values_that_are_no_plain_names_are_refused(settings):
    """A pattern that takes for ever would hang `from_pretrained`; another file would be read."""
    (argument,) = settings

    with pytest.raises(ValueError, match=f"^{argument}="):
        FistaPackedConfig(**settings)


def test_a_packed_folder_is_not_packed_again(pruned, tmp_path):
    pack_folder(pruned("llama"), tmp_path / "packed")

    with pytest.raises(ValueError, match="is packed already"):
        pack_folder(tmp_path / "packed", tmp_path / "twice")

    assert not (tmp_path / "twice").exists()


def test_a_folder_that_is_not_packed_is_not_unpacked(pruned, tmp_path):
    with pytest.raises(ValueError, match="is not packed"):
        unpack_folder(pruned("llama"), tmp_path / "again")

    assert not (tmp_path / "again").exists()


def test_a_model_that_was_not_pruned_is_not_packed(tiny_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no fista/masks\.safetensors"):
        pack_folder(tiny_folder, tmp_path / "packed")

    assert not (tmp_path / "packed").exists()


def test_an_output_that_holds_a_model_is_refused(pruned):
    with pytest.raises(FileExistsError, match="already holds a model"):
        pack_folder(pruned("gpt2"), pruned("llama"))


def test_a_packed_folder_can_only_be_loaded_as_a_dense_model():
    message = "runtime='sparse': a packed folder is loaded as a dense model"
    with pytest.raises(ValueError, match=message):
        FistaPackedConfig(runtime="sparse")


def test_the_configuration_of_packed_weights_is_refused_for_others(tiny_folder):
    with pytest.raises(ValueError, match="the model is not packed: pack the folder"):
        LlamaForCausalLM.from_pretrained(tiny_folder, quantization_config=FistaPackedConfig())


def test_a_nonzero_weight_outside_its_mask_is_refused(pruned, tmp_path):
    folder = shutil.copytree(pruned("llama"), tmp_path / "changed")
    tensors = load_file(folder / "model.safetensors")
    tensors[NAME][tensors[NAME] == 0] = 1.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    message = r"up_proj\.weight: weight has values other than zero outside of mask"
    with pytest.raises(ValueError, match=message):
        pack_folder(folder, tmp_path / "packed")

    assert not (tmp_path / "packed").exists()


def test_files_of_the_user_are_copied_and_replace_no_file_of_the_model(pruned, tmp_path, caplog):
    folder = shutil.copytree(pruned("llama"), tmp_path / "folder")
    output = tmp_path / "packed"
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.txt").write_text("mine")
    (folder / "nowhere").symlink_to("nothing")
    (tmp_path / "secret").write_text("private")
    (folder / "NOTICE.txt").symlink_to(tmp_path / "secret")
    # edited, but still the model's
    for name, mine in (("README.md", "My words.\n"), ("config.json", "\n")):
        (folder / name).write_text((folder / name).read_text() + mine)

    pack_folder(folder, output)
    unpack_folder(output, tmp_path / "again")

    assert "lead out of the folder: NOTICE.txt, nowhere" in caplog.text
    assert not (output / "NOTICE.txt").exists()
    assert (output / "sub" / "notes.txt").read_text() == "mine"
    names = model_files(folder) | {"packed.safetensors"}
    assert model_files(output) == names - {"model.safetensors", "fista/masks.safetensors"}
    assert model_files(tmp_path / "again") == model_files(folder)
    assert "My words." in (tmp_path / "again" / "README.md").read_text()


def test_a_packed_folder_is_not_replaced_while_a_file_of_the_user_is_in_it(pruned, tmp_path):
    output = tmp_path / "packed"
    pack_folder(pruned("llama"), output)
    (output / "notes.txt").write_text("mine")

    with pytest.raises(FileExistsError, match=r"holds notes\.txt, which"):
        pack_folder(pruned("llama"), output, overwrite=True)
    (output / "notes.txt").unlink()
    pack_folder(pruned("llama"), output, overwrite=True)

    assert is_packed(output)


@pytest.mark.parametrize("name", [".", "packed"])
def test_a_folder_is_not_packed_into_itself(name, pruned, tmp_path):
    folder = shutil.copytree(pruned("llama"), tmp_path / "folder")

    with pytest.raises(ValueError, match="lies in the folder that is read"):
        pack_folder(folder, folder / name, overwrite=True)


def test_an_index_without_metadata_is_packed(saved_gpt2, tmp_path):
    folder = shutil.copytree(saved_gpt2.folder, tmp_path / "folder")
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map}))

    pack_folder(folder, tmp_path / "packed")

    assert verify_checkpoint(tmp_path / "packed") == verify_checkpoint(saved_gpt2.folder)

"""What a run leaves as it is, is written as it is stored: bytes, dtypes, scales; a quantized model stays quantized."""

import errno
import json
import os
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
from families import family_model
from folder_files import tensors_of
from killed import Killed, killed_at_write
from pruning import same
from quantized_models import VOCAB_SIZE, compressed_qwen3_moe, fp8_deepseek, mxfp4_gpt_oss
from safetensors.torch import load_file, save_file
from tiny_llama import TEXT, tiny_tokenizer
from tiny_models import tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig, PruningReport, atomic, recover
from optimum_fista.evaluate.verification import verify_checkpoint
from optimum_fista.source.loading import read_model
from optimum_fista.source.stored_tensor import read_stored

TOKENS = torch.randint(0, VOCAB_SIZE, (8, 16), generator=torch.Generator().manual_seed(0))
LAYERS = {"pattern": "layers:0.34", "residual_correction": 0.0}


def prune(source: Path, output: Path, dtype: str = "auto", **options) -> PruningReport:
    pruner = FistaPruner(FistaPruningConfig(**options), progress=False)
    return pruner.prune(
        str(source), TOKENS.split(4), output_dir=output, device="cpu", dtype=dtype, overwrite=True
    )


def logits_of(folder: Path) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits


def settings_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor [..., bytes]: NaN and -0.0 count."""
    return tensor.contiguous().unsqueeze(-1).view(torch.uint8)


def add_last_layer(folder: Path, number: int) -> Path:
    """Store the decoder layer of this number, the last one, once more: as a layer that predicts more tokens."""
    tensors, last = load_file(folder / "model.safetensors"), f"layers.{number}."
    tensors |= {
        n.replace(last, f"layers.{number + 1}."): t.clone() for n, t in tensors.items() if last in n
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def fp8_with_more_tokens(folder: Path) -> Path:
    """A quantized model with a quantized layer that predicts more tokens, and a list of modules that are dense."""
    add_last_layer(fp8_deepseek(folder), 2)
    config = json.loads((folder / "config.json").read_text())
    modules = [f"model.layers.{number}.mlp.gate" for number in (1, 2, 3)]
    config["quantization_config"]["modules_to_not_convert"] = ["lm_head", *modules]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"pattern": "layers:0.5", "residual_correction": 0.0}),
        ("gpt2", {"pattern": "channels:0.25", "method": "magnitude"}),
        ("qwen3", {"pattern": "heads:0.5", "method": "wanda"}),
        *(
            (family, {"pattern": "experts:0.25", "expert_refit": False})
            for family in (
                "mixtral",
                "gpt_oss",
                "llama4_text",
                "ernie4_5_moe",
            )  # the last has biases [1, experts]
        ),
    ],
)
def test_stored_tensors_are_cut_as_those_of_the_model_are(tmp_path, family, options):
    model = family_model(family) if family == "ernie4_5_moe" else tiny_model(family)
    model.save_pretrained(tmp_path / "source")
    prune(tmp_path / "source", tmp_path / "stored", **options)
    prune(tmp_path / "source", tmp_path / "model", dtype="float32", **options)
    stored, expected = (read_stored(tmp_path / name) for name in ("stored", "model"))
    assert stored.keys() == expected.keys()
    assert all(tensor.equals(expected[name]) for name, tensor in stored.items())


@pytest.mark.parametrize("write", [fp8_deepseek, mxfp4_gpt_oss])
def test_experts_go_from_a_quantized_model_that_stays_quantized(tmp_path, write):
    source, options = write(tmp_path / "source"), {"pattern": "experts:0.25", "expert_refit": False}
    report = prune(source, tmp_path / "out", **options)
    before, after = load_file(source / "model.safetensors"), tensors_of(tmp_path / "out")
    for mixture in report.mixtures:
        layer = mixture.name.removesuffix("experts")
        for name in [name for name in after if name.startswith(layer) and "shared" not in name]:
            expert, _, rest = name.removeprefix(f"{mixture.name}.").partition(".")
            if expert.isdigit():
                expected = raw(before[f"{mixture.name}.{mixture.groups_kept[int(expert)]}.{rest}"])
            else:
                expected = raw(before[name])[list(mixture.groups_kept)]
            assert torch.equal(raw(after.pop(name)), expected), name
    assert all(torch.equal(raw(tensor), raw(before[name])) for name, tensor in after.items())
    assert settings_of(tmp_path / "out") == settings_of(source)
    assert "written as they are stored" in report.warnings[0]
    assert verify_checkpoint(tmp_path / "out", dense=source).num_equal
    prune(source, tmp_path / "dense", dtype="bfloat16", **options)
    assert torch.equal(logits_of(tmp_path / "out"), logits_of(tmp_path / "dense"))


@pytest.mark.parametrize("write", [fp8_with_more_tokens, mxfp4_gpt_oss])
def test_layers_go_from_a_quantized_model_that_stays_quantized(tmp_path, write):
    source = write(tmp_path / "source")
    report = prune(source, tmp_path / "out", **LAYERS)
    before, after = read_stored(source), read_stored(tmp_path / "out")
    stay = [*report.model["layers_kept"], *([3] if write is fp8_with_more_tokens else [])]
    old = {f"layers.{new}.": f"layers.{number}." for new, number in enumerate(stay)}
    for name in after:
        number = next((number for number in old if number in name), "-")
        assert after[name].equals(before[name.replace(number, old.get(number, "-"))]), name
    assert len(after) == len(
        [n for n in before if "layers." not in n or any(number in n for number in old.values())]
    )
    if write is fp8_with_more_tokens:
        assert [*report.model["copied"]] == ["model.layers.3"]
        gates = {f"model.layers.{new}.mlp.gate" for new, number in enumerate(stay) if number}
        assert {*settings_of(tmp_path / "out")["modules_to_not_convert"]} == gates | {"lm_head"}
    assert torch.isfinite(logits_of(tmp_path / "out")).all()
    assert verify_checkpoint(tmp_path / "out", dense=source).num_equal


def test_what_recover_makes_of_a_quantized_model_is_not_quantized(tmp_path):
    tiny_tokenizer().save_pretrained(fp8_with_more_tokens(source := tmp_path / "source"))
    prune(source, tmp_path / "out", **LAYERS)
    (text := tmp_path / "text.txt").write_text(TEXT)
    sizes = {
        "tokens": 256,
        "sequence_length": 16,
        "held_out": 4,
        "device": "cpu",
        "progress": False,
    }
    recover(tmp_path / "out", source, tmp_path / "trained", calibration=str(text), **sizes)
    before, after = read_stored(tmp_path / "out"), read_stored(tmp_path / "trained")
    dtypes = {
        name: tensor.dtype.replace("F8_E4M3", "BF16")
        for name, tensor in before.items()
        if "scale" not in name
    }
    assert {
        name: tensor.dtype for name, tensor in after.items()
    } == dtypes  # the layer for more tokens included


def test_a_killed_run_or_a_full_disk_loses_no_stored_tensor(tmp_path, monkeypatch):
    source = fp8_with_more_tokens(tmp_path / "source")
    flush = atomic.flush
    prune(source, tmp_path / "whole", **LAYERS)
    expected = read_stored(tmp_path / "whole")

    def full(path: Path) -> None:
        if "model-00003-of-00003" in path.name:  # it has the layer that predicts more tokens
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        flush(path)

    monkeypatch.setattr(atomic, "flush", full)
    with pytest.raises(
        OSError, match=r"No space left on device.*: 3 of 3 decoder layers are finished"
    ):
        prune(source, tmp_path / "0", **LAYERS)
    monkeypatch.undo()
    for number in (0, 12):
        with suppress(Killed), killed_at_write(number or 100):
            prune(source, tmp_path / str(number), **LAYERS)
        prune(source, tmp_path / str(number), **LAYERS)
        found = read_stored(tmp_path / str(number))
        assert found.keys() == expected.keys()
        assert all(tensor.equals(expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize("place", ["files", "memory"])
@pytest.mark.parametrize(
    ("preset", "is_read"), [("", True), ("FP8_DYNAMIC", True), ("W4A16", False)]
)
def test_a_quantized_layer_that_is_not_loaded_is_dequantized_or_named_if_the_result_is_dense(
    tmp_path, place, preset, is_read
):
    if preset:
        pytest.importorskip("compressed_tensors")
        source, last = add_last_layer(compressed_qwen3_moe(tmp_path / "source", preset), 1), 1
    else:
        source, last = fp8_with_more_tokens(tmp_path / "source"), 2
    dense = read_model(str(source))
    if place == "files":
        report = prune(source, tmp_path / "out", method="wanda")
    else:
        pruner = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)
        report = pruner.prune(dense, TOKENS.split(4))
        pruner.save_pretrained(dense, tmp_path / "out")
        dense = read_model(str(source))
    dense.save_pretrained(tmp_path / "dense")
    expected, found = (tensors_of(tmp_path / name) for name in ("dense", "out"))
    more = {name: tensor for name, tensor in expected.items() if f"layers.{last}." in name}
    copied = {
        name.replace(f"layers.{last}.", f"layers.{last + 1}."): tensor
        for name, tensor in more.items()
    }
    assert found.keys() == expected.keys() | (copied if is_read else {}).keys()
    assert not is_read or all(torch.equal(found[name], tensor) for name, tensor in copied.items())
    assert [*report.model["copied" if is_read else "lacks"]] == [f"model.layers.{last + 1}"]
    assert is_read or any(
        f"layers.{last + 1} (" in said and "they are quantized" in said for said in report.warnings
    )
    assert verify_checkpoint(tmp_path / "out", dense=source).num_equal


@pytest.mark.parametrize(
    ("entry", "is_refused"),
    [
        (r"re:.*layers\.[12]\..*", True),
        ("layers.1.mlp", True),
        (r"re:.*layers\.[0-9]+\.mlp", False),
        ("a.0.b", False),
        ("mtp.layers.0.fc", False),  # a module that is stored
        ("mtp.layers.1", True),
    ],
)
def test_patterns_of_numbered_layers_are_refused_if_layers_go(tmp_path, entry, is_refused):
    source = fp8_with_more_tokens(tmp_path / "source")
    other = {"mtp.layers.0.fc.weight": torch.ones(2, 2)}
    save_file(
        load_file(source / "model.safetensors") | other,
        source / "model.safetensors",
        {"format": "pt"},
    )
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] |= {
        "ignore": ["model.layers.1.mlp.gate"],
        "groups": {"one": {"targets": [entry]}},
    }
    (source / "config.json").write_text(json.dumps(config))
    with (
        pytest.raises(ValueError, match="names decoder layers by number in")
        if is_refused
        else nullcontext()
    ):
        prune(source, tmp_path / "out", **LAYERS)
    assert (tmp_path / "out").exists() != is_refused


@pytest.mark.parametrize(
    ("pattern", "nope", "tensor", "gone"),
    [
        ("channels:0.25", 8, "mlp.down_proj", 1),
        ("heads:0.5", 8, "kv_b_proj", 24),
        (
            "heads:0.5",
            12,
            "kv_b_proj",
            28,
        ),  # 56 rows in blocks of 16, 16, 16 and 8: two scales for each head
    ],
)
def test_scales_that_would_be_cut_are_refused(tmp_path, pattern, nope, tensor, gone):
    source = fp8_deepseek(tmp_path / "source", nope=nope)
    said = rf"{tensor}.weight_scale_inv stores one value for 16 rows or columns of .*, and groups of {gone} are removed"
    with pytest.raises(ValueError, match=said):
        prune(source, tmp_path / "out", pattern=pattern, method="wanda")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    prune(source, tmp_path / "out", pattern=pattern, method="wanda", dtype="bfloat16")


def test_packed_numbers_are_not_cut(tmp_path):
    pytest.importorskip("compressed_tensors")
    source = compressed_qwen3_moe(tmp_path / "source", "W4A16")
    with pytest.raises(
        ValueError, match="weight_shape is of a packed weight, which can't be cut: pass another"
    ):
        prune(source, tmp_path / "out", pattern="heads:0.5", method="wanda")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_heads_go_with_their_scales(tmp_path):
    """`kv_b_proj` has 32 rows for each head, two blocks of 16; `o_proj` has one block of columns."""
    source = fp8_deepseek(tmp_path / "source", nope=16)
    report = prune(source, tmp_path / "out", pattern="heads:0.5", method="wanda")
    before, after = load_file(source / "model.safetensors"), tensors_of(tmp_path / "out")
    for operator in report.operators:
        (head,), name = operator.groups_kept, operator.name
        assert torch.equal(raw(after[name]), raw(before[name])[:, 16 * head : 16 * head + 16])
        scales = f"{name.removesuffix('o_proj.weight')}kv_b_proj.weight_scale_inv"
        assert torch.equal(after[scales], before[scales][2 * head : 2 * head + 2])
    assert torch.isfinite(logits_of(tmp_path / "out")).all()
    assert verify_checkpoint(tmp_path / "out").num_operators == len(report.operators)


@pytest.mark.parametrize("pattern", ["2:4", "experts:0.25"])
def test_dtypes_are_those_of_the_files(tmp_path, pattern):
    source = tmp_path / "source"
    tiny_model("deepseek_v3").bfloat16().save_pretrained(source)
    before = load_file(source / "model.safetensors")
    exact = (
        "norm.weight",
        "gate.weight",
        "e_score_correction_bias",
        "self_attn.o_proj.weight",
        "tokens.weight",
    )
    for name in (name for name in before if name.endswith(exact)):
        before[name] = before[name].float() + 1e-5 * torch.randn(before[name].shape)
    save_file(before, source / "model.safetensors", {"format": "pt"})
    report = prune(source, tmp_path / "out", pattern=pattern)
    after = tensors_of(tmp_path / "out")
    assert all(tensor.dtype == before[name].dtype for name, tensor in after.items())
    kept = {
        f"{m.name.removesuffix('experts')}gate.weight": list(m.groups_kept) for m in report.mixtures
    }
    for name in (
        name
        for name in after
        if name.endswith(exact) and "o_proj" not in name and "bias" not in name
    ):
        assert torch.equal(after[name], before[name][kept.get(name, slice(None))]), name
    assert report.environment["written"] == "in the dtypes of the files"
    pruner = FistaPruner(FistaPruningConfig(pattern=pattern), progress=False)
    other = pruner.prune(model := AutoModelForCausalLM.from_pretrained(source), TOKENS.split(4))
    assert other.environment["written"] == report.environment["written"]
    pruner.save_pretrained(model, tmp_path / "in memory")
    assert same(tensors_of(tmp_path / "in memory"), after)
    pruner.save_pretrained(model.float(), tmp_path / "float32")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "float32").values()} == {torch.float32}
    prune(source, tmp_path / "asked", dtype="bfloat16", pattern=pattern)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "asked").values()} == {
        torch.bfloat16,
        torch.float32,
    }

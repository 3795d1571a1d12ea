"""What a run leaves as it is, is written as it is stored: bytes, dtypes, scales; a quantized model stays quantized."""

import json
from pathlib import Path

import pytest
import torch
from folder_files import bytes_of, tensors_of
from killed import interrupted_after
from quantized_models import VOCAB_SIZE, fp8_deepseek, mxfp4_gpt_oss
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig, PruningReport
from optimum_fista.evaluate.verification import verify_checkpoint
from optimum_fista.folder.stored_tensors import read_stored

TOKENS = torch.randint(0, VOCAB_SIZE, (8, 16), generator=torch.Generator().manual_seed(0))


def prune(source: Path, output: Path, dtype: str = "auto", **options) -> PruningReport:
    pruner = FistaPruner(FistaPruningConfig(**options), progress=False)
    return pruner.prune(str(source), TOKENS.split(4), output_dir=output, device="cpu", dtype=dtype)


def change_tensors(folder: Path, change) -> dict[str, Tensor]:
    """Let `change` change the tensors of a folder with one file; returns them."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


def settings_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def add_layer(folder: Path) -> None:
    """Add a quantized layer that predicts more tokens, and a list of modules that are not quantized."""

    def change(tensors: dict[str, Tensor]) -> None:
        last = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.2.")}
        tensors.update({name.replace("layers.2.", "layers.3."): tensor.clone() for name, tensor in last.items()})

    change_tensors(folder, change)
    config = json.loads((folder / "config.json").read_text())
    modules = [f"model.layers.{number}.mlp.gate" for number in (1, 2, 3)]
    config["quantization_config"]["modules_to_not_convert"] = ["lm_head", *modules]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("write", [fp8_deepseek, mxfp4_gpt_oss])
def test_experts_go_from_a_quantized_model_that_stays_quantized(tmp_path, write):
    source = write(tmp_path / "source")
    report = prune(source, tmp_path / "out", pattern="experts:0.25", expert_refit=False)
    before, after = load_file(source / "model.safetensors"), tensors_of(tmp_path / "out")
    for mixture in report.mixtures:
        kept, layer = mixture.groups_kept, mixture.name.removesuffix(".experts")
        for name in [name for name in after if name.startswith(layer)]:
            tail = name.removeprefix(f"{layer}.experts.")
            expert, dot, rest = tail.partition(".")
            if dot and expert.isdigit():
                assert torch.equal(raw(after[name]), raw(before[f"{layer}.experts.{kept[int(expert)]}.{rest}"]))
            elif len(after[name]) == 3:
                assert torch.equal(raw(after[name]), raw(before[name])[list(kept)])
            after.pop(name)
    assert all(torch.equal(raw(tensor), raw(before[name])) for name, tensor in after.items())
    assert settings_of(tmp_path / "out") == settings_of(source)
    assert "written as they are stored" in report.warnings[0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(loaded(TOKENS).logits).all()
    assert verify_checkpoint(tmp_path / "out", dense=source).num_equal
    # the model that Transformers loads is the one that a run writes in 16 bits
    prune(source, tmp_path / "dense", dtype="bfloat16", pattern="experts:0.25", expert_refit=False)
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(TOKENS).logits, loaded(TOKENS).logits)


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor [..., bytes]: NaN and -0.0 count."""
    return tensor.contiguous().view(*tensor.shape, 1).view(torch.uint8) if tensor.ndim else tensor


@pytest.mark.parametrize("write", [fp8_deepseek, mxfp4_gpt_oss])
def test_layers_go_from_a_quantized_model_that_stays_quantized(tmp_path, write):
    source = write(tmp_path / "source")
    if write is fp8_deepseek:
        add_layer(source)
    options = {"pattern": "layers:0.34", "residual_correction": 0.0}
    report, total = prune(source, tmp_path / "out", **options), 3 if write is fp8_deepseek else 2
    before, after = read_stored(source), read_stored(tmp_path / "out")
    stay = [*report.model["layers_kept"], 3]
    old = {f"layers.{new}.": f"layers.{number}." for new, number in enumerate(stay)}
    for name in after:
        number = next((number for number in old if number in name), "-")
        assert after[name].equals(before[name.replace(number, old.get(number, "-"))]), name
    gone = {f"model.layers.{number}." for number in {*range(total)} - {*stay}}
    assert len(after) == len([name for name in before if not name.startswith(tuple(gone))])
    if write is fp8_deepseek:
        assert report.model["copied"] == {"model.layers.3": len([n for n in before if "layers.3." in n])}
        gates = {f"model.layers.{new}.mlp.gate" for new, number in enumerate(stay) if number}
        assert {*settings_of(tmp_path / "out")["modules_to_not_convert"]} == gates | {"lm_head"}
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(TOKENS).logits).all()
    assert verify_checkpoint(tmp_path / "out", dense=source).num_equal
    with interrupted_after(0), pytest.raises(KeyboardInterrupt):
        prune(source, tmp_path / "again", **options)
    prune(source, tmp_path / "again", **options)
    names = [name for name in bytes_of(tmp_path / "out") if name.endswith(".safetensors")]
    assert all((tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes() for name in names)


def test_a_quantized_layer_that_is_not_loaded_is_named_if_the_result_is_not_quantized(tmp_path):
    source = fp8_deepseek(tmp_path / "source")
    add_layer(source)
    report = prune(source, tmp_path / "out", method="wanda")
    assert [*report.model["lacks"]] == ["model.layers.3"]
    assert any("model.layers.3 (" in warning and "they are quantized" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("entry", "is_refused"),
    [(r"re:.*layers\.[12]\..*", True), ("layers.1.mlp", True), (r"re:.*layers\.[0-9]+\.mlp", False), ("a.0.b", False)],
)
def test_patterns_of_numbered_layers_are_refused_if_layers_go(tmp_path, entry, is_refused):
    source = fp8_deepseek(tmp_path / "source")
    add_layer(source)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] |= {"ignore": ["model.layers.1.mlp.gate"], "groups": {"one": {"targets": [entry]}}}
    (source / "config.json").write_text(json.dumps(config))
    options = {"pattern": "layers:0.34", "residual_correction": 0.0}
    if is_refused:
        with pytest.raises(ValueError, match="names decoder layers by number in"):
            prune(source, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    else:
        prune(source, tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("pattern", "tensor", "span", "gone"),
    [("channels:0.25", "mlp.down_proj.weight_scale_inv", 16, 1), ("heads:0.5", "kv_b_proj.weight_scale_inv", 16, 24)],
)
def test_scales_that_would_be_cut_are_refused(tmp_path, pattern, tensor, span, gone):
    source = fp8_deepseek(tmp_path / "source")
    said = rf"{tensor} stores one value for {span} rows or columns of .*, and groups of {gone} are removed"
    with pytest.raises(ValueError, match=said):
        prune(source, tmp_path / "out", pattern=pattern, method="wanda")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    prune(source, tmp_path / "out", pattern=pattern, method="wanda", dtype="bfloat16")


def test_heads_go_without_their_scales(tmp_path):
    """`kv_b_proj` has 32 rows for each head, two blocks of 16; `o_proj` has one block of columns."""
    source = fp8_deepseek(tmp_path / "source", nope=16)
    report = prune(source, tmp_path / "out", pattern="heads:0.5", method="wanda")
    before, after = load_file(source / "model.safetensors"), tensors_of(tmp_path / "out")
    for operator in report.operators:
        (head,), name = operator.groups_kept, operator.name
        attention = name.removesuffix("o_proj.weight")
        assert torch.equal(raw(after[name]), raw(before[name])[:, 16 * head : 16 * head + 16])
        scales = f"{attention}kv_b_proj.weight_scale_inv"
        assert torch.equal(after[scales], before[scales][2 * head : 2 * head + 2])
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(TOKENS).logits).all()
    assert verify_checkpoint(tmp_path / "out").num_operators == len(report.operators)


@pytest.mark.parametrize("pattern", ["2:4", "experts:0.25"])
def test_dtypes_are_those_of_the_files(tmp_path, pattern):
    tiny_model("deepseek_v3").bfloat16().save_pretrained(tmp_path / "source")
    exact = (
        "norm.weight",
        "gate.weight",
        "e_score_correction_bias",
        "0.self_attn.o_proj.weight",
        "embed_tokens.weight",
    )

    def change(tensors: dict[str, Tensor]) -> None:
        for name in (name for name in tensors if name.endswith(exact)):
            tensors[name] = tensors[name].float() + 1e-5 * torch.randn(tensors[name].shape)

    before = change_tensors(tmp_path / "source", change)
    report = prune(tmp_path / "source", tmp_path / "out", pattern=pattern)
    after = tensors_of(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in after.items()}.items() <= {
        n: t.dtype for n, t in before.items()
    }.items()
    kept = {f"{m.name.removesuffix('experts')}gate.weight": list(m.groups_kept) for m in report.mixtures}
    for name in (name for name in after if name.endswith(exact) and "o_proj" not in name and "bias" not in name):
        assert torch.equal(after[name], before[name][kept.get(name, slice(None))]), name
    assert report.environment["written"] == "in the dtypes of the files"
    prune(tmp_path / "source", tmp_path / "asked", dtype="bfloat16", pattern=pattern)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "asked").values()} == {torch.bfloat16, torch.float32}

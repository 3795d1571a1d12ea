"""Models in files that are quantized: dequantized a decoder layer at a time, and pruned like the dequantized model."""

import json
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from _pytest.mark import ParameterSet
from folder_files import bytes_of, tensors_of
from pruning import same
from quantized_models import (
    VOCAB_SIZE,
    auto_fp8_qwen3_moe,
    compressed_qwen3_moe,
    fp8_deepseek,
    fp8_llava,
    mxfp4_gpt_oss,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from optimum_fista import FistaPruner, FistaPruningConfig, PruningReport, internals
from optimum_fista.cli.overview import overview_of
from optimum_fista.estimate.estimate import Estimate
from optimum_fista.evaluate.verification import verify_checkpoint
from optimum_fista.model.offload import stored_tensor
from optimum_fista.source.formats import compressed_tensors
from optimum_fista.source.loading import load_lazily, model_class, read_model

TOKENS = torch.randint(0, VOCAB_SIZE, (8, 16), generator=torch.Generator().manual_seed(0))


def prune(source: Path, output: Path, **options) -> PruningReport:
    pruner = FistaPruner(FistaPruningConfig(**options), progress=False)
    return pruner.prune(str(source), TOKENS.split(4), output_dir=output, device="cpu")


def content(folder: Path) -> dict:
    """The content of its `config.json`."""
    return json.loads((folder / "config.json").read_text())


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Call `change` with the tensors in the file of a model folder, and write them again."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


without_compressed_tensors = pytest.mark.skipif(
    find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed"
)


def write_compressed(preset: str) -> ParameterSet:
    write = partial(compressed_qwen3_moe, preset=preset)
    older = pytest.mark.skipif(
        internals.renames_without_casting(),
        reason="Transformers before 5.22 does not dequantize all of it",
    )
    return pytest.param(
        write, "CompressedTensorsConfig", id=preset, marks=[without_compressed_tensors, older]
    )


@pytest.mark.parametrize(
    ("write", "settings"),
    [
        (fp8_deepseek, "FineGrainedFP8Config"),
        (fp8_llava, "FineGrainedFP8Config"),
        (mxfp4_gpt_oss, "Mxfp4Config"),
        write_compressed("W4A16"),
        write_compressed("FP8_DYNAMIC"),
    ],
)
def test_a_quantized_source_is_pruned_as_the_model_that_transformers_dequantizes(
    tmp_path, write, settings
):
    source = write(tmp_path / "source")
    before = bytes_of(source)
    dequantizing = getattr(transformers, settings)(dequantize=True)
    automatic = model_class(AutoConfig.from_pretrained(source))
    dense = automatic.from_pretrained(source, quantization_config=dequantizing)
    # Transformers 5.17 would save it by those of the quantized model.
    internals.forget_weight_conversions(dense)
    dense.save_pretrained(tmp_path / "dense")

    report = prune(source, tmp_path / "pruned")
    prune(tmp_path / "dense", tmp_path / "expected")

    assert same(tensors_of(tmp_path / "pruned"), tensors_of(tmp_path / "expected"))
    result = content(tmp_path / "pruned")
    expected = content(tmp_path / "expected")
    expected.pop("base_model_ep_plan", None)  # of Transformers 5.17
    for config in (result, expected):
        del config["fista_pruning"]["origin"]  # the two sources are different files
    assert result == expected
    method = dequantizing.quant_method.value
    assert f"quantized by {method!r} are dequantized" in report.warnings[0]
    assert bytes_of(source) == before
    assert verify_checkpoint(tmp_path / "pruned", dense=source).num_equal


@without_compressed_tensors
def test_weights_in_nvfp4_are_multiplied_by_both_levels_of_scales(tmp_path):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import preset_name_to_scheme

    source = compressed_qwen3_moe(tmp_path / "source", "NVFP4A16")
    module = "model.layers.1.mlp.experts.2.up_proj."
    parts = {
        name.removeprefix(module): tensor
        for name, tensor in tensors_of(source).items()
        if name.startswith(module)
    }
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
    expected = compressor.decompress(parts, scheme)["weight"]

    model, *_ = load_lazily(str(source), tmp_path / "offload", device="cpu")

    gate_and_up = stored_tensor(model, "model.layers.1.mlp.experts.gate_up_proj")
    assert torch.equal(gate_and_up[2, 32:], expected)


def test_the_last_block_of_fp8_may_be_smaller(tmp_path):
    source = fp8_deepseek(tmp_path / "source", rotated=8)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    # One for each of 24 rows, which are a block of 16 and one of 8.
    scales = tensors[f"{name}_scale_inv"].repeat_interleave(16, 0).repeat_interleave(16, 1)[:24]
    expected = (tensors[name].float() * scales).bfloat16()

    lazy, *_ = load_lazily(str(source), tmp_path / "offload", device="cpu")
    in_memory = read_model(str(source))

    assert torch.equal(stored_tensor(lazy, name), expected)
    assert torch.equal(in_memory.get_parameter(name), expected)
    assert not [*(tmp_path / "offload").iterdir()]  # nothing is copied


def test_weights_in_the_layout_of_autofp8_are_multiplied_by_their_scales(tmp_path):
    source = auto_fp8_qwen3_moe(tmp_path / "source")
    stored = load_file(source / "model.safetensors")
    expected = {
        name: tensor
        if f"{name}_scale" not in stored
        else (tensor.float() * stored[f"{name}_scale"]).bfloat16()
        for name, tensor in stored.items()
        if not name.endswith("_scale")
    }

    report = prune(source, tmp_path / "out", sparsity=0.5, exclude=["*.q_proj"], method="magnitude")

    result = tensors_of(tmp_path / "out")
    assert result.keys() == expected.keys()
    for name, tensor in result.items():
        is_kept = tensor != 0
        assert torch.equal(tensor[is_kept], expected[name][is_kept]), name
    assert any("quantized by 'fp8' are dequantized" in warning for warning in report.warnings)
    assert "quantization_config" not in content(tmp_path / "out")
    assert torch.equal(read_model(str(source)).lm_head.weight, expected["lm_head.weight"])


def test_experts_in_the_layout_of_autofp8_are_removed_with_their_scales(tmp_path):
    source = auto_fp8_qwen3_moe(tmp_path / "source")
    before = load_file(source / "model.safetensors")

    report = prune(source, tmp_path / "out", pattern="experts:0.25", expert_refit=False)

    after = tensors_of(tmp_path / "out")
    for mixture in report.mixtures:
        for new, old in enumerate(mixture.groups_kept):
            for part in ("weight", "weight_scale", "input_scale"):
                name = f"{mixture.name}.{new}.up_proj.{part}"
                expected = before[f"{mixture.name}.{old}.up_proj.{part}"]
                assert torch.equal(after[name].float(), expected.float())
    settings = content(tmp_path / "out")["quantization_config"]
    assert settings == content(source)["quantization_config"]
    model = read_model(str(tmp_path / "out"))
    assert torch.isfinite(model(TOKENS).logits).all()


def test_with_one_text_experts_keep_their_quantization_and_a_warning_says_that_none_is_refitted(
    tmp_path,
):
    source = auto_fp8_qwen3_moe(tmp_path / "source")

    report = prune(source, tmp_path / "out", pattern="experts:0.25")

    settings = content(tmp_path / "out")["quantization_config"]
    assert settings == content(source)["quantization_config"]
    (warning,) = [text for text in report.warnings if "not refitted" in text]
    assert "because the calibration is one text" in warning


@pytest.mark.parametrize("write", [fp8_deepseek, auto_fp8_qwen3_moe])
@pytest.mark.parametrize("lazily", [True, False])
def test_a_weight_whose_scale_is_not_read_is_refused(tmp_path, write, lazily):
    source = write(tmp_path / "source")
    scale = {"model.layers.2.self_attn.o_proj.second_scale": torch.tensor(1e-3)}
    change_tensors(source, lambda tensors: tensors.update(scale))

    sentence = (
        r"model\.layers\.2\.self_attn\.o_proj\.weight has dtype F8_E4M3, and its scale "
        r"model\.layers\.2\.self_attn\.o_proj\.second_scale is not read"
    )
    options = {"device_map": {"": "disk"}, "offload_folder": tmp_path} if lazily else {}
    with pytest.raises(ValueError, match=sentence):
        read_model(str(source), **options)


@pytest.mark.skipif(
    internals.renames_without_casting(),
    reason="an older Transformers merges only experts that are stored alike",
)
@pytest.mark.parametrize("write", [fp8_deepseek, auto_fp8_qwen3_moe])
def test_one_expert_may_be_stored_without_quantization(tmp_path, write):
    source = write(tmp_path / "source")
    module = "model.layers.1.mlp.experts.2.up_proj"
    values = torch.randn(16, 32).bfloat16()

    def store_dense(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(module)]:
            del tensors[name]
        tensors[f"{module}.weight"] = values

    change_tensors(source, store_dense)

    in_memory = read_model(str(source))
    lazy, *_ = load_lazily(str(source), tmp_path / "offload", device="cpu")

    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(in_memory.get_parameter(name)[2, 16:], values)
    assert torch.equal(stored_tensor(lazy, name), in_memory.get_parameter(name))
    # The scales of the experts after it are their own.
    tensors = load_file(source / "model.safetensors")
    other = f"{module.replace('experts.2', 'experts.3')}.weight"
    scale = next(tensors[other + end] for end in ("_scale", "_scale_inv") if other + end in tensors)
    if scale.ndim:
        scale = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
    expected = (tensors[other].float() * scale).bfloat16()
    assert torch.equal(in_memory.get_parameter(name)[3, 16:], expected)


@pytest.fixture
def refusal(tmp_path):
    """`refusal(without, **settings)` is the message for a source with other quantization settings."""
    source = fp8_deepseek(tmp_path / "source")
    config = content(source)

    def message(*without: str, **settings) -> str:
        changed = config | {"quantization_config": config["quantization_config"] | settings}
        for key in without:
            del changed[key]
        (source / "config.json").write_text(json.dumps(changed))
        with pytest.raises((ValueError, ImportError)) as raised:
            prune(source, tmp_path / "pruned")
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
        return str(raised.value)

    return message


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_format_that_is_not_read_is_refused_with_what_reads_it(refusal, method):
    message = refusal(quant_method=method)

    assert f"quantized by {method!r}, which Transformers" in message
    assert "dequantize it with GPTQModel (gptqmodel.utils.model_dequant), save it" in message


def test_an_unknown_format_is_refused_by_name(refusal):
    assert "quantized by 'new', which Transformers" in refusal(quant_method="new")


def test_quantized_tensors_without_settings_are_refused(refusal):
    sentence = "dtype F8_E4M3, and config.json has no quantization_config"
    assert sentence in refusal("quantization_config")


def test_a_format_whose_package_is_missing_names_the_extra(refusal, monkeypatch):
    monkeypatch.setattr(compressed_tensors, "find_spec", lambda _: None)

    message = refusal(quant_method="compressed-tensors")

    assert "`pip install '.[compressed-tensors]'`" in message


def test_a_weight_without_its_scale_is_refused(refusal, tmp_path):
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    change_tensors(tmp_path / "source", lambda tensors: tensors.pop(f"{name}_scale_inv"))

    assert f"{name} has dtype F8_E4M3, and Transformers finds no scales for it: " in refusal()


def test_the_estimate_assumes_a_result_in_16_bits(tmp_path):
    source = fp8_deepseek(tmp_path / "source")

    estimate = Estimate(
        str(source),
        FistaPruningConfig(method="wanda"),
        num_samples=8,
        sequence_length=16,
        calibration="text",
        device="cpu",
    )
    prune(source, tmp_path / "pruned", method="wanda")

    assert overview_of(estimate)[0].endswith("decoder layers; dequantized from fp8")
    tensors = tensors_of(tmp_path / "pruned").items()
    parameters = [tensor for name, tensor in tensors if "e_score" not in name]  # a buffer
    assert estimate.weight_bytes == sum(tensor.nbytes for tensor in parameters)
    assert estimate.disk_bytes["fused experts, copied by the lazy reader"] == 0

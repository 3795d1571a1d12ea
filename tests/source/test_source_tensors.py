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
from tiny_llama import TEXT, tiny_llama, tiny_tokenizer, tiny_tokens
from tiny_models import tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig, PruningReport, atomic, recover
from optimum_fista.evaluate.verification import verify_checkpoint
from optimum_fista.records import MixtureReport
from optimum_fista.source.loading import read_model
from optimum_fista.source.stored_tensor import StoredTensor, read_stored

TOKENS = torch.randint(0, VOCAB_SIZE, (8, 16), generator=torch.Generator().manual_seed(0))
LAYERS = {"pattern": "layers:0.34", "residual_correction": 0.0}


def prune(
    source: Path, output: Path, dtype: str = "auto", batches=None, **options
) -> PruningReport:
    pruner = FistaPruner(FistaPruningConfig(**options), progress=False)
    if batches is None:
        batches = TOKENS.split(4)
    return pruner.prune(
        str(source), batches, output_dir=output, device="cpu", dtype=dtype, overwrite=True
    )


def add_tensors(folder: Path, more: dict[str, Tensor]) -> None:
    """Add tensors to the file of a model folder."""
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | more, folder / "model.safetensors", {"format": "pt"})


def logits_of(folder: Path) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits


def settings_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor [..., bytes]: NaN and -0.0 count."""
    return tensor.contiguous().unsqueeze(-1).view(torch.uint8)


def add_last_layer(folder: Path, number: int) -> Path:
    """Store the decoder layer of this number, the last one, once more: as a layer that predicts more tokens."""
    last = f"layers.{number}."
    more = {
        name.replace(last, f"layers.{number + 1}."): tensor.clone()
        for name, tensor in load_file(folder / "model.safetensors").items()
        if last in name
    }
    add_tensors(folder, more)
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
                "ernie4_5_moe",  # biases [1, experts]
                "longcat_flash",  # matrices of experts that return their inputs
            )
        ),
    ],
)
def test_stored_tensors_are_cut_like_those_of_the_model(tmp_path, family, options):
    has_no_tiny_model = family in ("ernie4_5_moe", "longcat_flash")
    model = family_model(family) if has_no_tiny_model else tiny_model(family)
    model.save_pretrained(tmp_path / "source")

    prune(tmp_path / "source", tmp_path / "stored", **options)
    prune(tmp_path / "source", tmp_path / "model", dtype="float32", **options)

    stored = read_stored(tmp_path / "stored")
    expected = read_stored(tmp_path / "model")
    assert stored.keys() == expected.keys()
    assert all(tensor.equals(expected[name]) for name, tensor in stored.items())


def bytes_without_experts(before: dict[str, Tensor], mixture: MixtureReport, name: str) -> Tensor:
    """The bytes of a mixture's tensor after experts were removed, of the tensors `before`.

    The experts that stay, `mixture.groups_kept`, are numbered again. Each has tensors of its own, such as
    "mlp.experts.3.up_proj.weight", or is a row of one tensor, as in the router.
    """
    number, _, rest = name.removeprefix(f"{mixture.name}.").partition(".")
    if number.isdigit():
        old_number = mixture.groups_kept[int(number)]
        return raw(before[f"{mixture.name}.{old_number}.{rest}"])
    return raw(before[name])[list(mixture.groups_kept)]


@pytest.mark.parametrize("form", ["fp8", "mxfp4", "W4A16", "NVFP4A16", "FP8_DYNAMIC"])
def test_experts_are_removed_from_a_quantized_model_that_stays_quantized(tmp_path, form):
    if form == "fp8":
        source = fp8_deepseek(tmp_path / "source")
    elif form == "mxfp4":
        source = mxfp4_gpt_oss(tmp_path / "source")
    else:  # presets of compressed-tensors
        pytest.importorskip("compressed_tensors")
        source = compressed_qwen3_moe(tmp_path / "source", form)
    options = {"pattern": "experts:0.25", "expert_refit": False}

    report = prune(source, tmp_path / "out", **options)
    prune(source, tmp_path / "dense", dtype="bfloat16", **options)

    before = load_file(source / "model.safetensors")
    after = tensors_of(tmp_path / "out")
    # Names of tensors that have lost experts, or are of an expert with a new number.
    of_mixtures = set()
    for mixture in report.mixtures:
        layer = mixture.name.removesuffix("experts")  # the router is beside the experts
        names = [name for name in after if name.startswith(layer) and "shared" not in name]
        for name in names:
            expected = bytes_without_experts(before, mixture, name)
            assert torch.equal(raw(after[name]), expected), name
        of_mixtures.update(names)
    assert of_mixtures
    others = after.keys() - of_mixtures
    assert all(torch.equal(raw(after[name]), raw(before[name])) for name in others)
    assert settings_of(tmp_path / "out") == settings_of(source)
    assert "written as they are stored" in report.warnings[0]
    assert verify_checkpoint(tmp_path / "out", dense=source).num_equal
    # Not by Transformers alone: it reads experts in NVFP4 without their second scale, and with FP8_DYNAMIC it rounds
    # activations.
    logits = read_model(str(tmp_path / "out"))(TOKENS).logits
    assert torch.equal(logits, logits_of(tmp_path / "dense"))


def test_the_number_of_texts_decides_whether_a_quantized_mixture_stays_quantized(tmp_path):
    """One text refits no expert, so nothing has to be dequantized; several texts may."""
    source = fp8_deepseek(tmp_path / "source")
    # A generator, which can be read only once.
    one_text = ({"input_ids": batch, "source": "a"} for batch in TOKENS.split(4))
    two_texts = [
        {"input_ids": batch, "source": name}
        for name, batch in zip(("a", "b"), TOKENS.split(4), strict=True)
    ]

    prune(source, tmp_path / "unrefitted", pattern="experts:0.25", expert_refit=False)
    prune(source, tmp_path / "one", batches=one_text, pattern="experts:0.25")
    prune(source, tmp_path / "two", batches=two_texts, pattern="experts:0.25")

    expected = tensors_of(tmp_path / "unrefitted")
    found = tensors_of(tmp_path / "one")
    assert found.keys() == expected.keys()
    assert all(torch.equal(raw(found[name]), raw(expected[name])) for name in expected)
    assert settings_of(tmp_path / "one") == settings_of(source)
    assert "quantization_config" not in json.loads((tmp_path / "two" / "config.json").read_text())


@pytest.mark.parametrize("write", [fp8_with_more_tokens, mxfp4_gpt_oss])
def test_layers_are_removed_from_a_quantized_model_that_stays_quantized(tmp_path, write):
    source = write(tmp_path / "source")
    predicts_more_tokens = write is fp8_with_more_tokens
    share = {"pattern": "layers:0.34" if predicts_more_tokens else "layers:0.5"}  # one of 3 or 2

    report = prune(source, tmp_path / "out", **(LAYERS | share))

    before = read_stored(source)
    after = read_stored(tmp_path / "out")
    stay = list(report.model["layers_kept"])
    if predicts_more_tokens:
        stay.append(3)
    old_names = {f"layers.{new}.": f"layers.{old}." for new, old in enumerate(stay)}
    for name, tensor in after.items():
        old_name = name
        for new, old in old_names.items():
            if new in name:
                old_name = name.replace(new, old)
                break
        assert tensor.equals(before[old_name]), name
    expected = [
        name
        for name in before
        if "layers." not in name or any(layer in name for layer in old_names.values())
    ]
    assert len(after) == len(expected)
    if predicts_more_tokens:
        assert [*report.model["copied"]] == ["model.layers.3"]
        gates = {f"model.layers.{new}.mlp.gate" for new, old in enumerate(stay) if old}
        assert {*settings_of(tmp_path / "out")["modules_to_not_convert"]} == gates | {"lm_head"}
    assert torch.isfinite(logits_of(tmp_path / "out")).all()
    assert verify_checkpoint(tmp_path / "out", dense=source).num_equal


def test_what_recover_makes_of_a_quantized_model_is_not_quantized(tmp_path):
    source = fp8_with_more_tokens(tmp_path / "source")
    tiny_tokenizer().save_pretrained(source)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    prune(source, tmp_path / "out", **LAYERS)

    recover(
        tmp_path / "out",
        source,
        tmp_path / "trained",
        calibration=str(text),
        tokens=256,
        sequence_length=16,
        held_out=4,
        device="cpu",
        progress=False,
    )

    expected = {  # the layer that predicts more tokens included
        name: tensor.dtype.replace("F8_E4M3", "BF16")
        for name, tensor in read_stored(tmp_path / "out").items()
        if "scale" not in name
    }
    trained = read_stored(tmp_path / "trained")
    assert {name: tensor.dtype for name, tensor in trained.items()} == expected


def require_same_tensors(folder: Path, expected: dict[str, StoredTensor]) -> None:
    tensors = read_stored(folder)
    assert tensors.keys() == expected.keys()
    assert all(tensor.equals(expected[name]) for name, tensor in tensors.items())


def test_a_full_disk_loses_no_stored_tensor(tmp_path, monkeypatch):
    source = fp8_with_more_tokens(tmp_path / "source")
    prune(source, tmp_path / "whole", **LAYERS)
    flush = atomic.flush

    def full(path: Path) -> None:
        if "model-00003-of-00003" in path.name:  # it has the layer that predicts more tokens
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        flush(path)

    with monkeypatch.context() as disk:
        disk.setattr(atomic, "flush", full)
        sentence = r"No space left on device.*: 3 of 3 decoder layers are finished"
        with pytest.raises(OSError, match=sentence):
            prune(source, tmp_path / "out", **LAYERS)
    prune(source, tmp_path / "out", **LAYERS)

    require_same_tensors(tmp_path / "out", read_stored(tmp_path / "whole"))


def test_a_killed_run_loses_no_stored_tensor(tmp_path):
    source = fp8_with_more_tokens(tmp_path / "source")
    prune(source, tmp_path / "whole", **LAYERS)

    with suppress(Killed), killed_at_write(12):
        prune(source, tmp_path / "out", **LAYERS)
    prune(source, tmp_path / "out", **LAYERS)

    require_same_tensors(tmp_path / "out", read_stored(tmp_path / "whole"))


@pytest.mark.parametrize("place", ["files", "memory"])
@pytest.mark.parametrize(
    ("preset", "is_read"), [("", True), ("FP8_DYNAMIC", True), ("W4A16", False)]
)
def test_a_quantized_layer_that_is_not_loaded_is_dequantized_or_named_if_the_result_is_dense(
    tmp_path, place, preset, is_read
):
    if preset:
        pytest.importorskip("compressed_tensors")
        source = add_last_layer(compressed_qwen3_moe(tmp_path / "source", preset), 1)
        last = 1
    else:
        source = fp8_with_more_tokens(tmp_path / "source")
        last = 2
    read_model(str(source)).save_pretrained(tmp_path / "dense")

    if place == "files":
        report = prune(source, tmp_path / "out", method="wanda")
    else:
        pruner = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)
        model = read_model(str(source))
        report = pruner.prune(model, TOKENS.split(4))
        pruner.save_pretrained(model, tmp_path / "out")

    dense = tensors_of(tmp_path / "dense")
    result = tensors_of(tmp_path / "out")
    further_layer = f"model.layers.{last + 1}"
    copies = {
        name.replace(f"model.layers.{last}.", f"{further_layer}."): tensor
        for name, tensor in dense.items()
        if f"layers.{last}." in name
    }
    if is_read:
        assert result.keys() == dense.keys() | copies.keys()
        assert all(torch.equal(result[name], tensor) for name, tensor in copies.items())
        assert [*report.model["copied"]] == [further_layer]
    else:
        assert result.keys() == dense.keys()
        assert [*report.model["lacks"]] == [further_layer]
        warnings = [warning for warning in report.warnings if f"{further_layer} (" in warning]
        assert any("they are quantized" in warning for warning in warnings)
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
    add_tensors(source, {"mtp.layers.0.fc.weight": torch.ones(2, 2)})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] |= {
        "ignore": ["model.layers.1.mlp.gate"],
        "groups": {"one": {"targets": [entry]}},
    }
    (source / "config.json").write_text(json.dumps(config))

    refusal = pytest.raises(ValueError, match="names decoder layers by number in")
    with refusal if is_refused else nullcontext():
        prune(source, tmp_path / "out", **LAYERS)

    assert (tmp_path / "out").exists() != is_refused


@pytest.mark.parametrize(
    ("pattern", "nope", "tensor", "gone"),
    [
        ("channels:0.25", 8, "mlp.down_proj", 1),
        ("heads:0.5", 8, "kv_b_proj", 24),
        # 56 rows in blocks of 16, 16, 16 and 8: two scales for each head
        (
            "heads:0.5",
            12,
            "kv_b_proj",
            28,
        ),
    ],
)
def test_scales_that_would_be_cut_are_refused(tmp_path, pattern, nope, tensor, gone):
    source = fp8_deepseek(tmp_path / "source", nope=nope)

    sentence = (
        rf"{tensor}.weight_scale_inv stores one value for 16 rows or columns of .*, "
        rf"and groups of {gone} are removed"
    )
    with pytest.raises(ValueError, match=sentence):
        prune(source, tmp_path / "out", pattern=pattern, method="wanda")

    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    prune(source, tmp_path / "out", pattern=pattern, method="wanda", dtype="bfloat16")


def test_cutting_weights_of_packed_numbers_is_refused(tmp_path):
    pytest.importorskip("compressed_tensors")
    source = compressed_qwen3_moe(tmp_path / "source", "W4A16")

    with pytest.raises(
        ValueError, match="weight_shape is of a packed weight, which can't be cut: pass a pattern"
    ):
        prune(source, tmp_path / "out", pattern="heads:0.5", method="wanda")

    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_heads_are_removed_with_their_scales(tmp_path):
    """`kv_b_proj` has 32 rows for each head, two blocks of 16; `o_proj` has one block of columns."""
    source = fp8_deepseek(tmp_path / "source", nope=16)

    report = prune(source, tmp_path / "out", pattern="heads:0.5", method="wanda")

    before = load_file(source / "model.safetensors")
    after = tensors_of(tmp_path / "out")
    for operator in report.operators:
        (head,) = operator.groups_kept
        columns = slice(16 * head, 16 * head + 16)
        assert torch.equal(raw(after[operator.name]), raw(before[operator.name])[:, columns])
        attention = operator.name.removesuffix("o_proj.weight")
        scales = f"{attention}kv_b_proj.weight_scale_inv"
        assert torch.equal(after[scales], before[scales][2 * head : 2 * head + 2])
    assert torch.isfinite(logits_of(tmp_path / "out")).all()
    assert verify_checkpoint(tmp_path / "out").num_operators == len(report.operators)


# Tensors that no run changes, and the embedding.
UNCHANGED = ("norm.weight", "gate.weight", "tokens.weight")


@pytest.fixture
def mixed_folder(tmp_path) -> Path:
    """A model in bfloat16 with some tensors in float32, whose values bfloat16 does not have."""
    source = tmp_path / "source"
    tiny_model("deepseek_v3").bfloat16().save_pretrained(source)
    in_float32 = (*UNCHANGED, "e_score_correction_bias", "self_attn.o_proj.weight")
    exact = {
        name: tensor.float() + 1e-5 * torch.randn(tensor.shape)
        for name, tensor in load_file(source / "model.safetensors").items()
        if name.endswith(in_float32)
    }
    add_tensors(source, exact)
    return source


@pytest.mark.parametrize("pattern", ["2:4", "experts:0.25"])
def test_dtypes_and_values_are_those_of_the_files(tmp_path, mixed_folder, pattern):
    before = load_file(mixed_folder / "model.safetensors")

    report = prune(mixed_folder, tmp_path / "out", pattern=pattern)

    after = tensors_of(tmp_path / "out")
    assert all(tensor.dtype == before[name].dtype for name, tensor in after.items())
    assert report.environment["written"] == "in the dtypes of the files"
    experts_kept = {
        f"{mixture.name.removesuffix('experts')}gate.weight": list(mixture.groups_kept)
        for mixture in report.mixtures
    }
    for name, tensor in after.items():
        if name.endswith(UNCHANGED):
            rows = experts_kept.get(name, slice(None))
            assert torch.equal(tensor, before[name][rows]), name


@pytest.mark.parametrize("pattern", ["2:4", "experts:0.25"])
def test_a_model_in_memory_is_saved_in_the_dtypes_of_its_files(tmp_path, mixed_folder, pattern):
    expected = prune(mixed_folder, tmp_path / "out", pattern=pattern)
    pruner = FistaPruner(FistaPruningConfig(pattern=pattern), progress=False)
    model = AutoModelForCausalLM.from_pretrained(mixed_folder)

    report = pruner.prune(model, TOKENS.split(4))
    pruner.save_pretrained(model, tmp_path / "in memory")
    pruner.save_pretrained(model.float(), tmp_path / "float32")

    assert report.environment["written"] == expected.environment["written"]
    assert same(tensors_of(tmp_path / "in memory"), tensors_of(tmp_path / "out"))
    dtypes = {tensor.dtype for tensor in tensors_of(tmp_path / "float32").values()}
    assert dtypes == {torch.float32}


def test_a_dtype_that_is_asked_for_is_written_except_where_the_class_needs_float32(
    tmp_path, mixed_folder
):
    prune(mixed_folder, tmp_path / "out", dtype="bfloat16", pattern="2:4")

    tensors = tensors_of(tmp_path / "out")
    in_float32 = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    # Transformers keeps the biases of this model's routers in float32, whatever dtype it is loaded in.
    assert any(name.endswith("e_score_correction_bias") for name in in_float32)
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.1.self_attn.o_proj.weight"].dtype == torch.bfloat16


def test_an_unknown_tensor_of_a_decoder_layer_is_left_out_if_it_would_have_to_be_cut(tmp_path):
    source = tmp_path / "source"
    model = tiny_llama()
    width = model.config.intermediate_size
    model.save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.scale_of_channels"] = torch.ones(width)
    tensors["model.layers.0.mlp.other"] = torch.ones(3)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    pruner = FistaPruner(FistaPruningConfig(pattern="channels:0.5"), progress=False)

    report = pruner.prune(source, tiny_tokens().split(4), output_dir=tmp_path / "out")

    stored = tensors_of(tmp_path / "out")
    assert "model.layers.0.mlp.other" in stored
    assert "model.layers.0.mlp.scale_of_channels" not in stored
    assert (
        "parts that decoder layers lose"
        in report.model["lacks"]["model.layers.0.mlp.scale_of_channels"]
    )

"""Models whose weights stay packed in memory: the same logits and texts, in less memory."""

import warnings

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_fista.folder.packed_folder import pack_folder
from optimum_fista.packed.linear import PackedLinear
from optimum_fista.packed.quantizer import FistaPackedConfig

IDS = torch.arange(24).view(2, 12)
NUM_PACKED = {
    "llama": 14,
    "gpt2": 8,
    "mixtral": 8,  # fused experts become dense
    "deepseek_v3": 10 + 2 * 3,  # with shared experts
    "gpt_oss": 8,
}


def load(folder, runtime="packed", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the kernels may not be compiled
        config = FistaPackedConfig(runtime=runtime)
        options = {"dtype": torch.float32} | options
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)


def logits(model):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(IDS).logits


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, counted once if they are shared."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in tensors if t.numel()}.values())


@pytest.mark.parametrize("family", NUM_PACKED)
def test_the_same_logits_and_text(family, pruned, tmp_path, caplog):
    pack_folder(pruned(family), tmp_path / "packed")
    expected = AutoModelForCausalLM.from_pretrained(pruned(family), dtype=torch.float32)
    caplog.clear()
    model = load(tmp_path / "packed")
    assert not [
        record
        for record in caplog.records
        if "UNEXPECTED" in record.message or "MISSING" in record.message
    ]
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == NUM_PACKED[family]
    assert torch.allclose(logits(model), logits(expected), atol=1e-4)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(IDS, **options), expected.generate(IDS, **options))
    with pytest.raises(ValueError, match=r"not serializable|not support"):
        model.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("family", ["gpt2", "gpt_oss"])
def test_sixteen_bits(family, pruned, tmp_path):
    pack_folder(pruned(family), tmp_path / "packed")
    expected = AutoModelForCausalLM.from_pretrained(pruned(family), dtype=torch.bfloat16)
    model = load(tmp_path / "packed", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert torch.allclose(logits(model), logits(expected), atol=0.15, rtol=0.05)


@pytest.mark.parametrize("family", ["gpt2", "deepseek_v3"])
def test_packed_weights_are_nowhere_dense(family, pruned, tmp_path):
    pack_folder(pruned(family), tmp_path / "packed")
    dense, packed = load(tmp_path / "packed", "dense"), load(tmp_path / "packed")
    layers = [m for m in packed.modules() if isinstance(m, PackedLinear)]
    replaced = sum(m.in_features * m.out_features for m in layers) * 4
    kept = sum(m.weight_values.nbytes + m.weight_mask.nbytes for m in layers)
    rows = sum(m.weight_starts.nbytes for m in layers)
    rows += sum({m.weight_layout.data_ptr(): m.weight_layout.nbytes for m in layers}.values())
    assert weight_bytes(packed) == weight_bytes(dense) - replaced + kept + rows
    assert kept < 0.75 * replaced  # rows this short are padded to words of 64 weights


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_oss"])
def test_device_maps(family, place, pruned, tmp_path):
    """What Accelerate offloads are parameters; packed weights are buffers, which stay in memory."""
    pack_folder(pruned(family), tmp_path / "packed")
    expected = AutoModelForCausalLM.from_pretrained(pruned(family), dtype=torch.float32)
    model = load(tmp_path / "packed", device_map={"": place}, offload_folder=tmp_path / "offload")
    assert torch.allclose(logits(model), logits(expected), atol=1e-4)
    assert torch.allclose(logits(model), logits(expected), atol=1e-4)
    assert {p.device.type for p in model.parameters()} == {"meta" if place == "disk" else "cpu"}
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(IDS, **options), expected.generate(IDS, **options))


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_hooks_of_accelerate(offload, offload_buffers, pruned, tmp_path):
    pack_folder(pruned("gpt2"), tmp_path / "packed")
    expected = AutoModelForCausalLM.from_pretrained(pruned("gpt2"), dtype=torch.float32)
    model = load(tmp_path / "packed")
    options = {"execution_device": torch.device("cpu"), "offload_buffers": offload_buffers}
    if offload == "cpu":
        cpu_offload(model, **options)
    else:
        disk_offload(model, tmp_path / "offload", **options)
    for _ in range(2):
        assert torch.allclose(logits(model), logits(expected), atol=1e-4)
    masks = {m.weight_mask.device.type for m in model.modules() if isinstance(m, PackedLinear)}
    assert masks == {"meta" if offload_buffers else "cpu"}


def test_packed_weights_on_disk_are_refused(pruned, tmp_path):
    pack_folder(pruned("llama"), tmp_path / "packed")
    options = {
        "device_map": {"": "disk"},
        "offload_folder": tmp_path / "offload",
        "offload_buffers": True,
    }
    with pytest.raises(
        ValueError, match=r"offload_buffers=True leaves the packed weight of model\.layers\.0\."
    ):
        load(tmp_path / "packed", **options)
    assert logits(load(tmp_path / "packed", "dense", **options)).isfinite().all()

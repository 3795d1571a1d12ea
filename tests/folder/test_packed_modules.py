"""Models whose weights stay packed in memory: the same logits and texts, in less memory."""

import warnings

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_fista.folder.packed_folder import pack_folder
from optimum_fista.folder.packed_loading import FistaPackedConfig
from optimum_fista.folder.packed_modules import _execution_device
from optimum_fista.packed.linear import PackedLinear

IDS = torch.arange(24).view(2, 12)
NUM_PACKED = {
    "llama": 14,
    "gpt2": 8,
    "mixtral": 8 + 2 * 2 * 4,
    "qwen3_moe": 8 + 2 * 2 * 4,
    "deepseek_v3": 10 + 2 * (2 * 4 + 3),
    "gpt_oss": 8 + 2 * 2 * 4,
    "granitemoe": 8 + 2 * 2 * 4,
    "llama4_text": 8 + 2 * 3,  # its experts become dense
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


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("family", NUM_PACKED)
def test_the_same_logits_and_text(family, pattern, pruned, tmp_path, caplog):
    pack_folder(pruned(family, pattern), tmp_path / "packed")
    expected = AutoModelForCausalLM.from_pretrained(pruned(family, pattern), dtype=torch.float32)
    caplog.clear()
    model = load(tmp_path / "packed")
    assert not [record for record in caplog.records if "UNEXPECTED" in record.message or "MISSING" in record.message]
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


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "deepseek_v3", "gpt_oss"])
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


@pytest.mark.parametrize("exclude", [("*.down_proj",), ("*.up_proj",), ("*.layers.0.*",), ("*.experts.*",)])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_what_was_left_dense_stays_dense(family, exclude, pruned, tmp_path):
    folder = pruned(family, exclude=exclude)
    pack_folder(folder, tmp_path / "packed")
    model = load(tmp_path / "packed")
    experts = [m for name, m in model.named_modules() if name.endswith("experts")]
    held = [isinstance(tensor, nn.ModuleList) for e in experts for tensor in (e.gate_up_proj, e.down_proj)]
    packed = {
        "*.down_proj": [True, False] * 2,
        "*.up_proj": [family == "gpt_oss", True] * 2,  # of Mixtral half a matrix is packed
        "*.layers.0.*": [False] * 2 + [True] * 2,
        "*.experts.*": [False] * 4,
    }
    assert held == packed[exclude[0]]
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.allclose(logits(model), logits(expected), atol=1e-4)


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
@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_hooks_of_accelerate(family, offload, offload_buffers, pruned, tmp_path):
    pack_folder(pruned(family, "2:4"), tmp_path / "packed")
    expected = AutoModelForCausalLM.from_pretrained(pruned(family, "2:4"), dtype=torch.float32)
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
    options = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offload", "offload_buffers": True}
    with pytest.raises(ValueError, match=r"offload_buffers=True leaves the packed weight of model\.layers\.0\."):
        load(tmp_path / "packed", **options)
    assert logits(load(tmp_path / "packed", "dense", **options)).isfinite().all()


def test_other_implementations_of_experts_stop(pruned, tmp_path):
    """They expect tensors; the one for packed experts can be set again."""
    pack_folder(pruned("mixtral"), tmp_path / "packed")
    model = load(tmp_path / "packed")
    before = logits(model)
    model.set_experts_implementation("eager")
    with pytest.raises(ValueError, match=r"experts_implementation='eager' can't compute .* 'fista_packed'"):
        logits(model)
    model.set_experts_implementation("fista_packed")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("device_map", "place"),
    [
        ({"": "disk"}, "cpu"),
        ({"model.layers.0": "cuda:0", "model.layers.1": "cpu", "lm_head": "disk"}, "cuda:0"),
        ({"model.layers.0": "cuda:1", "model.layers.1": "cuda:0"}, "cuda:0"),
        ({"model.layers.1.mlp": "cuda:3", "model.layers.1": "cuda:0"}, "cuda:3"),
        ({}, "cpu"),
    ],
)
def test_experts_go_where_their_module_computes(device_map, place):
    model = nn.Linear(1, 1)
    model.hf_device_map, model.device = device_map, torch.device("cpu")
    assert _execution_device(model, "model.layers.1.mlp.experts.down_proj") == torch.device(place)

"""Packed folders are loaded as ordinary dense models, in any dtype, on any device map, and train and save as such."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_fista.folder.packed_folder import pack_folder
from optimum_fista.packed.quantizer import FistaPackedConfig

IDS = torch.arange(24).view(2, 12)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss", "deepseek_v3"])
def test_a_packed_folder_gives_the_same_logits_in_the_dtype_that_is_asked_for(
    family, dtype, pruned, tmp_path, caplog
):
    pack_folder(pruned(family), tmp_path / "packed")
    expected = AutoModelForCausalLM.from_pretrained(pruned(family), dtype=dtype)
    caplog.clear()

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=dtype)

    # Transformers logs names of weights that a class does not know (UNEXPECTED), or does not find (MISSING).
    messages = [record.message for record in caplog.records]
    assert not [text for text in messages if "UNEXPECTED" in text or "MISSING" in text]
    assert {p.dtype for p in model.parameters()} == {p.dtype for p in expected.parameters()}
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_oss"])
def test_a_packed_folder_gives_the_same_logits_on_any_device_map(family, place, pruned, tmp_path):
    pack_folder(pruned(family), tmp_path / "packed")
    expected = AutoModelForCausalLM.from_pretrained(pruned(family))

    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", device_map={"": place}, offload_folder=tmp_path / "offload"
    )

    assert torch.allclose(logits(model), logits(expected), atol=1e-4)


def test_a_loaded_model_can_be_trained(pruned, tmp_path):
    pack_folder(pruned("llama"), tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")

    model(IDS, labels=IDS).loss.backward()

    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.grad.abs().sum() > 0


def test_other_runtimes_are_refused():
    with pytest.raises(ValueError, match="runtime='packed': a packed folder is loaded as a dense"):
        FistaPackedConfig(runtime="packed")

"""Pruning mixtures of experts: budgets, under-calibrated experts, saving, streaming, offloading, rollback."""

import json

import pytest
import torch
from accelerate import cpu_offload
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved_models import prune_and_save
from tiny_models import MOE_FAMILIES, VOCAB_SIZE, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.evaluate.verification import VerificationError, verify_checkpoint
from optimum_fista.prune import loop

STREAMED = [family for family in MOE_FAMILIES if family != "llama4_text"]
"""Transformers can't run Llama-4 offloaded to disk: its complex position embeddings stay on the meta device."""


pytestmark = pytest.mark.usefixtures("enough_tokens")


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (8, 24), generator=torch.Generator().manual_seed(1))


def pruner(**options) -> FistaPruner:
    return FistaPruner(FistaPruningConfig(**options), progress=False)


def same_weights(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    state = model.state_dict()
    expected = other.state_dict()
    return all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"pattern": "2:4"}])
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_a_saved_mixture_is_verified_and_reloaded_weight_for_weight(
    family, options, tokens, tmp_path
):
    model = tiny_model(family)
    report = prune_and_save(model, tmp_path / "out", tokens.split(4), **options).report

    found = verify_checkpoint(tmp_path / "out")

    experts = sum(o.shape[0] * o.shape[1] for o in report.operators if ".experts." in o.name)
    fused = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 3)
    assert experts == fused
    assert found.num_operators == len(report.operators)
    assert abs(found.num_zeros - found.num_weights / 2) <= 1
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model)
    if family == "mixtral":
        with safe_open(tmp_path / "out" / "fista" / "masks.safetensors", "pt") as masks:
            assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in masks.keys()  # noqa: SIM118


@pytest.mark.parametrize("family", STREAMED)
def test_streaming_a_mixture_gives_what_pruning_in_memory_gives(family, tokens, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "in")
    prune_and_save(model, tmp_path / "memory", tokens.split(4))

    pruner().prune(tmp_path / "in", tokens.split(4), output_dir=tmp_path / "streamed")

    verify_checkpoint(tmp_path / "streamed")
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "streamed"), model)
    masks = [
        load_file(tmp_path / kind / "fista" / "masks.safetensors")
        for kind in ("memory", "streamed")
    ]
    assert masks[0].keys() == masks[1].keys()
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


def offloaded_mixture(family, place, folder) -> PreTrainedModel:
    """A tiny mixture whose weights Accelerate keeps on the disk, in `folder`, or in a dictionary ("cpu")."""
    model = tiny_model(family)
    if place == "cpu":
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        cpu_offload(model, execution_device="cpu", state_dict=state)
        return model
    model.save_pretrained(folder / "in")
    in_memory = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    places = dict.fromkeys(in_memory, "cpu") | {"model.layers": "disk"}
    return AutoModelForCausalLM.from_pretrained(
        folder / "in", device_map=places, offload_folder=folder / "offload"
    )


@pytest.mark.parametrize(("family", "place"), [("mixtral", "disk"), ("gpt_oss", "cpu")])
def test_an_offloaded_mixture_becomes_what_it_becomes_in_memory(family, place, tokens, tmp_path):
    expected = tiny_model(family)
    pruner().prune(expected, tokens.split(4))
    model = offloaded_mixture(family, place, tmp_path)
    of_offloaded = pruner()

    of_offloaded.prune(model, tokens.split(4))

    with torch.no_grad():
        assert torch.allclose(model(tokens[:2]).logits, expected(tokens[:2]).logits, atol=1e-5)
    if place == "disk":
        of_offloaded.save_pretrained(model, tmp_path / "out")
        verify_checkpoint(tmp_path / "out")
        assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), expected)


def test_experts_with_too_few_tokens_are_pruned_by_magnitude_and_reported(tokens, monkeypatch):
    report = pruner(method="sparsegpt").prune(tiny_model("mixtral"), tokens.split(4))
    counts = sorted(o.num_tokens for o in report.operators if ".experts." in o.name)
    monkeypatch.setattr(loop, "UNDER_CALIBRATED_TOKENS", counts[12])

    report = pruner(method="sparsegpt").prune(tiny_model("mixtral"), tokens.split(4))

    few = [o for o in report.operators if o.method == "magnitude"]

    assert few
    assert all(".experts." in o.name and o.num_tokens < counts[12] for o in few)
    assert all(f"{o.num_tokens} calibration tokens" in o.message for o in few)
    assert any(
        w.startswith(f"{len(few)} of {len(report.operators)} operators") for w in report.warnings
    )


def test_zeros_shared_by_gradients_are_the_same_for_all_experts_of_a_kind(tokens):
    model = tiny_model("mixtral")
    model.config.output_router_logits = True  # its loss would ask routers that do not run
    batches = [*tokens.split(4), {"input_ids": tokens[:4], "held_out": True}]

    report = pruner(sparsity=0.5).prune(model, batches)

    totals = report.totals
    assert abs(totals["num_zeros"] - totals["num_weights"] / 2) <= 1
    assert report.warnings == []
    sparsities = {o.name: o.target_sparsity for o in report.operators if "down_proj" in o.name}
    for layer in range(2):
        found = [value for name, value in sparsities.items() if f"layers.{layer}." in name]
        # experts have 32 x 48 weights, and a zero more or less is rounding
        assert max(found) - min(found) <= 1 / (32 * 48) + 1e-9
    assert len({round(value, 3) for value in sparsities.values()}) > 1


def test_verify_names_the_part_of_a_fused_tensor_with_a_weight_outside_its_mask(tokens, tmp_path):
    prune_and_save(tiny_model("gpt_oss"), tmp_path / "out", tokens.split(4), pattern="2:4")
    names = [
        o["name"]
        for o in json.loads((tmp_path / "out" / "fista" / "report.json").read_text())["operators"]
    ]
    assert "model.layers.1.mlp.experts.gate_up_proj[2, :, 1:96:2]" in names
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    part = tensors["model.layers.1.mlp.experts.gate_up_proj"][2, :, 1:96:2]
    place = (part == 0).nonzero()[0]
    part[place[0], place[1]] = 1.0
    save_file(tensors, file, metadata={"format": "pt"})

    with pytest.raises(
        VerificationError, match=r"gate_up_proj\[2, :, 1:96:2\] has 1 weights outside its mask"
    ):
        verify_checkpoint(tmp_path / "out")

"""Models that Accelerate offloads are pruned as the same models in memory, where they are kept."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import OffloadedWeightsLoader
from folder_files import bytes_of
from tiny_llama import tiny_llama
from transformers import AutoModelForCausalLM
from untouched import Untouched, weights_of

from optimum_fista import FistaPruner, FistaPruningConfig


class Copies(dict):
    """Weights that are handed out as copies, as a GPU would get them: writing to one changes nothing here."""

    def __getitem__(self, key):
        return super().__getitem__(key).clone()


@pytest.fixture(params=["lazy reader", "disk", "cpu", "cpu, copies", "half of it on disk"])
def offloaded(request, tiny_folder, tmp_path):
    folder = tmp_path / "offload"
    if request.param == "lazy reader":
        return AutoModelForCausalLM.from_pretrained(
            tiny_folder, device_map={"": "disk"}, offload_folder=folder
        )
    if request.param == "half of it on disk":
        places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        return AutoModelForCausalLM.from_pretrained(
            tiny_folder, device_map=places, offload_folder=folder
        )
    model = tiny_llama()
    if request.param == "disk":
        return disk_offload(model, folder, execution_device=torch.device("cpu"))
    state = Copies(model.state_dict()) if request.param == "cpu, copies" else None
    return cpu_offload(model, execution_device=torch.device("cpu"), state_dict=state)


CONFIGS = [
    FistaPruningConfig(0.5),
    FistaPruningConfig(0.6, method="wanda", error_correction="intra"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
def test_offloaded_models_become_what_they_become_in_memory(offloaded, config, tokens, tiny_folder):
    checkpoint = bytes_of(tiny_folder)
    expected = tiny_llama()
    in_memory = FistaPruner(config, progress=False).prune(expected, tokens.split(4))

    report = FistaPruner(config, progress=False).prune(offloaded, tokens.split(4))

    assert report.totals["num_zeros"] == in_memory.totals["num_zeros"] > 7000  # of 15,360
    found = weights_of(offloaded)
    for name, parameter in expected.named_parameters():
        assert torch.equal(found[name], parameter), name
    with torch.no_grad():
        logits = offloaded(tokens[:2]).logits
        assert torch.allclose(logits, expected(tokens[:2]).logits, atol=1e-5)
    assert bytes_of(tiny_folder) == checkpoint
    assert all(
        h.offload for m in offloaded.modules() for h in hooks_of(m) if h.weights_map is not None
    )


def hooks_of(module) -> list[AlignDevicesHook]:
    hook = getattr(module, "_hf_hook", None)
    return [h for h in getattr(hook, "hooks", [hook]) if isinstance(h, AlignDevicesHook)]


def test_a_run_that_fails_leaves_offloaded_weights_as_they_were(offloaded, tokens, monkeypatch):
    originals = FistaPruningConfig(method="wanda").create_method("").prune
    calls = []

    def prune(self, problem, pattern):
        calls.append(problem.name)
        if len(calls) == 10:  # in the second decoder layer
            raise KeyboardInterrupt
        return originals(problem, pattern)

    monkeypatch.setattr("optimum_fista.solve.methods.wanda.Wanda.prune", prune)

    with Untouched(offloaded), pytest.raises(KeyboardInterrupt):
        FistaPruner(FistaPruningConfig(method="wanda"), progress=False).prune(
            offloaded, tokens.split(4)
        )

    with torch.no_grad():
        assert torch.allclose(
            offloaded(tokens[:2]).logits, tiny_llama()(tokens[:2]).logits, atol=1e-5
        )


def test_a_saved_offloaded_model_reloads_with_all_its_pruned_weights(offloaded, tmp_path, tokens):
    pruner = FistaPruner(FistaPruningConfig(0.5), progress=False)
    pruner.prune(offloaded, tokens.split(4))
    places = getattr(offloaded, "hf_device_map", None)

    pruner.save_pretrained(offloaded, tmp_path / "pruned")

    assert getattr(offloaded, "hf_device_map", None) == places
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    found = weights_of(offloaded)
    assert all(
        torch.equal(found[name], parameter) for name, parameter in reloaded.named_parameters()
    )
    assert int(sum((p == 0).sum() for n, p in reloaded.named_parameters() if "_proj" in n)) == 7680


def test_damaged_offloaded_weights_are_named(tiny_folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, device_map={"": "disk"})
    loader = model.model.layers[1].mlp.up_proj._hf_hook.weights_map.dataset
    assert isinstance(loader, OffloadedWeightsLoader)
    loader.state_dict["model.layers.1.mlp.up_proj.weight"] = torch.full((48, 32), float("nan"))

    with pytest.raises(
        ValueError, match=r"weight of model\.layers\.1\.mlp\.up_proj holds NaN or Inf"
    ):
        FistaPruner(FistaPruningConfig(method="wanda"), progress=False).prune(
            model, tokens.split(4)
        )

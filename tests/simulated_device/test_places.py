"""Models whose weights, activations and computation are in several places are pruned as on the CPU."""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from simulated_device import backend
from simulated_device.places import require_the_same
from tiny_llama import save_tiny_folder, tiny_llama, tiny_tokens
from transformers import AutoModelForCausalLM
from untouched import weights_of

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.model.activation_store import ActivationStore

ON_BOTH = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0}
ON_BOTH |= {"model.layers.1": 1, "model.norm": 1, "lm_head": 1}
IN_THREE_PLACES = ON_BOTH | {"model.layers.1": "cpu", "lm_head": "cpu"}


def batches(padded: bool = False) -> list[dict[str, torch.Tensor]]:
    mask = torch.ones(8, 16, dtype=torch.int64)
    if padded:
        mask[1, 11:] = mask[4, :3] = 0
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(tiny_tokens().split(4), mask.split(4), strict=True)]


def on(places: dict[str, int | str]):
    """A model with its modules on the devices of these numbers; those in CPU memory compute on device 0."""
    named = {name: torch.device("simulated", place) if place != "cpu" else "cpu" for name, place in places.items()}
    return dispatch_model(tiny_llama(), named, main_device=torch.device("simulated:0"), force_hooks=True)


MODELS = {
    "in memory": lambda: tiny_llama().to("simulated:1"),
    "two devices": lambda: on(ON_BOTH),
    "two devices and CPU memory": lambda: on(IN_THREE_PLACES),
    "CPU memory": lambda: cpu_offload(tiny_llama(), execution_device=torch.device("simulated:1")),
}


@pytest.mark.parametrize(("padded", "storage"), [(False, None), (True, "cpu"), (True, "disk")])
@pytest.mark.parametrize("place", MODELS)
def test_a_model_is_pruned_wherever_it_is(place, padded, storage):
    config = FistaPruningConfig(0.5)
    expected, model = tiny_llama(), MODELS[place]()
    FistaPruner(config, progress=False).prune(expected, batches(padded))
    FistaPruner(config, progress=False, storage_device=storage).prune(model, batches(padded))
    require_the_same(weights_of(model), weights_of(expected))


@pytest.mark.parametrize("storage", [None, "cpu"])
def test_files_are_pruned_on_a_device(storage, tmp_path):
    source = save_tiny_folder(tmp_path / "source")
    config = FistaPruningConfig(0.5)
    found = []
    for device in ("cpu", "simulated:1"):
        output = tmp_path / device.replace(":", "-")
        pruner = FistaPruner(config, progress=False, storage_device=storage)
        pruner.prune(source, batches(), output_dir=output, device=device)
        found.append(weights_of(AutoModelForCausalLM.from_pretrained(output)))
    require_the_same(*found)


def test_hidden_states_follow_the_layers_to_their_device():
    """They cross once, with the masks; on the device before, they would be fetched for every pass."""
    config = FistaPruningConfig(0.5, allocation="uniform")
    with backend.counted() as counts:
        FistaPruner(config, progress=False).prune(on(ON_BOTH), batches())
    hidden = 8 * 16 * tiny_llama().config.hidden_size * 4
    assert 2 * hidden <= counts.bytes["device to device"] < 3 * hidden


def test_what_is_kept_of_an_activation_is_not_what_the_layer_makes_of_it():
    """The copy to the host has streams of its own, so it must read memory that nothing else writes to."""
    store, activation = (
        ActivationStore(torch.device("cpu"), torch.device("simulated:0")),
        torch.ones(4, 4).to("simulated:0"),
    )
    read = []
    copy_ = torch.Tensor.copy_
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.Tensor, "copy_", lambda own, other, *a, **k: (read.append(other), copy_(own, other, *a, **k))[1]
        )
        store.append(activation, copy=True)
        store.append(activation)
    assert [tensor.data_ptr() == activation.data_ptr() for tensor in read if tensor.device == activation.device] == [
        False,
        True,
    ]

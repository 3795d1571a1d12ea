"""What was asked of CUDA alone is asked of whatever accelerator there is."""

from contextlib import nullcontext

import pytest
import torch
from simulated_device import backend
from tiny_llama import tiny_llama, tiny_tokenizer, tiny_tokens
from untouched import Untouched

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.cli.main import main
from optimum_fista.devices import usable_device
from optimum_fista.estimate import Estimate
from optimum_fista.memory import available_bytes, release_memory
from optimum_fista.removal import parts_removal
from optimum_fista.text.self_sampling import sample_text_from_model
from optimum_fista.versions import device_name, library_versions


def test_the_current_device_is_the_default():
    assert usable_device(None) == torch.device("simulated:1")
    estimate = Estimate(tiny_llama().config, num_samples=8, sequence_length=16)
    assert estimate.device == "simulated"
    assert set(estimate.memory) == {"device", "host"}
    assert "activations that wait" in estimate.memory["device"]


def test_its_memory_is_counted():
    device = torch.device("simulated:1")
    with backend.memory_limit(2**20, device):
        held = torch.empty(1000, device=device)
        assert available_bytes(device) == 2**20 - backend.memory_allocated(device)
        del held
    report = FistaPruner(FistaPruningConfig(0.5), progress=False).prune(
        tiny_llama().to(device), tiny_tokens().split(4)
    )
    weights = sum(parameter.nbytes for parameter in tiny_llama().parameters())
    assert all(layer.memory.device_bytes > weights for layer in report.layers)


def test_its_cache_is_emptied_and_its_name_is_told(monkeypatch):
    emptied = []
    monkeypatch.setattr(backend, "empty_cache", lambda: emptied.append(True))
    release_memory(collect=True)
    assert emptied
    assert library_versions()["gpu"] == "Simulated accelerator 1"
    assert device_name(torch.device("simulated:0")) == "Simulated accelerator 0"
    assert device_name(torch.device("cpu")) == "cpu"


def random_states():
    return [backend.get_rng_state(0), backend.get_rng_state(1), torch.get_rng_state()]


@pytest.mark.parametrize("device", ["simulated:0", "simulated:1"])
def test_sampling_leaves_its_generators_as_they_were(device):
    model = tiny_llama().to(device)
    before = random_states()
    drawn = [sample_text_from_model(model, tiny_tokenizer(), 2, 8, seed=7) for _ in range(2)]
    assert torch.equal(*drawn)
    assert all(map(torch.equal, before, random_states()))


@pytest.mark.parametrize("fails", [False, True])
def test_a_device_that_is_nearly_full_has_room_for_the_smaller_model(fails, monkeypatch):
    model, device, shrink = (
        tiny_llama().to("simulated:0"),
        torch.device("simulated:0"),
        parts_removal.shrink_model,
    )
    untouched, largest = Untouched(model), model.model.layers[0].mlp.down_proj.weight.nbytes

    def shrink_with_little_memory(*arguments):
        with backend.memory_limit(backend.memory_allocated(device) + 3 * largest, device):
            shrink(*arguments)
        if fails:
            raise KeyboardInterrupt

    monkeypatch.setattr(parts_removal, "shrink_model", shrink_with_little_memory)
    pruner = FistaPruner(
        FistaPruningConfig(pattern="channels:0.25/4+heads:0.5", method="wanda"), progress=False
    )
    with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
        pruner.prune(model, tiny_tokens().split(4))
    assert model.config.intermediate_size == (48 if fails else 36)
    if fails:
        untouched.check()


def test_the_doctor_tries_every_device(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for index in range(2):
        assert (
            f"\nsimulated:{index}: Simulated accelerator {index}, 16.0 GiB free of 16.0 GiB\n"
            in shown
        )
    assert shown.count("of the weights zero or kept as on the CPU") == 2

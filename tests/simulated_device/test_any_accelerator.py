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
from optimum_fista.estimate.estimate import Estimate
from optimum_fista.memory import available_bytes, release_memory
from optimum_fista.removal import parts_removal
from optimum_fista.text.self_sampling import sample_text_from_model
from optimum_fista.versions import device_name, library_versions


def test_the_current_device_is_the_default():
    estimate = Estimate(tiny_llama().config, num_samples=8, sequence_length=16)

    assert usable_device(None) == torch.device("simulated:1")
    assert estimate.device == "simulated"
    assert set(estimate.memory) == {"device", "host"}
    assert "activations that wait" in estimate.memory["device"]


def test_its_available_memory_is_known(bytes_before):
    device = torch.device("simulated:1")
    limit = bytes_before[1] + 2**20

    with backend.memory_limit(limit, device):
        held = torch.empty(1000, device=device)
        available = available_bytes(device)

    assert available == limit - bytes_before[1] - held.nbytes


def test_the_report_has_its_peak_memory():
    model = tiny_llama().to("simulated:1")
    pruner = FistaPruner(FistaPruningConfig(0.5), progress=False)

    report = pruner.prune(model, tiny_tokens().split(4))

    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert all(layer.memory.device_bytes > weights for layer in report.layers)


def test_its_cache_is_emptied(monkeypatch):
    emptied = []
    monkeypatch.setattr(backend, "empty_cache", lambda: emptied.append(True))

    release_memory(collect=True)

    assert emptied


def test_its_name_is_told():
    assert library_versions()["gpu"] == "Simulated accelerator 1"
    assert device_name(torch.device("simulated:0")) == "Simulated accelerator 0"
    assert device_name(torch.device("cpu")) == "cpu"


def random_states():
    """The states of the generators of both devices and of the CPU."""
    return [backend.get_rng_state(0), backend.get_rng_state(1), torch.get_rng_state()]


@pytest.mark.parametrize("device", ["simulated:0", "simulated:1"])
def test_sampling_leaves_its_generators_as_they_were(device):
    model = tiny_llama().to(device)
    before = random_states()

    first = sample_text_from_model(model, tiny_tokenizer(), 2, 8, seed=7)
    second = sample_text_from_model(model, tiny_tokenizer(), 2, 8, seed=7)

    assert torch.equal(first, second)
    assert all(map(torch.equal, before, random_states()))


@pytest.mark.parametrize("fails", [False, True])
def test_a_device_that_is_nearly_full_has_room_for_the_smaller_model(fails, monkeypatch):
    device = torch.device("simulated:0")
    model = tiny_llama().to(device)
    untouched = Untouched(model)
    largest = model.model.layers[0].mlp.down_proj.weight.nbytes
    shrink = parts_removal.shrink_model

    def shrink_with_little_memory(*arguments):
        """Shrink the model with room for three of its largest matrices, and fail afterwards if told to."""
        with backend.memory_limit(backend.memory_allocated(device) + 3 * largest, device):
            shrink(*arguments)
        if fails:
            raise KeyboardInterrupt

    monkeypatch.setattr(parts_removal, "shrink_model", shrink_with_little_memory)
    config = FistaPruningConfig(pattern="channels:0.25/4+heads:0.5", method="wanda")
    pruner = FistaPruner(config, progress=False)

    with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
        pruner.prune(model, tiny_tokens().split(4))

    assert model.config.intermediate_size == (48 if fails else 36)
    if fails:
        untouched.check()


def test_the_doctor_tries_every_device(capsys):
    exit_code = main(["doctor"])

    shown = capsys.readouterr().out
    assert exit_code == 0
    for index in range(2):
        line = f"simulated:{index}: Simulated accelerator {index}, 16.0 GiB free of 16.0 GiB"
        assert f"\n{line}\n" in shown
    assert shown.count("of the weights zero or kept as on the CPU") == 2

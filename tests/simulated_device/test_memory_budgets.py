"""How often the host waits for the device in a run, and what is moved between them: each number is the most allowed."""

import pytest
import torch
from accelerate import cpu_offload
from simulated_device import backend
from simulated_device.places import dispatched
from tiny_llama import tiny_llama, tiny_tokens
from tiny_models import tiny_model

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.model.activations import ActivationStore

OPERATORS = 7  # of a decoder layer


def counts_of(model, batches, *, storage=None, method="wanda", **options):
    """Prune a model, in memory, and return the waits, copies and bytes of the run."""
    config = FistaPruningConfig(0.5, method=method, **options)
    pruner = FistaPruner(config, progress=False, storage_device=storage)
    with backend.counted() as counts:
        pruner.prune(model, batches)
    return counts


def nbytes(module) -> int:
    """Bytes of the parameters of a module."""
    return sum(parameter.nbytes for parameter in module.parameters())


@pytest.mark.parametrize(
    ("method", "allocation", "most"), [("wanda", "uniform", 8.3), ("obs_admm", "fisher", 15.3)]
)
def test_the_host_waits_for_an_operator_as_often_whatever_the_batches(method, allocation, most):
    """Its mask and old weight move to the host, the mask is counted, factors are checked, its two errors are read.

    For the layer's digest its nine tensors are read once more.
    """

    def waits_of(num_layers, batch_size):
        """How often the host waits in a run over a model of so many layers, with batches of so many sequences."""
        model = tiny_llama(num_hidden_layers=num_layers).to("simulated:0")
        batches = tiny_tokens(16).split(batch_size)
        return counts_of(model, batches, method=method, allocation=allocation).waits.total()

    two_layers = waits_of(num_layers=2, batch_size=8)
    four_layers = waits_of(num_layers=4, batch_size=8)
    two_layers_small_batches = waits_of(num_layers=2, batch_size=2)
    four_layers_small_batches = waits_of(num_layers=4, batch_size=2)

    waits_of_two_layers = four_layers - two_layers
    assert waits_of_two_layers <= 2 * most * OPERATORS
    # only the recording of inputs sees batches
    assert four_layers_small_batches - two_layers_small_batches == waits_of_two_layers
    # 6 batches more, each of them recorded once
    assert two_layers_small_batches - two_layers <= 10 * 6


def test_weights_of_files_cross_once_each_way(tmp_path):
    model = tiny_llama(num_hidden_layers=4)
    model.save_pretrained(tmp_path / "source")
    tokens = tiny_tokens(16)
    config = FistaPruningConfig(0.5, method="wanda", allocation="uniform")

    with backend.counted() as counts:
        FistaPruner(config, progress=False).prune(
            tmp_path / "source",
            tokens.split(4),
            output_dir=tmp_path / "output",
            device="simulated:1",
        )

    layers = nbytes(model.model.layers)
    first_layer = nbytes(model.model.layers[0])  # comes once more, to learn the form of its output
    embedding = nbytes(model.get_input_embeddings())
    masks = 4 * sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim > 1)
    states = 3 * tokens.numel() * model.config.hidden_size * 4  # kept for a run that resumes
    to_device = layers + first_layer + embedding + tokens.nbytes
    assert counts.bytes["host to device"] <= to_device + 1024
    assert counts.bytes["device to host"] <= layers + masks + states + 1024
    assert not counts.bytes["device to device"]


def test_the_default_allocation_brings_offloaded_weights_twice_a_sequence():
    """Forwards and when a layer is recomputed, besides once before, once for the costs, and once to prune them."""
    tokens = tiny_tokens(4)
    num_sequences = 2

    def layers_moved(num_layers):
        """Prune an offloaded model, and return what is moved to the device, in weights of a decoder layer."""
        model = tiny_llama(num_hidden_layers=num_layers)
        weights = nbytes(model.model.layers) / num_layers
        offloaded = cpu_offload(model, torch.device("simulated:0"))
        counts = counts_of(
            offloaded, tokens.split(4), allocation_tokens=num_sequences * tokens.shape[1]
        )
        return counts.bytes["host to device"] / weights

    moved_for_two_layers = layers_moved(4) - layers_moved(2)

    assert moved_for_two_layers <= 2 * (3 + 2 * num_sequences)


def test_bytes_moved_for_a_mixture_do_not_grow_with_its_experts():
    """The tokens of each batch are shared by the experts, so each brings its own share and no more."""

    def bytes_of_activations(num_experts):
        """Prune a mixture, and return the bytes moved between the host and the device, without weights and masks."""
        model = tiny_model("mixtral", num_local_experts=num_experts, num_hidden_layers=1)
        model = model.to("simulated:0")
        # kept on the host, so that they can be put back, and for the digest
        weights = 2 * nbytes(model.model.layers)
        masks = sum(p.numel() for p in model.model.layers.parameters() if p.ndim > 1)
        counts = counts_of(
            model,
            tiny_tokens(16).split(4),
            storage="cpu",
            allocation="uniform",
            error_correction=0.5,
            residual_correction=1.0,
        )
        moved = counts.bytes["host to device"] + counts.bytes["device to host"]
        return moved - weights - masks

    assert bytes_of_activations(32) <= 1.1 * bytes_of_activations(4)


def test_hidden_states_follow_the_layers_to_their_device(tmp_path):
    """They cross once; on the device before, they would be fetched for every pass."""
    model = dispatched(tiny_llama(), tmp_path, "simulated:0", "simulated:1")
    tokens = tiny_tokens()

    counts = counts_of(model, tokens.split(4), method="fista", allocation="uniform")

    hidden = tokens.numel() * model.config.hidden_size * 4
    assert 2 * hidden <= counts.bytes["device to device"] < 3 * hidden


def test_what_is_kept_of_an_activation_is_not_what_the_layer_makes_of_it(monkeypatch):
    """The copy to the host has streams of its own, so it must read memory that nothing else writes to."""
    store = ActivationStore(torch.device("cpu"), torch.device("simulated:0"))
    activation = torch.ones(4, 4).to("simulated:0")
    addresses = []  # of tensors on the device that are copied from
    copy_ = torch.Tensor.copy_

    def see_source(target, source, *arguments, **keywords):
        """Note the address of the source, and copy."""
        if source.device == activation.device:
            addresses.append(source.data_ptr())
        return copy_(target, source, *arguments, **keywords)

    monkeypatch.setattr(torch.Tensor, "copy_", see_source)

    store.append(activation, copy=True)
    store.append(activation)

    reads_activation = [address == activation.data_ptr() for address in addresses]
    assert reads_activation == [False, True]

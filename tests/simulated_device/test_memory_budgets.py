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


def counts_of(model, *, batch_size=8, storage=None, **options):
    config = FistaPruningConfig(0.5, **{"method": "wanda"} | options)
    with backend.counted() as counts:
        FistaPruner(config, progress=False, storage_device=storage).prune(
            model, tiny_tokens(16).split(batch_size)
        )
    return counts


def nbytes(module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


@pytest.mark.parametrize(
    ("method", "allocation", "most"), [("wanda", "uniform", 8.3), ("obs_admm", "fisher", 15.3)]
)
def test_the_host_waits_for_an_operator_as_often_whatever_the_batches(method, allocation, most):
    """Its mask and old weight move to the host, the mask is counted, factors are checked, its two errors are read.

    For the layer's digest its nine tensors are read once more.
    """
    waits = {
        (layers, size): counts_of(
            tiny_llama(num_hidden_layers=layers).to("simulated:0"),
            batch_size=size,
            method=method,
            allocation=allocation,
        ).waits.total()
        for layers in (2, 4)
        for size in (2, 8)
    }
    assert waits[4, 8] - waits[2, 8] <= 2 * most * OPERATORS
    assert waits[4, 2] - waits[2, 2] == waits[4, 8] - waits[2, 8], (
        "only the recording of inputs sees batches"
    )
    assert waits[2, 2] - waits[2, 8] <= 10 * 6, "batches more, each of them recorded once"


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
    layers, first, embedding = (
        nbytes(part)
        for part in (model.model.layers, model.model.layers[0], model.get_input_embeddings())
    )
    masks = 4 * sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim > 1)
    states = 3 * tokens.numel() * model.config.hidden_size * 4  # kept for a run that resumes
    # the first layer comes once more, to learn the form of its output
    assert counts.bytes["host to device"] <= layers + first + embedding + tokens.nbytes + 1024
    assert counts.bytes["device to host"] <= layers + masks + states + 1024
    assert not counts.bytes["device to device"]


def test_the_default_allocation_brings_offloaded_weights_twice_a_sequence():
    """Forwards and when a layer is recomputed, besides once before, once for the costs, and once to prune them."""
    tokens, sequences, moved = tiny_tokens(4), 2, {}
    for layers in (2, 4):
        model = tiny_llama(num_hidden_layers=layers)
        weights = nbytes(model.model.layers) / layers
        config = FistaPruningConfig(
            0.5, method="wanda", allocation_tokens=sequences * tokens.shape[1]
        )
        with backend.counted() as counts:
            FistaPruner(config, progress=False).prune(
                cpu_offload(model, torch.device("simulated:0")), tokens.split(4)
            )
        moved[layers] = counts.bytes["host to device"] / weights
    assert moved[4] - moved[2] <= 2 * (3 + 2 * sequences)


def test_bytes_moved_for_a_mixture_do_not_grow_with_its_experts():
    """The tokens of each batch are shared by the experts, so each brings its own share and no more."""
    moved = {}
    for experts in (4, 32):
        model = tiny_model("mixtral", num_local_experts=experts, num_hidden_layers=1).to(
            "simulated:0"
        )
        # They are kept on the host, so that they can be put back, and for the digest.
        weights = 2 * nbytes(model.model.layers)
        counts = counts_of(
            model,
            storage="cpu",
            batch_size=4,
            allocation="uniform",
            error_correction=0.5,
            residual_correction=1.0,
        )
        masks = sum(p.numel() for p in model.model.layers.parameters() if p.ndim > 1)
        moved[experts] = (
            counts.bytes["host to device"] + counts.bytes["device to host"] - weights - masks
        )
    assert moved[32] <= 1.1 * moved[4]


def test_hidden_states_follow_the_layers_to_their_device(tmp_path):
    """Dense and pruned hidden states cross to the next device once. Otherwise every pass would fetch them again."""
    model = dispatched(tiny_llama(), tmp_path, "simulated:0", "simulated:1")
    with backend.counted() as counts:
        config = FistaPruningConfig(0.5, error_correction=0.5, allocation="uniform")
        FistaPruner(config, progress=False).prune(model, tiny_tokens().split(4))
    num_bytes = tiny_tokens().numel() * model.config.hidden_size * 4  # float32
    assert 2 * num_bytes <= counts.bytes["device to device"] < 3 * num_bytes


def test_what_is_kept_of_an_activation_is_not_what_the_layer_makes_of_it(monkeypatch):
    """The copy to the host has streams of its own, so it must read memory that nothing else writes to."""
    store = ActivationStore(torch.device("cpu"), torch.device("simulated:0"))
    activation, read, copy_ = torch.ones(4, 4).to("simulated:0"), [], torch.Tensor.copy_
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda own, *a, **k: (read.append(a[0]), copy_(own, *a, **k))[1]
    )
    store.append(activation, copy=True)
    store.append(activation)
    own = [
        tensor.data_ptr() == activation.data_ptr()
        for tensor in read
        if tensor.device == activation.device
    ]
    assert own == [False, True]

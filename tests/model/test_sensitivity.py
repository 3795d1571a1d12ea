import pytest
import torch
from families import family_model, family_tokens
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_model
from torch import nn
from untouched import Untouched

from optimum_fista.model.activations import ActivationStore
from optimum_fista.model.calibration import read_batches
from optimum_fista.model.choice import find_operators
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.model.sensitivity import DenseLoss, measure_sensitivities

LENGTH = 10


def data(padded: bool = True) -> dict:
    ids = torch.randint(3, VOCAB_SIZE, (6, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 7:] = 0
        mask[2, :3] = 0
        mask[4, 1:] = 0  # one token: nothing to foretell
    return {"input_ids": ids, "attention_mask": mask}


def operators_of(model):
    layers = find_decoder_layers(model)
    return layers, {k: v for name, layer in layers for k, v in find_operators(name, layer).items()}


def measure(model, num_tokens=10_000, sizes=(2, 3, 1), padded=True, storage=None):
    layers, operators = operators_of(model)
    parts = zip(*(tensor.split(sizes) for tensor in data(padded).values()), strict=True)
    batches = read_batches([{"input_ids": i, "attention_mask": m} for i, m in parts], VOCAB_SIZE)
    with torch.no_grad():
        loss = DenseLoss(layers, batches, num_tokens, storage=storage)
        return operators, measure_sensitivities(loss, operators)


def by_hand(model, operators, rows, padded):
    """Inputs and gradients of every operator, by sequences without padding, and no hooks on recomputed layers."""
    seen = {name: [] for name in operators}
    handles = []
    for name, operator in operators.items():

        def keep(module, args, output, name=name):
            output.retain_grad()
            seen[name].append((args[0].detach().clone(), output))
            return output.clone()  # Falcon adds to it in place

        handles.append(operator.module.register_forward_hook(keep))
    ids, mask = data(padded).values()
    for row in rows:
        real = ids[row][mask[row].bool()]
        logits = model(input_ids=real[None], use_cache=False).logits[0]
        nn.functional.cross_entropy(logits[:-1], real[1:], reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return {
        name: [(x.reshape(-1, x.shape[-1]), y.grad.reshape(-1, y.shape[-1])) for x, y in calls]
        for name, calls in seen.items()
    }


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_sums_are_those_of_plain_autograd(family, padded):
    model = tiny_model(family)
    operators, found = measure(model, padded=padded)
    rows = [0, 1, 2, 3, 5] if padded else range(6)
    again = tiny_model(family)
    expected = by_hand(again, operators_of(again)[1], rows, padded)
    for name, operator in operators.items():
        weights = operator.read().square().sum(0)
        gradients, inputs, energy, tokens = 0, 0, 0.0, 0
        for x, g in expected[name]:
            energies = x.square() @ weights
            energies = energies.clamp_max(2 * energies.median())
            gradients = gradients + energies @ g.square()
            inputs = inputs + x.square().sum(0)
            energy += float(energies.sum())
            tokens += len(x)
        outputs = gradients / (2 * energy)
        assert torch.allclose(
            found[name].outputs, outputs, rtol=1e-3, atol=1e-5 * float(outputs.max())
        )
        assert torch.allclose(found[name].inputs, inputs / tokens, rtol=1e-4)
        assert found[name].seen == tokens
        assert float(gradients.sum()) > 0


def test_the_model_is_as_it_was():
    model = tiny_model("llama")
    model.lm_head.weight.requires_grad_(False)
    with Untouched(model):
        measure(model)


@pytest.mark.parametrize(
    ("wanted", "taken"), [(2, 10), (10, 10), (11, 17), (17, 17), (25, 34), (10_000, 44)]
)
def test_sequences_are_taken_until_there_are_enough_tokens(wanted, taken):
    loss = DenseLoss(
        find_decoder_layers(tiny_model("llama")), read_batches([data()], VOCAB_SIZE), wanted
    )
    assert sum(row.num_tokens for row in loss.sequences()) == taken


def test_gradients_that_are_not_finite_are_an_error():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(
        ValueError, match=r"model\.layers\.0\..* hold NaN or Inf.*pass allocation='uniform'"
    ):
        measure(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all("forward" not in vars(layer) for layer in model.model.layers)


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_where_hidden_states_wait_does_not_matter(family, tmp_path):
    _, on_device = measure(tiny_model(family))
    _, in_files = measure(tiny_model(family), storage=tmp_path)
    for name in on_device:
        assert torch.equal(on_device[name].outputs, in_files[name].outputs)
        assert torch.equal(on_device[name].inputs, in_files[name].inputs)


def test_hidden_states_of_one_sequence_wait_in_files(tmp_path, monkeypatch):
    kept = []
    append, clear = ActivationStore.append, ActivationStore.clear

    def count(store, tensor, **keywords):
        append(store, tensor, **keywords)
        kept.append(tuple(tensor.shape))

    def count_cleared(store):
        kept.extend(
            [len(store)] if hasattr(store, "_kept") else []
        )  # a new store clears itself too
        clear(store)

    monkeypatch.setattr(ActivationStore, "append", count)
    monkeypatch.setattr(ActivationStore, "clear", count_cleared)
    model = tiny_model("llama")
    measure(model, num_tokens=2 * LENGTH, padded=False, storage=tmp_path)
    hidden = (1, LENGTH, model.config.hidden_size)
    assert kept == [hidden, hidden, 2] * 2


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("gemma3n_text", ["altup.modality_router"]),  # called twice
        ("mamba", ["mixer.dt_proj"]),  # not called
        ("deepseek_v4", ["self_attn.o_a_proj"]),  # a product of blocks
    ],
)
def test_what_is_not_one_matrix_product_has_no_gradient_and_disturbs_no_other(family, names):
    model = family_model(family)
    layers = find_decoder_layers(model)
    operators = {
        k: v
        for name, layer in layers
        for k, v in find_operators(name, layer, ["*.experts"]).items()
    }
    with torch.no_grad():
        loss = DenseLoss(layers, read_batches(family_tokens(), VOCAB_SIZE), 64)
        found = measure_sensitivities(loss, operators)
    unfelt = {name for name, sensitivity in found.items() if not sensitivity.is_felt}
    expected = {name for name in operators if name.split(".", 3)[-1] in names}
    assert expected
    assert expected <= unfelt
    assert len(unfelt) < len(found) / 2

"""Sensitivities are those of plain autograd on the whole model, which is as it was afterwards."""

from functools import partial

import pytest
import torch
from families import family_model, family_tokens
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_model
from torch import nn
from untouched import Untouched

from optimum_fista.model import sensitivity
from optimum_fista.model.activations import ActivationStore
from optimum_fista.model.calibration import CalibrationBatch, read_batches
from optimum_fista.model.choice import find_operators
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.model.operators import LinearOperator
from optimum_fista.model.sensitivity import DenseLoss, Sensitivity, measure_sensitivities

LENGTH = 10


def data(padded: bool = True) -> dict:
    """Six sequences; with padding after, before and around their tokens."""
    ids = torch.randint(3, VOCAB_SIZE, (6, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 7:] = 0
        mask[2, :3] = 0
        mask[4, 1:] = 0  # one token: nothing to foretell
    return {"input_ids": ids, "attention_mask": mask}


def operators_of(model, dense_experts=()) -> dict[str, LinearOperator]:
    """The operators of all decoder layers, by name."""
    operators = {}
    for name, layer in find_decoder_layers(model):
        operators |= find_operators(name, layer, dense_experts)
    return operators


def measure(model, num_tokens=10_000, padded=True, storage=None) -> dict[str, Sensitivity]:
    """Sensitivities of all operators of a model, on batches of two, three and one sequences."""
    sequences = data(padded)
    split_ids = sequences["input_ids"].split((2, 3, 1))
    split_masks = sequences["attention_mask"].split((2, 3, 1))
    batches = read_batches(
        [
            {"input_ids": ids, "attention_mask": mask}
            for ids, mask in zip(split_ids, split_masks, strict=True)
        ],
        VOCAB_SIZE,
    )
    with torch.no_grad():
        loss = DenseLoss(find_decoder_layers(model), batches, num_tokens, storage=storage)
        sensitivities, _ = measure_sensitivities(loss, operators_of(model))
    return sensitivities


def by_hand(model, operators, rows, padded):
    """Inputs and gradients of every operator, by sequences without padding, and no hooks on recomputed layers."""
    calls_of = {name: [] for name in operators}

    def keep(name, module, arguments, output):
        """Keep the inputs and outputs of an operator; a forward hook."""
        output.retain_grad()
        calls_of[name].append((arguments[0].detach().clone(), output))
        return output.clone()  # Falcon adds to it in place

    handles = [
        operator.module.register_forward_hook(partial(keep, name))
        for name, operator in operators.items()
    ]
    ids, mask = data(padded).values()
    for row in rows:
        real = ids[row][mask[row].bool()]
        logits = model(input_ids=real[None], use_cache=False).logits[0]
        nn.functional.cross_entropy(logits[:-1], real[1:], reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return {
        name: [(x.reshape(-1, x.shape[-1]), y.grad.reshape(-1, y.shape[-1])) for x, y in calls]
        for name, calls in calls_of.items()
    }


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_sensitivities_are_those_of_plain_autograd(family, padded):
    rows = [0, 1, 2, 3, 5] if padded else range(6)  # the fifth has one token if there is padding
    model = tiny_model(family)
    operators = operators_of(model)
    calls_of = by_hand(model, operators, rows, padded)

    sensitivities = measure(tiny_model(family), padded=padded)

    for name, operator in operators.items():
        columns = operator.read().square().sum(0)  # sum_i w_ij^2
        gradients = torch.zeros(operator.shape[0])
        inputs = torch.zeros(operator.shape[1])
        energy = 0.0
        num_tokens = 0
        for x, g in calls_of[name]:
            energies = x.square() @ columns
            energies = energies.clamp_max(2 * energies.median())
            gradients += energies @ g.square()
            inputs += x.square().sum(0)
            energy += float(energies.sum())
            num_tokens += len(x)
        outputs = gradients / (2 * energy)
        found = sensitivities[name]
        assert torch.allclose(found.outputs, outputs, rtol=1e-3, atol=1e-5 * float(outputs.max()))
        assert torch.allclose(found.inputs, inputs / num_tokens, rtol=1e-4)
        assert found.num_tokens == num_tokens
        assert float(gradients.sum()) > 0


def test_measuring_sensitivities_leaves_the_model_as_it_was():
    model = tiny_model("llama")
    model.lm_head.weight.requires_grad_(False)

    with Untouched(model):
        measure(model)


@pytest.mark.parametrize(
    ("wanted", "taken"), [(2, 10), (10, 10), (11, 17), (17, 17), (25, 34), (10_000, 44)]
)
def test_sequences_are_taken_until_there_are_enough_tokens(wanted, taken):
    batches = read_batches([data()], VOCAB_SIZE)
    loss = DenseLoss(find_decoder_layers(tiny_model("llama")), batches, wanted)

    assert sum(row.num_tokens for row in loss.sequences()) == taken


def test_the_loss_may_be_that_of_the_beginnings_of_sequences():
    batches = read_batches([data()], VOCAB_SIZE)
    layers = find_decoder_layers(tiny_model("llama"))

    sequences = DenseLoss(layers, batches, 14, longest=4).sequences()

    # that of a single token has no loss
    whole = DenseLoss(layers, batches, 10_000).sequences()[:4]
    assert len(sequences) == 4
    for sequence, of_all in zip(sequences, whole, strict=True):
        assert torch.equal(sequence.input_ids, of_all.input_ids[:, :4])


def test_short_sequences_run_together_and_add_up_to_the_same(monkeypatch):
    model = tiny_model("llama")
    operators = operators_of(model)
    batches = read_batches([data(padded=False)], VOCAB_SIZE)
    loss = DenseLoss(find_decoder_layers(model), batches, 10_000, longest=4)
    shapes = []
    model.get_input_embeddings().register_forward_hook(
        lambda _, ids, __: shapes.append(ids[0].shape)
    )

    def measured(tokens_together):
        monkeypatch.setattr(sensitivity, "TOKENS_TOGETHER", tokens_together)
        shapes.clear()
        with torch.no_grad():
            sensitivities, _ = measure_sensitivities(loss, operators)
        return sensitivities, [tuple(shape) for shape in shapes]

    together, shapes_together = measured(16)
    alone, shapes_alone = measured(4)

    assert shapes_together == [(4, 4), (2, 4)]  # six sequences
    assert shapes_alone == [(1, 4)] * 6
    for name in operators:
        assert together[name].num_tokens == alone[name].num_tokens == 24
        assert torch.allclose(together[name].inputs, alone[name].inputs, rtol=1e-4)
        assert torch.allclose(together[name].outputs, alone[name].outputs, rtol=1e-4)


def test_energies_are_limited_sequence_by_sequence_where_a_model_joins_their_tokens(monkeypatch):
    model = tiny_model("qwen3_next")
    operators = {n: o for n, o in operators_of(model).items() if ".shared_expert." in n}
    ids = torch.randint(3, VOCAB_SIZE, (4, 12), generator=torch.Generator().manual_seed(0))
    ids[:2] = ids[:2] % 8 + 3
    batches = read_batches([ids], VOCAB_SIZE)
    loss = DenseLoss(find_decoder_layers(model), batches, 10_000, longest=12)
    shapes = set()
    for operator in operators.values():
        operator.module.register_forward_hook(
            lambda _, inputs, __: shapes.add(inputs[0].shape[:-1])
        )

    together, _ = measure_sensitivities(loss, operators)
    assert shapes == {(48,)}
    monkeypatch.setattr(sensitivity, "TOKENS_TOGETHER", 12)
    alone, _ = measure_sensitivities(loss, operators)

    for name in operators:
        assert torch.allclose(together[name].outputs, alone[name].outputs, rtol=1e-3), name


def test_groups_of_channels_are_not_taken_for_tokens_when_energies_are_limited():
    linear = nn.Linear(4, 5, bias=False)
    watcher = sensitivity._Watcher(LinearOperator("o_a_proj", linear))
    inputs = torch.ones(2, 6, 2, 4)  # two sequences of six tokens with two groups of channels
    inputs[1] = 10.0
    inputs[:, 0] = 1000.0

    watcher.begin(CalibrationBatch(torch.zeros(2, 6).long()))
    watcher.see(linear, (inputs,), {}, None)

    usual = watcher.columns.sum().item()  # energy of a group of a usual token in the first sequence
    of_both_sequences = usual * (1 + 10**2)
    num_usual_groups = 5 * 2  # five usual tokens with two groups
    of_huge_groups = 2 * sensitivity._TYPICAL  # those of the first token, limited
    expected = of_both_sequences * (num_usual_groups + of_huge_groups)
    assert watcher.energy.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("wanted", "taken"), [(1, "abc"), (12, "abc"), (13, "abca"), (99, "abcaba")]
)
def test_texts_take_turns_and_each_gives_a_sequence_to_the_loss(wanted, taken):
    ids = torch.arange(24).view(6, 4)
    batches = read_batches(
        [
            {"input_ids": ids[:3], "source": "a"},
            {"input_ids": ids[3:5], "source": "b"},
            {"input_ids": ids[5:], "source": "c"},
        ],
        VOCAB_SIZE,
    )
    loss = DenseLoss(find_decoder_layers(tiny_model("llama")), batches, wanted)

    assert "".join(sequence.source for sequence in loss.sequences()) == taken


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
def test_sensitivities_are_the_same_with_hidden_states_in_files(family, tmp_path):
    on_device = measure(tiny_model(family))
    in_files = measure(tiny_model(family), storage=tmp_path)

    for name in on_device:
        assert torch.equal(on_device[name].outputs, in_files[name].outputs)
        assert torch.equal(on_device[name].inputs, in_files[name].inputs)


def test_files_hold_the_hidden_states_of_one_sequence_at_a_time(tmp_path, monkeypatch):
    events = []  # shapes of tensors that are appended, and lengths of stores that are cleared
    append = ActivationStore.append
    clear = ActivationStore.clear

    def count(store, tensor, **keywords):
        append(store, tensor, **keywords)
        events.append(tuple(tensor.shape))

    def count_cleared(store):
        is_new = not hasattr(store, "_kept")  # a new store clears itself, too
        if not is_new:
            events.append(len(store))
        clear(store)

    monkeypatch.setattr(ActivationStore, "append", count)
    monkeypatch.setattr(ActivationStore, "clear", count_cleared)
    model = tiny_model("llama")

    measure(model, num_tokens=2 * LENGTH, padded=False, storage=tmp_path)

    hidden = (1, LENGTH, model.config.hidden_size)
    assert events == [hidden, hidden, 2] * 2


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
    operators = operators_of(model, dense_experts=["*.experts"])
    batches = read_batches(family_tokens(), VOCAB_SIZE)

    with torch.no_grad():
        loss = DenseLoss(find_decoder_layers(model), batches, num_tokens=64)
        sensitivities, _ = measure_sensitivities(loss, operators)

    no_gradient = {name for name, found in sensitivities.items() if not found.has_gradient}
    expected = {name for name in operators if name.split(".", 3)[-1] in names}
    assert expected
    assert expected <= no_gradient
    assert len(no_gradient) < len(sensitivities) / 2

"""Decoder layers that run on recorded arguments return what they return inside the model."""

import pytest
import torch
from families import family_model
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_model
from torch import nn

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.inputs import RecordedInputs, record_inputs
from optimum_fista.model.layers import DecoderLayers, find_decoder_layers


def batch(rows: int, length: int, *, seed: int = 0, padded: bool = False) -> CalibrationBatch:
    """Random ids; with `padded`, the first row ends in padding and the last begins with it."""
    ids = torch.randint(
        3, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(seed)
    )
    mask = torch.ones_like(ids).bool()
    mask[0, -3:] = False
    mask[-1, :2] = False
    return CalibrationBatch(ids, mask if padded else None)


BATCHES = [
    batch(2, 9),
    batch(3, 9, seed=1, padded=True),
    batch(1, 6, seed=2),
    batch(2, 6, seed=3, padded=True),
]


def record(model, batches) -> tuple[DecoderLayers, RecordedInputs]:
    layers = find_decoder_layers(model)
    with torch.no_grad():
        return layers, record_inputs(layers, batches)


@pytest.mark.parametrize("family", FAMILIES)
def test_running_the_layers_on_what_was_recorded_gives_the_models_hidden_states(family):
    model = tiny_model(family, num_hidden_layers=3)
    layers, recorded = record(model, BATCHES)
    outputs_of_last_layer = []

    def keep(_, __, output):
        """Keep the output of the last layer: the model returns it after the final norm only."""
        outputs_of_last_layer.append(output[0] if isinstance(output, tuple) else output)

    layers.modules[-1].register_forward_hook(keep)
    for index, data in enumerate(BATCHES):
        outputs_of_last_layer.clear()
        mask = data.attention_mask
        with torch.no_grad():
            in_model = model(
                input_ids=data.input_ids,
                attention_mask=None if mask is None else mask.long(),
                output_hidden_states=True,
                use_cache=False,
            ).hidden_states
            expected = [*in_model[:-1], outputs_of_last_layer[0]]

            hidden_states = [recorded.hidden_states[index]]
            for layer, calls in zip(layers.modules, recorded.calls, strict=True):
                hidden_states.append(calls[index].run(layer, hidden_states[-1]))

        real = torch.ones_like(data.input_ids).bool() if mask is None else mask
        for hidden, reference in zip(hidden_states, expected, strict=True):
            assert torch.allclose(hidden[real], reference[real], rtol=1e-5, atol=1e-5)


class Rewired(nn.Module):
    """The decoder layers of a model, called in another way."""

    def __init__(self, layer: nn.Module, forward) -> None:
        super().__init__()
        self.layer = layer
        self.call = forward

    def forward(self, hidden_states, **arguments):
        return self.call(self.layer, hidden_states, **arguments)


def rewired(change) -> DecoderLayers:
    """Three decoder layers, of which the second is called by `change(layer, hidden_states, **arguments)`."""
    model = tiny_model("llama", num_hidden_layers=3)
    layers = find_decoder_layers(model)
    model.model.layers[1] = Rewired(layers.modules[1], change)
    return layers


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda layer, x, **more: layer(layer(x, **more), **more),
            "calls decoder layer .*1 but it should call .*2",
        ),
        (lambda layer, x, **more: x, "calls decoder layer .*2 but it should call .*1"),
        (
            lambda layer, x, **more: layer(x * 2, **more),
            "changes the hidden states in front of decoder layer .*1",
        ),
        (
            lambda layer, x, **more: layer(x, **more) + x,
            "changes the hidden states in front of decoder layer .*2",
        ),
    ],
)
def test_anything_but_one_layer_after_another_is_refused(change, reason):
    layers = rewired(change)
    forwards = [layer.forward for layer in layers.modules]

    with pytest.raises(UnsupportedArchitectureError, match=reason), torch.no_grad():
        record_inputs(layers, BATCHES[:1])

    assert [layer.forward for layer in layers.modules] == forwards


@pytest.mark.parametrize("family", ["glm_moe_dsa", "zaya"])
def test_what_a_layer_hands_on_besides_hidden_states_is_that_of_the_dense_network(family):
    model = family_model(family)
    chosen = [BATCHES[0], BATCHES[2]]

    layers, recorded = record(model, chosen)

    handed_on: list[torch.Tensor] = []  # by the layers in one pass
    for layer in layers.modules:
        layer.register_forward_hook(lambda _, __, output: handed_on.append(output[1]))
    for index, data in enumerate(chosen):
        handed_on.clear()
        with torch.no_grad():
            model(input_ids=data.input_ids, use_cache=False)
        for tensor, calls in zip(handed_on[:-1], recorded.calls[1:], strict=True):
            arguments = [*calls[index].arguments, *calls[index].keywords.values()]
            tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
            assert any(torch.equal(value, tensor) for value in tensors)


def test_a_recording_that_fails_leaves_the_layers_as_they_were():
    model = tiny_model("llama")
    layers = find_decoder_layers(model)
    special = layers.modules[1].forward
    layers.modules[1].forward = special  # as accelerate's hooks do

    with pytest.raises(IndexError):
        record(model, [*BATCHES, CalibrationBatch(torch.tensor([[VOCAB_SIZE]]))])

    assert "forward" not in vars(layers.modules[0])
    assert layers.modules[1].forward is special


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_run_once_at_most_and_nothing_behind_them(family):
    model = tiny_model(family, num_hidden_layers=3)
    runs = []
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: runs.append(name))

    layers, _ = record(model, BATCHES)

    assert not any(name.startswith((f"{layers.name}.1.", f"{layers.name}.2.")) for name in runs)
    assert not {"lm_head", "embed_out", "model.norm"} & set(runs)
    inside = [name for name in runs if name.startswith(f"{layers.name}.0.") and "act" not in name]
    assert inside
    assert len(inside) == len(set(inside)), "the first layer runs once, for all batches"


def test_equal_masks_and_position_embeddings_are_stored_once():
    _, recorded = record(tiny_model("llama"), [batch(2, 9, seed=seed) for seed in range(4)])

    embeddings = [
        calls[i].keywords["position_embeddings"] for calls in recorded.calls for i in range(4)
    ]
    assert len({cosine.data_ptr() for cosine, _ in embeddings}) == 1
    assert len({sine.data_ptr() for _, sine in embeddings}) == 1
    assert not torch.equal(*embeddings[0])


def test_different_masks_of_one_shape_are_kept_apart():
    # Both end in a real token, so that their last values are equal.
    data = [batch(2, 9, padded=True), batch(2, 9, padded=True)]
    data[1].attention_mask[1, 2:4] = False

    _, recorded = record(tiny_model("llama"), data)

    first, second = (recorded.calls[0][i].keywords["attention_mask"] for i in range(2))
    assert first.shape == second.shape
    assert not torch.equal(first, second)


def test_a_damaged_embedding_is_refused_if_a_token_of_the_text_uses_it():
    model = tiny_model("llama")
    damaged_token = 5
    with torch.no_grad():
        model.get_input_embeddings().weight[damaged_token, 3] = float("nan")

    with pytest.raises(ValueError, match="inputs of the first decoder layer hold NaN or Inf"):
        record(model, [CalibrationBatch(torch.tensor([[4, damaged_token, 6]]))])
    record(model, [CalibrationBatch(torch.tensor([[4, 6, 7]]))])  # raises nothing

"""Images and sounds reach the decoder layers as inside the model, and batches that lack a part of them are refused."""

import math
import warnings

import pytest
import torch
from families import ENOUGH_TOKENS
from killed import interrupted_after
from media_models import IMAGE, MEDIA_FAMILIES, media_batch, media_model

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.calibration import CalibrationBatch, hold_out, read_batches, tokens_sha256
from optimum_fista.model.inputs import record_inputs
from optimum_fista.model.layers import find_decoder_layers, token_limits
from optimum_fista.model.media import media_arguments, targets_of
from optimum_fista.model.sensitivity import DenseLoss
from optimum_fista.removal.layers import layers_with_least_loss
from optimum_fista.removal.model_outline import ModelOutline


def read(model, *batches) -> list[CalibrationBatch]:
    """Batches as a run reads them."""
    return read_batches(batches, *token_limits(model), media_arguments(model))


def prune(pruner, model, batches, **places):
    """Prune without warnings."""
    with warnings.catch_warnings(), ENOUGH_TOKENS:
        warnings.simplefilter("ignore")  # of too few tokens
        return pruner.prune(model, batches, **places)


def values_key(batch) -> str:
    """The argument that holds the images or sounds."""
    return "input_features" if "input_features" in batch else "pixel_values"


def with_other_values(batch, change: float = 1.0, factor: float = 1.0):
    """The same batch with other images or sounds."""
    key = values_key(batch)
    return batch | {key: batch[key] * factor + change}


@pytest.mark.parametrize("family", MEDIA_FAMILIES)
def test_decoder_layers_return_what_they_return_inside_the_model(family):
    model = media_model(family)
    layers = find_decoder_layers(model)
    batches = [media_batch(family, (1,), seed=1), media_batch(family, (2,), seed=2)]
    batches.append({"input_ids": batches[0]["input_ids"][:, -5:]})  # text alone
    outputs: list[torch.Tensor] = []  # of the layers inside the model
    handles = [
        layer.register_forward_hook(lambda _, __, output: outputs.append(output.clone()))
        for layer in layers.modules
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()

    with torch.no_grad():
        recorded = record_inputs(layers, read(model, *batches))

        for number, hidden in enumerate(recorded.hidden_states):
            for calls, layer in zip(recorded.calls, layers.modules, strict=True):
                hidden = calls[number].run(layer, hidden)
                assert torch.equal(hidden, outputs.pop(0))


@pytest.mark.parametrize("family", MEDIA_FAMILIES)
def test_other_images_give_other_hidden_states_and_another_fingerprint(family):
    model = media_model(family)
    layers = find_decoder_layers(model)
    batches = read(model, media_batch(family))
    others = read(model, with_other_values(media_batch(family)))

    with torch.no_grad():
        recorded = record_inputs(layers, batches)
        other = record_inputs(layers, others)

    assert not torch.equal(recorded.hidden_states[0], other.hidden_states[0])
    assert tokens_sha256(batches) != tokens_sha256(others)


@pytest.mark.parametrize("family", MEDIA_FAMILIES)
def test_a_batch_is_read_as_sequences_with_their_own_images_and_without_padding(family):
    model = media_model(family)
    together = media_batch(family, (1, 2), padding=3)
    masks = together["attention_mask"].bool()

    rows = read(model, together)

    assert [row.num_tokens for row in rows] == masks.sum(1).tolist()
    assert [len(batch.media) for batch in hold_out(rows, 1)] == [len(row.media) for row in rows]
    with torch.no_grad():
        expected = model(**together, use_cache=False).logits
        for row, row_expected, mask in zip(rows, expected, masks, strict=True):
            logits = model(**row.arguments(model)).logits[0]
            assert torch.allclose(logits, row_expected[mask], atol=1e-4)


def test_a_row_without_images_has_no_media():
    batch = media_batch("qwen3_vl", (2, 0, 1))

    first, second, third = read(media_model("qwen3_vl"), batch)

    assert len(first.media["image_grid_thw"]) == 2
    assert not second.media
    assert len(third.media["image_grid_thw"]) == 1
    assert torch.equal(third.media["pixel_values"], batch["pixel_values"][32:])


def test_images_of_different_sizes_are_told_apart_by_their_tokens():
    sizes = torch.tensor([[1, 4, 4], [1, 2, 2], [1, 2, 6]])  # of 4, 1 and 3 tokens
    ids = torch.tensor([[5, *[IMAGE] * 4, 6, IMAGE], [7, 8, 9, *[IMAGE] * 3, 5]])
    batch = {
        "input_ids": ids,
        "image_grid_thw": sizes,
        "pixel_values": torch.randn(16 + 4 + 12, 12),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }

    _, second = read(media_model("qwen3_vl"), batch)

    assert torch.equal(second.media["pixel_values"], batch["pixel_values"][20:])
    assert torch.equal(second.media["image_grid_thw"], sizes[2:])


def test_a_warning_tells_that_tokens_of_images_came_without_images():
    model = media_model("llava")
    batch = {"input_ids": media_batch("llava")["input_ids"]}
    pruner = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)

    message = "1 batches hold tokens that mark images or sounds, but no im"
    with ENOUGH_TOKENS, pytest.warns(UserWarning, match=message):
        pruner.prune(model, [batch])


BAD = {
    "not taken": (
        "llava",
        {"image_grid_thw": torch.ones(1, 3)},
        "'image_grid_thw', but the model takes only .*pixel_va",
    ),
    "embeddings": (
        "llava",
        {"inputs_embeds": torch.ones(1, 17, 32)},
        "holds 'inputs_embeds', but the model takes only",
    ),
    "no token": (
        "llava",
        {"input_ids": torch.ones(1, 17).long()},
        r"none of its input_ids is the token of images \(60",
    ),
    "NaN": (
        "llava",
        {"pixel_values": torch.full((1, 3, 8, 8), torch.nan)},
        "pixel_values holds NaN or Inf: pass",
    ),
    "one value": (
        "llava",
        {"pixel_values": 1.0},
        r"pixel_values has shape \(\), input_ids \(1, 17\): pass what the",
    ),
    "lists": (
        "llava",
        {"pixel_values": [torch.ones(3, 8, 8), torch.ones(3, 4, 4)]},
        "pixel_values can't be read as a",
    ),
    "types": (
        "gemma3",
        {"token_type_ids": torch.ones(1, 3)},
        r"token_type_ids has shape \(1, 3\), input_ids \(1, 17\)",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_media_are_refused_by_name(fault):
    family, values, message = BAD[fault]
    good = media_batch(family)

    with pytest.raises(ValueError, match=rf"calib_dataloader\[1\].*{message}"):
        read(media_model(family), good, good | values)


INCOMPLETE = {
    "patches of images": (
        "qwen3_vl",
        "pixel_values",
        "calib_dataloader\\[0\\] holds image_grid_thw, but no pixel_values: pass all that the model's processor",
    ),
    "sounds": (
        "qwen2_audio",
        "input_features",
        "calib_dataloader\\[0\\] holds feature_attention_mask, but no input_features: pass all that",
    ),
    "types of tokens": (
        "gemma3",
        "token_type_ids",
        "calib_dataloader\\[0\\] holds pixel_values, but no token_type_ids, .*: pass all that the model's processor",
    ),
    "types of tokens of a grid": (
        "qwen3_vl",
        "mm_token_type_ids",
        "calib_dataloader\\[0\\] holds .*, but no mm_token_type_ids, .*: pass all that the model's processor returns",
    ),
    "grids": (
        "qwen3_vl",
        "image_grid_thw",
        "Qwen3VLForConditionalGeneration .* lacks image_grid_thw .*: pass all that the model's processor returns",
    ),
    "sizes of images": (
        "mistral3",
        "image_sizes",
        "Mistral3ForConditionalGeneration .* lacks image_sizes .*: pass all that the model's processor returns",
    ),
    "mask of a sound": (
        "qwen2_audio",
        "feature_attention_mask",
        "Qwen2AudioForConditionalGeneration .* lacks feature_attention_mask .*: pass all that the model's processor",
    ),
}


@pytest.mark.parametrize("allocation", ["uniform", "fisher"])  # the second needs gradients first
@pytest.mark.parametrize("missing", INCOMPLETE)
def test_an_incomplete_batch_is_refused_with_what_it_lacks(missing, allocation):
    family, key, message = INCOMPLETE[missing]
    model, batch = media_model(family), media_batch(family)
    del batch[key]

    pruner = FistaPruner(FistaPruningConfig(allocation=allocation), progress=False)
    with pytest.raises(ValueError, match=message):
        prune(pruner, model, [batch])


def test_a_mask_that_the_model_can_do_without_may_be_missing():
    model, batch = media_model("smolvlm"), media_batch("smolvlm")
    del batch["pixel_attention_mask"]

    report = prune(FistaPruner(progress=False), model, [batch])

    assert report.calibration["media"] == ["pixel_values"]


def test_rows_whose_images_cannot_be_told_apart_are_refused():
    batch = media_batch("mistral3", (2, 1))
    batch["image_sizes"] = torch.tensor([[8, 8], [8, 4], [8, 8]])

    with pytest.raises(
        ValueError,
        match=r"has 2 sequences, and it can't be told which of them has which part of .*: pass one sequence",
    ):
        read(media_model("mistral3"), batch)


def test_features_added_between_layers_are_kept_for_their_tokens_only():
    model = media_model("qwen3_vl").bfloat16()
    batches = [media_batch("qwen3_vl", seed=seed) for seed in range(3)]
    passes: list[int] = []
    model.model.visual.register_forward_hook(lambda *_: passes.append(1))

    with torch.no_grad():
        recorded = record_inputs(find_decoder_layers(model), read(model, *batches))

    assert len(passes) == 4, "only the first batch runs twice"
    first, second, third, last = ([call.added for call in calls] for calls in recorded.calls)
    assert not any(first)
    assert not any(last)
    for added in (*second, *third):
        assert added.tokens.tolist() == [2, 3, 4, 5]
        assert added.rows[added.number].dtype == torch.bfloat16


@pytest.mark.parametrize("change", ["scaled", "in place"])
def test_changes_between_layers_that_are_no_sums_are_refused(change, monkeypatch):
    model = media_model("qwen3_vl")

    def process(hidden_states, mask, features):
        if change == "in place":
            hidden_states[mask] += features
            return hidden_states
        return hidden_states * 1.5

    monkeypatch.setattr(model.model.language_model, "_deepstack_process", process)

    with pytest.raises(
        UnsupportedArchitectureError,
        match=r"changes the hidden states in front of decoder .*layers\.1",
    ):
        record_inputs(find_decoder_layers(model), read(model, media_batch("qwen3_vl")))


def test_no_token_of_an_image_is_a_target():
    model = media_model("llava")

    assert targets_of(torch.tensor([5, IMAGE, 7]), model.config).tolist() == [5, -100, 7]


def test_a_sequence_with_images_is_never_cut():
    model = media_model("llava")
    batch = media_batch("llava")

    loss = DenseLoss(find_decoder_layers(model), read(model, batch), 2, longest=2)

    assert loss.sequences()[0].num_tokens == batch["input_ids"].shape[1]


def test_no_layer_goes_before_the_features_of_images_are_added():
    model = media_model("qwen3_vl")
    batch = media_batch("qwen3_vl")
    layers = find_decoder_layers(model)
    outline = ModelOutline(layers)
    loss = DenseLoss(layers, read(model, batch), 100)

    with torch.no_grad():
        ((removed, loss_without),) = layers_with_least_loss(loss, outline, 1)

        message = r"none of the decoder layers \[0, 1, 2\] can be removed: .* adds features"
        with pytest.raises(ValueError, match=message):
            layers_with_least_loss(loss, outline, 2)

    assert removed == 3
    model.model.language_model.layers = model.model.language_model.layers[:3]
    assert loss_without == pytest.approx(loss_of(model, batch))


def loss_of(model, batch) -> float:
    """Cross-entropy of the next token, over those that are no image."""
    ids = batch["input_ids"][0, 1:]
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits, ids.masked_fill(ids == IMAGE, -100)))


@pytest.mark.parametrize("family", MEDIA_FAMILIES)
def test_other_images_give_other_weights_and_leave_the_rest_alone(family):
    batch = media_batch(family, (1, 1), padding=2)
    first = media_model(family)
    second = media_model(family)

    prune(FistaPruner(progress=False), first, [batch])
    prune(FistaPruner(progress=False), second, [with_other_values(batch)])

    layers = find_decoder_layers(first).name
    weights = first.state_dict()
    other_weights = second.state_dict()
    for name, dense_weight in media_model(family).state_dict().items():
        is_pruned = name.startswith(layers) and name.endswith("_proj.weight")
        assert torch.equal(weights[name], dense_weight) is not is_pruned
        assert torch.equal(weights[name], other_weights[name]) is not is_pruned


@pytest.mark.parametrize("family", MEDIA_FAMILIES)
def test_the_report_names_the_media_and_measures_on_held_out_ones(family):
    held_out = media_batch(family, seed=5)
    batches = [media_batch(family), held_out | {"held_out": "photos"}]

    report = prune(FistaPruner(progress=False), media_model(family), batches)

    media = set(held_out) - {"input_ids", "attention_mask"}
    assert report.calibration["media"] == sorted(media)
    dense_loss = loss_of(media_model(family), held_out)
    assert report.perplexity["dense"] == pytest.approx(math.exp(dense_loss))


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "qwen2_audio"])
def test_a_run_from_files_goes_on_with_the_same_images_only_and_ends_as_one_in_memory(
    family, tmp_path
):
    model = media_model(family)
    model.save_pretrained(tmp_path / "dense")
    batches = [media_batch(family, (1, 2), seed=seed) for seed in range(2)]
    others = [with_other_values(batches[0], change=0.0, factor=1.001), batches[1]]
    pruner = FistaPruner(progress=False)
    places = {"output_dir": tmp_path / "out", "device": "cpu"}
    prune(pruner, model, batches)

    with interrupted_after(2), pytest.raises(KeyboardInterrupt):
        prune(pruner, tmp_path / "dense", batches, **places)
    with pytest.raises(ValueError, match=r"was another one \(calibration was"):
        prune(pruner, tmp_path / "dense", others, **places)
    prune(pruner, tmp_path / "dense", batches, **places)

    weights = type(model).from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())

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
from optimum_fista.removal.layers import choose_layers
from optimum_fista.removal.parts import ModelOutline


def read(model, *batches) -> list[CalibrationBatch]:
    return read_batches(batches, *token_limits(model), media_arguments(model))


def prune(pruner, model, batches, **places):
    with warnings.catch_warnings(), ENOUGH_TOKENS:
        warnings.simplefilter("ignore")  # of too few tokens
        return pruner.prune(model, batches, **places)


def pixels(batch) -> str:
    return "input_features" if "input_features" in batch else "pixel_values"


@pytest.mark.parametrize("family", MEDIA_FAMILIES)
def test_decoder_layers_return_what_they_return_inside_the_model(family):
    model = media_model(family)
    layers, given = find_decoder_layers(model), [media_batch(family, (n,), seed=n) for n in (1, 2)]
    given.append({"input_ids": given[0]["input_ids"][:, -5:]})  # text alone
    inside: list[torch.Tensor] = []
    keep = [
        layer.register_forward_hook(lambda _, __, out: inside.append(out.clone()))
        for layer in layers.modules
    ]
    with torch.no_grad():
        for batch in given:
            model(**batch, use_cache=False)
        for handle in keep:
            handle.remove()
        recorded = record_inputs(layers, read(model, *given))
        other = record_inputs(
            layers, read(model, given[0] | {pixels(given[0]): given[0][pixels(given[0])] + 1})
        )
        for number, hidden in enumerate(recorded.hidden_states):
            for calls, layer in zip(recorded.calls, layers.modules, strict=True):
                hidden = calls[number].run(layer, hidden)
                assert torch.equal(hidden, inside.pop(0))
    assert not torch.equal(recorded.hidden_states[0], other.hidden_states[0])


@pytest.mark.parametrize("family", MEDIA_FAMILIES)
def test_a_batch_is_read_as_sequences_with_their_own_images_and_without_padding(family):
    model, together = media_model(family), media_batch(family, (1, 2), padding=3)
    rows = read(model, together)
    assert [row.num_tokens for row in rows] == together["attention_mask"].sum(1).tolist()
    with torch.no_grad():
        expected = model(**together, use_cache=False).logits
        for row, logits, mask in zip(
            rows, expected, together["attention_mask"].bool(), strict=True
        ):
            found = model(**row.arguments(model)).logits[0]
            assert torch.allclose(found, logits[mask], atol=1e-4)
    assert [len(batch.media) for batch in hold_out(rows, 1)] == [len(row.media) for row in rows]
    alone = media_batch(family)
    other = alone | {pixels(alone): alone[pixels(alone)] + 1}
    assert tokens_sha256(read(model, alone)) != tokens_sha256(read(model, other))


def test_rows_without_images_and_images_of_different_sizes():
    model, batch = media_model("qwen3_vl"), media_batch("qwen3_vl", (2, 0, 1))
    first, second, third = read(model, batch)
    assert [
        row.media.get("image_grid_thw", torch.ones(0)).shape[0] for row in (first, second, third)
    ] == [2, 0, 1]
    assert torch.equal(third.media["pixel_values"], batch["pixel_values"][32:])
    assert not second.media
    sizes = torch.tensor(
        [[1, 4, 4], [1, 2, 2], [1, 2, 6]]
    )  # 4, 1 and 3 tokens, as the ids have them below
    ids = torch.tensor([[5, *[IMAGE] * 4, 6, IMAGE], [7, 8, 9, *[IMAGE] * 3, 5]])
    types = (ids == IMAGE).int()
    batch = {
        "input_ids": ids,
        "image_grid_thw": sizes,
        "pixel_values": torch.randn(32, 12),
        "mm_token_type_ids": types,
    }
    first, second = read(model, batch)
    assert torch.equal(second.media["pixel_values"], batch["pixel_values"][20:])
    assert torch.equal(second.media["image_grid_thw"], sizes[2:])


def test_images_that_were_forgotten_are_missed():
    batch = {"input_ids": media_batch("llava")["input_ids"]}
    with (
        ENOUGH_TOKENS,
        pytest.warns(
            UserWarning, match="1 batches hold tokens that mark images or sounds, but no im"
        ),
    ):
        FistaPruner(FistaPruningConfig(method="wanda"), progress=False).prune(
            media_model("llava"), [batch]
        )


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
    with pytest.raises(ValueError, match=rf"calib_dataloader\[1\].*{message}"):
        read(media_model(family), media_batch(family), media_batch(family) | values)


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
        match=r"which of its 2 sequences the .* belong to can't be told: pass one sequence",
    ):
        read(media_model("mistral3"), batch)


def test_features_added_between_layers_are_kept_for_their_tokens_only():
    model, given = (
        media_model("qwen3_vl").bfloat16(),
        [media_batch("qwen3_vl", seed=seed) for seed in range(3)],
    )
    passes: list[int] = []
    model.model.visual.register_forward_hook(lambda *_: passes.append(1))
    layers = find_decoder_layers(model)
    with torch.no_grad():
        recorded = record_inputs(layers, read(model, *given))
    assert len(passes) == 4, "only the first batch runs twice"
    additions = [[call.added for call in calls] for calls in recorded.calls]
    assert not any([*additions[0], *additions[3]])
    for added in (*additions[1], *additions[2]):
        assert added.tokens.tolist() == [2, 3, 4, 5]
        assert added.rows[added.number].dtype == torch.bfloat16


@pytest.mark.parametrize("change", ["scaled", "in place"])
def test_changes_that_are_no_sums_are_refused(change, monkeypatch):
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


def test_no_layer_goes_before_the_features_of_images_are_added():
    model, given = media_model("qwen3_vl"), media_batch("qwen3_vl")
    layers, batches = find_decoder_layers(model), read(model, given)
    with torch.no_grad():
        chosen = choose_layers(DenseLoss(layers, batches, 100), ModelOutline(layers), 1)
        assert [index for index, _ in chosen] == [3]
        with pytest.raises(
            ValueError,
            match=r"none of the decoder layers \[0, 1, 2\] can be removed: .* adds features",
        ):
            choose_layers(DenseLoss(layers, batches, 100), ModelOutline(layers), 2)
        model.model.language_model.layers = model.model.language_model.layers[:3]
        assert chosen[0][1] == pytest.approx(loss_of(model, given))


def loss_of(model, batch) -> float:
    ids = batch["input_ids"][0, 1:]
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits, ids.masked_fill(ids == IMAGE, -100)))


@pytest.mark.parametrize("family", MEDIA_FAMILIES)
def test_other_images_give_other_weights_and_leave_the_rest_alone(family):
    pruned = []
    for change in (0, 1):
        model, batch = media_model(family), media_batch(family, (1, 1), padding=2)
        batch[pixels(batch)] = batch[pixels(batch)] + change
        held_out = media_batch(family, seed=5)
        report = prune(
            FistaPruner(progress=False), model, [batch, held_out | {"held_out": "photos"}]
        )
        assert report.calibration["media"] == sorted(
            set(held_out) - {"input_ids", "attention_mask"}
        )
        assert report.perplexity["dense"] == pytest.approx(
            math.exp(loss_of(media_model(family), held_out))
        )
        pruned.append(model)
    dense, layers = media_model(family).state_dict(), find_decoder_layers(model).name
    first, second = (model.state_dict() for model in pruned)
    for name, weight in dense.items():
        in_layers = name.startswith(layers) and name.endswith("_proj.weight")
        assert (
            torch.equal(first[name], second[name])
            is torch.equal(first[name], weight)
            is not in_layers
        )


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "qwen2_audio"])
def test_a_run_from_files_goes_on_with_the_same_images_only_and_ends_as_one_in_memory(
    family, tmp_path
):
    model, batches = (
        media_model(family),
        [media_batch(family, (1, 2), seed=seed) for seed in range(2)],
    )
    model.save_pretrained(tmp_path / "dense")
    pruner, places = FistaPruner(progress=False), {"output_dir": tmp_path / "out", "device": "cpu"}
    prune(pruner, model, batches)
    other = batches[0] | {pixels(batches[0]): batches[0][pixels(batches[0])] * 1.001}
    with interrupted_after(2), pytest.raises(KeyboardInterrupt):
        prune(pruner, tmp_path / "dense", batches, **places)
    with pytest.raises(ValueError, match=r"was another one \(calibration was"):
        prune(pruner, tmp_path / "dense", [other, batches[1]], **places)
    prune(pruner, tmp_path / "dense", batches, **places)
    found = type(model).from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in model.state_dict().items())

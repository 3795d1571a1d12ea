"""Images, video and audio beside the tokens: which arguments of a model hold them, and which sequence each is part of.

A processor puts the patches of all images of a batch one after the other, and pads its sequences. Here each sequence
becomes a batch of its own, with its own images and without padding, so that batches can be held out and cut later on.
Placeholder tokens mark in the ids where an image is. They are tokens like others, but no model learns to predict them.
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

_KINDS = {
    "video": "video|second_per_grid|frames",
    "audio": "audio|feature|input_values|padding_mask",
    "image": "",
}
"""Kinds of media, and what the names of their arguments hold; all others are of images."""
_MAKES_MEDIA = re.compile("pixel|image|video|audio|input_features|input_values|patches")
_NOT_MEDIA = re.compile(
    "^(self|kwargs|input_ids|attention_mask|position_ids|state|noise|actions)$|embeds$|cache|past_key|coder_|logits|"
    "labels|output_|return_dict|per_layer"
)
_BY_TOKEN = re.compile("token_type_ids|position_mask|cross_attention_mask|image_attention_mask")
"""Arguments [batch, sequence, ...] with a value for every token."""


@dataclass(frozen=True)
class MediaArguments:
    """Arguments of a model for images, video and audio; empty for a model of text."""

    names: frozenset[str] = frozenset()
    placeholders: tuple[
        tuple[str, int], ...
    ] = ()  # kinds of media, each with the token id that marks its place

    def read(
        self, item: Mapping[str, Any], ids: Tensor, real: Tensor, where: str
    ) -> list[dict[str, Tensor]]:
        """Read these arguments of a batch, for each row of `ids` [batch, sequence] without padding (not `real`)."""
        rows: list[dict[str, Tensor]] = [{} for _ in ids]
        kinds: dict[str, dict[str, Tensor]] = {kind: {} for kind in _KINDS}
        for key in (key for key in item if key in self.names and item[key] is not None):
            value = as_tensor(
                item[key], where, key, "what the model's processor returns with return_tensors='pt'"
            )
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise ValueError(f"{where}: {key} holds NaN or Inf: pass another image or sound.")
            by_token = bool(_BY_TOKEN.search(key))
            if by_token and len(ids) == 1 and value.shape[:1] == ids.shape[1:]:
                value = value[None]  # [sequence] -> [1, sequence]
            if not value.ndim or (by_token and value.shape[:2] != ids.shape):
                shapes = f"has shape {tuple(value.shape)}, input_ids {tuple(ids.shape)}"
                raise ValueError(
                    f"{where}: {key} {shapes}: pass what the model's processor returns for these ids."
                )
            if by_token:
                for row, values, kept in zip(rows, value, real, strict=True):
                    row[key] = values[kept][None]
            else:
                kinds[next(kind for kind, words in _KINDS.items() if re.search(words, key))][
                    key
                ] = value
        for kind, values in kinds.items():
            tokens = sum(
                (ids == token for name, token in self.placeholders if name == kind),
                torch.zeros_like(ids),
            )
            counts, known = tokens.sum(1).tolist(), kind in dict(self.placeholders)
            if values and known and not any(counts):
                raise ValueError(
                    f"{where} holds {' and '.join(values)}, but none of its input_ids is the token of {kind}s "
                    f"({dict(self.placeholders)[kind]}): pass both as the model's processor returns them."
                )
            for row, part in zip(rows, _split(values, counts, where), strict=True):
                row |= part
        return [
            row if any(v.any() or not _BY_TOKEN.search(k) for k, v in row.items()) else {}
            for row in rows
        ]


TEXT_ONLY = MediaArguments()


def media_arguments(model: PreTrainedModel) -> MediaArguments:
    """Find which arguments of a model's forward pass hold media, by their names."""
    names = [
        name
        for name in inspect.signature(type(model).forward).parameters
        if not _NOT_MEDIA.search(name)
    ]
    if not any(_MAKES_MEDIA.search(name) for name in names):
        return TEXT_ONLY
    return MediaArguments(frozenset(names), tuple(_placeholders(model.config)))


def cut_sequence(
    batch: Mapping[str, Tensor], length: int, config: PreTrainedConfig
) -> dict[str, Tensor] | None:
    """Cut a batch of one sequence at `length` tokens; `None` if that cuts tokens of an image, or may do so."""
    ids, marks = batch["input_ids"], [token for _, token in _placeholders(config)]
    if ids.shape[1] > length and (
        not marks or torch.isin(ids[:, length:], torch.tensor(marks)).any()
    ):
        return None
    own = {"input_ids", "attention_mask"}
    return {k: v[:, :length] if k in own or _BY_TOKEN.search(k) else v for k, v in batch.items()}


def targets_of(ids: Tensor, config: PreTrainedConfig) -> Tensor:
    """The tokens to predict: `ids`, with -100 (no loss) in place of those that mark images."""
    marks = [token for _, token in _placeholders(config)]
    return (
        ids.masked_fill(torch.isin(ids, torch.tensor(marks, device=ids.device)), -100)
        if marks
        else ids
    )


def _placeholders(config: PreTrainedConfig) -> list[tuple[str, int]]:
    found = (
        (kind, getattr(config, f"{kind}_token_{word}", None))
        for kind in _KINDS
        for word in ("id", "index")
    )
    return list(dict.fromkeys((kind, token) for kind, token in found if isinstance(token, int)))


def as_tensor(value: Any, where: str, key: str, advice: str) -> Tensor:
    """Read an argument as a tensor; `advice` says what to pass instead."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{where}: {key} can't be read as a tensor ({error}): pass {advice}."
        ) from error
    return (
        tensor.clone() if tensor.is_inference() else tensor
    )  # no gradients with tensors of inference mode


def _split(values: Mapping[str, Tensor], counts: list[int], where: str) -> list[dict[str, Tensor]]:
    """Split the arguments of one kind of media into those of each row, which has `counts` placeholder tokens.

    The tokens of an image are in proportion to its patches; without a grid of patches, all images must be alike.
    """
    if not values or len(counts) == 1:
        return [dict(values) for _ in counts]
    grid = next(
        (value for key, value in values.items() if key.endswith(("grid_thw", "grid_hw"))), None
    )
    lengths = [len(value) for value in values.values()]
    patches = [1] * lengths[0] if grid is None else grid.prod(-1).tolist()  # of each image
    places, total, ends = [0, *accumulate(patches)], sum(counts), list[int | None]()
    alike = grid is not None or all(
        v.is_floating_point() or bool((v == v[:1]).all()) for v in values.values()
    )
    if len(patches) == len(counts) and (all(counts) or not total):  # one image for each row
        ends = [*range(1, len(counts) + 1)]
    elif total and alike:
        images = {place * total: image for image, place in enumerate(places)}
        ends = [images.get(tokens * places[-1]) for tokens in accumulate(counts)]
    bounds = list(pairwise([0, *(end for end in ends if end is not None)]))
    if len(bounds) < len(counts) or not {*lengths} <= {len(patches), places[-1]}:
        why = f"which of its {len(counts)} sequences the {' and '.join(values)} belong to can't be told"
        raise ValueError(f"{where}: {why}: pass one sequence a batch.")

    def part(value: Tensor, start: int, end: int) -> Tensor:
        return (
            value[start:end] if len(value) == len(patches) else value[places[start] : places[end]]
        )

    return [
        {key: part(v, *ends) for key, v in values.items()} if ends[0] < ends[1] else {}
        for ends in bounds
    ]

"""Images, video and audio beside the tokens: which arguments of a model hold them, and which sequence each is part of.

A processor of Transformers returns, besides `input_ids`, the *values* of images and sounds (`pixel_values`,
`input_features`) and arguments that describe them (`image_grid_thw`, `image_sizes`, masks). It puts the patches of all
images of a batch one after the other, and pads its sequences. Here each sequence becomes a batch of its own, with its
own images and without padding, so that batches can be held out and cut later on.

Placeholder tokens mark in `input_ids` where an image is. They are tokens like others, but no model learns to predict
them. Arguments *by token* have a value for every token of `input_ids`, such as `token_type_ids`.

`media_arguments` is called once for a model. `model.calibration.read_batches` then calls `MediaArguments.read` for
every batch of the user.
"""

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

_KINDS = {
    "video": "video|second_per_grid|frames",
    "audio": "audio|feature|input_values|padding_mask|sample_lengths",
    "image": "",
}
"""Kinds of media, and a pattern for the names of their arguments; all names that match none are of images."""
_VALUES = re.compile(
    "pixel_values|input_features$|input_values$|flattened_patches|image_patches$|audio_input_ids$"
)
"""Arguments that hold the images and sounds themselves; all others describe them."""
_MAKES_MEDIA = re.compile("pixel|image|video|audio|input_features|input_values|patches")
_NOT_MEDIA = re.compile(
    "^(self|kwargs|input_ids|attention_mask|position_ids|state|noise|actions)$|embeds$|cache|past_key|coder_|logits|"
    "labels|output_|return_dict|per_layer"
)
_BY_TOKEN = re.compile("token_type_ids|position_mask|cross_attention_mask|image_attention_mask")
"""Arguments [batch, sequence, ...] with a value for every token."""
_TYPES_OF_TOKENS = ("token_type_ids", "mm_token_type_ids")
"""Arguments without which a model runs, but masks or counts the tokens of an image as if they were text."""
_SETTINGS = re.compile("vision_feature|vision_aspect|interpolate|use_audio|downsample|sample$")
"""Arguments that no processor returns: settings of the forward pass."""


@dataclass(frozen=True)
class MediaArguments:
    """Arguments of a model for images, video and audio; empty for a model of text."""

    names: frozenset[str] = frozenset()
    # kinds of media (keys of `_KINDS`), each with the token id that marks its place in `input_ids`
    placeholders: tuple[tuple[str, int], ...] = ()

    def read(
        self, item: Mapping[str, Any], ids: Tensor, real: Tensor, where: str
    ) -> list[dict[str, Tensor]]:
        """Read the media of one batch, and split them into those of each sequence, without its padding.

        `item` is the user's batch, as the model's processor returns it. `ids` are its `input_ids` [batch, sequence],
        and `real`, bool of the same shape, is False for padding. `where` names the batch in errors, such as
        "calib_dataloader[3]". `self.names` are the arguments of the model that are read, and `self.placeholders` the
        token ids that mark media, by kind.

        Returns for each sequence its arguments, [1, sequence, ...] if they are by token. A sequence without an image
        gets none.
        """
        # the media arguments of this batch, by name
        given = {
            key: self._read_argument(key, item[key], ids, where)
            for key in item
            if key in self.names and item[key] is not None
        }
        # Refuses a batch that describes images without having them, or has them without the types of its tokens.
        self._require_whole(given, where)

        rows: list[dict[str, Tensor]] = [{} for _ in ids]  # arguments of each sequence
        # Of each kind, "video", "audio" and "image", its arguments.
        by_kind: dict[str, dict[str, Tensor]] = {kind: {} for kind in _KINDS}
        for key, value in given.items():
            if not _BY_TOKEN.search(key):
                by_kind[_kind_of(key)][key] = value
                continue
            # a value for every token: each sequence has its own
            for row, row_values, row_real in zip(rows, value, real, strict=True):
                row[key] = row_values[row_real][None]  # [sequence, ...] -> [1, real tokens, ...]

        for kind, values in by_kind.items():
            counts = self._count_placeholders(kind, ids)
            is_marked = kind in dict(self.placeholders)
            if values and is_marked and not any(counts):
                raise ValueError(
                    f"{where} holds {' and '.join(values)}, but none of its input_ids is the token of {kind}s "
                    f"({dict(self.placeholders)[kind]}): pass both as the model's processor returns them."
                )
            # `_split` finds by the counts which images are of which sequence. If no token marks this kind, there must
            # be as many images as sequences: one for each. Raises ValueError if it can't be told.
            for row, part in zip(rows, _split(values, counts, where), strict=True):
                row |= part  # changes the dictionary in `rows`

        # A sequence gets none if it has only arguments by token that are all zero: they say that every token is text.
        return [row if _says_something(row) else {} for row in rows]

    def lacking(self, given: Iterable[str]) -> list[str]:
        """Names of arguments that the model takes for the kinds of media that are given, and that are not given.

        `given` are names of arguments that a batch has. `self.names` are all media arguments of the model. Settings of
        its forward pass, which no processor returns, are left out. Changes nothing.
        """
        names = set(given)
        # of arguments by token, the name does not tell the kind
        kinds = {_kind_of(name) for name in names if not _BY_TOKEN.search(name)}
        return sorted(
            name
            for name in self.names - names
            if _kind_of(name) in kinds and not _SETTINGS.search(name)
        )

    def _read_argument(self, key: str, value: Any, ids: Tensor, where: str) -> Tensor:
        """Read one argument of a batch as a tensor, and check its shape against `ids` [batch, sequence].

        `value` is what the user passes under the name `key`, such as "pixel_values"; `where` names the batch in errors.
        """
        tensor = as_tensor(
            value, where, key, advice="what the model's processor returns with return_tensors='pt'"
        )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{where}: {key} holds NaN or Inf: pass another image or sound.")

        is_by_token = bool(_BY_TOKEN.search(key))
        lacks_batch = tensor.shape[:1] == ids.shape[1:]  # [sequence, ...]
        if is_by_token and len(ids) == 1 and lacks_batch:
            tensor = tensor[None]  # [sequence, ...] -> [1, sequence, ...]

        fits = tensor.shape[:2] == ids.shape if is_by_token else tensor.ndim > 0
        if not fits:
            raise ValueError(
                f"{where}: {key} has shape {tuple(tensor.shape)}, input_ids {tuple(ids.shape)}: pass what the model's "
                "processor returns for these ids."
            )
        return tensor

    def _require_whole(self, given: Mapping[str, Tensor], where: str) -> None:
        """Refuse a batch on which the model would run without seeing its images and sounds, or see them wrongly.

        `given` are the media arguments of the batch by name, and `self.names` all that the model takes. A batch is
        refused if it describes images but lacks the images themselves (`_VALUES`), or if it has images but not the
        types of its tokens (`_TYPES_OF_TOKENS`). Other missing arguments end in an error of the model
        (`CalibrationBatch.run`). `where` names the batch in errors, such as "calib_dataloader[3]".
        """
        for kind in _KINDS:
            of_kind = [key for key in given if _kind_of(key) == kind and not _BY_TOKEN.search(key)]
            # names under which the model takes the images or sounds themselves
            values = sorted(
                name for name in self.names if _VALUES.search(name) and _kind_of(name) == kind
            )
            has_values = any(name in given for name in values)
            if of_kind and values and not has_values:
                raise ValueError(
                    f"{where} holds {' and '.join(of_kind)}, but no {' or '.join(values)}: pass all that the model's "
                    "processor returns for these ids."
                )

        # images and sounds of any kind in this batch
        values = [key for key in given if _VALUES.search(key)]
        for name in _TYPES_OF_TOKENS:
            if values and name in self.names and name not in given:
                raise ValueError(
                    f"{where} holds {' and '.join(values)}, but no {name}, by which the model tells tokens of images "
                    "from those of text: pass all that the model's processor returns for these ids."
                )

    def _count_placeholders(self, kind: str, ids: Tensor) -> list[int]:
        """Count the tokens in each row of `ids` [batch, sequence] that mark media of a kind, such as "image".

        `self.placeholders` are pairs of a kind and the id of a token that marks it. A kind may have several, or none.
        """
        marks = torch.zeros_like(ids)
        for name, token in self.placeholders:
            if name == kind:
                marks += ids == token
        counts: list[int] = marks.sum(1).tolist()
        return counts


TEXT_ONLY = MediaArguments()


def media_arguments(model: PreTrainedModel) -> MediaArguments:
    """Find which arguments of a model's forward pass hold media, by their names; none for a model of text.

    If any name speaks of images or sounds, all arguments count but those that every model of text has (`_NOT_MEDIA`).
    The configuration says which tokens mark media. Changes nothing.
    """
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
    """Cut a batch of one sequence, as a processor returns it, at `length` tokens.

    `config` is that of the model. Returns a new dictionary, with views of the tensors. Returns `None` if one of the
    tokens after `length` belongs to an image, or may do so because the configuration names no placeholder token.
    """
    ids = batch["input_ids"]  # [1, sequence]
    if ids.shape[1] > length:
        marks = [token for _, token in _placeholders(config)]  # ids of tokens that mark media
        if not marks or torch.isin(ids[:, length:], torch.tensor(marks)).any():
            return None

    cut = {}
    for key, value in batch.items():
        is_by_token = key in ("input_ids", "attention_mask") or _BY_TOKEN.search(key)
        cut[key] = value[:, :length] if is_by_token else value
    return cut


def targets_of(ids: Tensor, config: PreTrainedConfig) -> Tensor:
    """The tokens to predict: `ids`, with -100 (no loss) in place of those that mark images and other media.

    `ids` are int64 of any shape, and `config` is that of the model. If no token marks media, `ids` itself is returned.
    """
    marks = [token for _, token in _placeholders(config)]  # ids of tokens that mark media
    if not marks:
        return ids
    is_mark = torch.isin(ids, torch.tensor(marks, device=ids.device))
    return ids.masked_fill(is_mark, -100)


def _placeholders(config: PreTrainedConfig) -> list[tuple[str, int]]:
    """The token ids in a configuration that mark media, each with its kind; no pair twice.

    An example is ("image", 151655), from the entry `image_token_id`.
    """
    pairs = []
    for kind in _KINDS:  # "video", "audio", "image"
        for word in ("id", "index"):
            token = getattr(config, f"{kind}_token_{word}", None)
            if isinstance(token, int):
                pairs.append((kind, token))
    return list(dict.fromkeys(pairs))


def as_tensor(value: Any, where: str, key: str, advice: str) -> Tensor:
    """Read an argument of a batch as a tensor that gradients can be computed with.

    `value` is a tensor, an array or nested lists. `where` and `key` name the argument in errors, such as
    "calib_dataloader[3]" and "pixel_values"; `advice` says what to pass instead. The result may share the value's
    memory.
    """
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{where}: {key} can't be read as a tensor ({error}): pass {advice}."
        ) from error
    # Tensors that were made in inference mode take part in no gradient; their copies do.
    return tensor.clone() if tensor.is_inference() else tensor


def _kind_of(name: str) -> str:
    """The kind of media, a key of `_KINDS`, that an argument is for: the first whose pattern is in its name."""
    return next(kind for kind, pattern in _KINDS.items() if re.search(pattern, name))


def _says_something(row: Mapping[str, Tensor]) -> bool:
    """Tell whether the media arguments of a sequence, by name, are more than zeros that mark all its tokens as text."""
    return any(value.any() or not _BY_TOKEN.search(key) for key, value in row.items())


def _split(
    values: Mapping[str, Tensor], counts: Sequence[int], where: str
) -> list[dict[str, Tensor]]:
    """Split the arguments of one kind of media into those of each sequence.

    Returns a dictionary for each sequence, with views of `values`; it is empty if the sequence has no image. Raises
    ValueError if it can't be told which images belong to which sequence.

    Args:
        values: Arguments of this kind by name, such as `pixel_values` [patches, size] and `image_grid_thw` [images, 3].
            They have a row for each image or for each patch, for the images of all sequences in order.
        counts: The number of placeholder tokens of this kind in each sequence of the batch, such as [256, 512].
        where: Names the batch in errors, such as "calib_dataloader[3]".
    """
    if not values:
        return [{} for _ in counts]
    has_one_sequence = len(counts) == 1
    if has_one_sequence:
        return [dict(values)]

    patches = _patches_of_images(values)  # of each image; 1 for each if no argument has its grid
    num_images = len(patches)
    # The number of the first patch of each image. One more entry, the number of all patches, ends the last image.
    patch_bounds = [0, *accumulate(patches)]
    num_patches = patch_bounds[-1]
    # Of each sequence: the number of its first image, and that of the first image after it. `None`: nobody can tell
    # which images a sequence has. Its placeholder tokens tell it if they are in proportion to the patches.
    images_of_sequences = _images_of_sequences(
        counts, patches, tokens_follow_patches=_tokens_follow_patches(values)
    )
    each_has_row_for_image_or_patch = all(
        len(value) in (num_images, num_patches) for value in values.values()
    )
    if images_of_sequences is None or not each_has_row_for_image_or_patch:
        raise ValueError(
            f"{where} has {len(counts)} sequences, and it can't be told which of them has which part of "
            f"{' and '.join(values)}: pass one sequence a batch."
        )

    values_of_sequences: list[dict[str, Tensor]] = []
    for first_image, end_image in images_of_sequences:
        values_of_sequence = {}
        has_images = first_image < end_image
        if has_images:
            images = slice(first_image, end_image)
            patches_of_images = slice(patch_bounds[first_image], patch_bounds[end_image])
            for key, value in values.items():
                has_row_for_each_image = len(value) == num_images
                rows = images if has_row_for_each_image else patches_of_images
                values_of_sequence[key] = value[rows]
        values_of_sequences.append(values_of_sequence)
    return values_of_sequences


def _grid_of(values: Mapping[str, Tensor]) -> Tensor | None:
    """The argument [images, 2 or 3] with the numbers of patches of each image along its axes, or `None`.

    `values` are arguments by name; one like `image_grid_thw` (time, height, width) is looked for.
    """
    for key, value in values.items():
        if key.endswith(("grid_thw", "grid_hw")):
            return value
    return None


def _patches_of_images(values: Mapping[str, Tensor]) -> list[int]:
    """Count the patches of each image; without a grid, each image counts as one.

    `values` are the arguments of one kind of media by name, such as `pixel_values`; there is at least one.
    """
    grid = _grid_of(values)
    if grid is None:
        any_argument = next(iter(values.values()))  # [images, ...]
        return [1] * len(any_argument)
    patches: list[int] = grid.prod(-1).tolist()
    return patches


def _tokens_follow_patches(values: Mapping[str, Tensor]) -> bool:
    """Tell whether an image with twice as many patches has twice as many placeholder tokens.

    It has if there is a grid of patches (the numbers of patches of each image), or if all images are alike: whatever
    describes them is the same for all. `values` are the arguments of one kind of media by name, such as `pixel_values`.
    Without a grid, each is [images, ...]. Changes nothing.
    """
    if _grid_of(values) is not None:
        return True
    # Images themselves are floating point, and have one size because they are in one tensor: they may differ. Integers
    # and booleans describe images: here each must be equal to the first one's.
    return all(
        value.is_floating_point() or bool((value == value[:1]).all()) for value in values.values()
    )


def _images_of_sequences(
    counts: Sequence[int], patches: Sequence[int], *, tokens_follow_patches: bool
) -> list[tuple[int, int]] | None:
    """Find for each sequence the number of its first image, and of the first one after it; `None` if unclear.

    `counts` are the numbers of placeholder tokens of the sequences, and `patches` are the numbers of patches of the
    images. If tokens are in proportion to patches (`tokens_follow_patches`), a sequence ends with the image at which
    the same share of all tokens and of all patches is reached.
    """
    num_tokens = sum(counts)
    num_patches = sum(patches)
    # Sequences differ if some have placeholder tokens and some have none. If none has any, no placeholder is known.
    all_or_none_are_marked = all(counts) or num_tokens == 0
    has_as_many_images = len(patches) == len(counts)
    if has_as_many_images and all_or_none_are_marked:  # one image each
        return list(pairwise(range(len(counts) + 1)))  # (0, 1), (1, 2), ...
    if num_tokens == 0 or not tokens_follow_patches:
        return None

    # A sequence ends with the image up to which the share of patches is equal to its share of tokens:
    #     patches_up_to / num_patches = tokens_up_to / num_tokens.
    # Shares are rounded, so both sides are multiplied by both totals: these integers are compared.
    num_images_of_share = {
        patches_up_to * num_tokens: num_images
        for num_images, patches_up_to in enumerate([0, *accumulate(patches)])
    }
    # Of each sequence, the number of images up to its end; `None` if no image ends there.
    ends = [
        num_images_of_share.get(tokens_up_to * num_patches) for tokens_up_to in accumulate(counts)
    ]
    known_ends = [end for end in ends if end is not None]
    if len(known_ends) < len(ends):
        return None
    return list(pairwise([0, *known_ends]))

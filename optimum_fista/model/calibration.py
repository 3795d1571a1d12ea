"""Calibration batches: the user's data is read once, checked, and fingerprinted.

A loader may give batches in any form that Transformers' models take. Ids and a mask are used, and images or audio if
the model takes them (`media`). Other arguments that would change the model's output are refused by name, because they
must not be ignored in silence.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from optimum_fista.model.media import TEXT_ONLY, MediaArguments, as_tensor
from optimum_fista.model.offload import execution_device

_NOT_READ = re.compile(
    "pixel|image|video|audio|bbox|embeds|input_(features|values)|coder_|cross_attention|token_type_ids|"
    "past_key_values|^cache$|per_layer_inputs|langs|mems|perm_mask"
)
"""Arguments that change a model's output for the same tokens."""


@dataclass(frozen=True)
class CalibrationBatch:
    """One batch of token ids; a sequence with images is alone in its batch, without padding."""

    input_ids: Tensor  # int64 [batch, sequence]
    attention_mask: Tensor | None = (
        None  # bool [batch, sequence], True = a real token; None when all are
    )
    held_out: bool = False  # whether no weight is fitted to it
    text: str | None = None  # name of its text, if known
    bytes_per_token: float | None = None  # of its text in UTF-8, if known
    media: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # other arguments of the model: images, types of tokens

    @property
    def num_tokens(self) -> int:
        """Number of real tokens."""
        return (
            self.input_ids.numel()
            if self.attention_mask is None
            else int(self.attention_mask.sum())
        )

    def rows(self) -> Iterator[Self]:
        """Every sequence as a batch of its own, without padding."""
        for row, ids in enumerate(self.input_ids):
            real = ids if self.attention_mask is None else ids[self.attention_mask[row]]
            yield replace(self, input_ids=real[None], attention_mask=None)

    def arguments(self, model: PreTrainedModel) -> dict[str, Any]:
        """Arguments to run a model with, where it computes; images are in its dtype."""
        device, mask = execution_device(model.get_input_embeddings()), self.attention_mask
        media = {
            k: v.to(device, model.dtype if v.is_floating_point() else v.dtype)
            for k, v in self.media.items()
        }
        mask = None if mask is None else mask.to(device).long()
        return {
            "input_ids": self.input_ids.to(device),
            "attention_mask": mask,
            "use_cache": False,
            **media,
        }

    def sequences(self, start: int, stop: int) -> Self:
        """A batch of some of the sequences."""
        mask = None if self.attention_mask is None else self.attention_mask[start:stop]
        mask = (
            None if mask is None or bool(mask.all()) else mask
        )  # attention is quicker without one
        return replace(self, input_ids=self.input_ids[start:stop], attention_mask=mask)


def read_batches(
    loader: Iterable[Any],
    vocab_size: int,
    longest: int | None = None,
    media: MediaArguments = TEXT_ONLY,
) -> list[CalibrationBatch]:
    """Read every batch of a calibration loader once, and move padding to the end of each sequence.

    The loader is an iterable of dicts with `input_ids` (and `attention_mask`), tensors of ids [batch, sequence] or
    [sequence], or lists of ids: a `torch.utils.data.DataLoader`, a data set or a generator. A sequence may have
    `longest` tokens; `None`: any number. `labels`, which data collators add, are ignored. `held_out` marks a batch that
    only measures; its value may be the name of the text. A dict may also hold images and the like as the model's
    processor returns them, if they are among the model's `media` arguments; then every sequence becomes a batch.
    """
    if isinstance(loader, Mapping | str) or not isinstance(loader, Iterable | Dataset):
        wanted = "batches, such as a DataLoader or a list of {'input_ids': ..., 'attention_mask': ...} dicts"
        raise ValueError(
            f"calib_dataloader is a {type(loader).__name__}: pass an iterable of {wanted}."
        )
    items: Iterable[Any] = loader
    if isinstance(loader, Tensor) and loader.ndim < 2:
        items = [loader]  # a tensor [sequences, length] gives one sequence after another
    elif isinstance(loader, list | tuple) and loader and all(isinstance(i, int) for i in loader):
        items = [loader]
    elif (
        isinstance(loader, Dataset)
        and not isinstance(loader, Iterable)
        and hasattr(loader, "__len__")
    ):
        items = (loader[i] for i in range(len(loader)))  # Python would read on until an IndexError
    batches = list[CalibrationBatch]()
    for number, item in enumerate(items):
        batches += _read_batch(item, f"calib_dataloader[{number}]", vocab_size, longest, media)
    if not batches:
        raise ValueError(
            "calib_dataloader gave no batch: pass at least one batch; a generator can be read only once."
        )
    if not any(batch.num_tokens for batch in batches):
        raise ValueError("calib_dataloader holds no real token: every attention_mask is zero.")
    return batches


def hold_out(batches: Sequence[CalibrationBatch], num_sequences: int) -> list[CalibrationBatch]:
    """Mark the last sequences as held out; if they begin inside a batch, it is cut in two."""
    if not num_sequences:
        return list(batches)
    total = sum(batch.input_ids.shape[0] for batch in batches)
    if num_sequences >= total:
        why = f"calib_dataloader holds {total} sequences, so none is left to calibrate on"
        raise ValueError(
            f"held_out={num_sequences}: {why}: pass a smaller number, or more sequences."
        )
    found, left = list[CalibrationBatch](), total - num_sequences
    for batch in batches:
        size = batch.input_ids.shape[0]
        cut = min(left, size)
        parts = ((0, cut, False), (cut, size, True))
        found += [
            replace(batch.sequences(start, stop), held_out=kind)
            for start, stop, kind in parts
            if start < stop
        ]
        left -= cut
    for held_out, name in ((False, "other"), (True, "held-out")):
        if not any(batch.num_tokens for batch in found if batch.held_out == held_out):
            why = f"the {name} sequences hold no real token, every attention_mask is zero"
            raise ValueError(f"held_out={num_sequences}: {why}.")
    return found


def describe_batches(batches: Sequence[CalibrationBatch]) -> dict[str, Any]:
    """Describe for the report the text (and images) to fit to, and the `held_out` ones if there are any."""
    described = [
        {
            "sha256": tokens_sha256(chosen),
            "num_sequences": sum(batch.input_ids.shape[0] for batch in chosen),
            "num_tokens": sum(batch.num_tokens for batch in chosen),
        }
        | (
            {"media": media}
            if (media := sorted({name for batch in chosen for name in batch.media}))
            else {}
        )
        for held_out in (False, True)
        if (chosen := [batch for batch in batches if batch.held_out == held_out]) or not held_out
    ]
    return described[0] | ({"held_out": described[1]} if described[1:] else {})


def shapes_of(batches: Sequence[CalibrationBatch]) -> list[list[int]]:
    """`[count, sequences, tokens]` of batches of equal shape that follow each other."""
    shapes = itertools.groupby(list(batch.input_ids.shape) for batch in batches)
    return [[len(list(same)), *shape] for shape, same in shapes]


def tokens_sha256(batches: Sequence[CalibrationBatch]) -> str:
    """SHA-256 of all real tokens (and images) with the sequence boundaries, whatever the batch size."""
    digest = hashlib.sha256()
    for batch in batches:
        for row in batch.rows():
            # the bar ends a sequence, so that the hash depends on how tokens are cut into sequences
            digest.update(row.input_ids.cpu().to(torch.int64).numpy().tobytes() + b"|")
            for name, values in sorted(row.media.items()):
                digest.update(f"{name} {values.dtype} {tuple(values.shape)} ".encode())
                digest.update(
                    values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
                )
    return digest.hexdigest()


def _read_batch(
    item: Any, where: str, vocab_size: int, longest: int | None, media: MediaArguments
) -> list[CalibrationBatch]:
    others: Mapping[str, Any] = {}
    if isinstance(item, Mapping):
        for key, value in item.items():
            known = (
                value is None
                or isinstance(value, str)
                or key in media.names
                or not _NOT_READ.search(key)
            )
            if not known and (
                not key.endswith("token_type_ids") or torch.as_tensor(value).any()
            ):  # 0: the default
                taken = ", ".join(sorted(media.names))
                takes = f"takes only {taken} besides" if taken else "runs on token ids only"
                advice = "pass text without it, as 'input_ids' (and 'attention_mask')"
                raise ValueError(f"{where} holds {key!r}, but the model {takes}: {advice}.")
        if "input_ids" not in item:
            raise ValueError(
                f"{where} has the keys {sorted(item)}: pass 'input_ids' (and 'attention_mask')."
            )
        others, item = item, item["input_ids"]
    elif isinstance(item, list | tuple) and len(item) == 1 and isinstance(item[0], Tensor):
        item = item[0]  # a batch of a TensorDataset
    ids = _as_rows(item, where, "input_ids").to(torch.int64)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        why = f"the token id {low if low < 0 else high}, outside the model's vocabulary [0, {vocab_size})"
        raise ValueError(
            f"{where}: input_ids holds {why}: tokenise with the model's own tokenizer."
        )
    if longest is not None and ids.shape[1] > longest:
        most = f"{longest}, the model's max_position_embeddings (--sequence-length {longest})"
        raise ValueError(f"{where} holds sequences of {ids.shape[1]} tokens: pass at most {most}.")
    real = _real_tokens(ids, others, where)
    # Real tokens come first: models count positions, and recurrent models keep states, from the first token on.
    order = real.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    held_out = others.get("held_out")
    text = held_out if isinstance(held_out, str) else None
    mask = None if bool(real.all()) else real.gather(1, order)
    batch = CalibrationBatch(
        ids.gather(1, order), mask, bool(held_out), text, others.get("bytes_per_token")
    )
    read = media.read(others, ids, real, where) if media.names else []
    if not any(read):
        return [batch]
    rows = zip(batch.rows(), read, strict=True)
    return [replace(row, media=MappingProxyType(part)) for row, part in rows if row.num_tokens]


def _real_tokens(ids: Tensor, others: Mapping[str, Any], where: str) -> Tensor:
    """Find which tokens are real, bool [batch, sequence]; they must be consecutive, one document in every row.

    Several documents in one row are refused: the model would read them as one, because it gets no boundaries.
    """
    mask = others.get("attention_mask")
    numbers = torch.ones_like(ids) if mask is None else _as_rows(mask, where, "attention_mask", ids)
    real = numbers.bool()
    packing = [
        key for key in ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k") if others.get(key) is not None
    ]
    if int(numbers.max()) > 1:  # 1, 1, 2, 2: two documents
        packing.append("attention_mask")
    if others.get("position_ids") is not None:
        positions = _as_rows(others["position_ids"], where, "position_ids", ids)
        # counted from the first token of a row, or from the first real one
        usual = (torch.arange(ids.shape[1]).to(ids).expand_as(ids), real.cumsum(1) - 1)
        if not any(torch.equal(positions[real], places[real]) for places in usual):
            packing.append("position_ids")
    if packing:
        why = f"{packing[0]} says that a row holds several documents, or begins late"
        raise ValueError(
            f"{where}: {why}: pass every document as a sequence of its own, without {packing[0]}."
        )
    begins = real[:, 1:] & ~real[:, :-1]
    if bool((begins.sum(1) + real[:, 0] > 1).any()):
        why = "attention_mask has a hole, zeros between two tokens"
        raise ValueError(f"{where}: {why}: pass zeros only before or after all tokens.")
    return real


def _as_rows(values: Any, where: str, key: str, like: Tensor | None = None) -> Tensor:
    """Read integers [batch, sequence]; with `like`, they must have its shape, and get its dtype and device."""
    rows = as_tensor(values, where, key, "ids [batch, sequence] of equal length")
    if rows.ndim == 1:
        rows = rows.unsqueeze(0)
    found = f"{where}: {key} has shape {tuple(rows.shape)}"
    if rows.ndim != 2 or rows.numel() == 0 or rows.is_floating_point() or rows.is_complex():
        wanted = "integers [batch, sequence] or [sequence], at least one"
        raise ValueError(f"{found} and dtype {rows.dtype}: pass {wanted}.")
    if like is not None and rows.shape != like.shape:
        raise ValueError(f"{found}, input_ids {tuple(like.shape)}: pass one value a token.")
    return rows if like is None else rows.to(like)


def cut_batches(
    batches: Sequence[CalibrationBatch], sizes: Sequence[int]
) -> list[CalibrationBatch]:
    """Cut batches into batches of other sizes; no new batch has sequences of two old ones."""
    lengths = [batch.input_ids.shape[0] for batch in batches]
    return [batches[number].sequences(start, end) for number, start, end in pieces(lengths, sizes)]


def pieces(lengths: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """For each piece, the number of its batch and its first and last row; pieces end where their batch ends."""
    wanted = iter(sizes)
    for number, length in enumerate(lengths):
        start = 0
        while start < length:
            end = start + next(wanted)
            yield number, start, end
            start = end

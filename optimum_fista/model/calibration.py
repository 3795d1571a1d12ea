"""Calibration batches: reading what users pass, checking it, and fingerprinting the tokens."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

_NOT_READ = re.compile(
    "pixel|image|video|audio|bbox|embeds|input_(features|values)|coder_|cross_attention|token_type_ids|"
    "past_key_values|per_layer_inputs|langs|mems|perm_mask"
)
"""Arguments of models that change what they make of tokens."""
_PACKING = ("seq_idx", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k")


@dataclass(frozen=True)
class CalibrationBatch:
    """One batch of token ids.

    Attributes:
        input_ids: int64 [batch, sequence].
        attention_mask: bool [batch, sequence], True = a real token; `None` when all are.
        held_out: Whether no weight is fitted to it.
        text: Name of the text that it is of, if known.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    held_out: bool = False
    text: str | None = None

    @property
    def num_tokens(self) -> int:
        """Number of real tokens."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    def rows(self) -> Iterator[Tensor]:
        """The ids of every sequence, without padding."""
        for row, ids in enumerate(self.input_ids):
            yield ids if self.attention_mask is None else ids[self.attention_mask[row]]

    def sequences(self, start: int, stop: int) -> CalibrationBatch:
        """A batch of some of the sequences."""
        mask = None if self.attention_mask is None else self.attention_mask[start:stop]
        return replace(self, input_ids=self.input_ids[start:stop], attention_mask=mask)


def read_batches(loader: Iterable[Any], vocab_size: int, longest: int | None = None) -> list[CalibrationBatch]:
    """Read every batch of a calibration loader once; padding in front of tokens moves to the end of their sequence.

    Documents that are packed in a row become sequences of their own, and padded batches no larger than theirs. They are
    known by numbers in `attention_mask` (1, 1, 2, 2) or `seq_idx`, `position_ids` that begin again, and
    `cu_seq_lens_q`. Nothing depends on `labels`, which data collators add. `held_out` marks a batch that no weight is
    fitted to; it may name the text.

    The loader is an iterable of dicts with `input_ids` (and `attention_mask`), tensors of ids [batch, sequence] or
    [sequence], or lists of ids: a `torch.utils.data.DataLoader`, a data set or a generator. A sequence may have
    `longest` tokens; `None`: any number.
    """
    if isinstance(loader, Mapping | str) or not isinstance(loader, Iterable | Dataset):
        raise ValueError(
            f"calib_dataloader is a {type(loader).__name__}: pass an iterable of batches, such as a DataLoader "
            "or a list of {'input_ids': ..., 'attention_mask': ...} dicts."
        )
    items = enumerate(_items(loader))
    batches = [batch for i, item in items for batch in _read_batch(item, f"calib_dataloader[{i}]", vocab_size, longest)]
    if not batches:
        raise ValueError(
            "calib_dataloader gave no batch: pass at least one batch of token ids; a generator can be read only once."
        )
    if not any(batch.num_tokens for batch in batches):
        raise ValueError("calib_dataloader holds no real token: every attention_mask is zero.")
    return batches


def hold_out(batches: Sequence[CalibrationBatch], num_sequences: int) -> list[CalibrationBatch]:
    """Mark the last sequences as held out; a batch that they begin in is cut in two."""
    if not num_sequences:
        return list(batches)
    total = sum(batch.input_ids.shape[0] for batch in batches)
    if num_sequences >= total:
        raise ValueError(
            f"held_out={num_sequences}: calib_dataloader holds {total} sequences, so none is left to calibrate on: "
            "pass a smaller number, or more sequences."
        )
    found, left = [], total - num_sequences
    for batch in batches:
        size = batch.input_ids.shape[0]
        cut = min(left, size)
        if cut:
            found.append(_without_idle_mask(batch.sequences(0, cut)))
        if cut < size:
            found.append(replace(_without_idle_mask(batch.sequences(cut, size)), held_out=True))
        left -= cut
    for held_out, name in ((False, "other"), (True, "held-out")):
        if not any(batch.num_tokens for batch in found if batch.held_out == held_out):
            raise ValueError(
                f"held_out={num_sequences}: the {name} sequences hold no real token, every attention_mask is zero."
            )
    return found


def tokens_sha256(batches: Sequence[CalibrationBatch]) -> str:
    """SHA-256 of all real tokens with the sequence boundaries, whatever the batch size."""
    digest = hashlib.sha256()
    for batch in batches:
        for ids in batch.rows():
            # The bar ends a sequence: tokens that are cut into other sequences have another hash.
            digest.update(ids.cpu().to(torch.int64).numpy().tobytes() + b"|")
    return digest.hexdigest()


def _without_idle_mask(batch: CalibrationBatch) -> CalibrationBatch:
    """The batch without a mask if all its tokens are real."""
    mask = batch.attention_mask
    return batch if mask is None or not bool(mask.all()) else replace(batch, attention_mask=None)


def _items(loader: Iterable[Any]) -> Iterable[Any]:
    if isinstance(loader, Tensor):
        # Iterating over a tensor [sequences, length] gives batches of one sequence.
        return loader.unsqueeze(0) if loader.ndim < 2 else loader
    if isinstance(loader, list | tuple) and loader and all(isinstance(i, int) for i in loader):
        return [loader]
    if isinstance(loader, Dataset) and not isinstance(loader, Iterable) and hasattr(loader, "__len__"):
        return (loader[i] for i in range(len(loader)))
    return loader


def _read_batch(item: Any, where: str, vocab_size: int, longest: int | None) -> list[CalibrationBatch]:
    packing: dict[str, Any] = {}
    mask, held_out = None, None
    if isinstance(item, Mapping):
        for key, value in item.items():
            if value is None or isinstance(value, str) or not _NOT_READ.search(key):
                continue
            if not key.endswith("token_type_ids") or torch.as_tensor(value).any():
                raise ValueError(
                    f"{where} holds {key!r}, and the model is only run on token ids: pass text without it, as "
                    "'input_ids' (and 'attention_mask')."
                )
        if "input_ids" not in item:
            raise ValueError(f"{where} has the keys {sorted(item)}: pass 'input_ids' (and 'attention_mask').")
        packing = {key: item[key] for key in _PACKING if item.get(key) is not None}
        mask, held_out = item.get("attention_mask"), item.get("held_out")
        item = item["input_ids"]
    # A batch of a TensorDataset.
    elif isinstance(item, list | tuple) and len(item) == 1 and isinstance(item[0], Tensor):
        item = item[0]
    ids = _as_rows(item, where, "input_ids").to(torch.int64)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise ValueError(
            f"{where}: input_ids holds the token id {bad}, outside the model's vocabulary [0, {vocab_size}): "
            "tokenise with the model's own tokenizer."
        )
    numbers = torch.ones_like(ids) if mask is None else _like(ids, mask, where, "attention_mask")
    documents = _documents(ids, numbers, packing, where)
    if len(documents) > int(numbers.any(1).sum()):  # rows of several documents
        batches = _padded(documents, ids.numel())
    else:  # real tokens first: models count positions, and recurrent ones carry states, from the first token on
        real = numbers.bool()
        order = real.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        batches = [_without_idle_mask(CalibrationBatch(ids.gather(1, order), real.gather(1, order)))]
    length = max(batch.input_ids.shape[1] for batch in batches)
    if longest is not None and length > longest:
        raise ValueError(
            f"{where} holds sequences of {length} tokens: pass at most {longest}, the model's max_position_embeddings "
            f"(--sequence-length {longest})."
        )
    text = held_out if isinstance(held_out, str) else None
    return [replace(batch, held_out=bool(held_out), text=text) for batch in batches]


def _documents(ids: Tensor, numbers: Tensor, packing: Mapping[str, Any], where: str) -> list[Tensor]:
    """The ids of every document, in order; a row may hold several.

    A document ends where another number begins in `numbers` [batch, sequence] (0: padding) or `seq_idx`, where
    `position_ids` begin again, and at the ends that `cu_seq_lens_q` and `cu_seq_lens_k` name.
    """
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = numbers.diff() != 0
    for row in numbers:
        runs = row.unique_consecutive()
        if len(runs[runs != 0]) > len(row[row != 0].unique()):
            raise ValueError(
                f"{where}: attention_mask has a hole, zeros or another document between two tokens of the same number: "
                "pass zeros only before or after a document."
            )
    if "seq_idx" in packing:
        starts[:, 1:] |= _like(ids, packing["seq_idx"], where, "seq_idx").diff() != 0
    if "position_ids" in packing:
        positions = _like(ids, packing["position_ids"], where, "position_ids")
        starts[:, 1:] |= positions.diff() != 1
        rows, columns = (starts & numbers.bool()).nonzero(as_tuple=True)
        first = positions[rows, columns]
        if not bool(((first == 0) | (first == columns)).all()):
            raise ValueError(
                f"{where}: position_ids are neither 0, 1, 2, ... from the beginning of every document nor of every "
                "row: leave position_ids out, or let them begin at 0."
            )
    for key in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if key in packing:
            ends = torch.as_tensor(packing[key]).reshape(-1).tolist()
            if ends != sorted({*ends, 0, ids.numel()}):
                raise ValueError(f"{where}: {key} is {ends}: pass rising numbers from 0 to {ids.numel()}, all tokens.")
            starts.view(-1)[ends[1:-1]] = True
    begins = starts.view(-1).nonzero()[:, 0].tolist()
    parts = zip(begins, [*begins[1:], ids.numel()], strict=True)
    return [ids.reshape(-1)[begin:end] for begin, end in parts if numbers.reshape(-1)[begin]]


def _padded(documents: Sequence[Tensor], most: int) -> list[CalibrationBatch]:
    """Batches of documents in their order, each a row, of at most so many tokens with padding."""
    groups: list[list[Tensor]] = [[]]
    for ids in documents:
        if groups[-1] and max(map(len, [*groups[-1], ids])) * (len(groups[-1]) + 1) > most:
            groups.append([])
        groups[-1].append(ids)
    padded = [pad_sequence(group, batch_first=True) for group in groups]
    masks = [pad_sequence([torch.ones_like(ids, dtype=torch.bool) for ids in g], batch_first=True) for g in groups]
    return [_without_idle_mask(CalibrationBatch(ids, mask)) for ids, mask in zip(padded, masks, strict=True)]


def _like(ids: Tensor, values: Any, where: str, key: str) -> Tensor:
    """Values for every token of `ids`, int64."""
    rows = _as_rows(values, where, key)
    if rows.shape != ids.shape:
        raise ValueError(
            f"{where}: {key} has shape {tuple(rows.shape)}, input_ids {tuple(ids.shape)}: pass one value a token."
        )
    return rows.to(ids)


def _as_rows(values: Any, where: str, key: str) -> Tensor:
    try:
        rows = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{where}: {key} can't be read as a tensor ({error}): pass ids [batch, sequence] of equal length."
        ) from error
    if rows.ndim == 1:
        rows = rows.unsqueeze(0)
    if rows.ndim != 2 or rows.numel() == 0 or rows.is_floating_point() or rows.is_complex():
        raise ValueError(
            f"{where}: {key} has shape {tuple(rows.shape)} and dtype {rows.dtype}: pass integers "
            "[batch, sequence] or [sequence], at least one."
        )
    return rows.clone() if rows.is_inference() else rows  # gradients can't be taken with tensors of inference mode

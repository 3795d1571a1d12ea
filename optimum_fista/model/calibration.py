"""Calibration batches: reading what users pass, checking it, and fingerprinting the tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


@dataclass(frozen=True)
class CalibrationBatch:
    """One batch of token ids.

    Attributes:
        input_ids: int64 [batch, sequence].
        attention_mask: bool [batch, sequence], True = a real token; `None` when all are.
        held_out: Whether errors are measured on it and no weight is fitted to it.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    held_out: bool = False

    @property
    def num_tokens(self) -> int:
        """Number of real tokens."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    def sequences(self, start: int, stop: int) -> CalibrationBatch:
        """A batch of some of the sequences."""
        mask = None if self.attention_mask is None else self.attention_mask[start:stop]
        return replace(self, input_ids=self.input_ids[start:stop], attention_mask=mask)


def read_batches(loader: Iterable[Any], vocab_size: int) -> list[CalibrationBatch]:
    """Read every batch of a calibration loader once; padding in front of tokens moves to the end of their sequence.

    Args:
        loader: Iterable of dicts with `input_ids` (and `attention_mask`), tensors of ids [batch, sequence] or
            [sequence], or lists of ids; a `torch.utils.data.DataLoader`, a data set or a generator.
        vocab_size: Number of rows of the input embedding.

    Raises:
        ValueError: If the loader is empty, an item has no ids or an impossible mask, or an id lies outside
            [0, vocab_size).
    """
    if isinstance(loader, Mapping | str) or not isinstance(loader, Iterable | Dataset):
        raise ValueError(
            f"calib_dataloader is a {type(loader).__name__}: pass an iterable of batches, such as a DataLoader "
            "or a list of {'input_ids': ..., 'attention_mask': ...} dicts."
        )
    batches = [_read_batch(item, i, vocab_size) for i, item in enumerate(_items(loader))]
    if not batches:
        used_up = isinstance(loader, Iterator)
        raise ValueError(
            "calib_dataloader gave no batch: "
            + (
                "it is a generator, which can be read only once, and has been read before. Pass a list or a "
                "DataLoader, or make a new generator."
                if used_up
                else "pass at least one batch of token ids."
            )
        )
    if not any(batch.num_tokens for batch in batches):
        raise ValueError("calib_dataloader holds no real token: every attention_mask is zero.")
    return batches


def hold_out(batches: Sequence[CalibrationBatch], num_sequences: int) -> list[CalibrationBatch]:
    """Mark the last sequences as held out; a batch that they begin in is cut in two.

    Raises:
        ValueError: If no real token is left to calibrate on, or none is held out although sequences are.
    """
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
        for row, ids in enumerate(batch.input_ids.cpu()):
            real = ids if batch.attention_mask is None else ids[batch.attention_mask[row].cpu()]
            # The bar ends a sequence: tokens that are cut into other sequences have another hash.
            digest.update(real.to(torch.int64).numpy().tobytes() + b"|")
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


def _read_batch(item: Any, index: int, vocab_size: int) -> CalibrationBatch:
    where = f"calib_dataloader[{index}]"
    mask = None
    if isinstance(item, Mapping):
        if "input_ids" not in item:
            raise ValueError(f"{where} has the keys {sorted(item)}: pass 'input_ids' (and 'attention_mask').")
        mask = item.get("attention_mask")
        item = item["input_ids"]
    # A batch of a TensorDataset.
    elif isinstance(item, list | tuple) and len(item) == 1 and isinstance(item[0], Tensor):
        item = item[0]
    ids = _as_rows(item, where, "input_ids").to(torch.int64)
    low, high = int(ids.min()), int(ids.max())
    if mask is not None:
        mask = _as_rows(mask, where, "attention_mask").bool()
        if mask.shape != ids.shape:
            raise ValueError(
                f"{where}: attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}: "
                "pass one mask value a token."
            )
        if bool(mask.all()):
            mask = None
        else:  # real tokens first: models count positions, and recurrent ones carry states, from the first token on
            order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
            ids, mask = ids.gather(1, order), mask.gather(1, order)
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise ValueError(
            f"{where}: input_ids holds the token id {bad}, outside the model's vocabulary [0, {vocab_size}): "
            "tokenise with the model's own tokenizer."
        )
    return CalibrationBatch(ids, mask)


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

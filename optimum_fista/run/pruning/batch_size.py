"""Smaller batches if the memory of the device does not suffice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optimum_fista.model.activation_store import ActivationStore, Storage
from optimum_fista.model.activations import HiddenStates
from optimum_fista.model.calibration import CalibrationBatch


def halved_sizes(batches: Sequence[CalibrationBatch], reason: str) -> list[int]:
    """Numbers of sequences when every batch is cut in two.

    Raises:
        torch.OutOfMemoryError: If every batch is one sequence already.
    """
    sizes = [batch.input_ids.shape[0] for batch in batches]
    if max(sizes) == 1:
        longest = max(batch.input_ids.shape[1] for batch in batches)
        raise torch.OutOfMemoryError(
            f"the device ran out of memory on a batch of one sequence of {longest} tokens: pass "
            f"storage_device='cpu' (--storage-device cpu) or shorter sequences (--sequence-length) [{reason}]"
        )
    return halves(sizes)


def halves(sizes: Sequence[int]) -> list[int]:
    """Every number cut in two, 1 left as it is."""
    return [part for size in sizes for part in ((size + 1) // 2, size // 2) if part]


def cut_batches(batches: Sequence[CalibrationBatch], sizes: Sequence[int]) -> list[CalibrationBatch]:
    """The same sequences in batches of other sizes, none of which reaches over the end of a batch."""
    cut, wanted = [], iter(sizes)
    for batch in batches:
        row = 0
        while row < batch.input_ids.shape[0]:
            end = row + next(wanted)
            cut.append(batch.sequences(row, end))
            row = end
    return cut


def cut_states(states: HiddenStates, sizes: Sequence[int], storage: Storage, device: torch.device) -> HiddenStates:
    """The same hidden states in batches of other sizes, kept at `storage`."""

    def cut(stream: Sequence[Tensor] | None) -> ActivationStore | None:
        if stream is None:
            return None
        store, wanted = ActivationStore(storage, device), iter(sizes)
        for hidden in stream:
            row = 0
            while row < hidden.shape[0]:
                size = next(wanted)
                store.append(hidden[row : row + size])
                row += size
        return store

    dense = cut(states.dense)
    return HiddenStates(dense, dense if states.pruned is states.dense else cut(states.pruned))

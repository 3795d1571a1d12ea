"""The calibration batches of a run, made smaller if the memory of the device does not suffice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_fista.model.activation_store import ActivationStore, Storage
from optimum_fista.model.activations import HiddenStates
from optimum_fista.model.architecture import DecoderLayers
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.hidden_states import RecordedInputs, record_inputs
from optimum_fista.model.offload import execution_device
from optimum_fista.run.memory import is_out_of_memory, release_free_memory
from optimum_fista.run.reports.report import PruningReport


class RunBatches:
    """Calibration batches of one run; every cut is a line of its report.

    Attributes:
        all: The batches, held-out ones at the end.
    """

    def __init__(
        self, model: PreTrainedModel, layers: DecoderLayers, batches: list[CalibrationBatch], report: PruningReport
    ) -> None:
        self.all = batches
        self._model = model
        self._layers = layers
        self._report = report

    @property
    def calibration(self) -> list[CalibrationBatch]:
        """Those that weights are fitted to."""
        return [batch for batch in self.all if not batch.held_out]

    def use_sizes_of(self, states: HiddenStates) -> None:
        """Cut the batches as those of hidden states that a run before has left."""
        sizes = [hidden.shape[0] for hidden in states.entering]
        if sizes != [batch.input_ids.shape[0] for batch in self.all]:
            self.all = cut_batches(self.all, sizes)
            self._report.warnings.append(f"continues with the batches of the last run, {max(sizes)} sequences at most")

    def halve(self, where: str, reason: str, states: HiddenStates | None, storage: Storage) -> HiddenStates | None:
        """Cut every batch in two after the device ran out of memory in `where`; `reason` is what it said.

        Returns:
            The hidden states that enter the decoder layer at hand, in the new batches.
        """
        sizes = halved_sizes(self.all, reason)
        self.all = cut_batches(self.all, sizes)
        if states is not None:
            states = cut_states(states, sizes, storage, execution_device(self._model.get_input_embeddings()))
        release_free_memory(collect=True)
        self._report.warn(
            f"out of memory in {where}: batches of {max(sizes)} sequences from here on ({reason.splitlines()[0]})"
        )
        return states

    def record(self, states: HiddenStates | None, storage: Storage) -> tuple[RecordedInputs, HiddenStates | None]:
        """What the decoder layers are called with, in batches that fit into the memory, and `states` cut like them."""
        while True:
            try:
                recorded = record_inputs(self._model, self._layers, self.all, storage)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error) or repr(error)
            # outside of the handler: the error holds the frames, and they hold what filled the memory
            states = self.halve("the embeddings", reason, states, storage)
        if recorded.handed_on and self._report.operators:  # what is handed on must be the dense network's
            most = max(batch.input_ids.shape[0] for batch in self.all)
            raise torch.OutOfMemoryError(
                f"the device ran out of memory after the first decoder layer of a {type(self._model).__name__}, whose "
                f"decoder layers hand more to the next than hidden states: pass batches of at most {most} sequences."
            )
        return recorded, states


def halved_sizes(batches: Sequence[CalibrationBatch], reason: str) -> list[int]:
    """Numbers of sequences when every batch is cut in two; one of a single sequence is left as it is."""
    sizes = [batch.input_ids.shape[0] for batch in batches]
    if max(sizes) == 1:
        longest = max(batch.input_ids.shape[1] for batch in batches)
        raise torch.OutOfMemoryError(
            f"the device ran out of memory on a batch of one sequence of {longest} tokens: pass "
            f"storage_device='cpu' (--storage-device cpu) or shorter sequences (--sequence-length) [{reason}]"
        )
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

    dense = cut(states.dense)  # before the first pruned layer both streams are the same tensors: cut them once
    return HiddenStates(dense, dense if states.pruned is states.dense else cut(states.pruned))

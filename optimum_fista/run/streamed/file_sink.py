"""Finished decoder layers going into the files of the model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from optimum_fista.run.checkpoints.stored_names import StoredName, as_stored
from optimum_fista.run.packed_folders.packing import Packer
from optimum_fista.run.pruning.layer_pruning import HiddenStates
from optimum_fista.run.pruning.sink import ModelSink
from optimum_fista.run.reports.report import LayerRecord
from optimum_fista.run.streamed.fingerprint import SourceFiles
from optimum_fista.run.streamed.journal import Journal
from optimum_fista.run.streamed.remaining_files import as_saved


class FileSink(ModelSink):
    """Writes every finished decoder layer to a shard of its own, packed if its journal says so.

    The model's own weights are put back only while their layer is not finished: what is finished is on disk.

    Args:
        model: The model, read from its files.
        journal: Where the layers go.
        source: The files that the model is read from.
        names: The names of the checkpoint, by those of the weights in the model.
        contexts: What the run works in.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        journal: Journal,
        source: SourceFiles,
        names: Mapping[str, StoredName],
        *contexts: AbstractContextManager[Any],
    ) -> None:
        super().__init__(model, *contexts)
        self._saved = model
        self._journal = journal
        self._source = source
        self._names = names

    def commit(self, index: int, layer: nn.Module, record: LayerRecord, states: HiddenStates | None) -> None:
        """Write a decoder layer for good."""
        self.forget()
        masks, self.masks = self.masks, {}
        tensors = {f"{record.report.name}.{key}": tensor for key, tensor in layer.state_dict().items()}
        tensors = as_saved(self._saved, tensors)
        if self._journal.packed:
            operators, stored = as_stored(record.operators, masks, self._names)
            tensors = Packer(operators, tensors, stored.__getitem__).pack(tensors)
        self._source.require_unchanged()
        self._journal.keep_layer(index, tensors, masks, record, states)

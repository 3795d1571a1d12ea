"""The files of a pruned model, written one decoder layer at a time."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from optimum_fista.folder.checkpoint import names_in, write_index
from optimum_fista.folder.output import write_file
from optimum_fista.folder.packed_folder import Packer, packed_settings
from optimum_fista.folder.source_files import copy_source
from optimum_fista.folder.stored_names import as_stored, stored_names
from optimum_fista.folder.writing import write_all_but_weights
from optimum_fista.model.held_out import HeldOut
from optimum_fista.model.layer_inputs import HiddenStates
from optimum_fista.model.offload import stored_tensor
from optimum_fista.packed.format import packed_names
from optimum_fista.prune.journal import Journal, KeptLayer, SourceFiles
from optimum_fista.prune.plan import Plan
from optimum_fista.prune.sink import ModelSink
from optimum_fista.report import LayerRecord, PruningReport


class FileSink(ModelSink):
    """Writes every finished decoder layer to a shard of its own, so dense weights are kept for one layer only."""

    _model: PreTrainedModel

    def __init__(
        self, plan: Plan, journal: Journal, source: SourceFiles, packed: bool, *contexts: AbstractContextManager[Any]
    ) -> None:
        super().__init__(plan.layers.model, *contexts)
        self._plan, self._journal, self._source, self._packed = plan, journal, source, packed
        self._stem = "packed" if packed else "model"  # plain Transformers finds no weights in a packed folder
        self._left = [index for index in range(len(plan.layers)) if index not in plan.removal.removed_layers]
        self._names = stored_names(plan.layers.model, plan.all_operators.values(), plan.removal.new_name)

    def commit(
        self, index: int, layer: nn.Module, record: LayerRecord, travelling: Sequence[HiddenStates | HeldOut]
    ) -> None:
        """Write a finished decoder layer; of one that is removed, its record only."""
        self.forget()  # the dense weights of this layer: the checkpoint has them
        streams = {name: stream for part in travelling for name, stream in part.kept().items()}
        masks, self.masks = self.masks, {}
        if index in self._plan.removal.removed_layers:
            self._source.require_unchanged()
            self._journal.keep_layer(index, None, {}, record, streams)
            return
        tensors = {f"{record.report.name}.{key}": tensor for key, tensor in layer.state_dict().items()}
        record, masks, tensors = self._plan.removal.shrink_layer(record, masks, tensors)
        tensors = self._stored(tensors)
        if self._packed:
            operators, stored = as_stored(record.operators, masks, self._names)
            # zeros never reach the disk
            tensors = Packer(operators, tensors, stored.__getitem__).pack(tensors)
        self._source.require_unchanged()  # before it counts as finished: what was read must be what was hashed
        shard = self._write_shard(self._left.index(index), tensors)
        self._journal.keep_layer(index, shard, masks, record, streams)

    def complete(
        self, tokenizer: PreTrainedTokenizerBase | None, report: PruningReport, layers: Mapping[int, KeptLayer]
    ) -> PruningReport:
        """Write all that is not a decoder layer, and what the folder says of the model; the complete report."""
        folder, model = self._journal.model, self._model
        shards = {folder / layer.shard for layer in layers.values() if layer.shard}
        for left in {*folder.iterdir()} - shards:  # by a process that was killed, or of a run with more layers
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        rest = self._stored({name: stored_tensor(model, name) for name in self._plan.layers.names_around})
        shards.add(self._write_shard(len(self._left), rest))
        weight_map = {name: shard.name for shard in shards for name in names_in(shard)}
        index_name = write_index(folder, self._stem, weight_map, {"total_parameters": report.model["num_parameters"]})
        masks = {name: mask for index in layers for name, mask in self._journal.masks(index).items()}
        operators, masks = as_stored(report.operators, masks, self._names)
        report = replace(report, operators=operators)
        packed = packed_settings(index_name, packed_names(weight_map)) if self._packed else None
        copy_source(self._source.folder, folder)  # before our own files, which replace some of them
        write_all_but_weights(folder, model, tokenizer, report, masks, packed)
        self._source.require_unchanged()
        return report

    def _write_shard(self, index: int, tensors: dict[str, Tensor]) -> Path:
        total = len(self._left) + 1  # the last one is for all that is not a decoder layer
        shard = self._journal.model / f"{self._stem}-{index + 1:05}-of-{total:05}.safetensors"
        write_file(shard, tensors, {"format": "pt"})
        return shard

    def _stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under the names of the checkpoint, on the CPU, without those that are tied to others."""
        # Transformers ties them again when it loads the folder
        left_out = set(self._model.all_tied_weights_keys) | set(self._model._keys_to_ignore_on_save or ())
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if name not in left_out}
        return revert_weight_conversion(self._model, kept)

"""What a streamed run has finished, on disk, so that it can go on after a crash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from optimum_fista.model.activation_store import Storage
from optimum_fista.run.checkpoints.atomic import write_tensors, write_text
from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.memory.peak_memory import MemoryPeak
from optimum_fista.run.planning.batches import FittedBatches
from optimum_fista.run.pruning.budgets import Budgets
from optimum_fista.run.pruning.layer_pruning import HiddenStates, stored
from optimum_fista.run.reports.report import FinetuningReport, OperatorReport

FOLDER = "journal"


@dataclass
class FinishedLayer:
    """A decoder layer whose final shard is on disk.

    Attributes:
        shard: Name of the shard.
        size: Its size in bytes.
        sha256: Its digest.
        names: The tensors in it.
        seconds: Time spent on the layer.
        operators: Reports of its operators.
        left_dense: Its operators that were left dense, with the reason.
        hidden_state_error: As in `LayerReport`.
        memory: As in `LayerReport`.
        finetuning: As in `LayerReport`.
    """

    shard: str
    size: int
    sha256: str
    names: list[str]
    seconds: float
    operators: list[OperatorReport]
    left_dense: dict[str, str] = field(default_factory=dict)
    hidden_state_error: float | None = None
    memory: MemoryPeak | None = None
    finetuning: FinetuningReport | None = None


class Journal:
    """Finished decoder layers, hidden states and budgets of a run, in a folder that becomes the model.

    A decoder layer is finished when its record is there and its shard is whole. What the next layer needs is written
    before: masks, hidden states, then the shard, then the record. Nothing is written in place, and every layer has
    files of its own, so that several processes can write layers at the same time.

    Attributes:
        folder: Holds the final shards, and the journal in a folder of its own until the run is complete.
        num_shards: Shards of the finished model: one a decoder layer, and one for the rest.
        packed: Whether the shards are those of a packed folder.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], num_layers: int, packed: bool = False) -> None:
        """Open the journal of a folder, or begin it.

        Raises:
            ValueError: If it was begun with another fingerprint; the message names the parts that differ.
        """
        self.folder = folder
        self.num_shards = num_layers + 1
        self.packed = packed
        self._journal = folder / FOLDER
        self._journal.mkdir(parents=True, exist_ok=True)
        file = self._journal / "fingerprint.json"
        wanted = json.loads(json.dumps(fingerprint))
        if not file.exists():
            write_text(file, json.dumps(wanted, indent=1))
        found = json.loads(file.read_text())
        different = [key for key in wanted | found if wanted.get(key) != found.get(key)]
        if different:
            shown = "; ".join(f"{key} was {_short(found.get(key))}, is {_short(wanted.get(key))}" for key in different)
            raise ValueError(
                f"output: the unfinished run in {str(folder)!r} was another one ({shown}). Start it again as it was, "
                "pass another folder, or pass overwrite=True (--overwrite) to throw its layers away."
            )

    def finished(self, *, read_shards: bool = True) -> dict[int, FinishedLayer]:
        """The decoder layers that are finished, by index; `read_shards=False` trusts their size."""
        records = {index: self._record(index, read_shards) for index in range(self.num_shards - 1)}
        return {index: record for index, record in records.items() if record is not None}

    def keep_layer(
        self,
        index: int,
        tensors: dict[str, Tensor],
        masks: dict[str, Tensor],
        operators: Sequence[OperatorReport],
        left_dense: Mapping[str, str],
        states: HiddenStates | None,
        seconds: float,
        hidden_state_error: float | None = None,
        memory: MemoryPeak | None = None,
        finetuning: FinetuningReport | None = None,
    ) -> None:
        """Write a decoder layer for good.

        Args:
            index: Its index.
            tensors: Its tensors by the names of the checkpoint, on the CPU.
            masks: Packed masks of its operators.
            operators: Their reports.
            left_dense: Operators left dense, with the reason.
            states: Hidden states behind it; `None` where the next layer does not need them.
            seconds: Time spent on it.
            hidden_state_error: As in `LayerReport`.
            memory: As in `LayerReport`.
            finetuning: As in `LayerReport`.
        """
        if masks:
            write_tensors(self._file("masks", index), masks, {})
        if states is not None:
            streams = {"dense": stored(states.dense), "pruned": stored(states.pruned)}
            hidden = {f"{name}.{i}": h.contiguous() for name, stream in streams.items() for i, h in enumerate(stream)}
            write_tensors(self._file("states", index + 1), hidden, {})
        shard = self.keep_shard(index, tensors)
        record = FinishedLayer(
            shard.name,
            shard.stat().st_size,
            _digest(shard),
            list(tensors),
            seconds,
            list(operators),
            dict(left_dense),
            hidden_state_error,
            memory,
            finetuning,
        )
        write_text(self._journal / f"layer-{index:05}.json", json.dumps(dataclasses.asdict(record)))
        self._file("states", index).unlink(missing_ok=True)

    def keep_shard(self, index: int, tensors: dict[str, Tensor]) -> Path:
        """Write a final shard and return its path."""
        shard = self.folder / self.shard_name(index)
        write_tensors(shard, tensors, {"format": "pt"})
        return shard

    def shard_name(self, index: int) -> str:
        """File name of a shard."""
        return f"{self._stem}-{index + 1:05}-of-{self.num_shards:05}.safetensors"

    @property
    def index_name(self) -> str:
        """File name of the shards' index."""
        return f"{self._stem}.safetensors.index.json"

    def masks(self, index: int) -> dict[str, Tensor]:
        """Packed masks of a finished decoder layer."""
        file = self._file("masks", index)
        return load_file(file) if file.exists() else {}

    def states(self, index: int, storage: Storage) -> HiddenStates | None:
        """Hidden states that enter a decoder layer; `None` where they are not there whole."""
        try:
            device = "cpu" if isinstance(storage, Path) else str(storage)
            tensors = load_file(self._file("states", index), device=device)
        except (OSError, SafetensorError):
            return None
        streams: dict[str, list[Tensor]] = {"dense": [], "pruned": []}
        for name in sorted(tensors, key=lambda name: int(name.partition(".")[2])):
            streams[name.partition(".")[0]].append(tensors[name])
        return HiddenStates(streams["dense"] or None, streams["pruned"] or None)

    def keep_batches(self, fitted: FittedBatches) -> None:
        """Write the batches that the run works with."""
        write_text(self._journal / "batches.json", json.dumps(dataclasses.asdict(fitted)))

    def batches(self) -> FittedBatches | None:
        """The batches that the run works with; `None` before."""
        file = self._journal / "batches.json"
        return FittedBatches(**json.loads(file.read_text())) if file.exists() else None

    def keep_budgets(self, budgets: Budgets) -> None:
        """Write the sparsities that the operators were given."""
        metadata = {"budgets": json.dumps({"sparsities": budgets.sparsities, "unseen": budgets.unseen})}
        weights = {name: value.cpu().contiguous() for name, value in budgets.output_weights.items()}
        write_tensors(self._journal / "budgets.safetensors", weights, metadata)

    def budgets(self, config: FistaPruningConfig) -> Budgets | None:
        """The sparsities that the operators were given; `None` before."""
        file = self._journal / "budgets.safetensors"
        if not file.exists():
            return None
        with safe_open(file, "pt") as tensors:
            values = json.loads(tensors.metadata()["budgets"])
            weights = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        return Budgets(config, values["sparsities"], weights, values["unseen"])

    @property
    def _stem(self) -> str:
        return "packed" if self.packed else "model"

    def _file(self, kind: str, index: int) -> Path:
        return self._journal / f"{kind}-{index:05}.safetensors"

    def _record(self, index: int, read_shard: bool) -> FinishedLayer | None:
        """The record of a decoder layer whose shard is whole."""
        file = self._journal / f"layer-{index:05}.json"
        if not file.exists():
            return None
        values = json.loads(file.read_text())
        values["operators"] = [OperatorReport.from_dict(operator) for operator in values["operators"]]
        if values.get("memory") is not None:
            values["memory"] = MemoryPeak(**values["memory"])
        if values.get("finetuning") is not None:
            values["finetuning"] = FinetuningReport(**values["finetuning"])
        record = FinishedLayer(**values)
        shard = self.folder / record.shard
        whole = shard.exists() and shard.stat().st_size == record.size
        return record if whole and (not read_shard or _digest(shard) == record.sha256) else None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

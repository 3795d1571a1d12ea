"""What a streamed run has finished, on disk, so that it can resume after a crash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from optimum_fista.model.activation_store import Storage
from optimum_fista.run.checkpoints.atomic import digest_of, write_tensors, write_text
from optimum_fista.run.checkpoints.output import FOLDER, MODEL, discard, is_streamed
from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.pruning.budgets import Budgets
from optimum_fista.run.records import as_record
from optimum_fista.run.reports.report import LayerRecord

_ADVICE = "pass another folder, or pass overwrite=True (--overwrite) to throw its layers away."
_SHOWN, _LETTERS = 6, 80  # of the differences between two runs
_RUN, _WEIGHTS = f"{FOLDER}/fingerprint.json", f"{FOLDER}/weights.json"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptLayer:
    """A decoder layer whose final shard is on disk.

    Attributes:
        record: What the run says of it.
        shard: Name of the shard; empty if the layer is removed.
        sha256: Digests of the shard, of the layer's `masks`, of the hidden states `before` it, on which it was pruned,
            and `after` it, and of the `budgets` that it was pruned with; `None` for what there is none of.
    """

    record: LayerRecord
    shard: str
    sha256: dict[str, str | None]


class Journal:
    """Finished decoder layers, hidden states and budgets of a run.

    A decoder layer is finished when its record is there and its shard is whole. The record is written last, after the
    shard, the masks, and the hidden states that the next layer needs. Nothing is written in place, and every layer has
    files of its own, so that several processes can write layers at the same time. Every file has its digest in a
    record, and every record its own: what is damaged is not taken.

    Attributes:
        folder: The unfinished folder.
        model: In it, the folder that becomes the output; it holds the final shards.
        budgets_sha256: Digest of the budgets that were last written or read.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        self.folder, self.model = folder, folder / MODEL
        self.budgets_sha256: str | None = None
        self._fingerprint = fingerprint
        self._sha256: dict[Path, str] = {}  # of hidden states that were last written or read
        self._journal = folder / FOLDER
        self.model.mkdir(exist_ok=True)

    def finished(self, *, read_shards: bool = True) -> dict[int, KeptLayer]:
        """The decoder layers that are finished, by index; `read_shards=False` trusts shards that are there."""
        found = {}
        for file in sorted(self._journal.glob("layer-*.json")):
            index, values = int(file.stem.partition("-")[2]), read_record(file)
            kept = None if values is None else as_record(KeptLayer, values)
            if kept is not None and self._is_whole(index, kept, read_shards):
                found[index] = kept
        return found

    def keep_layer(
        self,
        index: int,
        shard: Path | None,
        masks: dict[str, Tensor],
        record: LayerRecord,
        streams: Mapping[str, Sequence[Tensor]],
    ) -> None:
        """Finish a decoder layer whose shard is on disk; without one it is removed.

        `masks` are the packed masks of its operators, `record` is what the run says of it, `streams` are the hidden
        states after it that the run goes on with.
        """
        if streams:
            hidden = {f"{name}.{i}": h.contiguous() for name, stream in streams.items() for i, h in enumerate(stream)}
            file = self._file("states", index + 1)
            self._sha256[file] = _write(file, hidden)
        sha256 = {
            "shard": digest_of(shard) if shard else None,
            "masks": _write(self._file("masks", index), masks) if masks else None,
            "before": self._sha256.get(self._file("states", index)),
            "after": self._sha256.get(self._file("states", index + 1)),
            "budgets": self.budgets_sha256,
        }
        kept = KeptLayer(record, shard.name if shard else "", sha256)
        write_record(self._journal / f"layer-{index:05}.json", dataclasses.asdict(kept))
        self._file("states", index).unlink(missing_ok=True)  # only now: until the record is there, they are needed

    def masks(self, index: int) -> dict[str, Tensor]:
        """Packed masks of a finished decoder layer."""
        file = self._file("masks", index)
        return load_file(file) if file.exists() else {}

    def states(self, index: int, sha256: str | None, storage: Storage) -> dict[str, list[Tensor]] | None:
        """Hidden states that enter a decoder layer; `None` if they are not there whole, with this digest."""
        file = self._file("states", index)
        if sha256 is None or not _is_whole(file, sha256):
            return None
        self._sha256[file] = sha256
        tensors = load_file(file)  # not on the device: safetensors knows some by name only
        place = torch.device("cpu") if isinstance(storage, Path) else storage
        streams: dict[str, list[Tensor]] = {}
        for name in sorted(tensors, key=lambda name: int(name.partition(".")[2])):
            streams.setdefault(name.partition(".")[0], []).append(tensors.pop(name).to(place))
        return streams

    def keep_budgets(self, budgets: Budgets, weights: Mapping[str, Any]) -> None:
        """Begin the run: write the sparsities of the operators, the decoder layers that go, and the hashed files."""
        write_record(self.folder / _WEIGHTS, weights)
        begin_run(self.folder, self._fingerprint)
        tensors = {name: t.cpu().contiguous() for name, t in budgets.output_weights.items()}
        values: dict[str, Any] = {"sparsities": budgets.sparsities, "unseen": budgets.unseen}
        values["removed_layers"] = budgets.removed_layers
        values["tensors_sha256"] = _write(self._journal / "budgets.safetensors", tensors)
        values["run_sha256"] = _text_digest(self._fingerprint)  # ties budgets, and by their digest layers, to this run
        write_record(self._journal / "budgets.json", values)
        self.budgets_sha256 = _text_digest(values)

    def budgets(self, config: FistaPruningConfig) -> Budgets | None:
        """The sparsities that the operators were given; `None` before, or if they are damaged or another run's."""
        values, file = read_record(self._journal / "budgets.json"), self._journal / "budgets.safetensors"
        if values is None or values.get("run_sha256") != _text_digest(self._fingerprint):
            return None
        if not _is_whole(file, values["tensors_sha256"]):
            return None
        self.budgets_sha256 = _text_digest(values)
        removed = [(index, loss) for index, loss in values["removed_layers"]]
        return Budgets(config, values["sparsities"], load_file(file), values["unseen"], removed)

    def _file(self, kind: str, index: int) -> Path:
        return self._journal / f"{kind}-{index:05}.safetensors"

    def _is_whole(self, index: int, kept: KeptLayer, read_shard: bool) -> bool:
        shard, masks = self.model / kept.shard, kept.sha256["masks"]
        if not kept.shard or not read_shard:
            return shard.exists()
        return _is_whole(shard, kept.sha256["shard"]) and (not masks or _is_whole(self._file("masks", index), masks))


def open_run(folder: Path, fingerprint: Mapping[str, Any], overwrite: bool) -> None:
    """Take up the run that a locked unfinished folder holds; another one is thrown away if `overwrite`."""
    if is_streamed(folder) and read_record(folder / _RUN) != fingerprint:
        if not overwrite:
            refuse_differences(folder, _begun(folder), fingerprint)
        discard(folder, keep_texts=True)


def begin_run(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Note in an unfinished folder which run it holds: from now on it is kept until the run is finished."""
    if not is_streamed(folder):
        write_record(folder / _RUN, fingerprint)


def _begun(folder: Path) -> dict[str, Any]:
    begun = read_record(folder / _RUN)
    if begun is None:
        file = str(folder / _RUN)
        raise ValueError(f"output: {file!r} is damaged, so it is not known which run it belongs to: {_ADVICE}")
    return begun


def hashed_weights(folder: Path) -> dict[str, Any]:
    """Sizes, times and digests of the weight files that a run in an unfinished folder read; none if there is no run."""
    return read_record(folder / _WEIGHTS) or {}


def begun_batch_size(folder: Path) -> int | None:
    """Sequences a batch of the run that an unfinished folder holds; `None` if there is none."""
    begun = read_record(folder / _RUN) or {}
    return max((batch[0] for batch in begun.get("batches", ())), default=None)


def require_same_settings(
    folder: Path, config: FistaPruningConfig, num_sequences: int, sequence_length: int | None
) -> None:
    """Refuse other settings than those of the run that an unfinished folder holds, before tokens are sampled."""
    if not is_streamed(folder):
        return
    begun = _begun(folder)
    if "batches" not in begun:
        raise ValueError(
            f"output: the unfinished run in {str(folder)!r} is a recovery: give the command of `recover` again to "
            f"finish it, {_ADVICE}"
        )
    first = begun["batches"][0]
    found = {"config": begun["config"], "sequences": sum(batch[0] for batch in begun["batches"]), "length": first[1]}
    wanted = {"config": json.loads(json.dumps(config.resolved().to_dict())), "sequences": num_sequences}
    refuse_differences(folder, found, wanted | {"length": sequence_length or first[1]})


def refuse_differences(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to go on with a run that was another one."""
    if different := list(_differences(found, wanted)):
        shown = "; ".join(different[:_SHOWN]) + ("; ..." if len(different) > _SHOWN else "")
        raise ValueError(
            f"output: the unfinished run in {str(folder)!r} was another one ({shown}). Start it again as it was, "
            f"{_ADVICE}"
        )


def write_record(path: Path, values: Mapping[str, Any]) -> None:
    """Write plain values as JSON, with their digest."""
    write_text(path, json.dumps({"sha256": _text_digest(values), "values": values}, indent=1))


def read_record(path: Path) -> dict[str, Any] | None:
    """The values of a record; `None` if there is none, or it is damaged."""
    try:
        found = json.loads(path.read_bytes())
        values: dict[str, Any] = found["values"]
        if found["sha256"] == _text_digest(values):
            return values
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        pass
    logger.warning("%s is damaged and not used", path)
    return None


def _text_digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _is_whole(path: Path, sha256: str | None) -> bool:
    """Whether a file is there with the bytes that were written."""
    if path.exists() and digest_of(path) == sha256:
        return True
    logger.warning("%s is damaged and not used", path)
    return False


def _write(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a safetensors file and return its digest."""
    write_tensors(path, tensors, {"format": "pt"})  # no metadata and no tensors would make a file that can't be read
    return digest_of(path)


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """What differs between two dictionaries of dictionaries, for people."""
    for key in {**found, **wanted}:
        was, now = found.get(key), wanted.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now, f"{prefix}{key}.")
        elif was != now:
            texts = [json.dumps(value) for value in (was, now)]
            before, after = (text if len(text) <= _LETTERS else f"{text[:_LETTERS]}..." for text in texts)
            yield f"{prefix}{key} was {before}, is {after}"

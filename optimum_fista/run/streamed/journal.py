"""What a streamed run has finished, on disk, so that it can resume after a crash."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from optimum_fista.model.activation_store import Storage
from optimum_fista.model.activations import HiddenStates
from optimum_fista.run.checkpoints.atomic import digest_of, write_tensors, write_text
from optimum_fista.run.checkpoints.output import FOLDER, MODEL
from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.pruning.budgets import Budgets
from optimum_fista.run.records import as_record
from optimum_fista.run.reports.report import LayerRecord

WEIGHTS_FILE = "weights.json"
_ADVICE = "pass another folder, or pass overwrite=True (--overwrite) to throw its layers away."
_SHOWN = 6  # differences between two runs
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptLayer:
    """A decoder layer whose final shard is on disk.

    Attributes:
        record: What the run says of it.
        shard: Name of the shard; empty if the layer is removed.
        size: Its size in bytes.
        sha256: Digests of the shard, of the layer's `masks`, of the hidden states `before` it, on which it was pruned,
            and `after` it, of the `budgets` that it was pruned with, and of what the measurement of the loss goes on
            with after it, `probe`; `None` for what there is none of.
    """

    record: LayerRecord
    shard: str
    size: int
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
        """Open the journal of a folder, or begin it.

        Raises:
            ValueError: If it was begun with another fingerprint, or that is damaged; the message names what differs.
        """
        self.folder, self.model = folder, folder / MODEL
        self.budgets_sha256: str | None = None
        self._states_sha256: dict[int, str] = {}
        self._probe_sha256: dict[int, str] = {}
        self._journal = folder / FOLDER
        for made in (self.model, self._journal):
            made.mkdir(parents=True, exist_ok=True)
        file = self._journal / "fingerprint.json"
        wanted = json.loads(json.dumps(fingerprint))  # as it will be read: tuples are lists, keys are text
        self._run_sha256 = _text_digest(wanted)
        if not file.exists():
            write_record(file, wanted)
        found = read_record(file)
        if found is None:
            raise ValueError(f"output: {str(file)!r} is damaged, so it is not known which run it belongs to: {_ADVICE}")
        refuse_differences(folder, found, wanted)

    def finished(self, *, read_shards: bool = True) -> dict[int, KeptLayer]:
        """The decoder layers that are finished, by index, in order; `read_shards=False` trusts their files' size."""
        records = {int(file.stem.partition("-")[2]): file for file in sorted(self._journal.glob("layer-*.json"))}
        kept = {index: self._kept(index, file, read_shards) for index, file in records.items()}
        return {index: layer for index, layer in kept.items() if layer is not None}

    def keep_layer(
        self, index: int, shard: Path | None, masks: dict[str, Tensor], record: LayerRecord, states: HiddenStates | None
    ) -> None:
        """Finish a decoder layer whose shard is on disk; without one it is removed.

        `masks` are the packed masks of its operators, `record` is what the run says of it, `states` are the hidden
        states after it; `None` if the next layer does not need them.
        """
        if states is not None:
            streams = states.kept()
            hidden = {f"{name}.{i}": h.contiguous() for name, stream in streams.items() for i, h in enumerate(stream)}
            self._states_sha256[index + 1] = _write(self._file("states", index + 1), hidden)
        sha256 = {
            "shard": digest_of(shard) if shard else None,
            "masks": _write(self._file("masks", index), masks) if masks else None,
            "before": self._states_sha256.get(index),
            "after": self._states_sha256.get(index + 1),
            "budgets": self.budgets_sha256,
            "probe": self._probe_sha256.get(index + 1),
        }
        name, size = (shard.name, shard.stat().st_size) if shard else ("", 0)
        kept = KeptLayer(record, name, size, sha256)
        write_record(self._journal / f"layer-{index:05}.json", dataclasses.asdict(kept))
        for kind in ("states", "probe"):  # only now: until the record is there, they are needed
            self._file(kind, index).unlink(missing_ok=True)

    def keep_probe(self, index: int, kept: dict[str, Tensor]) -> None:
        """Write what the measurement of the loss goes on with before a decoder layer."""
        self._probe_sha256[index] = _write(self._file("probe", index), kept)

    def probe(self, index: int, sha256: str | None) -> dict[str, Tensor] | None:
        """What it goes on with; `None` if that is not there whole, with this digest."""
        file = self._file("probe", index)
        if sha256 is None or not _is_whole(file, sha256):
            return None
        self._probe_sha256[index] = sha256
        return load_file(file)

    def masks(self, index: int) -> dict[str, Tensor]:
        """Packed masks of a finished decoder layer."""
        file = self._file("masks", index)
        return load_file(file) if file.exists() else {}

    def states(self, index: int, sha256: str | None, storage: Storage) -> HiddenStates | None:
        """Hidden states that enter a decoder layer; `None` if they are not there whole, with this digest."""
        file = self._file("states", index)
        if sha256 is None or not _is_whole(file, sha256):
            return None
        tensors = load_file(file)  # not on the device: safetensors knows some by name only
        place = torch.device("cpu") if isinstance(storage, Path) else storage
        self._states_sha256[index] = sha256
        streams: dict[str, list[Tensor]] = {"dense": [], "pruned": []}
        for name in sorted(tensors, key=lambda name: int(name.partition(".")[2])):
            streams[name.partition(".")[0]].append(tensors.pop(name).to(place))
        return HiddenStates(streams["dense"] or None, streams["pruned"] or None)

    def keep_weights(self, files: Mapping[str, Any]) -> None:
        """Write sizes, times and digests of the weight files, by which a change is found."""
        write_record(self._journal / WEIGHTS_FILE, dict(files))

    def keep_budgets(self, budgets: Budgets) -> None:
        """Write the sparsities that the operators were given, and the decoder layers that go."""
        tensors = {name: t.cpu().contiguous() for name, t in budgets.output_weights.items()}
        sha256 = _write(self._journal / "budgets.safetensors", tensors)
        values: dict[str, Any] = {"sparsities": budgets.sparsities, "unseen": budgets.unseen, "tensors_sha256": sha256}
        values["removed_layers"] = budgets.removed_layers
        values["run_sha256"] = self._run_sha256  # ties budgets, and by their digest every layer, to this run
        write_record(self._journal / "budgets.json", values)
        self.budgets_sha256 = _text_digest(values)

    def budgets(self, config: FistaPruningConfig) -> Budgets | None:
        """The sparsities that the operators were given; `None` before, or if they are damaged or another run's."""
        values, file = read_record(self._journal / "budgets.json"), self._journal / "budgets.safetensors"
        if values is None or values.get("run_sha256") != self._run_sha256:
            return None
        if not _is_whole(file, values["tensors_sha256"]):
            return None
        self.budgets_sha256 = _text_digest(values)
        removed = [(index, loss) for index, loss in values["removed_layers"]]
        return Budgets(config, values["sparsities"], load_file(file), values["unseen"], removed)

    def _file(self, kind: str, index: int) -> Path:
        return self._journal / f"{kind}-{index:05}.safetensors"

    def _kept(self, index: int, file: Path, read_shard: bool) -> KeptLayer | None:
        """A decoder layer whose record, shard and masks are whole."""
        values = read_record(file)
        if values is None:
            return None
        kept = as_record(KeptLayer, values)
        if not kept.shard:
            return kept
        shard, masks = self.model / kept.shard, kept.sha256["masks"]
        whole = shard.exists() and shard.stat().st_size == kept.size
        if whole and read_shard:
            whole = _is_whole(shard, kept.sha256["shard"])
            whole = whole and (not masks or _is_whole(self._file("masks", index), masks))
        return kept if whole else None


def begun_run(folder: Path) -> dict[str, Any] | None:
    """The fingerprint of the run that an unfinished folder holds; `None` if there is none, or it is damaged."""
    file = folder / FOLDER / "fingerprint.json"
    return read_record(file) if file.exists() else None


def has_only_begun(folder: Path) -> bool:
    """Whether an unfinished folder holds a pruning run that has finished nothing yet, so that nothing is lost."""
    begun, journal = begun_run(folder), folder / FOLDER
    kept = any(journal.glob("layer-*.json")) or (journal / "budgets.json").exists()
    return begun is not None and "batches" in begun and not kept


def begun_batch_size(folder: Path) -> int | None:
    """Sequences a batch of the run that an unfinished folder holds; `None` if there is none."""
    begun = begun_run(folder)
    return None if begun is None else max((batch[0] for batch in begun.get("batches", ())), default=None)


def require_same_settings(
    folder: Path, config: FistaPruningConfig, num_sequences: int, sequence_length: int | None
) -> None:
    """Refuse other settings than those of the run that an unfinished folder holds, before tokens are sampled.

    Raises:
        ValueError: If they differ; the message names what.
    """
    begun = begun_run(folder)
    if begun is None or has_only_begun(folder):
        return
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
    """Refuse to go on with a run that was another one.

    Raises:
        ValueError: If they differ; the message names what.
    """
    different = list(differences(found, wanted))
    if different:
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


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """What differs between two dictionaries of dictionaries, for people."""
    for key in {**found, **wanted}:
        was, now = found.get(key), wanted.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from differences(was, now, f"{prefix}{key}.")
        elif was != now:
            before, after = _short(json.dumps(was), json.dumps(now))
            yield f"{prefix}{key} was {before}, is {after}"


def _short(*texts: str) -> list[str]:
    """Texts for people: of long ones a few characters around the first that is not the same in all."""
    same = itertools.takewhile(lambda column: len({*column}) == 1, zip(*texts, strict=False))
    start = max(0, len(list(same)) - 30) if max(map(len, texts)) > 80 else 0
    ends = (min(start + 77, len(text)) if len(text) > 80 else len(text) for text in texts)
    return [
        "..." * (start > 0) + text[start:end] + "..." * (end < len(text)) for text, end in zip(texts, ends, strict=True)
    ]

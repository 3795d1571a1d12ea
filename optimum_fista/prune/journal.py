"""The journal on disk by which a run from files to files resumes: which run it is, and what it has finished.

A run is identified by everything that the bytes of its result depend on. So the same command finds its own layers and
no others, and its result is the same bit for bit, however often it was stopped.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from optimum_fista import internals
from optimum_fista.atomic import (
    digest_of,
    is_whole,
    read_record,
    write_record,
    write_tensors,
)
from optimum_fista.bars import tqdm
from optimum_fista.folder.output import FOLDER, MODEL, RUN_FILE, discard
from optimum_fista.model.activations import Storage
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.options import as_record
from optimum_fista.prune.plan import Budgets, Plan
from optimum_fista.prune.ranks import Ranks
from optimum_fista.report import LayerRecord, PruningReport
from optimum_fista.source.model_folder import CONFIG_FILE
from optimum_fista.versions import library_versions

WEIGHTS_FILE = f"{FOLDER}/weights.json"
"""Sizes, times and digests of the weight files that are read."""
_ADVICE = "pass another folder, or pass overwrite=True (--overwrite) to throw its layers away."
_SHOWN, _LETTERS = 6, 80  # of the differences between two runs
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".gguf", ".bin", ".bin.index.json")
_NOT_COMPUTED_WITH = (internals.LOADED_FROM, "transformers_version")
_FORMAT = 10  # of the records of a journal
_READERS = 4  # files that are hashed at a time
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptLayer:
    """A decoder layer whose final shard is on disk."""

    record: LayerRecord
    shard: str  # its name; empty if the layer is removed
    # Digests of the shard, of the hidden states `before` the layer and `after` it, and of the `budgets` used to
    # prune it; None if a file does not exist.
    sha256: dict[str, str | None]


class Journal:
    """Finished decoder layers, hidden states and budgets of a run, in an unfinished `folder`.

    A decoder layer is finished when its record is there and its shard is whole. The record is written last, after the
    shard, the masks, and the hidden states that the next layer needs. No file is changed in place, and every layer has
    its own files, so that several processes can write layers at the same time. A record has the digests of its files
    and of itself: damaged files are not used.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        self.folder, self.model = (
            folder,
            folder / MODEL,
        )  # the folder that becomes the output, with the final shards
        self._budgets_sha256: str | None = None  # of the budgets read last
        self._fingerprint = fingerprint
        self._states_sha256: dict[int, str] = {}  # of the states written or read last
        self._budgets = folder / FOLDER / "budgets.json"
        self.model.mkdir(exist_ok=True)

    def finished(self, *, read_shards: bool = True, progress: bool = False) -> dict[int, KeptLayer]:
        """The finished decoder layers, by index; `read_shards=False` trusts existing shards without reading them."""
        found, files = {}, sorted(self._budgets.parent.glob("layer-*.json"))
        shown: Any = {"desc": "Reading finished layers", "unit": "layer", "leave": False}
        for file in tqdm(files, **shown, disable=not (progress and files)):
            if (values := read_record(file)) is not None:
                kept = as_record(KeptLayer, values)
                shard, read = self.model / kept.shard, read_shards and kept.shard
                there = is_whole(shard, kept.sha256["shard"]) if read else shard.exists()
                # pruned with the same budgets, once these are read
                if there and self._budgets_sha256 in (None, kept.sha256["budgets"]):
                    found[int(file.stem.partition("-")[2])] = kept
        return found

    def keep_layer(
        self,
        index: int,
        shard: tuple[str, str] | None,
        masks: dict[str, Tensor],
        record: LayerRecord,
        streams: Mapping[str, Sequence[Tensor]],  # hidden states that the next layer needs
    ) -> None:
        """Finish a decoder layer whose shard (name and digest) is on disk; a removed layer has no shard."""
        layer, states = self._file("layer", index), self._file("states", index)
        next_states = self._file("states", index + 1)
        if streams:
            hidden = {
                f"{name}.{i}": h.contiguous()
                for name, stream in streams.items()
                for i, h in enumerate(stream)
            }
            self._states_sha256[index + 1] = write_tensors(next_states, hidden)
        sha256 = {
            "shard": shard[1] if shard else None,
            "before": self._states_sha256.get(index),
            "after": self._states_sha256.get(index + 1),
            "budgets": self._budgets_sha256,
        }
        kept = KeptLayer(record, shard[0] if shard else "", sha256)
        write_record(layer.with_suffix(".json"), dataclasses.asdict(kept), masks)
        states.unlink(missing_ok=True)  # only now: they are needed until the record is written

    def masks(self, index: int) -> dict[str, Tensor]:
        """Packed masks of a finished decoder layer."""
        return load_file(self._file("layer", index))

    def resume(
        self, finished: Mapping[int, KeptLayer], storage: Storage
    ) -> tuple[int, dict[str, list[Tensor]] | None]:
        """Count the first decoder layers that are finished, each on the hidden states of the layer before.

        Returns also the hidden states after them, by name; `None` if their file is missing or damaged.
        """
        first, sha256 = 0, None
        while first in finished and finished[first].sha256["before"] == sha256:
            first, sha256 = first + 1, finished[first].sha256["after"]
        file = self._file("states", first)
        if sha256 is None or not is_whole(file, sha256):
            return first, None
        self._states_sha256[first] = sha256
        tensors = load_file(file)  # not on the device: safetensors can't load to every device
        place = torch.device("cpu") if isinstance(storage, Path) else storage
        streams: dict[str, list[Tensor]] = {}
        for name in sorted(tensors, key=lambda name: int(name.partition(".")[2])):
            streams.setdefault(name.partition(".")[0], []).append(tensors.pop(name).to(place))
        return first, streams

    def keep_budgets(self, budgets: Budgets, weights: Mapping[str, Any]) -> None:
        """Begin the run: write the budgets of the operators, the decoder layers to remove, and the hashed files."""
        write_record(self.folder / WEIGHTS_FILE, weights)
        write_record(
            self.folder / RUN_FILE, self._fingerprint
        )  # from now on the folder is kept until the run ends
        values = {name: value for name, value in vars(budgets).items() if name != "output_weights"}
        values["run"] = digest_of(
            self.folder / RUN_FILE
        )  # ties budgets (and layers, by their digest) to this run
        tensors = {name: t.cpu().contiguous() for name, t in budgets.output_weights.items()}
        write_record(self._budgets, values, tensors)

    def budgets(self) -> Budgets | None:
        """Read the budgets; `None` if they are not written yet, damaged, or those of another run."""
        values = read_record(self._budgets)
        if values is None or values["run"] != digest_of(self.folder / RUN_FILE):
            return None
        self._budgets_sha256 = digest_of(self._budgets)
        removed = [(index, loss) for index, loss in values["removed_layers"]]
        weights = load_file(self._budgets.with_suffix(".safetensors"))
        return Budgets(
            sparsities=values["sparsities"],
            output_weights=weights,
            without_gradient=values["without_gradient"],
            removed_layers=removed,
        )

    def _file(self, kind: str, index: int) -> Path:
        return self._budgets.with_name(f"{kind}-{index:05}.safetensors")


def join_run(folder: Path, fingerprint: Mapping[str, Any], overwrite: bool, ranks: Ranks) -> None:
    """Have rank 0 resume the run of a locked unfinished folder; if it is another run, `overwrite` discards it."""

    def begin() -> Mapping[str, Any]:
        if not overwrite:
            require_same_run(folder, fingerprint)
        if json.dumps(read_record(folder / RUN_FILE)) != json.dumps(
            fingerprint
        ):  # their order counts, too
            discard(folder, keep_texts=True)  # also the rest of a run that was only half discarded
        return fingerprint

    def join() -> None:
        if different := [key for key in fingerprint if fingerprint[key] != begun[key]]:
            which = f"{' and '.join(different)} differ from those of rank 0"
            raise ValueError(
                f"{which}: start every process with the same model, options and calibration text."
            )

    begun = ranks.first(begin)
    ranks.each(join)


def require_same_run(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Refuse an unfinished folder of another run; `wanted` is what is known of this run."""
    if not (folder / RUN_FILE).exists():
        return
    begun = read_record(folder / RUN_FILE)
    if begun is None:
        file = str(folder / RUN_FILE)
        raise ValueError(
            f"output: {file!r} is damaged, so it is not known which run it belongs to: {_ADVICE}"
        )
    if different := list(_differences({key: begun.get(key) for key in wanted}, wanted)):
        shown = "; ".join(different[:_SHOWN]) + ("; ..." if len(different) > _SHOWN else "")
        run = f"the unfinished run in {str(folder)!r} was another one ({shown})"
        raise ValueError(f"output: {run}. Start it again as it was, {_ADVICE}")


def begun_batch_size(folder: Path) -> int | None:
    """Sequences in a batch of the run in an unfinished folder; `None` if there is no run."""
    begun = read_record(folder / RUN_FILE) or {}
    return max((batch[0] for batch in begun.get("batches", ())), default=None)


def _differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    """Say in words what differs between two dictionaries of dictionaries."""
    for key in {**found, **wanted}:
        was, now = found.get(key), wanted.get(key)
        if isinstance(was, dict) and isinstance(now, dict) and (was != now or [*was] == [*now]):
            yield from _differences(was, now, f"{prefix}{key}.")
        elif was != now or isinstance(
            was, dict
        ):  # the order differs, and the first matching override counts
            texts = [json.dumps(value) for value in (was, now)]
            before, after = (
                text if len(text) <= _LETTERS else f"{text[:_LETTERS]}..." for text in texts
            )
            yield f"{prefix}{key} was {before}, is {after}"


def run_fingerprint(
    source: SourceFiles,
    plan: Plan,
    batches: Sequence[CalibrationBatch],
    report: PruningReport,
    packed: bool,
) -> dict[str, Any]:
    """Everything that the bytes of a run depend on: weights, configurations, arithmetic, tokens, versions."""
    shapes = [list(batch.input_ids.shape) for batch in batches]
    versions, calibration = library_versions(), report.calibration
    tokens = calibration["sha256"]
    if "held_out" in calibration:
        tokens = [tokens, calibration["held_out"]["sha256"]]
    network = json.loads(plan.layers.model.config.to_json_string(use_diff=False))
    fingerprint = {
        "journal": _FORMAT,
        "weights": {name: digest for name, digest in source.digests.items() if name != CONFIG_FILE},
        "model_config": {
            key: value for key, value in network.items() if key not in _NOT_COMPUTED_WITH
        },
        "arithmetic": {
            k: v for k, v in report.environment.items() if k not in ("processor", "batches")
        },
        "config": report.config,  # as the user gave it: after a removal changes it, some patterns look the same
        "calibration": tokens,
        "batches": shapes,
        "sequences": sum(shape[0] for shape in shapes),
        "length": shapes[0][1],
        "packed": packed,
        "versions": {name: versions[name] for name in ("optimum-fista", "torch", "transformers")},
    }
    return dict(json.loads(json.dumps(fingerprint)))


def shared_files(folder: Path, unfinished: Path, ranks: Ranks, progress: bool) -> SourceFiles:
    """The files of a model that several processes read; rank 0 alone hashes those that it sees too."""
    noted = read_record(unfinished / WEIGHTS_FILE) or {}  # digests of an earlier start of the run
    known = ranks.first(lambda: SourceFiles(folder, noted, progress).hashes)
    return ranks.each(lambda: SourceFiles(folder, known, progress))


class SourceFiles:
    """Weight files and configuration of the model that is read: size, times, inode and SHA-256 by name.

    Whole files are hashed, at 1 to 2 GB/s a core: 140 GB take a minute, which is little beside hours of pruning.
    """

    def __init__(self, folder: Path, known: dict[str, list[Any]], progress: bool) -> None:
        self.folder = folder
        self._progress = progress
        self.hashes: dict[str, list[Any]] = {}
        there = sorted(
            filter(Path.is_file, folder.iterdir())
        )  # a link in the Hub's cache may lead nowhere
        files = [file for file in there if file.name == CONFIG_FILE or file.name.endswith(_WEIGHTS)]
        for file in files:
            found = file.stat()
            # a file with the same numbers is not read again: a write changes its ctime, which no program can set
            stamp = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
            self.hashes[file.name] = [
                *stamp,
                None if known.get(file.name, [])[:-1] != stamp else known[file.name][-1],
            ]
        changed = [file for file in files if self.hashes[file.name][-1] is None]
        with ThreadPoolExecutor(_READERS) as pool:
            shown: Any = {
                "desc": "Hashing weights",
                "total": len(changed),
                "unit": "file",
                "leave": False,
            }
            digests = tqdm(
                pool.map(digest_of, changed), **shown, disable=not (progress and changed)
            )
            for file, digest in zip(changed, digests, strict=True):
                self.hashes[file.name][-1] = digest

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 by file name."""
        return {name: values[-1] for name, values in self.hashes.items()}

    def require_unchanged(self) -> None:
        """Refuse to go on if a file has changed since it was hashed."""
        found = SourceFiles(self.folder, self.hashes, self._progress)
        if changed := sorted({name for name, _ in self.digests.items() ^ found.digests.items()}):
            which = f"{', '.join(changed)} in {str(self.folder)!r} changed during the run"
            raise ValueError(
                f"{which}: restore the old files and start again with the same output, or {_ADVICE}"
            )
        self.hashes = found.hashes

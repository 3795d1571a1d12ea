"""What identifies a streamed run: all that the bytes of its result depend on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from optimum_fista.folder.checkpoint import CONFIG_FILE
from optimum_fista.folder.output import digest_of
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.prune.plan import Plan
from optimum_fista.prune.ranks import Ranks
from optimum_fista.report import PruningReport, library_versions

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".gguf", ".bin", ".bin.index.json")
_NOT_COMPUTED_WITH = ("_name_or_path", "transformers_version")
_FORMAT = 8  # of the records of a journal
_READERS = 4  # files that are hashed at a time


def run_fingerprint(
    source: SourceFiles, plan: Plan, batches: Sequence[CalibrationBatch], report: PruningReport, packed: bool
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
        "model_config": {key: value for key, value in network.items() if key not in _NOT_COMPUTED_WITH},
        "arithmetic": {k: v for k, v in report.environment.items() if k not in ("processor", "batches")},
        "config": report.config,  # as asked: what a removal makes of it does not tell all patterns apart
        "calibration": tokens,
        "batches": shapes,
        "sequences": sum(shape[0] for shape in shapes),
        "length": shapes[0][1],
        "packed": packed,
        "versions": {name: versions[name] for name in ("optimum-fista", "torch", "transformers")},
    }
    return dict(json.loads(json.dumps(fingerprint)))


def shared_files(folder: Path, known: dict[str, list[Any]], ranks: Ranks, progress: bool) -> SourceFiles:
    """The files of a model that several processes read; those that rank 0 sees too are hashed by it alone."""
    known = ranks.first(lambda: SourceFiles(folder, known, progress).hashes)
    return ranks.each(lambda: SourceFiles(folder, known, progress))


class SourceFiles:
    """The weight files and the configuration of the model that is read: size, times, inode and SHA-256 by name.

    Files whose size, times and inode are those of `known` are not read again: writing to a file changes its ctime,
    which no program can set. The others are read whole, at 1 to 2 GB/s a core: 140 GB take a minute on a disk that is
    fast enough, which is little compared to hours of pruning.
    """

    def __init__(self, folder: Path, known: dict[str, list[Any]], progress: bool) -> None:
        self.folder = folder
        self._progress = progress
        self.hashes: dict[str, list[Any]] = {}
        files = [f for f in sorted(folder.iterdir()) if f.name == CONFIG_FILE or f.name.endswith(_WEIGHTS)]
        for file in files:
            found = file.stat()
            stamp = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
            self.hashes[file.name] = [*stamp, None if known.get(file.name, [])[:-1] != stamp else known[file.name][-1]]
        changed = [file for file in files if self.hashes[file.name][-1] is None]
        with ThreadPoolExecutor(_READERS) as pool:
            shown: Any = {"desc": "Hashing weights", "total": len(changed), "unit": "file", "delay": 3, "leave": False}
            digests = tqdm(pool.map(digest_of, changed), **shown, disable=not progress)
            for file, digest in zip(changed, digests, strict=True):
                self.hashes[file.name][-1] = digest

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 by file name."""
        return {name: values[-1] for name, values in self.hashes.items()}

    def require_unchanged(self) -> None:
        """Refuse what was made of files that changed after they were hashed."""
        found = SourceFiles(self.folder, self.hashes, self._progress)
        if changed := sorted({name for name, _ in self.digests.items() ^ found.digests.items()}):
            raise ValueError(
                f"{', '.join(changed)} in {str(self.folder)!r} changed during the run: put back what was there "
                "and start again with the same output, or pass overwrite=True (--overwrite) to begin anew."
            )
        self.hashes = found.hashes

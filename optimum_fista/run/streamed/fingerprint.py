"""What tells one streamed run from another."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from optimum_fista.run.pruning.model_pruning import ModelPruning
from optimum_fista.run.reports.report import library_versions
from optimum_fista.run.streamed.journal import FOLDER

_VERSIONS = ("optimum-fista", "torch", "transformers")
_BLOCKS = 64


def run_fingerprint(name: str, pruning: ModelPruning) -> dict[str, Any]:
    """Everything that the bytes of a run depend on: weights, configuration, calibration tokens, versions."""
    versions, calibration = library_versions(), pruning.report.calibration
    tokens = calibration["sha256"]
    if "held_out" in calibration:
        tokens = [tokens, calibration["held_out"]["sha256"]]
    fingerprint = {
        "model": weight_files(name) | {"dtype": str(pruning.model.dtype)},
        "config": pruning.config.to_dict(),
        "calibration": tokens,
        "batches": [list(batch.input_ids.shape) for batch in pruning.batches.all],
        "versions": {name: versions[name] for name in _VERSIONS},
    }
    return dict(json.loads(json.dumps(fingerprint)))


def is_of_another_run(folder: Path, fingerprint: dict[str, Any]) -> bool:
    """Whether a folder is there and holds no run with this fingerprint."""
    file = folder / FOLDER / "fingerprint.json"
    return folder.exists() and (not file.exists() or json.loads(file.read_text()) != fingerprint)


def weight_files(name: str) -> dict[str, Any]:
    """What tells one set of weights from another without reading all of them.

    Names and sizes of the weight files, and a digest of blocks spread over each, headers included.
    """
    folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, local_files_only=True))
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".gguf", ".bin"))
    return {"files": {path.name: [path.stat().st_size, _sampled_digest(path)] for path in files}}


def _sampled_digest(path: Path) -> str:
    size, block = path.stat().st_size, 1 << 16
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for place in range(_BLOCKS):
            file.seek(max(0, (size - block) * place // (_BLOCKS - 1)))
            digest.update(file.read(block))
    return digest.hexdigest()

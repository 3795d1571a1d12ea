"""Comparing pruning methods in one run that can be interrupted and started again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_fista.run.checkpoints.atomic import write_text
from optimum_fista.run.checkpoints.loading import load_model, read_config, require_tokenizer
from optimum_fista.run.checkpoints.output import locked_output
from optimum_fista.run.comparison.comparison import Comparison
from optimum_fista.run.comparison.material import Material, prepare, windows_sha256
from optimum_fista.run.comparison.rows import Row
from optimum_fista.run.comparison.settings import (
    CALIBRATED,
    DENSE,
    HELD_OUT,
    NO_PATTERN,
    Candidate,
    ComparisonSettings,
    candidates,
)
from optimum_fista.run.evaluation.perplexity import evaluate_perplexity
from optimum_fista.run.evaluation.zero_shot import TaskSuite
from optimum_fista.run.memory import release_free_memory
from optimum_fista.run.pruner import FistaPruner
from optimum_fista.run.reports.report import PruningReport, library_versions
from optimum_fista.run.streamed.fingerprint import SourceFiles


def compare(settings: ComparisonSettings, output: str | Path, *, progress: bool = True) -> Comparison:
    """Prune a model by every method, pattern and seed, and measure the dense and every pruned one.

    One model is in memory at a time. Every row is kept in `output`/rows under a digest of all it depends on (weights,
    configuration, tokens, tasks), so that the same call after an interrupt resumes with the first unfinished row. A
    row that fails is recorded with its error, and tried again by the next call. `output`/table.md, .csv and .json are
    written again after every row, pictures at the end.

    Args:
        settings: What to compare.
        output: Folder to write to and to take finished rows from.
        progress: Show progress bars.

    Returns:
        The comparison; its `failures` say which rows failed.

    Raises:
        ValueError: If a text or a task is unknown or too short, or nothing of a method can work.
        ImportError: If tasks are to be measured and lm-eval is missing.
        OSError: If `output` can't be written to, another run writes to it, or it holds files of something else under
            the names of a comparison's.
    """
    output = Path(output)
    with locked_output(output):
        output.mkdir(exist_ok=True)
        Comparison.require_own(output)
        suite = None
        if settings.tasks:
            options = {name: getattr(settings, name) for name in ("include_path", "limit", "batch_size")}
            suite = TaskSuite(settings.tasks, progress=progress, **options)
        tokenizer = require_tokenizer(settings.model)
        material = prepare(settings, tokenizer, output / "calibration", progress)
        recipe = list(dict.fromkeys(line for seed in settings.seeds for line in material[seed].recipe))
        comparison = Comparison(settings.to_dict(), [*recipe, *([suite.recipe] if suite is not None else [])])
        run = _Run(settings, tokenizer, material, suite, output / "rows", progress, _identity(settings.model, progress))
        # of another seed, the dense model is measured on windows of that seed alone, if there are any
        seeds = settings.seeds if settings.held_out else settings.seeds[:1]
        wanted = [Candidate(DENSE, NO_PATTERN, seed) for seed in seeds]
        wanted += candidates(settings.methods, settings.patterns, settings.seeds, settings.held_out)
        with tqdm(wanted, desc="Comparing", unit="row", disable=not progress) as bar:
            for candidate in bar:
                bar.set_postfix_str(f"{candidate.method}, {candidate.pattern}, seed {candidate.seed}")
                comparison.rows.append(run.row(candidate))
                comparison.write_tables(output)
        comparison.write_plots(output)
    return comparison


def measure_row(
    method: str,
    pattern: str,
    model: PreTrainedModel,
    texts: dict[str, Tensor],
    report: PruningReport | None = None,
    *,
    seed: int = 0,
    batch_size: int = 1,
    progress: bool = True,
) -> Row:
    """Perplexities of a model, and what the report of its pruning says."""
    perplexity = {
        name: evaluate_perplexity(model, windows, batch_size=batch_size, progress=progress).perplexity
        for name, windows in texts.items()
    }
    names = ("totals", "seconds", "config", "calibration")
    found = {} if report is None else {name: getattr(report, name) for name in names}
    return Row(method, pattern, seed, perplexity, versions=library_versions(), **found)


@dataclass(frozen=True)
class _Run:
    """Rows of one comparison, from their files if they are finished; `weights` tells the models apart."""

    settings: ComparisonSettings
    tokenizer: PreTrainedTokenizerBase
    material: dict[int, Material]
    suite: TaskSuite | None
    folder: Path
    progress: bool
    weights: dict[str, Any]

    def row(self, candidate: Candidate) -> Row:
        """The finished row, or a new one; a pruned row that fails says why."""
        key = self._key(candidate)
        name = re.sub(r"[^\w.=]+", "-", f"{candidate.method}-{candidate.pattern}-{candidate.seed}")
        file = self.folder / f"{name[:80]}-{key[:12]}.json"
        if file.exists():
            row = Row.from_dict(json.loads(file.read_text()))
            if row.key == key and row.error is None:
                return row
        try:
            row = self._measure(candidate)
        except Exception as error:
            if candidate.method == DENSE:
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            row = Row(candidate.method, candidate.pattern, candidate.seed, versions=library_versions(), error=reason)
        release_free_memory(collect=True)  # of the model, which an error held until here
        row = replace(row, key=key)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(dataclasses.asdict(row), indent=1) + "\n")
        return row

    def _measure(self, candidate: Candidate) -> Row:
        settings, material, config = self.settings, self.material[candidate.seed], candidate.config
        if candidate.error is not None:
            raise ValueError(candidate.error)
        places = {name: getattr(settings, name) for name in ("device", "dtype", "device_map")}
        model, _ = load_model(settings.model, **places)
        report = None
        if config is not None:
            pruner = FistaPruner(config, progress=self.progress, storage_device=settings.storage_device)
            batches = list(material.calibration.split(settings.batch_size))
            if config.held_out:
                batches += material.texts[HELD_OUT].split(settings.batch_size)
            report = pruner.prune(model, batches, calibration_source=settings.calibration)
        options: dict[str, Any] = {"seed": candidate.seed, "batch_size": settings.batch_size, "progress": self.progress}
        row = measure_row(candidate.method, candidate.pattern, model, self._texts(candidate), report, **options)
        if self.suite is not None and self._is_complete(candidate):
            row = replace(row, accuracy={r.task: r.scores for r in self.suite.measure(model, self.tokenizer)})
        return row

    def _is_complete(self, candidate: Candidate) -> bool:
        """Whether everything is measured, and not only what a seed changes of the dense model."""
        return candidate.method != DENSE or candidate.seed == self.settings.seeds[0]

    def _texts(self, candidate: Candidate) -> dict[str, Tensor]:
        complete, own = self._is_complete(candidate), (CALIBRATED, HELD_OUT)
        return {n: windows for n, windows in self.material[candidate.seed].texts.items() if complete or n in own}

    def _key(self, candidate: Candidate) -> str:
        settings = self.settings
        parts: dict[str, Any] = {
            "model": self.weights,
            "dtype": settings.dtype,
            "batch_size": settings.batch_size,
            "texts": {name: windows_sha256(windows) for name, windows in self._texts(candidate).items()},
            "tasks": self.suite.identity if self.suite is not None and self._is_complete(candidate) else None,
            "candidate": [candidate.method, candidate.pattern, candidate.seed],
        }
        if candidate.config is not None:
            parts["config"] = candidate.config.resolved().to_dict()
            parts["calibration"] = windows_sha256(self.material[candidate.seed].calibration)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _identity(name: str, progress: bool) -> dict[str, Any]:
    """What tells one set of weights from another: digests of a folder's files, or the Hub's commit."""
    if Path(name).is_dir():
        return SourceFiles(Path(name), {}, progress).digests
    return {"name": name, "commit": getattr(read_config(name), "_commit_hash", None)}

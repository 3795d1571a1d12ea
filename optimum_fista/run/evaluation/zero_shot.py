"""Zero-shot accuracy on tasks of lm-eval."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_fista.installing import install_command
from optimum_fista.model.evaluation_mode import evaluation_mode

# Metrics of a task in the order in which the table prefers them.
_PREFERRED = ("acc", "exact_match", "acc_norm")


@dataclass(frozen=True)
class Score:
    """One metric of a task.

    Attributes:
        value: Its mean over the task's documents.
        stderr: Standard error of that mean, if it is known.
    """

    value: float
    stderr: float | None = None


@dataclass(frozen=True)
class TaskResult:
    """What was measured on a task, without examples in the prompt.

    Attributes:
        task: Its name.
        scores: By metric; the first is the one that tables show.
        num_documents: Documents it was measured on.
        lm_eval: Version of lm-eval.
        files_sha256: Hash of the folder of task files, if the task may come from one.
    """

    task: str
    scores: Mapping[str, Score]
    num_documents: int
    lm_eval: str
    files_sha256: str | None = None


class TaskSuite:
    """Tasks to measure models on, found by their names.

    Args:
        names: Tasks, or groups with metrics of their own, as lm-eval names them.
        include_path: Folder of further task files. If it has all the tasks, nothing else is looked at.
        limit: Only the first documents of every task; `None`: all.
        batch_size: Requests a forward pass.
        progress: Whether to show that lm-eval's tasks are being read, which takes a while.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        include_path: str | Path | None = None,
        limit: int | None = None,
        batch_size: int = 1,
        progress: bool = True,
    ) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise ImportError(
                f"tasks={list(names)!r} need the package lm-eval, which is not installed: "
                f"run {install_command('eval')}, or pass no tasks."
            )
        if include_path is not None and not Path(include_path).is_dir():
            raise ValueError(f"include_path={str(include_path)!r}: no such folder; pass one with task files.")
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit}: pass 1 or more.")
        self.names = list(dict.fromkeys(names))
        self.include_path = None if include_path is None else Path(include_path)
        self.limit = limit
        self.batch_size = batch_size
        self._manager = self._find_tasks(progress)

    @property
    def identity(self) -> dict[str, Any]:
        """What a result depends on, besides the model and versions."""
        if self.include_path is None:
            return {"tasks": self.names, "limit": self.limit, "files": None}
        digest = hashlib.sha256()
        for path in sorted(path for path in self.include_path.rglob("*") if path.is_file()):
            digest.update(path.relative_to(self.include_path).as_posix().encode() + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return {"tasks": self.names, "limit": self.limit, "files": digest.hexdigest()}

    @property
    def recipe(self) -> str:
        """How accuracy is measured, for people."""
        documents = "all documents" if self.limit is None else f"the first {self.limit} documents"
        how = f"lm-eval {_version()}, no examples in the prompt, {documents} of each"
        return f"Accuracy on {', '.join(self.names)}: {how}."

    def measure(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[TaskResult]:
        """Measure a model on one task after another, and yield each result before the next task begins."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        files = self.identity["files"]
        for name in self.names:
            with evaluation_mode(model):
                found: Any = lm_eval.simple_evaluate(
                    HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size),
                    tasks=[name],
                    num_fewshot=0,
                    limit=self.limit,
                    bootstrap_iters=1,  # accuracies have a formula for the standard error
                    log_samples=False,
                    task_manager=self._manager,
                    random_seed=None,
                    numpy_random_seed=None,
                    torch_random_seed=None,
                )
            scores = _scores(name, {} if found is None else found["results"].get(name, {}))
            documents = sum(count["effective"] for count in found["n-samples"].values())  # of all tasks of a group
            yield TaskResult(name, scores, documents, _version(), files)

    def _find_tasks(self, progress: bool) -> Any:
        for name in ("lm_eval", "lm-eval"):
            logging.getLogger(name).setLevel(logging.ERROR)
        from lm_eval.tasks import TaskManager

        known: Any = None
        if self.include_path is not None:
            known = TaskManager(include_path=self.include_path, include_defaults=False)
        if known is None or not set(self.names) <= set(known.all_tasks):
            title = "Reading lm-eval's tasks"
            with tqdm(total=1, desc=title, bar_format="{desc} [{elapsed}]", disable=not progress):
                known = TaskManager(include_path=self.include_path)
        missing = [name for name in self.names if name not in known.all_tasks]
        if missing:
            raise ValueError(
                f"tasks: {', '.join(map(repr, missing))} not found; pass names of lm-eval (lm-eval ls tasks), or "
                "include_path with a folder of task files."
            )
        groups = {name for name in known.all_groups if (known.task_index[name].cfg or {}).get("aggregate_metric_list")}
        several = [name for name in self.names if name not in {*known.all_subtasks, *groups}]
        if several:
            raise ValueError(
                f"tasks: {', '.join(map(repr, several))}: a tag or a group without a metric of its own; pass the tasks "
                "that it stands for."
            )
        return known


def _version() -> str:
    return importlib.metadata.version("lm_eval")


def _scores(task: str, result: dict[str, Any]) -> dict[str, Score]:
    """Metrics from lm-eval's `{"acc,none": 0.5, "acc_stderr,none": 0.1}`."""
    scores: dict[str, Score] = {}
    for key, value in result.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = result.get(f"{metric}_stderr,{filtered}")
        scores.setdefault(metric, Score(float(value), float(stderr) if isinstance(stderr, int | float) else None))
    if not scores:
        raise ValueError(f"tasks: lm-eval gives no metric for {task!r}; pass another task.")
    first = next((metric for metric in _PREFERRED if metric in scores), next(iter(scores)))
    return {first: scores.pop(first)} | scores

"""Zero-shot accuracy on tasks of lm-eval.

lm-eval measures; this file finds its tasks before a model is loaded, and silences its log. Tasks are measured one after
another, so that results are kept if a later task fails.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_fista.evaluate.evaluation_file import Score, TaskResult
from optimum_fista.installing import install_command
from optimum_fista.model.forward import evaluation_mode

_PREFERRED = ("acc", "exact_match", "acc_norm")  # tables show the first of these that a task has


class TaskSuite:
    """Tasks of lm-eval to measure models on, or groups of tasks that have their own metrics, by name.

    `include_path` is a folder of further task files, and `limit` the number of documents of every task (`None`: all).
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        include_path: str | Path | None = None,
        limit: int | None = None,
        batch_size: int = 1,
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
        self.names = list(dict.fromkeys(names))  # each once
        self.limit, self.batch_size = limit, batch_size  # requests a forward pass
        self.include_path = None if include_path is None else Path(include_path)
        with _errors_only():
            self._manager = self._find_tasks()

    def measure(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[TaskResult]:
        """Measure a model on one task after another, and yield each result before the next task begins."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        files = None if self.include_path is None else _digest(self.include_path)
        for name in self.names:
            with evaluation_mode(model), _errors_only():
                found: Any = lm_eval.simple_evaluate(
                    HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size),
                    tasks=[name],
                    num_fewshot=0,
                    limit=self.limit,
                    bootstrap_iters=1,  # accuracies have a formula for the standard error
                    log_samples=False,
                    task_manager=self._manager,
                    random_seed=None,  # the random numbers of this process stay as they are
                    numpy_random_seed=None,
                    torch_random_seed=None,
                )
            scores = _scores(name, {} if found is None else found["results"].get(name, {}))
            documents = sum(count["effective"] for count in found["n-samples"].values())  # of all tasks of a group
            yield TaskResult(name, scores, documents, version("lm_eval"), files)

    def _find_tasks(self) -> Any:
        from lm_eval.tasks import TaskManager

        known: Any = None
        if self.include_path is not None:  # without lm-eval's own tasks first: reading these takes a minute
            known = TaskManager(include_path=self.include_path, include_defaults=False)
        if known is None or not set(self.names) <= set(known.all_tasks):
            with tqdm(total=1, desc="Reading lm-eval's tasks", bar_format="{desc} [{elapsed}]"):
                known = TaskManager(include_path=self.include_path)
        advice = "pass names of lm-eval (lm-eval ls tasks), or include_path with a folder of task files"
        groups = {name for name in known.all_groups if (known.task_index[name].cfg or {}).get("aggregate_metric_list")}
        for name in self.names:
            if name not in known.all_tasks:
                raise ValueError(f"tasks: {name!r} not found; {advice}.")
            if name not in {*known.all_subtasks, *groups}:
                why = "a tag or a group without a metric of its own; pass the tasks that it stands for"
                raise ValueError(f"tasks: {name!r}: {why}.")
        return known


@contextmanager
def _errors_only() -> Iterator[None]:
    """Have lm-eval log nothing but errors."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _digest(folder: Path) -> str:
    """Digest of a folder's files and their names: two measurements are comparable only on the same task files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _scores(task: str, result: dict[str, Any]) -> dict[str, Score]:
    """Metrics from lm-eval's `{"acc,none": 0.5, "acc_stderr,none": 0.1}`."""
    scores: dict[str, Score] = {}
    for key, value in result.items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            stderr = result.get(f"{metric}_stderr,{filtered}")
            scores.setdefault(metric, Score(float(value), float(stderr) if isinstance(stderr, int | float) else None))
    if not scores:
        raise ValueError(f"tasks: lm-eval gives no metric for {task!r}; pass another task.")
    first = next((metric for metric in _PREFERRED if metric in scores), next(iter(scores)))
    return {first: scores.pop(first)} | scores

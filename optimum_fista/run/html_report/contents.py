"""What the page is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from optimum_fista.run.checkpoints.checkpoint import REPORT_FILE, read_report
from optimum_fista.run.evaluation.evaluation_file import EVALUATION_FILE, Evaluation, read_evaluations
from optimum_fista.run.evaluation.generation import continue_prompts
from optimum_fista.run.html_report.row_sparsity import MaskSparsities, read_sparsities
from optimum_fista.run.reports.report import PruningReport


@dataclass(frozen=True)
class Continuation:
    """A prompt and what the dense and the pruned model make of it."""

    prompt: str
    dense: str
    pruned: str


@dataclass(frozen=True)
class ReportContents:
    """What is known of a pruned model.

    Attributes:
        folder: Its folder.
        report: The report of its pruning.
        sparsities: What its masks say.
        evaluations: Perplexities of it and of other models.
        continuations: Texts, where they were asked for.
    """

    folder: Path
    report: PruningReport
    sparsities: MaskSparsities
    evaluations: tuple[Evaluation, ...] = ()
    continuations: tuple[Continuation, ...] = ()


def read_contents(
    folder: Path, evaluation_files: Sequence[Path] | None = None, progress: Callable[[str], None] = lambda _: None
) -> ReportContents:
    """Read the report, the masks and the perplexities of a pruned folder, packed or not.

    Args:
        folder: The model folder.
        evaluation_files: Files of perplexities; `None`: `fista/evaluation.json` of the folder, where there is one.
        progress: Called with each operator's name once its mask is read.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file holds something else.
    """
    report = read_report(folder)
    if not report.operators:
        raise ValueError(f"{str(folder / REPORT_FILE)!r} names no pruned operator: pass the folder of a pruned model.")
    if evaluation_files is None:
        usual = folder / EVALUATION_FILE
        evaluation_files = [usual] if usual.exists() else []
    evaluations = tuple(evaluation for path in evaluation_files for evaluation in read_evaluations(path))
    return ReportContents(folder, report, read_sparsities(folder, report, progress), evaluations)


def with_continuations(
    contents: ReportContents,
    dense: str,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 48,
    device: str | None = None,
    dtype: str = "auto",
) -> ReportContents:
    """The same with what both models, loaded one after the other, make of some prompts.

    Raises:
        ValueError: If a model can't be loaded or a prompt is empty.
    """
    written = [
        continue_prompts(name, prompts, max_new_tokens=max_new_tokens, device=device, dtype=dtype)
        for name in (dense, str(contents.folder))
    ]
    continuations = tuple(Continuation(*texts) for texts in zip(prompts, *written, strict=True))
    return dataclasses.replace(contents, continuations=continuations)

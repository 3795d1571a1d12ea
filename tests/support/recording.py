"""Layer problems that reach the pruning method, recorded on calibration data with padding."""

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from tiny_models import VOCAB_SIZE
from torch import Tensor
from transformers import PreTrainedModel

from optimum_fista.config import FistaPruningConfig
from optimum_fista.pruner import FistaPruner
from optimum_fista.solve.method import PrunedOperator, PruningMethod
from optimum_fista.solve.methods.magnitude import Magnitude
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import LayerProblem


def record_of(problem: LayerProblem, result: PrunedOperator) -> SimpleNamespace:
    """What reached the method for one operator, and what it made of it."""
    return SimpleNamespace(
        name=problem.name,
        weight=problem.weight.clone(),
        gram=problem.gram.clone(),
        target=problem.target.clone(),
        target_energy=float(problem.output_energies.sum()),
        mean=problem.statistics.mean.clone(),
        num_tokens=problem.statistics.num_tokens,
        pruned=result.weight.clone(),
        fit_error=result.fit_error,
    )


class Recorder(PruningMethod):
    """Magnitude pruning with larger survivors, which remembers its problems."""

    name = "recorder"

    def __init__(self) -> None:
        self.groups: list[list[SimpleNamespace]] = []

    def prune(self, problem: LayerProblem, pattern: SparsityPattern) -> PrunedOperator:
        plain = Magnitude().prune(problem, pattern)
        weight = plain.weight * 1.1
        return PrunedOperator(weight, plain.mask, problem.fit_error(weight))

    def prune_sharing(
        self, problems: Sequence[LayerProblem], patterns: Sequence[SparsityPattern]
    ) -> list[PrunedOperator]:
        results = super().prune_sharing(problems, patterns)
        self.groups.append([record_of(*pair) for pair in zip(problems, results, strict=True)])
        return results

    @property
    def records(self) -> list[SimpleNamespace]:
        return [record for group in self.groups for record in group]


def calibration() -> dict[str, Tensor]:
    """Eight sequences of ten tokens; three are padded, right or left."""
    ids = torch.randint(3, VOCAB_SIZE, (8, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[3, 7:] = 0
    mask[4, :3] = 0
    mask[6, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def batches(*sizes: int) -> list[dict[str, Tensor]]:
    """The calibration data in batches of these sizes."""
    data = calibration()
    parts = zip(data["input_ids"].split(sizes), data["attention_mask"].split(sizes), strict=True)
    return [{"input_ids": ids, "attention_mask": mask} for ids, mask in parts]


def prune(
    model: PreTrainedModel, error_correction: str | float, data: list[dict[str, Tensor]], **options
) -> Recorder:
    """Prune by a recorder; returns what it saw."""
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FistaPruningConfig, "create_method", lambda self, model_type: recorder)
        options = {"residual_correction": 0.0, "allocation": "uniform"} | options
        FistaPruner(
            FistaPruningConfig(error_correction=error_correction, **options), progress=False
        ).prune(model, data)
    return recorder


def require_problem(
    record: SimpleNamespace, W: Tensor, X: Tensor, X_star: Tensor, error_correction: str | float
) -> None:
    """What reached the method is the problem of `W` on inputs [tokens, in]; its fit error is that of the outputs."""
    share = error_correction if isinstance(error_correction, float) else 1.0
    wanted = share * X + (1 - share) * X_star
    assert torch.equal(record.weight, W)
    assert record.num_tokens == len(X_star) > 0
    assert_close(record.gram, X_star.T @ X_star, f"gram of {record.name}")
    assert torch.equal(record.gram, record.gram.T)
    assert_close(record.target, W @ wanted.T @ X_star, f"target of {record.name}")
    assert_close(record.mean, X_star.mean(0), f"mean of {record.name}")
    outputs = wanted @ W.T
    assert record.target_energy == pytest.approx(float(outputs.square().sum()), rel=1e-4)
    error = float((X_star @ record.pruned.T - outputs).norm() / outputs.norm())
    assert record.fit_error == pytest.approx(error, rel=1e-3)


def assert_close(ours: Tensor, expected: Tensor, what: str) -> None:
    assert ours.shape == expected.shape
    distance = float((ours - expected).norm() / expected.norm())
    assert distance <= 1e-4, f"{what}: relative distance {distance:g}"

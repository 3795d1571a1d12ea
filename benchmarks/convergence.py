"""Why FISTA on the LASSO stalls, and where ADMM's penalty belongs: three pictures on real operators.

1. Objective of the LASSO above its minimum by FISTA step, plain from three warm starts and with diagonal
   preconditioning and restart. The penalty is the one at which half of the solution is zero.
2. Squared relative error of what a method would give after that many products with the Gram matrix: the iterate
   rounded to 50% and refitted.
3. Squared relative error after twelve ADMM iterations by `rho`, in three systems of coordinates.

    python benchmarks/convergence.py MODEL --calibration TEXT --layers 3,15,26 --plot docs/convergence.png
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from shared import calibration_of, parse_arguments, save
from solvers import layer_problems
from torch import Tensor

from optimum_fista.solve.linalg import damped_cholesky, damped_inverse
from optimum_fista.solve.methods import create_method
from optimum_fista.solve.methods.admm import SplitState
from optimum_fista.solve.patterns import Unstructured
from optimum_fista.solve.problem import LayerProblem, inner, largest_eigenvalue
from optimum_fista.solve.proximal_gradient import soft_threshold
from optimum_fista.solve.refit import refit
from optimum_fista.source.loading import load_model

Step = Callable[[int, Tensor], None]

HALF = Unstructured(0.5)
RIDGE = 0.03
RHOS = (0.03, 0.06, 0.12, 0.25, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0, 6.0, 12.0)


class Scaled:
    """A layer problem with a small ridge in coordinates `W / s`."""

    def __init__(self, problem: LayerProblem, coordinates: str) -> None:
        diagonal = problem.statistics.diagonal
        gram = problem.gram.clone()
        gram.diagonal().add_(diagonal, alpha=RIDGE)
        unit = gram.diagonal().rsqrt()
        if coordinates == "plain":
            scale = torch.full_like(unit, float(gram.diagonal().mean()) ** -0.5)
        elif coordinates == "unit Gram diagonal":
            scale = unit
        else:
            factor, _ = damped_cholesky((gram * unit * unit[:, None]).clone, 0.0)
            scale = torch.cholesky_inverse(factor).diagonal().sqrt() * unit
        self.problem, self.scale = problem, scale
        self.gram = gram * scale * scale[:, None]
        self.target = (problem.target + problem.weight * (diagonal * RIDGE)) * scale
        self.start = problem.weight / scale

    def error(self, weight: Tensor, mask: Tensor) -> float:
        """Squared relative error of scaled weights after a refit on a mask."""
        fitted, _ = refit(self.gram, self.target, weight, mask)
        return self.problem.fit_error(fitted * self.scale) ** 2

    def objective(self, weight: Tensor, l1_penalty: float) -> float:
        """The LASSO's."""
        smooth = inner(weight @ self.gram, weight) / 2 - inner(weight, self.target)
        return smooth + l1_penalty * float((weight.abs() * self.scale).sum(dtype=torch.float64))

    def fista(
        self, start: Tensor, l1_penalty: float, steps: int, restart: bool, see: Step | None = None
    ) -> Tensor:
        """FISTA with thresholds `l1_penalty * s_j / L`: the LASSO of the unscaled weights, whatever the scale.

        `restart` drops the momentum when it points uphill (O'Donoghue & Candes 2015, gradient scheme).
        """
        weight = point = start
        lipschitz, t = largest_eigenvalue(self.gram), 1.0
        for count in range(1, steps + 1):
            values = torch.addmm(point, point, self.gram, alpha=-1 / lipschitz).add_(
                self.target, alpha=1 / lipschitz
            )
            found = soft_threshold(values, l1_penalty * self.scale / lipschitz)
            if see is not None:
                see(count, found)
            # point - found is the generalized gradient over L; a step along it goes uphill.
            t = 1.0 if restart and inner(point - found, found - weight) > 0 else t
            t_next = (1 + math.sqrt(1 + 4 * t * t)) / 2
            point = torch.add(found, found - weight, alpha=(t - 1) / t_next)
            weight, t = found, t_next
        return weight


def admm(
    scaled: Scaled, rho: float, iterations: int, see: Callable[[int, Tensor, Tensor], None] | None
) -> SplitState:
    inverse = damped_inverse(scaled.gram.clone(), rho)
    state = SplitState(scaled.target.__getitem__, scaled.start.clone())
    for iteration in range(1, iterations + 1):
        state.iterate(inverse, rho, HALF)
        if see is not None:
            see(iteration, state.point * state.mask, state.mask)  # type: ignore[arg-type, operator]
    return state


def half_penalty(scaled: Scaled) -> float:
    """The penalty at which half of the LASSO's solution is zero, to 1%."""
    low, high = math.log(1e-6), math.log(float((scaled.target / scaled.scale).abs().max()))
    weight = scaled.start
    while True:
        middle = (low + high) / 2
        weight = scaled.fista(weight, math.exp(middle), 150, True)
        zeros = float((weight == 0).float().mean())
        if abs(zeros - 0.5) < 0.01 or high - low < 1e-3:
            return math.exp(middle)
        low, high = (middle, high) if zeros < 0.5 else (low, middle)


def shown(step: int) -> bool:
    return step <= 20 or step % 10 == 0


def stalling(problem: LayerProblem, steps: int) -> tuple[dict[str, list], dict[str, list]]:
    """Curves of pictures 1 and 2: lists of (step, value)."""
    plain, unit = Scaled(problem, "plain"), Scaled(problem, "unit Gram diagonal")
    surgeon = Scaled(problem, "unit diagonal of the inverse")
    l1_penalty = half_penalty(unit)
    best = unit.objective(unit.fista(unit.start, l1_penalty, 8 * steps, True), l1_penalty)
    dense = abs(unit.objective(torch.zeros_like(unit.start), l1_penalty) - best)
    gaps: dict[str, list] = {}
    errors: dict[str, list] = {}

    def follow(name: str, scaled: Scaled, start: Tensor, restart: bool, rounded: bool) -> None:
        gaps[name] = []
        if rounded:
            errors[name] = []

        def see(step: int, weight: Tensor) -> None:
            if shown(step):
                gaps[name].append((step, (scaled.objective(weight, l1_penalty) - best) / dense))
                if rounded:
                    errors[name].append(
                        (step, scaled.error(weight, HALF.mask((weight * scaled.scale).abs())))
                    )

        scaled.fista(start, l1_penalty, steps, restart, see)

    follow("FISTA from the dense weights", plain, plain.start, False, True)
    for name in ("wanda", "sparsegpt"):
        warm = create_method(name).prune(problem, HALF).weight
        follow(f"FISTA from {name}", plain, warm / plain.scale, False, name == "sparsegpt")
    follow("FISTA, preconditioned, restarts", unit, unit.start, True, True)
    for name, scaled, rho in (
        ("ADMM, unit Gram diagonal, rho 0.5", unit, 0.5),
        ("ADMM, surgeon coordinates, rho 1.2", surgeon, 1.2),
    ):
        curve = errors[name] = []

        def see(iteration: int, weight: Tensor, mask: Tensor, curve=curve, scaled=scaled) -> None:
            if shown(iteration):
                curve.append((iteration, scaled.error(weight, mask)))

        admm(scaled, rho, 40, see)
    return gaps, errors


def by_rho(problems: list[LayerProblem]) -> dict[str, list]:
    """Geometric mean of the squared relative error over operators, by coordinates: lists of (rho, value)."""
    curves = {}
    for coordinates in ("plain", "unit Gram diagonal", "unit diagonal of the inverse"):
        logs: dict[float, list[float]] = {rho: [] for rho in RHOS}
        for problem in problems:
            scaled = Scaled(problem, coordinates)
            for rho in RHOS:
                state = admm(scaled, rho, 12, None)
                logs[rho].append(math.log(scaled.error(state.point, state.mask)))  # type: ignore[arg-type]
        curves[coordinates] = [
            (rho, math.exp(statistics.fmean(values))) for rho, values in logs.items()
        ]
    return curves


def plot(record: dict, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    titles = (
        "LASSO: objective above its minimum",
        "error after rounding and refitting",
        "error after 12 ADMM iterations",
    )
    labels = ("FISTA step", "products with the Gram matrix", "rho")
    for axis, key, title, label in zip(
        axes, ("gaps", "errors", "by_rho"), titles, labels, strict=True
    ):
        for name, curve in record[key].items():
            places, values = zip(*curve, strict=True)
            axis.plot(
                places,
                [max(v, 1e-9) for v in values],
                label=name,
                marker="." if key == "by_rho" else None,
            )
        axis.set(title=title, xlabel=label, xscale="log", yscale="log")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(1e-6, 3)
    axes[1].set_ylim(3e-3, 1.3e-2)
    axes[1].legend(fontsize=8, loc="lower left")
    axes[0].axvline(20, color="gray", linestyle=":")
    figure.savefig(path, dpi=110)


@torch.no_grad()
def main() -> None:
    sizes = {
        "num_samples": 24,
        "sequence_length": 1024,
        "layers": [3, 15, 26],
        "steps": 300,
        "seed": 0,
    }
    helps = {
        "layers": "decoder layers; pictures 1 and 2 use the middle one",
        "steps": "FISTA steps shown",
    }
    files = {"output": Path("runs/convergence.json"), "plot": Path}
    arguments = parse_arguments(__doc__, "model", "calibration", helps=helps, **sizes, **files)
    model, tokenizer = load_model(arguments.model, dtype="float32", device="cpu")
    windows = calibration_of(arguments, tokenizer, arguments.num_samples)
    layers = arguments.layers
    found = [
        problem
        for (group,) in layer_problems(model, [windows], set(layers))
        for problem in group[:1]
    ]
    middle = layers[len(layers) // 2]
    chosen = next(p for p in found if f".{middle}." in p.name and p.name.endswith("o_proj"))
    gaps, errors = stalling(chosen, arguments.steps)
    record = {"operator": chosen.name, "gaps": gaps, "errors": errors}
    record["by_rho"] = by_rho(
        [p for p in found if p.name.endswith(("o_proj", "q_proj", "gate_proj"))]
    )
    save(arguments, record)
    for key in ("gaps", "errors", "by_rho"):
        for name, curve in record[key].items():
            picked = [c for c in curve if c[0] in (1, 5, 10, 20, 40, 100, arguments.steps, *RHOS)]
            print(f"{key}: {name}: " + ", ".join(f"{place} {value:.2e}" for place, value in picked))
    if arguments.plot:
        plot(record, arguments.plot)


if __name__ == "__main__":
    main()

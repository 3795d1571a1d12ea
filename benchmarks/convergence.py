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
    """A layer problem with a small ridge in coordinates `W / s`.

    Attributes:
        problem: The layer problem, with weights `W` [out, in].
        scale: `s` [in].
        gram, target, start: Gram matrix [in, in], target [out, in] and dense weights [out, in] in these coordinates.
    """

    def __init__(self, problem: LayerProblem, coordinates: str) -> None:
        """Scale a problem. `coordinates` are "plain", "unit Gram diagonal" or "unit diagonal of the inverse"."""
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
        self.problem = problem
        self.scale = scale
        self.gram = gram * scale * scale[:, None]
        self.target = (problem.target + problem.weight * (diagonal * RIDGE)) * scale
        self.start = problem.weight / scale

    def error(self, weight: Tensor, mask: Tensor) -> float:
        """Return the squared relative error of scaled weights after a refit on a mask."""
        fitted, _ = refit(self.gram, self.target, weight, mask)
        return self.problem.fit_error(fitted * self.scale) ** 2

    def objective(self, weight: Tensor, l1_penalty: float) -> float:
        """Return the objective of the LASSO at scaled weights."""
        smooth = inner(weight @ self.gram, weight) / 2 - inner(weight, self.target)
        return smooth + l1_penalty * float((weight.abs() * self.scale).sum(dtype=torch.float64))

    def fista(
        self,
        start: Tensor,
        l1_penalty: float,
        steps: int,
        *,
        restart: bool,
        on_step: Step | None = None,
    ) -> Tensor:
        """Run FISTA with thresholds `l1_penalty * s_j / L`: the LASSO of the unscaled weights, whatever the scale.

        `restart` drops the momentum when it points uphill (O'Donoghue & Candes 2015, gradient scheme). `on_step` is
        called with the number of each step and its weights. `start` stays as it is.
        """
        weight = start
        point = start  # where the gradient is taken: the weights with momentum
        lipschitz = largest_eigenvalue(self.gram)
        t = 1.0
        for step in range(1, steps + 1):
            # point - (point G - C) / L, a step against the gradient
            values = torch.addmm(point, point, self.gram, alpha=-1 / lipschitz)
            values.add_(self.target, alpha=1 / lipschitz)
            next_weight = soft_threshold(values, l1_penalty * self.scale / lipschitz)
            if on_step is not None:
                on_step(step, next_weight)
            # point - next_weight is the generalized gradient over L; a step along it goes uphill.
            change = next_weight - weight
            if restart and inner(point - next_weight, change) > 0:
                t = 1.0
            t_next = (1 + math.sqrt(1 + 4 * t * t)) / 2
            point = torch.add(next_weight, change, alpha=(t - 1) / t_next)
            weight = next_weight
            t = t_next
        return weight


def admm(
    scaled: Scaled,
    rho: float,
    iterations: int,
    see: Callable[[int, Tensor, Tensor], None] | None = None,
) -> SplitState:
    """Run ADMM to half of the weights; `see` is called with the number, the weights and the mask of each iteration."""
    inverse = damped_inverse(scaled.gram.clone(), rho)
    # a stack of one operator, [1, out, in]
    target = scaled.target[None]
    state = SplitState(lambda rows: target[:, rows], scaled.start.clone()[None])
    for iteration in range(1, iterations + 1):
        state.iterate(inverse[None], rho, [HALF])
        if see is not None:
            assert state.mask is not None
            see(iteration, state.point[0] * state.mask[0], state.mask[0])
    return state


def half_penalty(scaled: Scaled) -> float:
    """Return the penalty at which half of the LASSO's solution is zero, to 1%; found by bisection."""
    low = math.log(1e-6)
    high = math.log(float((scaled.target / scaled.scale).abs().max()))
    weight = scaled.start
    while True:
        middle = (low + high) / 2
        weight = scaled.fista(weight, math.exp(middle), 150, restart=True)
        zeros = float((weight == 0).float().mean())
        if abs(zeros - 0.5) < 0.01 or high - low < 1e-3:
            return math.exp(middle)
        if zeros < 0.5:
            low = middle
        else:
            high = middle


def is_shown(step: int) -> bool:
    """Tell whether a step is a point of a curve."""
    return step <= 20 or step % 10 == 0


def stalling(problem: LayerProblem, steps: int) -> tuple[dict[str, list], dict[str, list]]:
    """Return the curves of pictures 1 and 2: lists of (step, value), by name."""
    plain = Scaled(problem, "plain")
    unit = Scaled(problem, "unit Gram diagonal")
    surgeon = Scaled(problem, "unit diagonal of the inverse")
    l1_penalty = half_penalty(unit)
    minimizer = unit.fista(unit.start, l1_penalty, 8 * steps, restart=True)
    minimum = unit.objective(minimizer, l1_penalty)
    # The gap of zero weights, in which gaps are measured.
    unit_of_gaps = abs(unit.objective(torch.zeros_like(unit.start), l1_penalty) - minimum)
    gaps: dict[str, list] = {}
    errors: dict[str, list] = {}

    def follow(
        name: str, scaled: Scaled, start: Tensor, *, restart: bool = False, is_rounded: bool = True
    ) -> None:
        """Add the curves of FISTA from `start`; only that of picture 1 without `is_rounded`."""
        gaps[name] = []
        if is_rounded:
            errors[name] = []

        def see(step: int, weight: Tensor) -> None:
            """Add a point to both curves."""
            if not is_shown(step):
                return
            gap = scaled.objective(weight, l1_penalty) - minimum
            gaps[name].append((step, gap / unit_of_gaps))
            if is_rounded:
                mask = HALF.mask((weight * scaled.scale).abs())
                errors[name].append((step, scaled.error(weight, mask)))

        scaled.fista(start, l1_penalty, steps, restart=restart, on_step=see)

    def follow_admm(name: str, scaled: Scaled, rho: float) -> None:
        """Add the curve of ADMM to picture 2."""
        errors[name] = []

        def see(iteration: int, weight: Tensor, mask: Tensor) -> None:
            """Add a point."""
            if is_shown(iteration):
                errors[name].append((iteration, scaled.error(weight, mask)))

        admm(scaled, rho, 40, see)

    wanda = create_method("wanda").prune(problem, HALF).weight
    sparsegpt = create_method("sparsegpt").prune(problem, HALF).weight
    follow("FISTA from the dense weights", plain, plain.start)
    follow("FISTA from wanda", plain, wanda / plain.scale, is_rounded=False)
    follow("FISTA from sparsegpt", plain, sparsegpt / plain.scale)
    follow("FISTA, preconditioned, restarts", unit, unit.start, restart=True)
    follow_admm("ADMM, unit Gram diagonal, rho 0.5", unit, 0.5)
    follow_admm("ADMM, surgeon coordinates, rho 1.2", surgeon, 1.2)
    return gaps, errors


def by_rho(problems: list[LayerProblem]) -> dict[str, list]:
    """Return the geometric mean of the squared relative error over operators, by coordinates: lists of (rho, value)."""
    curves = {}
    for coordinates in ("plain", "unit Gram diagonal", "unit diagonal of the inverse"):
        logs: dict[float, list[float]] = {rho: [] for rho in RHOS}
        for problem in problems:
            scaled = Scaled(problem, coordinates)
            for rho in RHOS:
                state = admm(scaled, rho, 12)
                assert state.mask is not None
                logs[rho].append(math.log(scaled.error(state.point[0], state.mask[0])))
        curves[coordinates] = [
            (rho, math.exp(statistics.fmean(values))) for rho, values in logs.items()
        ]
    return curves


def plot(record: dict, path: Path) -> None:
    """Draw the three pictures of a record into a file."""
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
            steps, values = zip(*curve, strict=True)
            heights = [max(value, 1e-9) for value in values]  # on a logarithmic scale
            axis.plot(steps, heights, label=name, marker="." if key == "by_rho" else None)
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
    """Compute the curves, print some of their points, and draw them if asked for."""
    helps = {
        "layers": "decoder layers; pictures 1 and 2 use the middle one",
        "steps": "FISTA steps shown",
    }
    arguments = parse_arguments(
        __doc__,
        "model",
        "calibration",
        helps=helps,
        num_samples=24,
        sequence_length=1024,
        layers=[3, 15, 26],
        steps=300,
        seed=0,
        output=Path("runs/convergence.json"),
        plot=Path,
    )
    model, tokenizer = load_model(arguments.model, dtype="float32", device="cpu")
    windows = calibration_of(arguments, tokenizer, arguments.num_samples)
    layers = arguments.layers
    problems = []  # of the first operator of each group
    for (group,) in layer_problems(model, [windows], set(layers)):
        problems += group[:1]

    middle = layers[len(layers) // 2]
    chosen = next(
        problem
        for problem in problems
        if f".{middle}." in problem.name and problem.name.endswith("o_proj")
    )
    gaps, errors = stalling(chosen, arguments.steps)
    of_large = [p for p in problems if p.name.endswith(("o_proj", "q_proj", "gate_proj"))]
    record = {
        "operator": chosen.name,
        "gaps": gaps,
        "errors": errors,
        "by_rho": by_rho(of_large),
    }
    save(arguments, record)

    printed_steps = (1, 5, 10, 20, 40, 100, arguments.steps, *RHOS)
    for key in ("gaps", "errors", "by_rho"):
        for name, curve in record[key].items():
            points = [f"{step} {value:.2e}" for step, value in curve if step in printed_steps]
            print(f"{key}: {name}: " + ", ".join(points))
    if arguments.plot:
        plot(record, arguments.plot)


if __name__ == "__main__":
    main()

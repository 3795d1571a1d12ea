"""Work of a run, foretold stage by stage, and the time it takes at given rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optimum_fista.model.probe import Work
from optimum_fista.run.planning.machine import MachineRates
from optimum_fista.run.planning.model import LayerKind, PlannedModel
from optimum_fista.run.planning.settings import PlanSettings

_SWEEP = 8  # bytes: a float32 read and written
_READ = 200  # operations that take as long as reading a weight from its file
_ADAM = 12  # passes over all weights a step: masks, Adam in single operations, rounding
_OPERATIONS = 20  # Python and kernel launches a column step or product brings along


@dataclass
class StageWork:
    """Work of one stage.

    Attributes:
        forward: Operations of the model in its dtype: products, attention, the rest.
        float_products: Floating-point operations of float32 products of problems and solver.
        gram_products: Those of Gram matrices from activations, half a product each.
        factor_products: Those of factorisations and inverses.
        file_bytes: Bytes written, and read again for their digest.
    """

    forward: Work
    float_products: float = 0.0
    gram_products: float = 0.0
    factor_products: float = 0.0
    file_bytes: float = 0.0

    @property
    def products(self) -> float:
        """Floating-point operations of all products."""
        f = self.forward
        return f.products + f.attention + self.float_products + self.gram_products + self.factor_products

    def seconds(self, rates: MachineRates) -> float:
        """Time at these rates."""
        return (
            self.forward.products / rates.model_products
            + self.forward.attention / rates.attention
            + self.forward.moved_bytes / rates.moved_bytes
            + self.forward.operations * rates.operation_seconds
            + self.float_products / rates.float_products
            + self.gram_products / rates.gram_products
            + self.factor_products / rates.factor_products
            + self.file_bytes / rates.file_bytes
        )


def plan_work(model: PlannedModel, settings: PlanSettings) -> dict[str, StageWork]:
    """Work by stage."""
    stages = {
        "allocation": _allocation(model, settings) if settings.allocates else StageWork(Work()),
        "forward passes": StageWork(Work()),
        "statistics": StageWork(Work()),
        "solving": StageWork(Work()),
        **({"fine-tuning": StageWork(Work())} if settings.finetunes else {}),
        "files": StageWork(Work()),
    }
    if settings.calibration == "self":
        stages = {"calibration text": _sampling(model, settings)} | stages
    for kind in model.kinds:
        _layer(stages, settings, kind)
        if settings.finetunes:
            _finetune(stages["fine-tuning"], settings, kind)
        streams = model.hidden_bytes * settings.batches * settings.streams
        stages["files"].file_bytes += kind.count * (kind.weight_bytes * 2 + streams)
    return stages


def _sampling(model: PlannedModel, settings: PlanSettings) -> StageWork:
    """Every token is a forward pass of its own; a step reads all weights for 32 sequences."""
    parameters = sum(p.numel() for p in model.model.parameters())
    steps = settings.sequence_length * -(-settings.num_samples // 32)
    work = Work(products=2.0 * parameters * settings.tokens, moved_bytes=float(steps) * model.weight_bytes)
    for kind in model.kinds:
        work.operations += steps * kind.count * kind.probe.forward.operations
        work.attention += kind.count * kind.probe.forward.attention * settings.batches
    return StageWork(work)


def _allocation(model: PlannedModel, settings: PlanSettings) -> StageWork:
    """A pass forwards, recomputed on the way back, and one backwards; and the saliencies of all weights."""
    times = settings.allocation_tokens / settings.batch_tokens
    found = StageWork(Work())
    for kind in model.kinds:
        probe = kind.probe
        found.forward += (probe.forward.scaled(2) + probe.backward).scaled(times * kind.count)
        found.forward.attention += 2.5 * probe.forward.attention * times * kind.count
        for group in probe.groups:
            for rows, columns in (operator.shape for operator in group):
                values = settings.allocation_tokens * (6 * columns + 10 * rows) + 24 * rows * columns
                found.forward.moved_bytes += kind.count * _SWEEP * values
                found.forward.operations += kind.count * 4 * _READ
        for expert in kind.experts:
            products = 3 * 2.0 * settings.allocation_tokens * expert.active * expert.shape[0] * expert.shape[1]
            found.forward.products += kind.count * products
            found.forward.moved_bytes += kind.count * _SWEEP * 24 * expert.pruned_weights
    embedding = settings.embedding_bytes(model.model) / settings.element_size
    vocabulary = settings.vocabulary(model.model)
    found.forward.products += 4.0 * embedding * settings.allocation_tokens
    found.forward.moved_bytes += 6.0 * _SWEEP * vocabulary * settings.allocation_tokens
    return found


def _layer(stages: dict[str, StageWork], settings: PlanSettings, kind: LayerKind) -> None:
    probe, batches = kind.probe, settings.batches
    corrected = [i for i in range(len(probe.groups)) if not settings.sees_dense(i)]
    passes = batches * (int(settings.runs_dense) + bool(corrected)) + 1 + 2 * bool(settings.residual)
    forward = stages["forward passes"]
    forward.forward += probe.forward.scaled(passes * kind.count)
    for index, group in enumerate(probe.groups):
        shapes = [operator.shape for operator in group]
        last = settings.corrects_residual(kind, index)
        if last and settings.carries_on:
            forward.forward.products += kind.count * 2.0 * settings.tokens * shapes[0][0] * shapes[0][1]
        _statistics(stages["statistics"], settings, shapes, kind.count, settings.tokens, index in corrected, last)
        _solve(stages["solving"], settings, shapes, kind.count)
    for expert in kind.experts:
        tokens = settings.tokens * expert.active / expert.count
        products = 2.0 * tokens * expert.shape[0] * expert.shape[1]
        forward.forward.products += 2 * kind.count * expert.count * products
        for solved, count in expert.groups.items():
            times = kind.count * count
            _statistics(stages["statistics"], settings, solved, times, tokens, bool(corrected), False)
            _solve(stages["solving"], settings, solved, times)


def _finetune(stage: StageWork, settings: PlanSettings, kind: LayerKind) -> None:
    """A pass forwards and one backwards a step, with the gradients of the weights, and one pass over all batches."""
    probe, steps, weights = kind.probe, settings.config.finetune_steps, kind.pruned_weights
    found = (probe.forward + probe.backward).scaled(steps) + probe.forward.scaled(settings.batches)
    found.attention += 2.5 * probe.forward.attention * steps
    linear = sum(o.shape[0] * o.shape[1] for group in probe.groups for o in group)
    routed = sum(e.active * e.shape[0] * e.shape[1] for e in kind.experts)
    found.products += 2.0 * settings.batch_tokens * (steps * (linear + 3 * routed) + settings.batches * routed)
    found.moved_bytes += steps * _SWEEP * _ADAM * weights
    stage.forward += found.scaled(kind.count)


def _statistics(
    stage: StageWork,
    settings: PlanSettings,
    shapes: Sequence[tuple[int, int]],
    times: int,
    tokens: float,
    corrected: bool,
    last: bool,
) -> None:
    """Gram and cross-Gram matrices of a group, and the problems made from them."""
    rows, columns = sum(out for out, _ in shapes), shapes[0][1]
    narrow = rows < columns or last
    stage.gram_products += times * tokens * columns**2
    moved = tokens * columns * (settings.element_size + 12) + 10 * _SWEEP * columns**2 + _SWEEP * rows * columns
    products = float(rows) * columns**2
    if corrected:
        crosses = bool(settings.dense_share) or last
        stage.float_products += times * 2.0 * tokens * (rows if narrow else columns) * columns * crosses
        moved += tokens * (rows * (8 if not narrow else 24) + columns * 2 * settings.element_size)
        products += rows * columns**2 * (0 if narrow else 1)
        products += rows * columns**2 * (settings.dense_share < 1 and not last)
        if last:
            moved += 6 * _SWEEP * tokens * rows
    if settings.config.held_out:  # their problem, and the error of what is written
        products += rows * columns**2 * (2 + (corrected and not narrow and settings.dense_share > 0))
        moved += _SWEEP * (5 * columns**2 + 6 * rows * columns)
    stage.float_products += times * 2.0 * products
    stage.forward.moved_bytes += times * moved
    stage.forward.operations += times * _OPERATIONS * (1 + settings.batches)


def _solve(stage: StageWork, settings: PlanSettings, shapes: Sequence[tuple[int, int]], times: int) -> None:
    """Solving a group of operators, and measuring the error of what is written."""
    cost, columns = settings.cost, shapes[0][1]
    rows = sum(out for out, _ in shapes)
    shares = cost.shares_factor or settings.stacks
    stage.factor_products += times * cost.factor_operations(columns) * (1 if shares else len(shapes))
    products = cost.product_operations(rows, columns)
    products += 2.0 * rows * columns**2 * ((settings.element_size < 4) + 2 * settings.stacks)
    stage.float_products += times * products
    sweeps = cost.sweeps + 12 + 8 * settings.stacks
    stage.forward.moved_bytes += times * _SWEEP * sweeps * rows * columns
    calls = cost.sweeps + cost.products + cost.column_steps * columns + 60
    stage.forward.operations += times * calls * (1 if shares else len(shapes))

"""The whole method: every decoder layer is run, solved group by group, written, and committed.

As in FISTAPruner (arXiv 2408.03728), decoder layers are pruned one after the other, and in a layer the linear operators
in execution order. Each is fitted to the dense network's outputs, on the inputs that the pruned network gives it. There
are three differences. Operators with the same inputs are solved together, because they share the expensive Gram matrix.
Any method can solve them. Only one decoder layer is on the device at a time, so the model may be larger than its
memory, but hidden states must be kept between the layers.
"""

import time
from collections.abc import Collection, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial

import torch

from optimum_fista.memory import release_memory, watched_memory
from optimum_fista.model.correction import GroupProblems, LayerTargets
from optimum_fista.model.experts import ExpertOperator, split_experts
from optimum_fista.model.groups import trace_groups
from optimum_fista.model.held_out import HeldOut
from optimum_fista.model.inputs import LayerActivations
from optimum_fista.model.offload import execution_device, offload_hook, onloaded, sha256_of
from optimum_fista.model.operators import require_finite
from optimum_fista.prune.batches import Calibration, record, retried
from optimum_fista.prune.callback import PruningCallback
from optimum_fista.prune.plan import UNDER_CALIBRATED_TOKENS, Plan
from optimum_fista.prune.progress import Progress
from optimum_fista.prune.reordering import reorder_channels
from optimum_fista.prune.sink import Sink
from optimum_fista.report import LayerRecord, LayerReport, OperatorReport, PruningReport
from optimum_fista.solve.allocation import prune_stacked
from optimum_fista.solve.method import PrunedOperator, PruningMethod
from optimum_fista.solve.methods.magnitude import Magnitude
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.refit import refit_columns


def prune_layers(
    plan: Plan,
    calibration: Calibration,
    report: PruningReport,
    sink: Sink,
    held_out: HeldOut | None = None,
    todo: Collection[int] | None = None,
    num_done: int = 0,
) -> None:
    """Prune decoder layers in place, one after the other, and add them to the report.

    `todo` are their indices; `None`: all. An earlier start has finished `num_done` others. The hidden states of
    `calibration` enter the first of them. If `calibration` has none, the run begins at the embeddings, and layers
    outside `todo` run as they are. A layer is committed to `sink` before the callbacks are called with it.
    """
    todo = range(len(plan.layers)) if todo is None else todo
    pruned, is_carried = plan.pruned_layers, plan.config.correction.carry == "full"
    last = max(
        (index for index in pruned if index in todo), default=-1
    )  # later layers need not run
    first = 0 if calibration.states is None else min(todo)
    report.left_dense = dict(plan.removal.left_dense)
    with closing(Progress(num_done)) if plan.progress else nullcontext() as bar:
        callbacks = plan.callbacks if bar is None else (bar, *plan.callbacks)
        for callback in callbacks:
            callback.on_layers_begin(
                len(plan.layers), {i: 1 + c for i, c in enumerate(plan.costs) if i in todo}
            )
        calibration = retried(partial(record, plan), calibration, "the embeddings", plan, report)
        held_out = held_out if held_out is not None and held_out.begin() else None
        for index, (name, layer) in enumerate(plan.layers):
            is_mine, followed = index in todo, held_out if index in todo else None
            if index < first or not (is_mine or index < last):
                continue
            started, done = time.perf_counter(), LayerRecord(LayerReport(name, None, 0.0))
            # before its weights are on the device: offloaded ones are hashed where they are
            dense_sha256 = sha256_of(layer, layer.state_dict()) if is_mine else None
            experts = split_experts(plan.removal.operators[name].values())
            with onloaded(layer.modules()), experts:
                if followed is not None:
                    followed.run(index, "dense")
                if index <= last:
                    step = partial(prune_layer, plan, sink, callbacks, index, is_mine)
                    calibration, done = retried(step, calibration, name, plan, report, sink.undo)
                if followed is not None and index not in plan.removal.removed_layers:
                    followed.run(index, "pruned")
                if followed is not None and index == len(plan.layers) - 1:
                    followed.measure()
                if is_mine:
                    known = {
                        key: why
                        for key, why in plan.removal.left_dense.items()
                        if key.startswith(f"{name}.")
                    }
                    about = replace(
                        done.report,
                        seconds=time.perf_counter() - started,
                        dense_sha256=dense_sha256,
                    )
                    done = LayerRecord(about, done.operators, known | done.left_dense)
                    report.add(done)
                    states = (
                        calibration.states
                        if is_carried and index < max(pruned, default=-1)
                        else None
                    )
                    sink.commit(
                        index,
                        layer,
                        done,
                        [part for part in (states, followed) if part is not None],
                    )
            if is_mine:
                for callback in callbacks:
                    callback.on_layer_end(index, done.report, done.operators)


def prune_layer(
    plan: Plan,
    sink: Sink,
    callbacks: Sequence[PruningCallback],
    index: int,
    is_mine: bool,
    calibration: Calibration,
) -> tuple[Calibration, LayerRecord]:
    """Prune the operators of a decoder layer, group by group in execution order, or run it as it is.

    Returns the batches with the hidden states that leave the layer.
    """
    name, layer = f"{plan.layers.name}.{index}", plan.layers.modules[index]
    release_memory(layer)  # of the decoder layer before
    calibration = record(
        plan, calibration
    )  # again, if memory ran out and the batches are smaller now
    states, recorded = calibration.states, calibration.recorded
    assert states is not None
    assert recorded is not None
    device, correction = execution_device(layer), plan.config.correction
    storage = plan.storage or device
    states.move(storage, device)
    calls, recorded.calls[index] = recorded.calls[index], []  # freed with this layer
    activations = LayerActivations(layer, calls, recorded.token_masks, storage, recorded.held_out)
    if not is_mine or index in plan.removal.removed_layers:
        targets = LayerTargets(activations, [], correction, states)
        states = targets.leave() if not is_mine else targets.pass_by()
        return replace(calibration, states=states), LayerRecord(LayerReport(name, None, 0.0))
    operators = plan.removal.operators[name]
    require_finite([operator for operator in operators.values() if offload_hook(operator.owner)])
    hidden = states.entering[0].to(device)  # [batch, sequence, hidden], for a test run of the layer
    reorders = plan.config.reorder_channels
    orders = reorder_channels(plan, sink, name, activations, states.entering) if reorders else {}
    trace = trace_groups(layer, operators, calls[0], hidden)
    left_dense = trace.left_dense
    groups, others, experts = plan.removal.before(name, trace.groups, activations, hidden)
    reports: list[OperatorReport] = []
    with watched_memory(device) as peak:
        targets = LayerTargets(
            activations, groups, correction, states, ends=trace.ends, experts=experts
        )
        for number in range(len(groups)):
            # a call of its own, so that the matrices of a group are freed before the next ones are made
            found = prune_group(plan, sink, targets.problems(number))
            reports += [replace(report, input_order=orders.get(report.name)) for report in found]
            for callback in callbacks:
                for report in found:
                    callback.on_operator_end(report)
        states, reports, mixture = plan.removal.after(name, sink, targets, reports)
    about = LayerReport(
        name,
        activations.hidden_state_error(states),
        0.0,
        peak if operators or mixture else None,
        mixture,
    )
    return replace(calibration, states=states), LayerRecord(about, reports, left_dense | others)


def prune_group(plan: Plan, sink: Sink, problems: GroupProblems) -> list[OperatorReport]:
    """Solve for the operators of a group and write them; the reports have the errors of the weights as written."""
    release_memory()  # the solver needs the memory that capturing left in the allocator
    started = time.perf_counter()
    pruned_group, patterns, method = solve_group(plan, problems)
    seconds = (
        time.perf_counter() - started
    )  # results were read, so the device has finished its kernels
    for operator, pruned in zip(problems.operators, pruned_group, strict=True):
        sink.write(operator, pruned.weight, pruned.mask)
    reports = []
    parts = zip(
        problems.operators, problems.fitted, problems.held_out, pruned_group, patterns, strict=True
    )
    for operator, problem, held_out, pruned, pattern in parts:
        exact = (
            operator.parameter.dtype == problem.weight.dtype
        )  # otherwise the solution was rounded
        written = pruned.weight if exact else operator.read()
        fit_error = pruned.fit_error if exact else problem.fit_error(written)
        kept = pattern.num_kept(operator.shape)  # the mask was counted when the pattern was checked
        report = OperatorReport(
            name=f"{operator.name}.weight",
            shape=operator.shape,
            stored_transposed=operator.transposed,
            pattern=str(pattern),
            target_sparsity=pattern.sparsity,
            scope=pattern.scope,
            num_kept=kept,
            sparsity=1 - kept / pruned.mask.numel(),
            method=method,
            fit_error=fit_error,
            output_error=problems.output_error(problem, written, fit_error),
            l1_penalty=pruned.l1_penalty,
            iterations=pruned.iterations,
            converged=pruned.converged,
            message=pruned.message,
            num_tokens=problem.statistics.num_tokens,
            solve_seconds=seconds / len(problems.operators),
            residual_corrected=problems.last is not None,
        )
        if held_out is not None:
            error = held_out.fit_error(written)
            report = replace(
                report,
                held_out_fit_error=error,
                held_out_output_error=problems.output_error(
                    held_out, written, error, held_out=True
                ),
                held_out_tokens=held_out.statistics.num_tokens,
            )
        reports.append(report)
    return reports


def solve_group(
    plan: Plan, problems: GroupProblems
) -> tuple[list[PrunedOperator], list[SparsityPattern], str]:
    """Solve for the operators of a group, without writing; returns also their patterns and the method's name."""
    group, fitted, output_weights = problems.operators, problems.fitted, plan.budgets.output_weights
    method: PruningMethod = plan.method
    shares, patterns = (
        plan.budgets.sparsities,
        [plan.removal.patterns[operator.name] for operator in group],
    )
    pairs = zip(group, patterns, strict=True)
    patterns = [replace(p, sparsity=shares[o.name]) if o.name in shares else p for o, p in pairs]
    tokens, name, message = fitted[0].statistics.num_tokens, method.name, ""
    if (
        isinstance(group[0], ExpertOperator) and tokens < UNDER_CALIBRATED_TOKENS
    ):  # the router sent hardly any
        method, name = Magnitude(), Magnitude.name
        message = f"under-calibrated expert: {tokens} calibration tokens reached it, so magnitude pruned it"
    if all(pattern.whole_columns and not pattern.sparsity for pattern in patterns):
        # All columns stay: the operator compensates for removed heads, or for a removed decoder layer before its own.
        pruned, name = [], "refit"
        for problem in fitted:
            mask = torch.ones_like(problem.weight, dtype=torch.bool)
            found, advice = refit_columns(problem, mask[0])  # least squares over all weights
            error = problem.fit_error(found)
            pruned.append(
                PrunedOperator(found, mask, error, 1, converged=not advice, message=advice)
            )
    elif not message and all(operator.name in output_weights for operator in group):
        # rows of all operators compete for the zeros of the group, which decides how many each operator gets
        pruned = prune_stacked(
            method, fitted, patterns, [output_weights[operator.name] for operator in group]
        )
        patterns = [replace(p, sparsity=q.sparsity) for p, q in zip(patterns, pruned, strict=True)]
    else:
        pruned = [
            replace(p, message=message or p.message) for p in method.prune_sharing(fitted, patterns)
        ]
    finite = torch.stack(
        [torch.isfinite(result.weight).all() for result in pruned]
    ).tolist()  # one transfer
    for operator, pattern, result, is_finite in zip(group, patterns, pruned, finite, strict=True):
        broken = pattern.violation(result.mask) or (
            None if is_finite else "weights hold NaN or Inf"
        )
        if broken:
            raise RuntimeError(
                f"method {method.name!r} failed on {operator.name}: {broken}. Pass another method."
            )
        result.weight.masked_fill_(~result.mask, 0.0)  # no -0.0
    return pruned, patterns, name

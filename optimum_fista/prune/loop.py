"""The loop over decoder layers: each is run, solved group by group, written, and committed.

As in FISTAPruner (arXiv 2408.03728), decoder layers are pruned one after the other, and in a layer the linear operators
in execution order. Each is fitted to the dense network's outputs, on the inputs that the pruned network gives it. There
are three differences. Operators with the same inputs are solved together, because they share the expensive Gram matrix;
so are operators of equal shape of different experts, which are many and small (`model.groups.solved_together`). Any
method can solve them. Only one decoder layer is on the device at a time, so the model may be larger than its memory,
but hidden states must be kept between the layers.

`prune_layers` goes from layer to layer by a `_Loop`. Its method `prune` calls `prune_layer`, once more if memory runs
out. That calls `prune_groups` for each group, or for groups of some experts at once, and that calls `solve_groups`,
which writes nothing. Terms:

- `Plan`: what is pruned and how. `plan.removal` has the operators of each decoder layer with their patterns, and what
  else is removed (experts, decoder layers). `plan.budgets` has the shares of zeros that the loss of the model gives.
- operator: a linear module of a decoder layer, or one matrix of one expert. group: operators with the same inputs.
- `Calibration`: the batches, with the hidden states that enter the next decoder layer (`HiddenStates`: of the dense
  network, of the pruned one, or both).
- `GroupProblems`: for each operator of a group its `LayerProblem` (Gram matrix, weights, targets), on tokens to fit to
  and on held-out ones. `PrunedOperator`: the weights and mask that a method returns.
- `Sink`: overwrites weights in the model (`write`), takes that back (`undo`), or makes it final (`store`, `commit`).
- `HeldOut`: held-out sequences on their way through the dense and the pruned layers, to measure perplexities.
- `LayerRecord`: what the report says of a decoder layer, with a report for each operator.
"""

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from optimum_fista.memory import old_objects_skipped, release_memory, watched_memory
from optimum_fista.model.correction import GroupProblems, LayerTargets, run_unpruned
from optimum_fista.model.digests import sha256_of
from optimum_fista.model.experts import ExpertOperator, split_experts
from optimum_fista.model.groups import solved_together, trace_groups
from optimum_fista.model.held_out import HeldOut
from optimum_fista.model.inputs import HiddenStates, LayerActivations
from optimum_fista.model.offload import execution_device, offload_hook, onloaded
from optimum_fista.model.operators import Group, LinearOperator, require_finite
from optimum_fista.prune.batches import Calibration, record_arguments, retried
from optimum_fista.prune.callback import PruningCallback
from optimum_fista.prune.plan import UNDER_CALIBRATED_TOKENS, Plan
from optimum_fista.prune.progress import Progress
from optimum_fista.prune.reordering import reorder_channels
from optimum_fista.prune.sink import Sink
from optimum_fista.records import LayerRecord, LayerReport, MixtureReport, OperatorReport
from optimum_fista.removal.prediction_experts import choose_prediction_experts
from optimum_fista.report import PruningReport
from optimum_fista.solve.allocation import prune_weighted
from optimum_fista.solve.method import (
    ProblemGroup,
    PrunedOperator,
    errors_unread,
    reported_error,
)
from optimum_fista.solve.methods.magnitude import Magnitude
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import LayerProblem, fit_errors
from optimum_fista.solve.refit import refit_columns


def prune_layers(
    plan: Plan,
    calibration: Calibration,
    report: PruningReport,
    sink: Sink,
    *,
    held_out: HeldOut | None = None,
    todo: Collection[int] | None = None,
    num_done: int = 0,
) -> None:
    """Prune decoder layers in place, one after the other, and add them to the report.

    A layer is committed to the sink before the callbacks are called with it. The hidden states of `calibration` are
    used up. `report.left_dense` is replaced, and only then records of layers are added.

    Args:
        plan: What is pruned and how, with its budgets.
        calibration: Batches; their hidden states enter the first layer of `todo`. Without hidden states, the run begins
            at the embeddings, and layers outside `todo` run as they are.
        report: Gets a record for each layer of `todo`, and warnings.
        sink: Gets the pruned weights.
        held_out: Runs through the layers of `todo` in the dense and in the pruned network, to measure both.
        todo: Indices of the layers to prune; `None`: all.
        num_done: Layers that an earlier start has finished, for the progress bar.
    """
    num_layers = len(plan.layers)
    if todo is None:
        todo = range(num_layers)
    # Layers after the last one to prune or to reach need not run. Without such a layer, none need.
    last = max((index for index in plan.layers_to_reach if index in todo), default=-1)
    # The first layer to run: the one that the hidden states enter, if there are any.
    first = 0 if calibration.states is None else min(todo)
    # Operators that no decoder layer is asked for: by name, with the reason why they stay dense.
    report.left_dense = dict(plan.removal.left_dense)

    with (
        _with_progress(plan, num_done) as callbacks,
        old_objects_skipped(plan.layers.model),
    ):
        # In forward passes of a layer: one for the layer itself, and those of its pruning.
        costs = {index: 1 + cost for index, cost in enumerate(plan.costs) if index in todo}
        for callback in callbacks:
            callback.on_layers_begin(num_layers, costs)
        calibration = retried(
            partial(record_arguments, plan),
            calibration,
            where="the embeddings",
            plan=plan,
            report=report,
        )
        # Records the arguments of the layers, too; False: this model's losses can't be measured layer by layer.
        if held_out is not None and not held_out.begin():
            held_out = None

        loop = _Loop(plan, sink, callbacks, report, calibration, held_out)
        del calibration  # so that the loop can free its hidden states
        for index in range(first, num_layers):
            if index in todo:
                loop.prune(index, runs=index <= last)
            elif index < last:  # another process prunes it, and a later layer needs what leaves it
                loop.pass_through(index)


@dataclass
class _Loop:
    """The loop over decoder layers; from layer to layer only `calibration` changes.

    Attributes:
        plan: The plan of the run.
        sink: Gets the pruned weights, and each layer when it is finished.
        callbacks: Called after each operator and layer.
        report: Gets the records of layers, and warnings.
        calibration: Batches, with the hidden states that enter the next layer.
        held_out: Runs through the dense and the pruned layers; `None` if nothing is measured.
    """

    plan: Plan
    sink: Sink
    callbacks: Sequence[PruningCallback]
    report: PruningReport
    calibration: Calibration
    held_out: HeldOut | None

    def prune(self, index: int, *, runs: bool) -> None:
        """Bring a decoder layer to its device, prune it there, and commit it.

        `self.plan` says what is pruned. Weights of the layer are overwritten through `self.sink`, which also gets its
        masks and writes its files, if it is a sink for files. `self.calibration` is replaced by one with the hidden
        states that leave the layer. `self.held_out` runs through the layer, and `self.report` gets its record. After
        the last layer, layers that predict more tokens run. The callbacks are called.

        Args:
            index: The number of the layer.
            runs: Whether the layer or a later one is pruned. Otherwise it runs for `self.held_out` only.
        """
        started = time.perf_counter()
        name = f"{self.plan.layers.name}.{index}"
        layer = self.plan.layers.modules[index]
        is_removed = index in self.plan.removal.removed_layers
        is_last = index == len(self.plan.layers) - 1
        layer_record = LayerRecord(LayerReport(name, hidden_state_error=None, seconds=0.0))
        # The dense weights are hashed where they need not be copied: on a device, before they are brought there; on a
        # CPU, when they are read anyway, because quantized ones are dequantized each time.
        computes_on_cpu = execution_device(layer).type == "cpu"
        dense_sha256 = None if computes_on_cpu else sha256_of(layer, layer.state_dict())

        with self._on_its_device(index):
            if computes_on_cpu:
                dense_sha256 = sha256_of(layer, layer.state_dict())
            if self.held_out is not None:
                self.held_out.run(index, "dense")
            if runs and is_removed:
                self._run(index)
            elif runs:
                # Once more with smaller batches, if memory runs out; `undo` puts back the dense weights before.
                self.calibration, layer_record = retried(
                    partial(prune_layer, self.plan, self.sink, self.callbacks, index),
                    self.calibration,
                    where=name,
                    plan=self.plan,
                    report=self.report,
                    undo=self.sink.undo,
                )
            if self.held_out is not None:
                if not is_removed:
                    self.held_out.run(index, "pruned")
                if is_last:
                    self.held_out.measure()

            layer_record = _completed(
                self.plan,
                layer_record,
                seconds=time.perf_counter() - started,
                dense_sha256=dense_sha256,
            )
            # Masks of an earlier run of operators that this one leaves alone.
            layer_record = self.plan.removal.carry_masks(layer, layer_record, self.sink)
            self.sink.store(index, layer, layer_record)

        # Only now, when the weights of the last decoder layer are off the device.
        if is_last:
            layer_record = replace(layer_record, prediction_mixtures=self._predict())
        self.report.add(layer_record)
        self.sink.commit(index, layer_record, self._travelling(index))
        for callback in self.callbacks:
            callback.on_layer_end(index, layer_record.report, layer_record.operators)

    def pass_through(self, index: int) -> None:
        """Bring a decoder layer that another process prunes to its device, and run it as it is.

        `self.calibration` is replaced by one with the hidden states that leave the layer.
        """
        with self._on_its_device(index):
            self._run(index)

    @contextmanager
    def _on_its_device(self, index: int) -> Iterator[None]:
        """Hold the weights of a decoder layer on the device where it computes, and each of its experts as a module."""
        layer = self.plan.layers.modules[index]
        # Before the weights of this layer are read: a copy of the layer before, without its removed experts, may be in
        # a cycle of Python objects, and the allocator still holds other memory of that layer.
        release_memory(layer)
        operators = self.plan.removal.operators[f"{self.plan.layers.name}.{index}"]
        with onloaded(layer.modules()), split_experts(operators.values()):
            yield

    def _run(self, index: int) -> None:
        """Run a decoder layer in which nothing is pruned; replaces `self.calibration`.

        If memory runs out, it runs on smaller batches, and `self.report` gets a warning.
        """
        self.calibration = retried(
            partial(run_layer, self.plan, index),
            self.calibration,
            where=f"{self.plan.layers.name}.{index}",
            plan=self.plan,
            report=self.report,
        )

    def _predict(self) -> list[MixtureReport]:
        """Choose the experts of the layers that predict more tokens; none if `self.plan` has no such layers.

        They run on the hidden states that leave the last decoder layer, which `self.calibration` has. If memory runs
        out, they run on smaller batches, and `self.report` gets a warning.
        """
        plan = self.plan
        if not plan.prediction_layers:
            return []

        def choose(calibration: Calibration) -> list[MixtureReport]:
            """Choose the experts on the batches of `calibration`, with its hidden states."""
            assert calibration.states is not None
            return choose_prediction_experts(
                plan.prediction_layers,
                plan.layers,
                calibration.batches,
                calibration.states.to_prune_on,
                plan.storage,
            )

        release_memory()  # the allocator still holds memory of the last decoder layer
        return retried(
            choose,
            self.calibration,
            where="the layers that predict more tokens",
            plan=plan,
            report=self.report,
        )

    def _travelling(self, index: int) -> list[HiddenStates | HeldOut]:
        """Return what a run that resumes after the decoder layer number `index` needs besides its weights.

        These are the hidden states that enter the next layer (in `self.calibration`), if errors are carried to it, and
        those of the held-out text (`self.held_out`), if the run has one. Changes nothing, and copies nothing.
        """
        travelling: list[HiddenStates | HeldOut] = []
        # Whether a later layer is pruned, or has to run.
        is_followed = index < max(self.plan.layers_to_reach, default=-1)
        # "full": the targets of a layer count the errors of all layers before it.
        if self.plan.config.correction.carry == "full" and is_followed:
            assert self.calibration.states is not None
            travelling.append(self.calibration.states)
        if self.held_out is not None:
            travelling.append(self.held_out)
        return travelling


@contextmanager
def _with_progress(plan: Plan, num_done: int) -> Iterator[Sequence[PruningCallback]]:
    """Yield the callbacks of the run; the first one shows a progress bar, if the plan wants one.

    `num_done` layers of the run were finished by an earlier start. At the end the bar is taken away.
    """
    if not plan.progress:
        yield plan.callbacks
        return
    with closing(Progress(num_done)) as bar:
        yield (bar, *plan.callbacks)


def _completed(
    plan: Plan, layer_record: LayerRecord, *, seconds: float, dense_sha256: str | None
) -> LayerRecord:
    """Return a copy of a decoder layer's record with its time, the digest of its dense tensors, and all reasons.

    `seconds` is the wall time of the layer, and `dense_sha256` is of the layer before it was pruned; `None` if it was
    not computed. The reasons tell why operators of the layer stay dense: those that `plan.removal` knew before the run,
    and those that `layer_record` has already.
    """
    prefix = f"{layer_record.report.name}."
    left_dense = {
        name: reason for name, reason in plan.removal.left_dense.items() if name.startswith(prefix)
    }
    return replace(
        layer_record,
        report=replace(layer_record.report, seconds=seconds, dense_sha256=dense_sha256),
        left_dense=left_dense | layer_record.left_dense,
    )


def run_layer(plan: Plan, index: int, calibration: Calibration) -> Calibration:
    """Run a decoder layer in which nothing is pruned, or pass it by if the run removes it.

    The layer is on its device. `index` is its number. Returns the batches of `calibration` with the hidden states that
    leave the layer; those that enter it are used up, and so are the recorded arguments of the layer.
    """
    calibration = record_arguments(plan, calibration)
    activations, states = _entered(plan, calibration, index)
    is_removed = index in plan.removal.removed_layers
    return replace(calibration, states=run_unpruned(activations, states, is_removed=is_removed))


def prune_layer(
    plan: Plan,
    sink: Sink,
    callbacks: Sequence[PruningCallback],
    index: int,
    calibration: Calibration,
) -> tuple[Calibration, LayerRecord]:
    """Prune the operators of a decoder layer through the sink, group by group in execution order.

    The layer is on its device. Its weights are overwritten, and masks go to the sink. An operator that can't be pruned
    is named in the record with the reason.

    Args:
        plan: The plan of the run.
        sink: Gets the pruned weights.
        callbacks: Called after each operator.
        index: The number of the layer.
        calibration: Batches, with the hidden states that enter the layer. These are used up, and so are the recorded
            arguments of the layer.

    Returns:
        The batches with the hidden states that leave the layer, and the record of the layer without its time.
    """
    name = f"{plan.layers.name}.{index}"
    # The arguments of the layers are recorded already, unless memory ran out and the batches are smaller now.
    calibration = record_arguments(plan, calibration)
    activations, states = _entered(plan, calibration, index)
    operators = plan.removal.operators[name]
    # Refuses NaN and Inf in offloaded weights, which are on the device only now; all others were checked before the
    # run.
    require_finite([operator for operator in operators.values() if offload_hook(operator.owner)])
    # [batch, sequence, hidden], for test runs of the layer
    hidden = states.to_prune_on[0].to(activations.device)
    # The old numbers of the inputs of an operator, in their new order, by the name of its weight.
    orders: dict[str, tuple[int, ...]] = {}
    if plan.config.reorder_channels:
        orders = reorder_channels(plan, sink, name, activations, states.to_prune_on)
    # Runs the layer once to see which operators have the same inputs, and in which order they are called.
    trace = trace_groups(activations.layer, operators, activations.calls[0], hidden)
    chosen = plan.removal.choose_operators(name, trace.groups, activations, hidden)

    with watched_memory(activations.device) as peak:
        targets = LayerTargets(
            activations,
            chosen.groups,
            plan.config.correction,
            entering=states,
            ends=trace.ends,
            experts=chosen.experts,
        )
        reports = _pruned_groups(plan, sink, callbacks, targets, chosen.groups)
        reports = [  # with the order of the inputs; None: the same as before
            replace(operator_report, input_order=orders.get(operator_report.name))
            for operator_report in reports
        ]
        # Removes experts, if the pattern says so, and runs the pruned layer.
        leaving = plan.removal.finish_layer(name, sink, targets, reports)

    is_pruned = bool(operators) or leaving.mixture is not None
    layer_report = LayerReport(
        name,
        hidden_state_error=activations.hidden_state_error(leaving.states),
        seconds=0.0,
        memory=peak if is_pruned else None,
        mixture=leaving.mixture,
    )
    left_dense = trace.left_dense | chosen.left_dense
    layer_record = LayerRecord(layer_report, leaving.operators, left_dense)
    return replace(calibration, states=leaving.states), layer_record


def _entered(
    plan: Plan, calibration: Calibration, index: int
) -> tuple[LayerActivations, HiddenStates]:
    """Join a decoder layer with the arguments of its calls, and bring the hidden states that enter it to its device.

    Takes the arguments, which `record_arguments` recorded, out of the calibration, so that they are freed when this
    layer is finished. `index` is the number of the layer. `plan.storage` is where activations are kept between passes
    (`None`: where the layer computes).
    """
    recorded, states = calibration.recorded, calibration.states
    assert recorded is not None
    assert states is not None
    layer = plan.layers.modules[index]
    calls = recorded.calls[index]
    recorded.calls[index] = []
    activations = LayerActivations(
        layer,
        calls,
        token_masks=recorded.token_masks,
        storage=plan.storage or execution_device(layer),
        held_out=recorded.held_out,
        sources=recorded.sources,
    )
    states.move(activations.storage, activations.device)
    return activations, states


def _pruned_groups(
    plan: Plan,
    sink: Sink,
    callbacks: Sequence[PruningCallback],
    targets: LayerTargets,
    groups: Sequence[Group],
) -> list[OperatorReport]:
    """Prune the groups of a decoder layer through the sink; return the reports of their operators, in execution order.

    `groups` are in execution order, and `targets` makes their problems. Groups of some experts are solved together, and
    may come out of this order. `callbacks` are called after each operator.
    """
    reports: dict[int, list[OperatorReport]] = {}  # by the number of the group
    for numbers in solved_together(groups, targets.activations.device):
        # A call of its own, so that the matrices of these groups are freed before the next ones are made.
        reports_of_groups = prune_groups(
            plan, sink, [targets.problems(number) for number in numbers]
        )
        reports.update(zip(numbers, reports_of_groups, strict=True))
        for callback in callbacks:
            for operator_report in chain.from_iterable(reports_of_groups):
                callback.on_operator_end(operator_report)
    return [operator_report for number in sorted(reports) for operator_report in reports[number]]


def prune_groups(
    plan: Plan, sink: Sink, groups: Sequence[GroupProblems]
) -> list[list[OperatorReport]]:
    """Solve for the operators of groups together, and write them through the sink, which overwrites their weights.

    The sink also keeps the masks. Each of `groups` has operators, and for each one its problem on the tokens to fit to
    and on held-out ones; they are used up. Returns a report for each operator, by group and in the order of the group,
    with the errors of the weights as written.
    """
    release_memory()  # the solver needs the memory that capturing left in the allocator
    started = time.perf_counter()
    with errors_unread():  # they are measured below
        solutions = solve_groups(plan, groups)
    # Results were read, so the device has finished its kernels.
    seconds = time.perf_counter() - started
    for problems, solution in zip(groups, solutions, strict=True):
        for operator, pruned in zip(problems.operators, solution.operators, strict=True):
            sink.write(operator, pruned.weight, pruned.mask)
        if problems.last is not None:
            problems.last.run_pruned()  # for its output error, and for the hidden states after the layer

    solve_seconds = seconds / sum(len(problems.operators) for problems in groups)
    reports: list[list[OperatorReport]] = []
    for problems, solution in zip(groups, solutions, strict=True):
        reports.append([])
        # Of the weights as written, so this is the only time that errors are measured. The host waits once for all.
        sums = [
            problem.error_and_energy(_written(operator, pruned))
            for problem, operator, pruned in zip(
                problems.fitted, problems.operators, solution.operators, strict=True
            )
        ]
        errors = fit_errors(sums)
        # The held-out problems are made here, one by one.
        for number, held_out in enumerate(problems.held_out):
            report = _operator_report(
                problems,
                solution,
                number,
                fit_error=errors[number],
                held_out=held_out,
                solve_seconds=solve_seconds,
            )
            reports[-1].append(report)
    return reports


def _written(operator: LinearOperator, pruned: PrunedOperator) -> Tensor:
    """Return the weights of an operator as they are in the model by now, float32 or better, [out, in].

    They are those of its result `pruned`, unless they were rounded to the dtype of the model.
    """
    is_exact = operator.parameter.dtype == pruned.weight.dtype
    return pruned.weight if is_exact else operator.read()


@dataclass(frozen=True)
class GroupSolution:
    """Pruned operators of a group, in its order, with the pattern that each has and the name of the method."""

    operators: list[PrunedOperator]
    patterns: list[SparsityPattern]
    method: str


def _operator_report(
    problems: GroupProblems,
    solution: GroupSolution,
    number: int,
    *,
    fit_error: float,
    held_out: LayerProblem | None,
    solve_seconds: float,
) -> OperatorReport:
    """Report the operator with this number in its group, whose solution is written to the model already.

    `problems` has the operators of the group and their problems, and `solution` their new weights and masks.
    `fit_error` is the error of the written weights on the tokens to fit to. `held_out` is the problem of this operator
    on the held-out tokens; `None` if there are none. `solve_seconds` is its share of the group's time.

    Changes nothing. An operator with a residual correction (`problems.last`, alone in its group) has run with its
    written weights already.
    """
    operator = problems.operators[number]
    problem = problems.fitted[number]
    pruned = solution.operators[number]
    pattern = solution.patterns[number]
    written = _written(operator, pruned)
    # `_require_solved` has counted the mask: it has as many weights as the pattern.
    num_kept = pattern.num_kept(operator.shape)
    operator_report = OperatorReport(
        name=f"{operator.name}.weight",
        shape=operator.shape,
        stored_transposed=operator.transposed,
        pattern=str(pattern),
        target_sparsity=pattern.sparsity,
        scope=pattern.scope,
        num_kept=num_kept,
        sparsity=1 - num_kept / pruned.mask.numel(),
        method=solution.method,
        fit_error=fit_error,  # against the targets of the error correction
        # Against the dense network's outputs; equal to `fit_error` if these are the targets.
        output_error=problems.output_error(problem, written, fit_error),
        l1_penalty=pruned.l1_penalty,
        iterations=pruned.iterations,
        converged=pruned.converged,
        message=pruned.message,
        num_tokens=problem.statistics.num_tokens,
        solve_seconds=solve_seconds,
        residual_corrected=problems.last is not None,
    )
    if held_out is None:
        return operator_report

    error = held_out.fit_error(written)
    return replace(
        operator_report,
        held_out_fit_error=error,
        held_out_output_error=problems.output_error(held_out, written, error, held_out=True),
        held_out_tokens=held_out.statistics.num_tokens,
    )


def solve_groups(plan: Plan, groups: Sequence[GroupProblems]) -> list[GroupSolution]:
    """Solve for the operators of groups by the plan's method, which may solve alike ones together; writes nothing.

    There are three exceptions. Operators that keep all columns are refitted. Experts that got hardly any tokens are
    pruned by magnitude. If the loss weights the outputs of all operators of a group (`plan.budgets`), their rows
    compete for the group's zeros; then the weights and targets in the problems change by rounding. `fitted` of a group
    has the problem of each operator. Returns a solution for each group. Raises RuntimeError if a method breaks a
    pattern, or returns NaN or Inf.
    """
    solutions: dict[int, GroupSolution] = {}  # all by the number of the group in `groups`
    weighted: dict[int, ProblemGroup] = {}  # groups whose rows compete
    others: dict[int, ProblemGroup] = {}
    for number, problems in enumerate(groups):
        patterns = [_pattern(plan, operator) for operator in problems.operators]
        group = ProblemGroup(problems.fitted, patterns)
        if all(pattern.whole_columns and pattern.sparsity == 0 for pattern in patterns):
            # The operators compensate for removed heads, or for a removed decoder layer before their own.
            refitted = [_refitted(problem) for problem in problems.fitted]
            solutions[number] = GroupSolution(refitted, patterns, "refit")
        elif _is_under_calibrated(problems):
            solutions[number] = _pruned_by_magnitude(group)
        elif all(operator.name in plan.budgets.output_weights for operator in problems.operators):
            # Operators of a group see the same tokens, so all of them have weights of their outputs, or none has.
            weighted[number] = group
        else:
            others[number] = group

    solutions_of_weighted = _solved_by_competing_rows(
        plan, list(weighted.values()), [groups[number].operators for number in weighted]
    )
    solutions.update(zip(weighted, solutions_of_weighted, strict=True))

    results = plan.method.prune_groups(list(others.values()))
    for (number, group), operators in zip(others.items(), results, strict=True):
        solutions[number] = GroupSolution(operators, list(group.patterns), plan.method.name)

    for number, problems in enumerate(groups):
        _require_solved(problems.operators, solutions[number])
        for pruned in solutions[number].operators:
            # A product with a mask leaves -0.0 in place of negative weights.
            pruned.weight.masked_fill_(~pruned.mask, 0.0)
    return [solutions[number] for number in range(len(groups))]


def _solved_by_competing_rows(
    plan: Plan,
    problem_groups: Sequence[ProblemGroup],
    groups: Sequence[Group],
) -> list[GroupSolution]:
    """Solve groups in which the rows of all operators compete for the zeros of the group (`prune_weighted`).

    So the result decides how many zeros each operator gets, and the patterns of a solution have these shares.
    `problem_groups` have the problems of the operators in `groups`. The plan has what an error in each output of an
    operator costs, [out]. The weights and targets in the problems change by rounding.
    """
    output_weights = [
        [plan.budgets.output_weights[operator.name] for operator in group] for group in groups
    ]
    results = prune_weighted(plan.method, problem_groups, output_weights)
    solutions: list[GroupSolution] = []
    for group, operators, counts in zip(
        problem_groups, results, _kept_by_groups(results), strict=True
    ):
        patterns = [
            replace(pattern, sparsity=1 - num_kept / pruned.mask.numel())
            for pattern, pruned, num_kept in zip(group.patterns, operators, counts, strict=True)
        ]
        solutions.append(GroupSolution(operators, patterns, plan.method.name))
    return solutions


def _kept_by_groups(results: Sequence[Sequence[PrunedOperator]]) -> list[list[int]]:
    """Count the weights that each mask keeps, by group and by operator; the host waits for a device only once."""
    sums = [pruned.mask.sum() for operators in results for pruned in operators]
    counts = iter(torch.stack(sums).tolist() if sums else [])
    return [[next(counts) for _ in operators] for operators in results]


def _is_under_calibrated(problems: GroupProblems) -> bool:
    """Tell whether the operators are of an expert to which the router sent too few tokens for a method."""
    # Operators of a group have the same inputs, so also the same tokens.
    num_tokens = problems.fitted[0].statistics.num_tokens
    is_expert = isinstance(problems.operators[0], ExpertOperator)
    return is_expert and num_tokens < UNDER_CALIBRATED_TOKENS


def _pruned_by_magnitude(group: ProblemGroup) -> GroupSolution:
    """Prune the operators of an under-calibrated expert by magnitude; their reports will say so."""
    num_tokens = group.problems[0].statistics.num_tokens
    message = f"under-calibrated expert: {num_tokens} calibration tokens reached it, so magnitude pruned it"
    operators = [
        replace(pruned, message=message)
        for pruned in Magnitude().prune_sharing(group.problems, group.patterns)
    ]
    return GroupSolution(operators, list(group.patterns), Magnitude.name)


def _pattern(plan: Plan, operator: LinearOperator) -> SparsityPattern:
    """Return the pattern of an operator, with the share of zeros that its budget gives it."""
    pattern = plan.removal.patterns[operator.name]
    sparsity = plan.budgets.sparsities.get(operator.name)
    return pattern if sparsity is None else replace(pattern, sparsity=sparsity)


def _refitted(problem: LayerProblem) -> PrunedOperator:
    """Fit all weights of an operator to its targets by least squares; none becomes zero. Changes no weight.

    `problem` has the dense weights, the target outputs, and the Gram matrix of the inputs.
    """
    mask = torch.ones_like(problem.weight, dtype=torch.bool)
    every_column = mask[0]
    # The message is empty if the factorisation needed no help.
    weight, message = refit_columns(problem, every_column)
    return PrunedOperator(
        weight=weight,
        mask=mask,
        fit_error=reported_error(problem, weight),
        iterations=1,
        converged=not message,
        message=message,
    )


def _require_solved(group: Group, solution: GroupSolution) -> None:
    """Refuse a solution (RuntimeError) whose masks break their patterns, or whose weights are not finite.

    `solution` is of the operators of `group`, in its order; it has what their masks must be. Changes nothing.
    """
    results = solution.operators
    # Of each result, how many weights it keeps, and whether all are finite: one transfer from the device for all.
    numbers = torch.stack(
        [
            torch.stack([result.mask.sum(), torch.isfinite(result.weight).all()])
            for result in results
        ]
    ).tolist()
    for operator, pattern, result, (num_kept, is_finite) in zip(
        group, solution.patterns, results, numbers, strict=True
    ):
        # Says in words how the mask breaks the pattern; `None` if it does not.
        fault = pattern.violation(result.mask, num_kept)
        if fault is None and not is_finite:
            fault = "weights hold NaN or Inf"
        if fault is not None:
            raise RuntimeError(
                f"method {solution.method!r} failed on {operator.name}: {fault}. Pass another method."
            )

"""The whole method: decoder layer after decoder layer, group of operators after group."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, replace

from tqdm.auto import tqdm

from optimum_fista.folder.loading import storage_place
from optimum_fista.memory import is_out_of_memory, release_memory, watched_memory
from optimum_fista.model.correction import GroupProblems, LayerTargets
from optimum_fista.model.groups import trace_groups
from optimum_fista.model.layer_inputs import LayerActivations, RecordedInputs
from optimum_fista.model.offload import execution_device, offload_hook, onloaded, sha256_of
from optimum_fista.prune.budgets import Budgets
from optimum_fista.prune.group import prune_group
from optimum_fista.prune.model_pruning import ModelPruning
from optimum_fista.prune.plan import require_finite
from optimum_fista.prune.reordering import reorder_channels
from optimum_fista.prune.sink import ModelSink
from optimum_fista.report import LayerRecord, LayerReport, OperatorReport
from optimum_fista.solve.method import PruningMethod


def prune_layers(run: ModelPruning, sink: ModelSink, todo: Collection[int] | None = None) -> None:
    """Prune decoder layers in place.

    Layers to remove are chosen and zeros are allocated to the operators first. Then one layer after the other is
    brought to its device, run on the calibration tokens, pruned group by group, and committed.

    Args:
        run: What is pruned, and how.
        sink: Where the layers go; each is committed before callbacks are called with it. Layers after the last operator
            to prune are committed without being run.
        todo: Their indices; `None`: all. If `run.states` is set, it holds those that enter the first of them; otherwise
            the layers must be independent of each other, and those that are not to do stay dense.
    """
    budgets = run.shared_budgets()  # first: the layers that it removes change the configuration
    method = run.config.create_method(run.model.config.model_type)
    todo = range(len(run.layers)) if todo is None else todo
    pruned = run.pruned_layers
    last = max((index for index in pruned if index in todo), default=-1)
    with (
        run.working(),
        tqdm(
            total=run.num_before + len(todo),
            initial=run.num_before,
            desc=run.title,
            unit="layer",
            disable=not run.progress or any(callback.shows_layers for callback in run.callbacks),
        ) as bar,
    ):
        loop = _Loop(run, sink, method, budgets, bar)
        recorded = run.record()
        first = 0 if run.states is None else min(todo)
        if run.states is None:
            run.states = run.config.correction.enter(recorded.hidden_states)
        del recorded.hidden_states
        if run.held_out is not None and not run.held_out.begin():
            run.held_out = None
        costs = {index: 1 + cost for index, cost in enumerate(run.costs()) if index in todo}
        for callback in run.callbacks:
            callback.on_layers_begin(len(run.layers), costs)
        for index, (name, layer) in enumerate(run.layers):
            if index < first or (index > last and index not in todo):
                recorded.calls[index] = []
                continue
            started = time.perf_counter()
            record = LayerRecord(LayerReport(name, None, 0.0)) if index > last else None
            held_out = run.held_out if index in todo else None
            # Before its weights are on the device, so that what is kept elsewhere does not come back for this.
            dense_sha256 = sha256_of(layer, layer.state_dict()) if index in todo else None
            with onloaded(layer.modules()):
                if held_out is not None:
                    held_out.run(index, "dense")
                while record is None:
                    record = loop.try_layer(index, recorded, prunes=index in todo)
                    if record is None:  # with smaller batches
                        recorded = run.record()
                        recorded.hidden_states.clear()
                recorded.calls[index] = []
                if held_out is not None and index not in run.removed:
                    held_out.run(index, "pruned")
                if held_out is not None and index == len(run.layers) - 1:
                    held_out.measure()
                if index in todo:
                    record = run.finished(record, time.perf_counter() - started, dense_sha256)
                    carried = index < max(pruned, default=-1) and run.config.correction.carry == "full"
                    sink.commit(index, layer, record, run.states if carried else None, held_out)
            release_memory(layer)
            if index in todo:
                bar.update()
                for callback in run.callbacks:
                    callback.on_layer_end(index, record.report, record.operators)


@dataclass
class _Loop:
    """What is inside the loop over decoder layers: one layer, and one group of its operators."""

    run: ModelPruning
    sink: ModelSink
    method: PruningMethod
    budgets: Budgets
    bar: tqdm

    def try_layer(self, index: int, recorded: RecordedInputs, *, prunes: bool) -> LayerRecord | None:
        """Prune a decoder layer, or run it as it is; `None`, with it dense again and batches halved, if memory ran out.

        Either way `run.states` becomes the hidden states after the layer.
        """
        run, layer = self.run, self.run.layers.modules[index]
        name, device = f"{run.layers.name}.{index}", execution_device(layer)
        storage = storage_place(run.storage_device, device)
        entering = run.states
        assert entering is not None
        try:
            entering.move(storage, device)
            calls, masks = recorded.calls[index], recorded.token_masks
            activations = LayerActivations(layer, calls, masks, storage, recorded.held_out)
            if prunes and index not in run.removed:
                return self.prune_layer(index, name, activations)
            targets = LayerTargets(activations, [], run.config.correction, entering)
            run.states = targets.pass_by() if index in run.removed else targets.leave()
            return LayerRecord(LayerReport(name, None, 0.0))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error) or repr(error)
        # outside of the handler: the error holds the frames, and they hold what filled the memory
        self.sink.undo()
        run.states = entering
        run.halve(name, reason)
        return None

    def prune_layer(self, index: int, name: str, activations: LayerActivations) -> LayerRecord:
        """Prune the operators of one decoder layer, group by group in execution order."""
        run, operators, removal, entering = self.run, self.run.operators[name], self.run.removal, self.run.states
        assert entering is not None
        require_finite([operator for operator in operators.values() if offload_hook(operator.owner)])
        first = entering.entering[0].to(activations.device)
        orders: dict[str, tuple[int, ...]] = {}
        removal.prove(name, activations, first)
        if run.config.reorder_channels:
            orders = reorder_channels(run, self.sink, name, activations, entering.entering)
        groups, left_dense = trace_groups(activations.layer, operators, activations.calls[0], first)
        groups, others = removal.to_prune(name, groups, activations, first)
        left_dense |= others
        experts = removal.experts_of(name, activations.layer)
        reports: list[OperatorReport] = []
        mixture, smaller = None, None
        with watched_memory(activations.device) as peak:
            together = None if experts is None else experts.module
            targets = LayerTargets(activations, groups, run.config.correction, entering, together)
            # with the dense network's inputs, while the layer still is that of the dense network; else as pruned
            first_of_all = run.config.correction.sees_dense_inputs(len(groups))
            if first_of_all:
                mixture, smaller = removal.remove_experts(self.sink, name, experts, targets)
            for number in range(len(groups)):
                # in a call: the matrices of a group must be gone before those of the next one are made
                reports += self.prune_group(index, targets.problems(number))
            if not first_of_all:
                mixture, smaller = removal.remove_experts(self.sink, name, experts, targets)
            leaving = targets.leave(smaller)
        run.states = leaving
        moved = activations.hidden_state_error(leaving)
        reports = [replace(report, input_order=orders.get(report.name)) for report in reports]
        memory = peak if operators or mixture else None
        return LayerRecord(LayerReport(name, moved, 0.0, memory, mixture), reports, left_dense)

    def prune_group(self, index: int, problems: GroupProblems) -> list[OperatorReport]:
        """Prune operators that share their inputs, and show it."""
        reports = prune_group(problems, self.method, self.budgets, self.sink)
        last, layers = reports[-1], self.run.layers
        name = last.name.removeprefix(f"{layers.name}.{index}.").removesuffix(".weight")
        held_out = "" if last.held_out_fit_error is None else f", held out {last.held_out_fit_error:.4f}"
        self.bar.set_postfix_str(f"layer {index + 1}/{len(layers)} {name} fit error {last.fit_error:.4f}{held_out}")
        for callback in self.run.callbacks:
            for report in reports:
                callback.on_operator_end(report)
        return reports

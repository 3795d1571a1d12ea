"""Error correction: on which inputs the operators of a decoder layer are pruned, and which outputs they should have.

`Correction` has the equation. `LayerTargets` makes the layer problems by it: a `DenseRecord` is what it keeps of the
dense network, and the `LastOperator` is one that compensates for the errors of all others. FISTAPruner corrects errors
inside a decoder layer. Here the attention may be left out of the correction, which saves time, or errors of earlier
layers may be corrected too. The targets may lie between those of the dense and of the pruned network.

Letters in comments: `W` is the dense weight of an operator [out, in], `X` its inputs in the dense network, `X*` in the
network as pruned so far. A group is a list of operators that share their inputs, so they share `X` and `X*`. Tokens are
rows of tensors here, [tokens, in].

For each decoder layer, `LayerTargets` is made while the layer is dense. Then `problems` is called for one group after
another, and `leave` at the end. Each group that the inputs of a group depend on is pruned before it; groups of
different experts do not depend on each other, and are solved together (`groups.solved_together`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Self

import torch
from torch import Tensor, nn

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.activations import ActivationStore
from optimum_fista.model.dense_record import DenseRecord
from optimum_fista.model.experts import AssignedTokens, ExpertOperator, FusedExperts
from optimum_fista.model.finished_parts import FinishedParts
from optimum_fista.model.groups import PartEnd
from optimum_fista.model.hooks import operator_input, watching
from optimum_fista.model.inputs import HiddenStates, LayerActivations
from optimum_fista.model.last_operator import LastOperator, is_added_to_output
from optimum_fista.model.operators import Group
from optimum_fista.solve.problem import LayerProblem

Carry = Literal["none", "after_attention", "intra", "full"]


@dataclass(frozen=True)
class Correction:
    """How an operator compensates for the errors of the operators that were pruned before it.

    With the inputs `X` of an operator in the dense network and `X*` in the network as pruned so far, it is fitted to

        W* X*  ~  Y = W (a X + (1 - a) X*) - b (D* - D),     a = dense_share, b = residual_share.

    `D` and `D*` are the rest of the decoder layer's output in the two networks, to which the operator's own output is
    added; only the last operator of a layer has them. FISTAPruner (arXiv 2408.03728, eq. 2) has a = 1 and b = 0.
    """

    # Where X* comes from. "none": from the dense network, X* = X. "intra": from the pruned operators of the same layer,
    # and the hidden states that enter the layer are dense. "after_attention": in the attention X* = X; operators after
    # it see a layer in which the attention's last operator is pruned, but not the others of the attention. If the layer
    # has no attention (`FinishedParts`), as "intra". "full": as "intra", but the hidden states that enter are pruned.
    carry: Carry
    dense_share: float = 1.0  # a, in [0, 1]
    residual_share: float = 0.0  # b, in [0, 1]

    @classmethod
    def parse(cls, error_correction: str | float, residual_correction: float = 0.0) -> Self:
        """Read the two options of a configuration.

        `error_correction` is one of the words of `carry`; a number means "full" with this share of the dense inputs,
        `a` in [0, 1]. `residual_correction` is the share `b` in [0, 1].
        """
        if isinstance(error_correction, int | float):
            return cls("full", float(error_correction), residual_correction)
        # With "none", operators see only the dense network: D* = D, and b is not used.
        residual_share = residual_correction if error_correction != "none" else 0.0
        return cls(error_correction, 1.0, residual_share)  # type: ignore[arg-type]

    @property
    def needs_dense(self) -> bool:
        """Whether the targets need the dense network's inputs or outputs."""
        return self.carry != "full" or self.dense_share > 0 or self.residual_share > 0

    def sees_dense_inputs(self, group: int, groups_of_attention: int) -> bool:
        """Whether `X* = X` for the group of operators with this number in the decoder layer.

        The first `groups_of_attention` groups are those of the attention (`FinishedParts.groups_of_attention`); 0: the
        layer has none.
        """
        if self.carry in ("none", "full"):
            return self.carry == "none"
        # The hidden states that enter the layer are dense, and so are the inputs of the first group.
        is_in_attention = self.carry == "after_attention" and group < groups_of_attention
        return group == 0 or is_in_attention

    def enter(self, hidden_states: Sequence[Tensor]) -> HiddenStates:
        """The hidden states that enter the first decoder layer: as dense ones, as pruned ones, or as both, as needed.

        In front of the first layer both are the same `hidden_states` [batch, sequence, hidden], a batch each.
        `self.needs_dense`: targets need the inputs or outputs of the dense network.
        """
        if self.carry != "full":  # every layer starts from dense hidden states
            return HiddenStates(dense=hidden_states, pruned=None)
        if not self.needs_dense:
            return HiddenStates(dense=None, pruned=hidden_states)
        return HiddenStates(dense=hidden_states, pruned=hidden_states)


@dataclass
class GroupProblems:
    """The layer problems of operators that share their inputs."""

    operators: Group
    fitted: list[LayerProblem]
    # over held-out tokens, made one by one; None if an operator got none
    held_out: Iterator[LayerProblem | None]
    last: LastOperator | None  # the operator, if it has a residual correction

    def output_error(
        self, problem: LayerProblem, weight: Tensor, fit_error: float, *, held_out: bool = False
    ) -> float | None:
        """`|| W* X* - W X ||_F / || W X ||_F` with weights `W*` as written; `None` if `W X` is not known.

        `problem` is one of `self.fitted`, or one of `self.held_out` if `held_out` is True. `weight` is `W*` [out, in].
        `fit_error` is the relative error against the targets, on the tokens of the problem. It is the result if the
        targets are the dense network's outputs (`problem.aims_at_dense`).

        If the operator has a residual correction (`self.last` is set), it has run with these weights
        (`LastOperator.run_pruned`), and the error is that of this run.
        """
        if self.last is not None:
            return self.last.output_error(held_out=held_out)
        return fit_error if problem.aims_at_dense else problem.output_error(weight)


class LayerTargets:
    """The layer problems of one decoder layer, group by group; nothing else refers to `X`, `X*` and the targets.

    The dense layer runs once, when this object is made, if hidden states of the dense network enter it. For `X*` of a
    group the layer runs from its start up to that group, with all earlier groups pruned; finished parts of the layer
    don't run again (`FinishedParts`). Between two groups only the outputs of these parts and the layer's input hidden
    states are kept. The layer must be dense at first.

    `groups` are in execution order, and `ends` say which operators end parts of the layer; both are of a `LayerTrace`.
    `entering` are the hidden states that enter the layer. `experts` is the module with the experts, if some of them
    will be removed.
    """

    def __init__(
        self,
        activations: LayerActivations,
        groups: Sequence[Group],
        correction: Correction,
        entering: HiddenStates,
        *,
        ends: Mapping[str, PartEnd] | None = None,
        experts: nn.Module | None = None,
    ) -> None:
        """Run the dense layer once, and record what later problems need of the dense network.

        If no dense hidden states enter (`entering.dense` is `None`), the targets need nothing of the dense network, and
        the layer does not run. Hooks are on the modules while it runs.

        Args:
            activations: The layer, with the recorded arguments of its calls.
            groups: Groups of operators, in execution order; from `trace_groups`.
            correction: Which inputs and targets the operators have.
            entering: The hidden states that enter the layer, in the dense and in the pruned network.
            ends: From `trace_groups`: which operators end parts of the layer, by their names.
            experts: The module with the experts, if some of them will be removed.
        """
        self.activations = activations
        self.entering = entering
        self._groups = groups
        self._correction = correction
        self._finished = FinishedParts(activations, groups, ends or {})
        # by the number of the group; each is taken out when the problems of its group are made
        self._records = {
            number: DenseRecord(
                group,
                activations,
                is_dense_input=self._sees_dense_inputs(number),
                needs_dense=correction.needs_dense,
            )
            for number, group in enumerate(groups)
        }
        # the mixture whose experts are pruned now, with the tokens that it assigned to them in each batch
        self._mixture: tuple[FusedExperts, list[AssignedTokens]] | None = None
        self._last: LastOperator | None = None
        self._experts = experts
        self._expert_outputs = activations.store()  # E(X), [tokens, out] by batch
        # hidden states after the layer in the dense network; None if these are not needed
        self._outputs: ActivationStore | None = None

        # whether the sum of all experts gets a residual correction
        self.corrects_experts = False
        # Asked for a group after all others: the rest of the layer's output differs in the two networks.
        has_rest = not self._sees_dense_inputs(len(groups))
        if experts is not None and correction.residual_share > 0 and has_rest:
            hidden = entering.to_prune_on[0]
            self.corrects_experts = is_added_to_output(activations, experts, hidden)

        if entering.dense is not None:
            self._outputs = self._run_dense(entering.dense)

    def _sees_dense_inputs(self, index: int) -> bool:
        """Whether `X* = X` for the group number `index`; the number of all groups stands for an operator after them."""
        return self._correction.sees_dense_inputs(index, self._finished.groups_of_attention)

    def _run_dense(self, hidden_states: Sequence[Tensor]) -> ActivationStore:
        """Run the dense layer on every batch, and return its output hidden states.

        One pass serves all groups: hooks fill the record of each (`self._records`), and `self._expert_outputs` if
        experts will be removed (`self._experts` is their module then). The hooks are removed at the end. The order in
        which they are set does not matter: each sees only its own module. If the operators of the attention are pruned
        on dense inputs, `self._finished` keeps those of the last one, so that the attention need not run again.

        `hidden_states` [batch, sequence, hidden] of each batch enter the layer.
        """
        outputs = self.activations.store()
        expert_sums = _ExpertSums(self._expert_outputs)
        with ExitStack() as hooks:
            if self._correction.carry == "after_attention" and self._finished.groups_of_attention:
                hooks.enter_context(self._finished.keeping_inputs_of_attention())
            for record in self._records.values():
                # All operators of a group have the same inputs: those of the first one are enough.
                first_module = record.group[0].module
                hooks.enter_context(
                    first_module.register_forward_pre_hook(record.see_input, with_kwargs=True)
                )
                for operator in record.group:
                    see_output = partial(record.see_output, operator)
                    hooks.enter_context(operator.module.register_forward_hook(see_output))
            if self._experts is not None:
                hooks.enter_context(self._experts.register_forward_hook(expert_sums.see_output))

            for batch, hidden in enumerate(hidden_states):
                expert_sums.num_tokens = hidden.shape[:2].numel()
                for record in self._records.values():
                    record.batch = batch  # its hooks need the number
                outputs.append(self.activations.run(batch, hidden))
        return outputs

    def problems(self, index: int) -> GroupProblems:
        """The problems of the group number `index`, which is still dense; groups that it depends on are pruned.

        This is called once for each group: its record in `self._records` is used up. If the group has other inputs than
        in the dense network, the layer runs. Outputs of finished parts may be kept then for later groups. If the
        operator of the group has a residual correction, `self._last` is set, for `leave`: the caller runs it
        (`LastOperator.run_pruned`) when its pruned weights are in the model.
        """
        # popped, so that the record and its sums are freed with the problems, before the next group's are made
        record = self._records.pop(index)
        group = self._groups[index]
        # If X* = X, the dense pass has summed everything.
        if not self._sees_dense_inputs(index):
            self._last = self._sum_pruned_inputs(index, record)

        share = self._correction.dense_share
        weights = [operator.read() for operator in group]
        fitted = list(record.sums_to_fit.problems(group, weights, share))

        held_out_sums = record.held_out_sums
        held_out: Iterator[LayerProblem | None]
        if held_out_sums is None or held_out_sums.num_tokens == 0:
            held_out = iter([None] * len(group))
        else:
            # generators: a problem is made when the caller asks for it
            dense_weights = (problem.weight for problem in fitted)
            held_out = held_out_sums.problems(group, dense_weights, share)
        return GroupProblems(group, fitted, held_out, self._last)

    def _sum_pruned_inputs(self, index: int, record: DenseRecord) -> LastOperator | None:
        """Run the layer as it is now, and sum over `X*` of the group number `index`.

        Changes the sums of `record`, which is that of the group, and the outputs of finished parts that are kept
        (`self._finished`). Returns the operator if it has a residual correction; `None`: the group has none.
        """
        group = self._groups[index]
        is_last = index == len(self._groups) - 1
        # only the last operator has a residual correction, and only if it is alone in its group
        may_compensate = (
            self._correction.residual_share > 0
            and is_last
            and len(group) == 1
            and not isinstance(group[0], ExpertOperator)
        )
        compensates = may_compensate and is_added_to_output(
            self.activations, group[0].module, self.entering.to_prune_on[0]
        )
        if compensates:
            with self._finished.skipped(index, keep=False):
                return self._sum_residual(record)

        # for a later group, or at the end (`leave`); otherwise keeping outputs of parts would not pay
        runs_again = not is_last or self.entering.pruned is not None
        with self._finished.skipped(index, keep=runs_again):
            self._sum_inputs(record)
        return None

    def expert_targets(self) -> Iterator[Tensor]:
        """Run the layer as it is now, and yield targets for the sum of all experts, [batch, sequence, out].

        If the sum is `E(X)` in the dense network and `E(X*)` now, its target is

            Y = a E(X) + (1 - a) E(X*) - b (D* - D),

        with `D` and `D*` the rest of the layer's output; b = 0 unless `self.corrects_experts`. `a` and `b` are the
        `dense_share` and the `residual_share` of the correction.

        `self._experts` is the mixture; a hook is on it until the iterator ends.
        """
        assert self._experts is not None
        sums: list[Tensor] = []  # E(X*) of the batch that runs, [tokens, out]
        expert_sums = _ExpertSums(sums)
        with self._experts.register_forward_hook(expert_sums.see_output):
            for batch, hidden in enumerate(self.entering.to_prune_on):
                expert_sums.num_tokens = hidden.shape[:2].numel()
                output = self.activations.run(batch, hidden)
                if len(sums) != 1:
                    raise UnsupportedArchitectureError(
                        f"a {type(self._experts).__name__} is called {len(sums)} times in a forward pass of its "
                        "decoder layer, so its experts can't be removed: use a pattern that removes no experts, "
                        "such as '2:4'."
                    )
                target = self._expert_target(batch, output, sums.pop().float())
                # [tokens, out] -> [batch, sequence, out]; with hyper-connections, out is several hidden states
                yield target.to(output.dtype).view(*hidden.shape[:2], -1)

    def _expert_target(self, batch: int, layer_output: Tensor, pruned_sum: Tensor) -> Tensor:
        """Return the target of one batch for the sum of all experts (`expert_targets`), float32 [tokens, out].

        Symbols are those of `expert_targets`. The dense pass has kept two things of each batch: the sum of the experts
        E(X) [tokens, out] in `self._expert_outputs`, and the layer's whole outputs D + E(X) in `self._outputs`.

        Args:
            batch: The number of the batch.
            layer_output: The layer's output D* + E(X*) in the pruned network, [batch, sequence, hidden].
            pruned_sum: The sum of all experts there, E(X*), float32 [tokens, out]; it stays as it is.
        """
        correction = self._correction
        if not correction.needs_dense:  # a = b = 0
            return pruned_sum

        dense_sum = self._expert_outputs[batch].float()  # E(X)
        # (1 - a) E(X*) + a E(X), a new tensor
        target = torch.lerp(pruned_sum, dense_sum, correction.dense_share)
        if self.corrects_experts:
            assert self._outputs is not None
            # (D* + E(X*)) - (D + E(X)), in the layer's dtype, and then float32 [tokens, out]
            change_of_layer = layer_output - self._outputs[batch].to(layer_output.device)
            change_of_layer = change_of_layer.reshape(pruned_sum.shape).float()
            change_of_rest = change_of_layer - pruned_sum + dense_sum  # D* - D
            target -= change_of_rest * correction.residual_share
        return target

    def leave(self, smaller: nn.Module | None = None) -> HiddenStates:
        """Run the pruned layer, and return the hidden states after it; this is called once, after the last group.

        If experts were removed, the copy `smaller` without them runs in place of the layer. If the last operator has a
        residual correction (`self._last`), only that operator runs. Otherwise the layer runs, unless later layers need
        no hidden states of the pruned network (`self.entering.pruned` is `None`). Those of the dense network are known
        from the dense pass (`self._outputs`).
        """
        entering = self.entering.pruned
        pruned: ActivationStore | None = None
        if smaller is not None:
            if entering is not None:
                pruned = replace(self.activations, layer=smaller).outputs(entering)
        elif self._last is not None:
            # D* was kept, so only the operator itself runs
            pruned = self._last.hidden_states
        elif entering is not None:
            with self._finished.skipped(len(self._groups), keep=False):
                pruned = self.activations.outputs(entering)
        return HiddenStates(self._outputs, pruned)

    def _sum_inputs(self, record: DenseRecord) -> None:
        """Run the layer up to a group, and add its inputs `X*` to the sums of its `record`."""
        operator = record.group[0]
        if isinstance(operator, ExpertOperator):
            self._sum_inputs_of_expert(record, operator)
            return
        # the pruned hidden states if layers before were pruned, otherwise dense ones
        entering = self.entering.to_prune_on
        # An iterator: the layer runs on a batch when the loop asks for it.
        calls = self.activations.arguments_of(operator.module, entering)
        for batch, (arguments, keywords) in enumerate(calls):
            record.add(batch, operator_input(arguments, keywords))  # [batch, sequence, in]

    def _sum_inputs_of_expert(self, record: DenseRecord, operator: ExpertOperator) -> None:
        """Add the inputs `X*` of an expert to the sums of its `record`; `operator` is the first one of the group.

        The first group of a mixture runs the layer, and later groups read the tokens that are kept from it
        (`_assigned_tokens`).
        """
        assigned_batches = self._assigned_tokens(operator.experts)
        # The group is not pruned yet. Its weights give the energies of dense outputs, which no hook has recorded.
        dense_weights = [expert.read() for expert in record.group]
        for batch, assigned in enumerate(assigned_batches):
            record.add_expert(
                batch,
                inputs=operator.inputs(assigned, self.activations.device),  # [tokens, in]
                tokens=assigned.tokens_of(operator.expert),
                dense_weights=dense_weights,
            )

    def _assigned_tokens(self, experts: FusedExperts) -> list[AssignedTokens]:
        """The tokens that a mixture assigns to its experts in each batch.

        The layer runs once for all `experts` of a mixture: their inputs are computed from the input of the mixture. The
        result is kept in `self._mixture` until another mixture comes. `self.entering` are the hidden states that enter
        the layer.
        """
        if self._mixture is None or self._mixture[0] is not experts:  # it is another mixture
            entering = self.entering.to_prune_on
            self._mixture = (experts, self.activations.assigned_tokens(experts, entering))
        return self._mixture[1]

    def _sum_residual(self, record: DenseRecord) -> LastOperator:
        """Run the layer to its end, and sum over the inputs and the targets of the last operator.

        The operator still has its dense weights. So the run gives its inputs `X*`, its outputs `W X*`, and the layer's
        outputs `D* + W X*`. From them, and from the `record` of the dense network, the targets are made
        (`_add_residual`). Changes the sums of `record`; hooks on the operator are removed at the end.

        Returns the operator with what was kept of this run, so that the layer need not run again after the operator is
        pruned.
        """
        activations = self.activations
        operator = record.group[0]
        # squared norms of the rows of W X, [out], from the dense pass
        energies = record.sums_to_fit.energies[operator.name]
        held_out_energies = torch.zeros_like(energies)
        if record.held_out_sums is not None:
            held_out_energies = record.held_out_sums.energies[operator.name]
        last = LastOperator(
            operator,
            activations,
            energy=energies.sum(),
            held_out_energy=held_out_energies.sum(),
            inputs=activations.store(),
            # later layers may start from dense hidden states: then those after this layer are not needed
            rest=None if self.entering.pruned is None else activations.store(),
            dense_outputs=activations.store() if record.outputs is None else record.outputs,
        )
        # Without the outputs W X, the record has the inputs X, and `_add_residual` multiplies them by the weight.
        weight = operator.read() if record.outputs is None else None

        inputs_seen: list[Tensor] = []
        outputs_seen: list[Tensor] = []

        def copy_output(_: nn.Module, __: object, output: Tensor) -> None:
            """Append a copy of the output to `outputs_seen`, because some layers add to it in place; a forward hook."""
            outputs_seen.append(output.clone())

        with watching({operator.module: inputs_seen.append}, {operator.module: copy_output}):
            for batch, hidden in enumerate(self.entering.to_prune_on):
                layer_output = activations.run(batch, hidden)
                # a view, because some layers call their operator with [tokens, in]
                own_output = outputs_seen.pop().view(layer_output.shape)
                inputs = inputs_seen.pop()
                self._add_residual(
                    batch,
                    record,
                    last,
                    weight=weight,
                    layer_output=layer_output,
                    own_output=own_output,
                    inputs=inputs,
                )
                del layer_output, own_output, inputs  # before the next batch runs
        return last

    def _add_residual(
        self,
        batch: int,
        record: DenseRecord,
        last: LastOperator,
        *,
        weight: Tensor | None,
        layer_output: Tensor,
        own_output: Tensor,
        inputs: Tensor,
    ) -> None:
        """Add the inputs and the targets of one batch to the sums of the last operator.

        The targets `Y` [tokens, out] compensate for the share b of the error of the rest of the layer (`Correction`):

            Y = W (a X + (1 - a) X*) - b (D* - D)

        `D` and `D*` are the rest of the layer's output in the dense and in the pruned network. `self._outputs` are the
        layer's outputs in the dense network. Changes the sums of `record`, and appends to the stores of `last`.

        Args:
            batch: Number of the batch.
            record: What is kept of the dense network: `X` or `W X`.
            last: The operator, with the stores of its inputs and outputs.
            weight: `W` [out, in]; `None` if the record has `W X`.
            layer_output: `D* + W X*`, with the operator's bias, [batch, sequence, out].
            own_output: `W X*`, with the bias, [batch, sequence, out].
            inputs: `X*`, as the operator was called with, [batch, sequence, in] or [tokens, in].
        """
        assert self._outputs is not None
        activations = self.activations
        correction = self._correction
        operator = last.operator

        # W X* [tokens, out], float32, without padding
        product = activations.rows(own_output, batch, operator)
        product = operator.outputs_without_bias(product).float()
        device = product.device

        # W X [tokens, out], float32
        if record.inputs is not None and weight is not None:
            dense_product = record.inputs[batch].to(device, non_blocking=True).float() @ weight.T
            last.dense_outputs.append(dense_product)
        else:
            dense_product = last.dense_outputs[batch].to(device, non_blocking=True).float()

        # (D* + W X*) - (D + W X), in the layer's dtype: the two sums are close, so little is lost in their difference
        change_of_layer = layer_output - self._outputs[batch].to(device)
        change_of_rest = (  # D* - D, float32, without padding
            activations.rows(change_of_layer, batch, operator).float() - product + dense_product
        )

        targets = product.mul(1 - correction.dense_share)
        targets.add_(dense_product, alpha=correction.dense_share)
        targets.sub_(change_of_rest, alpha=correction.residual_share)

        rows = activations.rows(inputs, batch, operator)
        record.sums_of(batch).add(rows, "targets", targets)
        last.inputs.append(inputs)
        if last.rest is not None:
            last.rest.append(layer_output - own_output)


def run_unpruned(
    activations: LayerActivations, entering: HiddenStates, *, is_removed: bool
) -> HiddenStates:
    """Run a decoder layer in which nothing is pruned, and return the hidden states after it.

    `activations` has the layer, and `entering` are the hidden states that enter it. If the layer is removed, those of
    the pruned network pass it by.
    """
    dense = None if entering.dense is None else activations.outputs(entering.dense)
    if is_removed or entering.pruned is None:
        return HiddenStates(dense, entering.pruned)
    return HiddenStates(dense, activations.outputs(entering.pruned))


class _ExpertSums:
    """Collects the sum of the outputs of all experts of a mixture, [tokens, out] of each batch, by a forward hook.

    Attributes:
        num_tokens: The number of tokens in the batch that runs, padding included.
    """

    def __init__(self, sums: ActivationStore | list[Tensor]) -> None:
        """`sums` gets the sum of each batch."""
        self._sums = sums
        self.num_tokens = 0

    def see_output(self, _: nn.Module, __: object, output: Tensor) -> None:
        """Append the sum of all experts in the batch that runs; a forward hook of the mixture."""
        # Llama-4 returns one output for each expert, [experts * tokens, out]: the number tells them apart.
        self._sums.append(sum_of_experts(output, self.num_tokens))


def sum_of_experts(output: Tensor, num_tokens: int) -> Tensor:
    """Sum the outputs of the experts for each token: a new tensor [tokens, out].

    `output` is what a mixture returns for `num_tokens` tokens: their sum, or in Llama-4 one output for each expert,
    [experts * tokens, out].
    """
    return output.detach().reshape(-1, num_tokens, output.shape[-1]).sum(0)

"""Error correction: on which inputs the operators of a decoder layer are pruned, and which outputs they should have.

`Correction` has the equation; everything that depends on it is in this file. FISTAPruner corrects errors inside a
decoder layer. Here, errors of earlier layers may be corrected too. The targets may lie between those of the dense and
of the pruned network. The last operator of a layer may compensate for the errors of all others. For this, activations
of the dense network are kept for one layer: the inputs or the outputs of an operator, whichever take less memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.activations import ActivationStore
from optimum_fista.model.experts import AssignedTokens, ExpertOperator, FusedExperts
from optimum_fista.model.gram import GroupSums
from optimum_fista.model.groups import FinishedParts, is_added_to_output
from optimum_fista.model.hooks import operator_input, watching
from optimum_fista.model.inputs import HiddenStates, LayerActivations
from optimum_fista.model.operators import Group, LinearOperator
from optimum_fista.model.precision import quick_products
from optimum_fista.solve.problem import LayerProblem, relative

Carry = Literal["none", "intra", "full"]


@dataclass(frozen=True)
class Correction:
    """How an operator compensates for the errors of the operators that were pruned before it.

    With the inputs `X` of an operator in the dense network and `X*` in the network as pruned so far, it is fitted to

        W* X*  ~  Y = W (a X + (1 - a) X*) - b (D* - D),     a = dense_share, b = residual_share.

    `D` and `D*` are the rest of the decoder layer's output in the two networks, to which the operator's own output is
    added; only the last operator of a layer has them. FISTAPruner (arXiv 2408.03728, eq. 2) has a = 1 and b = 0.
    """

    # Where X* comes from. "none": from the dense network, X* = X. "intra": from the pruned operators of the same layer,
    # and the hidden states that enter the layer are dense. "full": these are pruned too.
    carry: Carry
    dense_share: float = 1.0  # a, in [0, 1]
    residual_share: float = 0.0  # b, in [0, 1]

    @classmethod
    def parse(cls, error_correction: str | float, residual_correction: float = 0.0) -> Self:
        """Read the two options of a configuration; a number means `"full"` with this share of the dense inputs."""
        if isinstance(error_correction, int | float):
            return cls("full", float(error_correction), residual_correction)
        residual_share = residual_correction if error_correction != "none" else 0.0
        return cls(error_correction, 1.0, residual_share)  # type: ignore[arg-type]

    @property
    def needs_dense(self) -> bool:
        """Whether the targets need the dense network's inputs or outputs."""
        return self.carry != "full" or self.dense_share > 0 or self.residual_share > 0

    def sees_dense_inputs(self, group: int) -> bool:
        """Whether `X* = X` for the group of operators with this number in the decoder layer."""
        return self.carry == "none" or (self.carry == "intra" and group == 0)

    def enter(self, hidden_states: Sequence[Tensor]) -> HiddenStates:
        """The hidden states that enter the first decoder layer: dense, pruned, or both, as needed."""
        if self.carry != "full":
            return HiddenStates(hidden_states)
        return HiddenStates(hidden_states if self.needs_dense else None, hidden_states)


@dataclass
class LastOperator:
    """The last operator of a decoder layer: its inputs, and the sums to which its outputs are added, one per batch."""

    operator: LinearOperator
    activations: LayerActivations
    energies: dict[
        bool, Tensor
    ]  # squared norms of the rows of W X, [out], float64: held out (True) and others
    inputs: ActivationStore  # X*
    rest: ActivationStore | None  # D*; None if the layer's output hidden states are not needed
    dense: ActivationStore  # W X in the dense network, [tokens, out]

    @cached_property  # for the errors first, then for the layer's outputs: no batch runs twice
    def results(self) -> tuple[dict[bool, Tensor], ActivationStore | None]:
        """Squared errors of its pruned outputs, of held-out batches and of others, and hidden states after the layer.

        The operator runs once, with the weights that it has at the first access.
        """
        activations, operator = self.activations, self.operator
        squares = {
            kind: torch.zeros((), dtype=torch.float64, device=activations.device)
            for kind in (False, True)
        }
        outputs = None if self.rest is None else activations.store()
        for batch, inputs in enumerate(self.inputs):
            with quick_products():
                output = operator.module(inputs)
            if outputs is not None and self.rest is not None:
                rest = self.rest[batch]
                outputs.append(rest + output.view(rest.shape))
            found = operator.outputs_without_bias(activations.rows(output, batch, operator))
            difference = found - self.dense[batch].to(found.device).float()
            squares[activations.held_out[batch]] += difference.square().sum(1).double().sum()
        return squares, outputs


@dataclass
class GroupProblems:
    """The layer problems of operators that share their inputs."""

    operators: Group
    fitted: list[LayerProblem]
    held_out: Iterator[
        LayerProblem | None
    ]  # over held-out tokens, made one by one; None if an operator got none
    last: LastOperator | None  # the operator, if it has a residual correction

    def output_error(
        self, problem: LayerProblem, weight: Tensor, fit_error: float, *, held_out: bool = False
    ) -> float | None:
        """`|| W* X* - W X ||_F / || W X ||_F` with weights `W*` as written; `None` if `W X` is not known.

        This equals `fit_error` if the targets are the dense network's outputs, on held-out tokens and on others.
        """
        if self.last is None:
            return fit_error if problem.aims_at_dense else problem.output_error(weight)
        squares, energy = self.last.results[0][held_out], self.last.energies[held_out].sum()
        return relative(*torch.stack([squares, energy]).tolist())  # one wait for the device


class LayerTargets:
    """The layer problems of one decoder layer, group by group; nothing else refers to `X`, `X*` and the targets.

    The dense layer runs once, at the beginning. For `X*` of a group the layer runs from its start up to that group,
    with all earlier groups pruned; finished parts of the layer don't run again (`FinishedParts`). Between two groups
    only the outputs of these parts and the layer's input hidden states are kept. The layer must be dense at first.
    `groups` are in execution order; `experts` is the module with the experts if some of them are removed.
    """

    def __init__(
        self,
        activations: LayerActivations,
        groups: Sequence[Group],
        correction: Correction,
        entering: HiddenStates,
        experts: nn.Module | None = None,
    ) -> None:
        self.activations = activations
        self.entering = entering
        self._groups = groups
        self._correction = correction
        self._finished = FinishedParts(activations, groups)
        self._records = {
            i: _DenseRecord(group, activations, correction, i) for i, group in enumerate(groups)
        }
        self._mixture: tuple[FusedExperts, list[AssignedTokens]] | None = None
        self._last: LastOperator | None = None
        self._experts, self._expert_outputs = experts, activations.store()
        corrects = correction.residual_share > 0 and not correction.sees_dense_inputs(len(groups))
        self.adds_experts = (  # whether the sum of all experts gets a residual correction
            experts is not None
            and corrects
            and is_added_to_output(activations, experts, entering.entering[0])
        )
        self._outputs: ActivationStore | None = None
        if entering.dense is None:
            return
        # one pass serves all groups: each records the inputs and outputs of its operators
        records, count, self._outputs = self._records.values(), 0, activations.store()
        hooks: dict[nn.Module, Callable[..., None]]
        hooks = {
            operator.module: partial(r.see_output, operator)
            for r in records
            for operator in r.group
        }
        if experts is not None:
            hooks[experts] = lambda _, __, output: self._expert_outputs.append(
                tokens_of(output, count)
            )
        with watching({record.group[0].module: record.see_input for record in records}, hooks):
            for batch, hidden in enumerate(entering.dense):
                count = hidden.shape[:2].numel()
                for record in records:
                    record.batch = batch
                self._outputs.append(activations.run(batch, hidden))

    def problems(self, index: int) -> GroupProblems:
        """The problems of a group that is still dense; all groups before it are pruned and written."""
        # popped, so that the record and its sums are freed with the problems, before the next group's are made
        group, record, correction = self._groups[index], self._records.pop(index), self._correction
        is_last = index == len(self._groups) - 1
        if not correction.sees_dense_inputs(
            index
        ):  # otherwise X* = X, and the dense pass has summed them
            # only the last operator has a residual correction, and only if it is alone in its group
            corrects = (
                correction.residual_share > 0
                and is_last
                and len(group) == 1
                and group[0].tokens is None
            )
            if corrects and is_added_to_output(
                self.activations, group[0].module, self.entering.entering[0]
            ):
                with self._finished.skipped(index, keep=False):
                    self._last = self._sum_residual(record)
            else:
                with self._finished.skipped(
                    index, keep=not is_last or self.entering.pruned is not None
                ):
                    self._sum_inputs(record)
        share = correction.dense_share
        fitted = list(
            record.sums[False].problems(group, [operator.read() for operator in group], share)
        )
        held_out: Iterator[LayerProblem | None] = iter([None] * len(group))
        if True in record.sums and record.sums[True].num_tokens:
            held_out = record.sums[True].problems(
                group, (problem.weight for problem in fitted), share
            )
        return GroupProblems(group, fitted, held_out, self._last)

    def pass_by(self) -> HiddenStates:
        """Hidden states after a layer that is removed: in the pruned network, those that enter it."""
        return HiddenStates(self._outputs, self.entering.pruned)

    def expert_targets(self) -> Iterator[Tensor]:
        """Run the layer as it is now, and yield targets for the sum of all experts, [batch, sequence, out].

        If the sum is `E(X)` in the dense network and `E(X*)` now, its target is

            Y = a E(X) + (1 - a) E(X*) - b (D* - D),

        with `D` and `D*` the rest of the layer's output; b = 0 unless `adds_experts`.
        """
        assert self._experts is not None
        correction, seen, count = self._correction, list[Tensor](), 0
        with watching(
            {}, {self._experts: lambda _, __, output: seen.append(tokens_of(output, count).float())}
        ):
            for batch, hidden in enumerate(self.entering.entering):
                count = hidden.shape[:2].numel()
                output = self.activations.run(batch, hidden)
                if len(seen) != 1:
                    why = f"is called {len(seen)} times in a forward pass of its decoder layer, so its experts can't go"
                    raise UnsupportedArchitectureError(
                        f"a {type(self._experts).__name__} {why}: use another pattern."
                    )
                target = same = seen.pop()
                if correction.needs_dense:
                    dense = self._expert_outputs[batch].float()
                    target = torch.lerp(same, dense, correction.dense_share)
                    if self.adds_experts:
                        assert self._outputs is not None
                        both = (
                            (output - self._outputs[batch].to(output.device))
                            .reshape(same.shape)
                            .float()
                        )
                        target -= (both - same + dense) * correction.residual_share
                # of hidden states, of which a layer may have several for a token (hyper-connections)
                yield target.to(output.dtype).view(*hidden.shape[:2], -1)

    def leave(self, smaller: nn.Module | None = None) -> HiddenStates:
        """Hidden states after the layer, or after the `smaller` one without experts, when all groups are pruned."""
        entering, pruned = self.entering.pruned, None
        if smaller is not None:
            pruned = (
                None
                if entering is None
                else replace(self.activations, layer=smaller).outputs(entering)
            )
        elif self._last is not None:
            pruned = self._last.results[1]  # D* was kept, so only the operator itself runs
        elif entering is not None:
            with self._finished.skipped(len(self._groups), keep=False):
                pruned = self.activations.outputs(entering)
        return HiddenStates(self._outputs, pruned)

    def _sum_inputs(self, record: _DenseRecord) -> None:
        """Sum over `X*` of a group and over the dense network's record; the layer runs up to the group."""
        operator, activations, entering = record.group[0], self.activations, self.entering.entering
        found: Iterator[
            Tensor
        ]  # [batch, sequence, in] or, of an expert, [tokens, in], a batch each
        weights: list[Tensor] = []
        if isinstance(operator, ExpertOperator):
            if self._mixture is None or self._mixture[0] is not operator.experts:
                # one run for all experts of a mixture: their inputs are computed from the input of the mixture
                self._mixture = (
                    operator.experts,
                    activations.assigned_tokens(operator.experts, entering),
                )
            found = (operator.inputs(tokens, activations.device) for tokens in self._mixture[1])
            weights = [expert.read() for expert in record.group]
        else:
            found = (
                operator_input(*given)
                for given in activations.arguments_of(operator.module, entering)
            )
        for batch, inputs in enumerate(found):
            record.batch = batch
            record.add(inputs, weights)

    def _sum_residual(self, record: _DenseRecord) -> LastOperator:
        """Sum over `X*` and the targets `Y = W (a X + (1 - a) X*) - b (D* - D)` of the last operator.

        The layer runs to its end with the operator's dense weights, which gives `X*`, `W X*` and `D* + W X*`.
        """
        operator, activations, correction = record.group[0], self.activations, self._correction
        last = LastOperator(
            operator,
            activations,
            energies={kind: sums.energies[operator.name] for kind, sums in record.sums.items()},
            inputs=activations.store(),
            rest=None if self.entering.pruned is None else activations.store(),
            dense=activations.store() if record.outputs is None else record.outputs,
        )
        weight = operator.read() if record.outputs is None else None
        assert self._outputs is not None
        seen: list[
            Tensor
        ] = []  # its input, and a copy of its output: some layers add to that in place
        copy_output = {operator.module: lambda _, __, output: seen.append(output.clone())}
        with watching({operator.module: seen.append}, copy_output):
            for batch, hidden in enumerate(self.entering.entering):
                output = activations.run(batch, hidden)
                own, inputs = (
                    seen.pop().view(output.shape),
                    seen.pop(),
                )  # some call their operator with [tokens, in]
                same = operator.outputs_without_bias(
                    activations.rows(own, batch, operator)
                ).float()  # W X*
                if record.inputs is not None and weight is not None:
                    dense = (
                        record.inputs[batch].to(same.device, non_blocking=True).float() @ weight.T
                    )
                    last.dense.append(dense)
                else:
                    dense = last.dense[batch].to(same.device, non_blocking=True).float()  # W X
                # in the layer's dtype: the two sums are close, so little is lost in their difference
                both = output - self._outputs[batch].to(same.device)  # (D* + W X*) - (D + W X)
                moved = activations.rows(both, batch, operator).float() - same + dense  # D* - D
                targets = same.mul(1 - correction.dense_share).add_(
                    dense, alpha=correction.dense_share
                )
                targets.sub_(moved, alpha=correction.residual_share)
                rows = activations.rows(inputs, batch, operator)
                record.sums[activations.held_out[batch]].add(rows, "targets", targets)
                last.inputs.append(inputs)
                if last.rest is not None:
                    last.rest.append(output - own)
                del (
                    output,
                    own,
                    inputs,
                    same,
                    dense,
                    both,
                    moved,
                    targets,
                    rows,
                )  # before the next batch runs
        return last


class _DenseRecord:
    """Activations of one group in the dense network: enough to form `W X X*^T` with any later `X*`."""

    def __init__(
        self, group: Group, activations: LayerActivations, correction: Correction, index: int
    ) -> None:
        self.group = group
        self.batch = 0  # number of the batch that runs
        self._activations = activations
        self._same = correction.sees_dense_inputs(index)
        size, device = group[0].shape[1], activations.device
        kinds = sorted(
            {False, *activations.held_out}
        )  # tokens to fit, and those held out if there are any
        self.sums = {kind: GroupSums(size, device, same_inputs=self._same) for kind in kinds}
        self.inputs: ActivationStore | None = None  # X [tokens, in] by batch, in the model's dtype
        self.outputs: ActivationStore | None = (
            None  # or W X of all operators side by side, [tokens, out] by batch
        )
        self.tokens: list[
            Tensor
        ] = []  # which tokens are the rows of X, by batch, if these are not all tokens
        self._side_by_side: list[Tensor] = []  # outputs of the batch that runs
        if self._same or not correction.needs_dense:
            return
        if (
            group[0].tokens is not None
        ):  # experts are many and small: their inputs are kept, and not in files
            on_disk = isinstance(activations.storage, Path)
            self.inputs = ActivationStore(
                torch.device("cpu") if on_disk else activations.storage, device
            )
        elif sum(operator.shape[0] for operator in group) < size:  # keep the smaller one
            self.outputs = activations.store()
        else:
            self.inputs = activations.store()

    def see_input(self, inputs: Tensor) -> None:
        """Record the dense inputs of the group."""
        operator = self.group[0]
        rows = self._activations.rows(inputs, self.batch, operator)
        if self._same:
            self.sums[self._activations.held_out[self.batch]].add(rows)
        elif self.inputs is not None:
            self.inputs.append(rows, copy=True)  # the layer may overwrite it
            if operator.tokens is not None:
                self.tokens.append(
                    self._activations.rows(operator.tokens[:, None], self.batch, operator)[:, 0]
                )

    def see_output(
        self, operator: LinearOperator, _: nn.Module, __: object, output: Tensor
    ) -> None:
        """Record the dense outputs of one operator, as its forward hook; those of a group come in its order."""
        if self._same or operator.tokens is not None:
            return
        rows = operator.outputs_without_bias(self._activations.rows(output, self.batch, operator))
        self.sums[self._activations.held_out[self.batch]].add_energies(operator.name, rows)
        if self.outputs is not None:
            self._side_by_side.append(
                rows.to(output.dtype, copy=True)
            )  # Falcon adds to it in place
            if operator is self.group[-1]:
                self.outputs.append(torch.cat(self._side_by_side, dim=1))
                self._side_by_side.clear()

    def add(self, inputs: Tensor, weights: Sequence[Tensor]) -> None:
        """Add the inputs `X*` of a batch, and the dense network's record of it; `weights` are those of experts."""
        operator, sums = self.group[0], self.sums[self._activations.held_out[self.batch]]
        rows = self._activations.rows(inputs, self.batch, operator)
        if self.outputs is not None:
            sums.add(rows, "outputs", self.outputs[self.batch].to(rows.device, non_blocking=True))
        elif self.inputs is not None:
            dense = self.inputs[self.batch].to(rows.device, non_blocking=True)
            if (
                operator.tokens is not None
            ):  # in the dense network other tokens may have reached the expert
                tokens = self._activations.rows(operator.tokens[:, None], self.batch, operator)[
                    :, 0
                ]
                dense = _rows_of(tokens, dense, self.tokens[self.batch], rows)
                for expert, weight in zip(self.group, weights, strict=True):
                    sums.add_energies(expert.name, dense.float() @ weight.T)
            sums.add(rows, "inputs", dense)
        else:
            sums.add(rows)


def tokens_of(output: Tensor, num_tokens: int) -> Tensor:
    """Sum the outputs of the experts for each token, [tokens, out]; Llama-4 returns one output for each expert."""
    return output.detach().reshape(-1, num_tokens, output.shape[-1]).sum(0)


def _rows_of(tokens: Tensor, kept: Tensor, before: Tensor, later: Tensor) -> Tensor:
    """Select rows for `tokens`: from `kept` [.., in] if the token is in `before`, otherwise from `later`."""
    if not before.numel():
        return later
    # a search works because `LinearOperator.tokens` are rising
    place = torch.searchsorted(before, tokens).clamp_max(before.numel() - 1)
    return torch.where((before[place] == tokens)[:, None], kept[place], later)

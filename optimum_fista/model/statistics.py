"""From the activations of one decoder layer to the layer problems of its operators."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from optimum_fista.model.activation_store import ActivationStore, Storage
from optimum_fista.model.gram import GramAccumulator
from optimum_fista.model.operator import LinearOperator
from optimum_fista.model.replay import LayerCall, watching
from optimum_fista.solve.blocks import row_blocks
from optimum_fista.solve.problem import InputStatistics, LayerProblem, inner_by_rows

Group = list[LinearOperator]


@dataclass
class LayerActivations:
    """One decoder layer with everything needed to run it on the calibration tokens.

    Attributes:
        layer: The decoder layer.
        calls: Its arguments besides the hidden states, a batch each.
        token_masks: bool [batch, sequence] or `None`, a batch each; False tokens count nowhere.
        storage: Where hidden states and recorded activations are kept between passes: a device, or a folder for
            memory-mapped files.
    """

    layer: nn.Module
    calls: Sequence[LayerCall]
    token_masks: Sequence[Tensor | None]
    storage: Storage

    def store(self) -> ActivationStore:
        """An empty list of activations that are kept at `storage` and needed on the layer's device."""
        return ActivationStore(self.storage, next(self.layer.parameters()).device)

    def rows(self, activations: Tensor, batch: int, operator: LinearOperator) -> Tensor:
        """Real tokens of an operator's activation [batch, sequence, n] or [batch * sequence, n] as [tokens, n]."""
        flat = activations.detach().reshape(-1, activations.shape[-1])
        mask = self.token_masks[batch]
        if mask is None:
            return flat
        real = mask.reshape(-1) if operator.tokens is None else mask.reshape(-1)[operator.tokens]
        if flat.shape[0] != real.numel():
            raise ValueError(
                f"{operator.name} sees {flat.shape[0]} rows for {real.numel()} tokens, so padding can't be told apart: "
                f"pass batches without padding, or exclude=['{operator.name}']."
            )
        return flat[real]

    def tokens(self, batch: int, operator: LinearOperator) -> Tensor | None:
        """Indices of the rows of `rows`, where the operator does not see all tokens."""
        mask, tokens = self.token_masks[batch], operator.tokens
        return tokens if mask is None or tokens is None else tokens[mask.reshape(-1)[tokens]]


@dataclass
class DenseRecord:
    """What the dense network shows of one group: enough to form `C = W X X*^T` against any later `X*`.

    Attributes:
        narrow: Whether outputs are kept (fewer outputs than inputs) rather than inputs.
        kept: Dense outputs without bias, side by side, [tokens, out], or dense inputs [tokens, in], a batch each,
            in the model's dtype.
        tokens: Indices of the tokens seen, a batch each, where these are not all.
        energies: Squared norms of the rows of `W X`, [out], float64, by operator that sees all tokens.
    """

    narrow: bool
    kept: list[Tensor] | ActivationStore = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    energies: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, group: Group, activations: LayerActivations) -> DenseRecord:
        """An empty record in the smaller form; experts, many and small, keep inputs, and no files of their own."""
        if group[0].tokens is None:
            return cls(sum(o.shape[0] for o in group) < group[0].shape[1], activations.store())
        device = next(activations.layer.parameters()).device
        in_files = isinstance(activations.storage, Path)
        return cls(False, ActivationStore(torch.device("cpu") if in_files else activations.storage, device))

    def inputs_of(self, batch: int, tokens: Tensor | None, later: Tensor) -> Tensor:
        """Dense inputs of the tokens that the rows of `later` [tokens, in] are of; those not seen are taken from it."""
        kept = self.kept[batch].to(later.device, non_blocking=True).float()
        if tokens is None:
            return kept
        before = self.tokens[batch].to(later.device)
        if not before.numel():
            return later
        place = torch.searchsorted(before, tokens).clamp_max(before.numel() - 1)
        return torch.where((before[place] == tokens)[:, None], kept[place], later)


def record_dense(
    activations: LayerActivations,
    groups: Sequence[Group],
    hidden_states: Sequence[Tensor],
    with_gram: Sequence[bool],
) -> tuple[ActivationStore, list[DenseRecord], list[GramAccumulator | None]]:
    """Run the dense layer once on every batch.

    Args:
        activations: The decoder layer, still dense.
        groups: Its groups of operators.
        hidden_states: Dense inputs of the layer, a batch each.
        with_gram: By group: True accumulates the Gram matrix of the dense inputs, False records the
            activations for a cross-Gram against later inputs.

    Returns:
        Dense outputs of the layer, records by group, and Gram matrices by group (`None` without).
    """
    device = next(activations.layer.parameters()).device
    records = [DenseRecord.of(group, activations) for group in groups]
    grams = [GramAccumulator(g[0].shape[1], device) if w else None for g, w in zip(groups, with_gram, strict=True)]
    batch = 0
    outputs: dict[str, Tensor] = {}

    def see_input(index: int, inputs: Tensor) -> None:
        operator = groups[index][0]
        rows = activations.rows(inputs, batch, operator)
        gram = grams[index]
        if gram is not None:
            gram.add(rows.float())
        elif not records[index].narrow:
            store = records[index].kept
            assert isinstance(store, ActivationStore)
            store.append(rows, copy=True)  # the layer may overwrite it
            tokens = activations.tokens(batch, operator)
            if tokens is not None:
                records[index].tokens.append(tokens.cpu())

    def see_output(index: int, operator: LinearOperator, output: Tensor) -> None:
        if grams[index] is None and operator.tokens is None:
            rows = operator.outputs_without_bias(activations.rows(output, batch, operator))
            if records[index].narrow:
                outputs[operator.name] = rows.to(output.dtype, copy=True)  # Falcon adds to it in place
            energies = records[index].energies
            squares = rows.float().square().sum(0).double()
            energies[operator.name] = energies[operator.name] + squares if operator.name in energies else squares

    watch_inputs = {g[0].module: (lambda x, i=i: see_input(i, x)) for i, g in enumerate(groups)}
    watch_outputs = {o.module: (lambda y, i=i, o=o: see_output(i, o, y)) for i, g in enumerate(groups) for o in g}
    dense_outputs = activations.store()
    with watching(watch_inputs, watch_outputs):
        for batch, (hidden, call) in enumerate(zip(hidden_states, activations.calls, strict=True)):  # noqa: B007, read by the callbacks
            output = call.run(activations.layer, hidden.to(device, non_blocking=True))
            assert output is not None
            dense_outputs.append(output)
            for index, record in enumerate(records):
                if record.narrow and grams[index] is None:
                    side_by_side = torch.cat([outputs[o.name] for o in groups[index]], dim=1)
                    record.kept.append(side_by_side)
            outputs.clear()
    return dense_outputs, records, grams


def problems_same_input(group: Group, gram: GramAccumulator) -> list[LayerProblem]:
    """Layer problems with X* = X: the target is `W G`."""
    statistics = checked_statistics(group, gram)
    return [LayerProblem(operator.read(), statistics, name=operator.name) for operator in group]


def problems_corrected(
    activations: LayerActivations,
    group: Group,
    record: DenseRecord,
    inputs: Iterable[Tensor],
    dense_share: float,
) -> list[LayerProblem]:
    """Layer problems whose inputs X* come from the layer as it is pruned so far.

    The target outputs are `W (a X + (1 - a) X*)`, a = `dense_share`: 1 aims at the dense network's outputs.

    Args:
        activations: The decoder layer, its earlier groups already pruned.
        group: Operators that share an input and are still dense.
        record: What the dense network showed of the group; used up, and not read when `dense_share` is 0.
        inputs: X* of the group [batch, sequence, in], a batch each.
        dense_share: In [0, 1].
    """
    device = group[0].parameter.device
    size = group[0].shape[1]
    gram = GramAccumulator(size, device)
    width = sum(operator.shape[0] for operator in group) if record.narrow else size
    cross = torch.zeros(width, size, device=device) if dense_share else None
    weights = [] if group[0].tokens is None else [operator.read() for operator in group]
    for batch, activation in enumerate(inputs):
        rows = activations.rows(activation, batch, group[0]).float()
        gram.add(rows)
        if cross is not None:
            tokens = activations.tokens(batch, group[0])
            kept = record.inputs_of(batch, tokens, rows)
            cross.addmm_(kept.T, rows)
            if tokens is not None:
                for operator, weight in zip(group, weights, strict=True):
                    squares = (kept @ weight.T).square().sum(0).double()
                    record.energies[operator.name] = record.energies.get(operator.name, 0) + squares
    record.kept.clear()
    statistics = checked_statistics(group, gram)
    problems, row = [], 0
    for index, operator in enumerate(group):
        weight = weights[index] if weights else operator.read()
        if cross is None:
            problems.append(LayerProblem(weight, statistics, name=operator.name))
            continue
        target = cross[row : row + weight.shape[0]] if record.narrow else weight @ cross
        row += weight.shape[0]
        energies = record.energies[operator.name]
        problems.append(_mixed(weight, statistics, target, energies, dense_share, operator.name))
    return problems


def _mixed(
    weight: Tensor, statistics: InputStatistics, target: Tensor, energies: Tensor, share: float, name: str
) -> LayerProblem:
    """The problem of target outputs `W (a X + (1 - a) X*)` from `W X X*^T` and the squared norms of the rows of W X."""
    if share == 1:
        return LayerProblem(weight, statistics, target, energies, name)
    mixed, remade = inner_by_rows(weight, target), torch.empty_like(energies)
    for rows in row_blocks(weight):
        same = weight[rows] @ statistics.gram
        remade[rows] = inner_by_rows(weight[rows], same)
        target[rows].mul_(share).add_(same, alpha=1 - share)
    energies = share**2 * energies + 2 * share * (1 - share) * mixed + (1 - share) ** 2 * remade
    return LayerProblem(weight, statistics, target, energies, name, same_energies=remade)


def checked_statistics(group: Group, gram: GramAccumulator) -> InputStatistics:
    """The finished statistics of a group's inputs.

    Raises:
        ValueError: If they hold NaN or Inf.
    """
    statistics = gram.finish()
    if not all(bool(torch.isfinite(extreme)) for extreme in statistics.gram.aminmax()):
        raise ValueError(
            f"the inputs of {group[0].name} hold NaN or Inf (or overflow when squared in float32): the model is "
            "damaged there, or its activations overflow its dtype; try dtype=torch.float32 or torch.bfloat16."
        )
    return statistics

"""From the activations of one decoder layer to the layer problems of its operators."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from optimum_fista.model.activation_store import ActivationStore, Storage
from optimum_fista.model.gram import GramAccumulator
from optimum_fista.model.layer_sums import Group, LayerSums, add_energies, checked_statistics
from optimum_fista.model.offload import execution_device
from optimum_fista.model.operator import LinearOperator
from optimum_fista.model.replay import LayerCall, watching
from optimum_fista.solve.problem import LayerProblem


@dataclass
class LayerActivations:
    """One decoder layer with everything needed to run it on the calibration tokens.

    Attributes:
        layer: The decoder layer.
        calls: Its arguments besides the hidden states, a batch each.
        token_masks: bool [batch, sequence] or `None`, a batch each; False tokens count nowhere.
        storage: Where hidden states and recorded activations are kept between passes: a device, or a folder for
            memory-mapped files.
        held_out: Whether a batch is held out, a batch each; empty: none is.
        device: Where the layer computes.
    """

    layer: nn.Module
    calls: Sequence[LayerCall]
    token_masks: Sequence[Tensor | None]
    storage: Storage
    held_out: Sequence[bool] = ()
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        """Find the real tokens once, on the layer's device: picking rows by a mask makes the host wait each time."""
        self.device = execution_device(self.layer)
        self.token_masks = [None if mask is None else mask.to(self.device) for mask in self.token_masks]
        self._real = [None if mask is None else mask.reshape(-1).nonzero()[:, 0] for mask in self.token_masks]

    def is_held_out(self, batch: int) -> bool:
        """Whether nothing is fitted to a batch."""
        return bool(self.held_out) and self.held_out[batch]

    def store(self) -> ActivationStore:
        """An empty list of activations that are kept at `storage` and needed on the layer's device."""
        return ActivationStore(self.storage, self.device)

    def real_tokens(self, hidden_states: Tensor, batch: int) -> Tensor:
        """Real tokens of hidden states [batch, sequence, n] as [tokens, n]."""
        flat, real = hidden_states.reshape(-1, hidden_states.shape[-1]), self._real[batch]
        return flat if real is None else flat[real]

    def rows(self, activations: Tensor, batch: int, operator: LinearOperator) -> Tensor:
        """Real tokens of an operator's activation [batch, sequence, n] or [batch * sequence, n] as [tokens, n]."""
        flat = activations.detach().reshape(-1, activations.shape[-1])
        mask = self.token_masks[batch]
        if mask is None:
            return flat
        seen = mask.numel() if operator.tokens is None else operator.tokens.numel()
        if flat.shape[0] != seen:
            raise ValueError(
                f"{operator.name} sees {flat.shape[0]} rows for {seen} tokens, so padding can't be told apart: "
                f"pass batches without padding, or exclude=['{operator.name}']."
            )
        return self.real_tokens(flat, batch) if operator.tokens is None else flat[mask.reshape(-1)[operator.tokens]]

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
        held_out_energies: The same over held-out tokens.
        held_out: Sums over held-out tokens; `None` without any, and before the inputs X* have been seen.
    """

    narrow: bool
    kept: list[Tensor] | ActivationStore = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    energies: dict[str, Tensor] = field(default_factory=dict)
    held_out_energies: dict[str, Tensor] = field(default_factory=dict)
    held_out: LayerSums | None = None

    @classmethod
    def of(cls, group: Group, activations: LayerActivations) -> DenseRecord:
        """An empty record in the smaller form; experts, many and small, keep inputs, and no files of their own."""
        if group[0].tokens is None:
            return cls(sum(o.shape[0] for o in group) < group[0].shape[1], activations.store())
        in_files = isinstance(activations.storage, Path)
        storage = torch.device("cpu") if in_files else activations.storage
        return cls(False, ActivationStore(storage, activations.device))

    def begin_sums(self, activations: LayerActivations, group: Group, *, narrow: bool, dense_share: float) -> LayerSums:
        """Sums over the tokens that problems are made from, and beside them `held_out` where tokens are held out."""
        size, device = group[0].shape[1], group[0].parameter.device
        make = partial(LayerSums, size, device, narrow=narrow, dense_share=dense_share)
        if any(activations.held_out):
            self.held_out = make(energies=self.held_out_energies)
        return make(energies=self.energies)

    def take_held_out(self) -> LayerSums | None:
        """The sums over held-out tokens, which are kept here no longer."""
        sums, self.held_out = self.held_out, None
        return sums

    def inputs_of(self, batch: int, tokens: Tensor | None, later: Tensor) -> Tensor:
        """Dense inputs of the tokens that the rows of `later` [tokens, in] are of; those not seen are taken from it."""
        kept = self.kept[batch].to(later.device, non_blocking=True).float()
        if tokens is None:
            return kept
        before = self.tokens[batch]
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
        with_gram: By group: True accumulates the Gram matrix of the dense inputs (in the record where tokens are held
            out), False records the activations for a cross-Gram against later inputs.

    Returns:
        Dense outputs of the layer, records by group, and Gram matrices by group (`None` without).
    """
    device = activations.device
    records = [DenseRecord.of(group, activations) for group in groups]
    grams = [GramAccumulator(g[0].shape[1], device) if w else None for g, w in zip(groups, with_gram, strict=True)]
    for group, record, gram in zip(groups, records, grams, strict=True):
        if gram is not None and any(activations.held_out):
            record.held_out = LayerSums(group[0].shape[1], device)
    batch = 0
    outputs: dict[str, Tensor] = {}

    def see_input(index: int, inputs: Tensor) -> None:
        operator = groups[index][0]
        rows = activations.rows(inputs, batch, operator)
        gram = grams[index]
        if gram is not None:
            held_out = records[index].held_out if activations.is_held_out(batch) else None
            (gram if held_out is None else held_out).add(rows.float())
        elif not records[index].narrow:
            store = records[index].kept
            assert isinstance(store, ActivationStore)
            store.append(rows, copy=True)  # the layer may overwrite it
            tokens = activations.tokens(batch, operator)
            if tokens is not None:
                records[index].tokens.append(tokens)

    def see_output(index: int, operator: LinearOperator, output: Tensor) -> None:
        if grams[index] is None and operator.tokens is None:
            rows = operator.outputs_without_bias(activations.rows(output, batch, operator))
            if records[index].narrow:
                outputs[operator.name] = rows.to(output.dtype, copy=True)  # Falcon adds to it in place
            record = records[index]
            energies = record.held_out_energies if activations.is_held_out(batch) else record.energies
            add_energies(energies, operator.name, rows.float())

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
        record: What the dense network showed of the group; used up, and not read when `dense_share` is 0. It gets the
            sums over held-out tokens.
        inputs: X* of the group [batch, sequence, in], a batch each.
        dense_share: In [0, 1].
    """
    sums = record.begin_sums(activations, group, narrow=record.narrow, dense_share=dense_share)
    weights = [] if group[0].tokens is None else [operator.read() for operator in group]
    for batch, activation in enumerate(inputs):
        into = record.held_out if activations.is_held_out(batch) else sums
        assert into is not None
        rows, kept = activations.rows(activation, batch, group[0]).float(), None
        if dense_share:
            tokens = activations.tokens(batch, group[0])
            kept = record.inputs_of(batch, tokens, rows)
            if tokens is not None:
                for operator, weight in zip(group, weights, strict=True):
                    add_energies(into.energies, operator.name, kept @ weight.T)
        into.add(rows, kept)
    record.kept.clear()
    return list(sums.problems(group, weights or [operator.read() for operator in group]))

"""What is kept of the operators of a group in the dense network: enough to make their layer problems later.

Letters in comments: `W` is the dense weight of an operator [out, in], `X` its inputs in the dense network, `X*` in the
network as pruned so far. Tokens are rows of tensors here, [tokens, in].
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optimum_fista.model.activations import ActivationStore
from optimum_fista.model.experts import ExpertOperator
from optimum_fista.model.gram import GroupSums
from optimum_fista.model.hooks import operator_input
from optimum_fista.model.inputs import LayerActivations
from optimum_fista.model.operators import Group, LinearOperator


class DenseRecord:
    """Activations of one group in the dense network: enough to form `W X X*^T` with any later `X*`.

    With `is_dense_input`, `X* = X`, so everything is summed in the dense pass. `needs_dense` is that of the
    `Correction`. Hooks of the dense pass call `see_input` and `see_output`; later passes call `add` or `add_expert`.

    Attributes:
        group: The operators.
        batch: The number of the batch that runs in the dense pass; the caller sets it.
        sums_to_fit: Sums over the tokens to fit.
        held_out_sums: Sums over held-out tokens; `None` if no batch is held out.
        inputs: `X` [tokens, in] by batch, in the model's dtype, or `None`.
        outputs: Or `W X` of all operators side by side, [tokens, out] by batch, if these are smaller.
    """

    def __init__(
        self,
        group: Group,
        activations: LayerActivations,
        *,
        is_dense_input: bool,
        needs_dense: bool,
    ) -> None:
        """Begin empty, and decide what is kept: inputs `X`, outputs `W X`, or only sums.

        `is_dense_input` says that `X* = X`: everything is summed in the dense pass. Without `needs_dense`, targets need
        nothing of the dense network. In both cases only sums are kept. `activations` runs the decoder layer, and is not
        changed. If its `storage` is a folder, a file without a name is made there for what is kept.
        """
        self.group = group
        self.batch = 0  # the number of the batch that runs in the dense pass; the caller sets it
        self._activations = activations
        self._is_dense_input = is_dense_input
        size = group[0].shape[1]
        self.sums_to_fit = GroupSums(size, activations.device, same_inputs=is_dense_input)
        self.held_out_sums: GroupSums | None = None
        if any(activations.held_out):
            self.held_out_sums = GroupSums(size, activations.device, same_inputs=is_dense_input)
        self.inputs: ActivationStore | None = None
        self.outputs: ActivationStore | None = None
        self._tokens: list[Tensor] = []  # of an expert: which tokens are the rows of X, by batch
        self._side_by_side: list[Tensor] = []  # outputs of the batch that runs
        if is_dense_input or not needs_dense:
            return  # only sums are kept

        num_outputs = sum(operator.shape[0] for operator in group)
        if self._is_expert:  # by the class of the operators
            # Experts are many and small: their inputs are kept, and not in files.
            is_in_files = isinstance(activations.storage, Path)
            storage = torch.device("cpu") if is_in_files else activations.storage
            self.inputs = ActivationStore(storage, activations.device)
        elif num_outputs < size:  # keep what is smaller: outputs of all operators, or their inputs
            self.outputs = activations.store()
        else:
            self.inputs = activations.store()

    @property
    def _is_expert(self) -> bool:
        """Whether the operators are of an expert, which gets only some tokens."""
        return isinstance(self.group[0], ExpertOperator)

    def sums_of(self, batch: int) -> GroupSums:
        """Return the sums to which the batch with this number is added: those of held-out batches or of the others."""
        if self._activations.held_out[batch]:
            assert self.held_out_sums is not None
            return self.held_out_sums
        return self.sums_to_fit

    def see_input(self, _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Record the dense inputs of the group; a forward pre-hook of its first operator.

        If `X* = X` (`self._is_dense_input`), the inputs are added to the sums. Otherwise they are appended to the store
        `self.inputs`, if inputs are kept. The batch that runs is number `self.batch`.
        """
        inputs = operator_input(arguments, keywords)
        tokens = arguments[1] if self._is_expert else None  # as `ExpertLinear` is called
        rows = self._activations.rows(inputs, self.batch, self.group[0], tokens)
        if self._is_dense_input:
            self.sums_of(self.batch).add(rows)
        elif self.inputs is not None:
            self.inputs.append(rows, copy=True)  # a copy, because the layer may overwrite them
            if tokens is not None:
                self._tokens.append(self._real_tokens(tokens, self.batch))

    def see_output(
        self, operator: LinearOperator, _: nn.Module, __: object, output: Tensor
    ) -> None:
        """Record the dense outputs of one operator, as its forward hook; those of a group come in its order.

        Their energies are added to the sums. If outputs are kept (`self.outputs`), they wait in `self._side_by_side`,
        and are appended to the store when the last operator of the group has run. `self.batch` is the number of the
        batch that runs.
        """
        if self._is_dense_input or self._is_expert:
            # With dense inputs, outputs are known from the Gram matrix. For an expert, `add_expert` computes them.
            return
        products = self._activations.rows(output, self.batch, operator)  # without padding
        products = operator.outputs_without_bias(products)  # W X
        self.sums_of(self.batch).add_energies(operator.name, products)
        if self.outputs is not None:
            # a copy, because the layer may add to the output in place (Falcon)
            self._side_by_side.append(products.to(output.dtype, copy=True))
            if operator is self.group[-1]:
                self.outputs.append(torch.cat(self._side_by_side, dim=1))
                self._side_by_side.clear()

    def add(self, batch: int, inputs: Tensor) -> None:
        """Add the inputs `X*` [batch, sequence, in] of a batch, and the dense network's record of it, to the sums.

        `batch` is the number of the batch. The record is `self.outputs` or `self.inputs`, or nothing if targets do not
        need it.
        """
        sums = self.sums_of(batch)
        rows = self._activations.rows(inputs, batch, self.group[0])
        if self.outputs is not None:
            dense_outputs = self.outputs[batch].to(rows.device, non_blocking=True)
            sums.add(rows, "outputs", dense_outputs)
        elif self.inputs is not None:
            dense_inputs = self.inputs[batch].to(rows.device, non_blocking=True)
            sums.add(rows, "inputs", dense_inputs)
        else:
            sums.add(rows)

    def add_expert(
        self, batch: int, inputs: Tensor, tokens: Tensor, dense_weights: Sequence[Tensor]
    ) -> None:
        """Add the inputs `X*` [tokens, in] of an expert in a batch, and the dense record of it, to the sums.

        `batch` is the number of the batch. `tokens`, int64, are the tokens of the rows, and `dense_weights` [out, in]
        the weights of the group's operators. The dense pass has kept `self.inputs`, if targets need them, and which
        tokens these were (`self._tokens`).
        """
        sums = self.sums_of(batch)
        rows = self._activations.rows(inputs, batch, self.group[0], tokens)
        if self.inputs is None:
            sums.add(rows)
            return
        # In the dense network other tokens may have reached the expert. A token without a dense input gets `X*`.
        dense_inputs = _rows_of(
            self._real_tokens(tokens, batch),
            recorded=self.inputs[batch].to(rows.device, non_blocking=True),
            recorded_tokens=self._tokens[batch],
            others=rows,
        )
        for expert, weight in zip(self.group, dense_weights, strict=True):
            sums.add_energies(expert.name, dense_inputs.float() @ weight.T)
        sums.add(rows, "inputs", dense_inputs)

    def _real_tokens(self, tokens: Tensor, batch: int) -> Tensor:
        """Those of the `tokens` of an expert that are not padding."""
        return self._activations.rows(tokens[:, None], batch, self.group[0], tokens)[:, 0]


def _rows_of(tokens: Tensor, recorded: Tensor, recorded_tokens: Tensor, others: Tensor) -> Tensor:
    """Select a row [in] for each token: the recorded one, or if there is none, the one of `others`.

    `recorded` [recorded tokens, in] belongs to `recorded_tokens`, and `others` [tokens, in] to `tokens`. Both lists of
    tokens are rising.
    """
    if not recorded_tokens.numel():
        return others
    # Of each token, the row in which it is if it was recorded. A token after all recorded ones would be out of range:
    # it gets the last row, and is compared with that.
    rows = torch.searchsorted(recorded_tokens, tokens).clamp_max_(recorded_tokens.numel() - 1)
    is_recorded = recorded_tokens.index_select(0, rows) == tokens
    return torch.where(is_recorded[:, None], recorded.index_select(0, rows), others)

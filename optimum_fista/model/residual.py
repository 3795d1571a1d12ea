"""The last operator of a decoder layer, whose output is added to the layer's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from optimum_fista.model.activation_store import ActivationStore
from optimum_fista.model.activations import LayerActivations
from optimum_fista.model.forward import run_module, watching
from optimum_fista.model.operator import LinearOperator
from optimum_fista.solve.problem import relative

_ROUNDED = 0.5
"""Largest mean error of a rounded sum, in units of its last place; layers of 172 families that add show at most .29."""


def is_added_to_output(activations: LayerActivations, module: nn.Module, hidden_states: Tensor) -> bool:
    """Whether the decoder layer's output is something plus the output of one of its modules, tried on one batch.

    Its own output may be smaller than a rounding error of the layer's in half precision, so an output as large as the
    rest takes its place: a wave, because a norm may leave a constant as it is. Some layers add to it in place.
    """
    seen: list[Tensor] = []

    def run(replace: Callable[[Tensor], Tensor]) -> Tensor:
        with module.register_forward_hook(lambda _, __, output: replace(output)):
            return activations.calls[0].run(activations.layer, hidden_states.to(activations.device)).float()

    with watching({}, {module: seen.append}):
        rest = run(torch.zeros_like)  # D
    if len(seen) != 1 or seen[0].numel() != rest.numel():
        return False
    # As large as the rest at every token: beside one of huge activations the answers of others to a wave of its size
    # would be lost in rounding.
    wave = torch.arange(rest.numel(), device=rest.device).float().sin_().view(rest.shape)
    wave = wave.mul_(rest.abs().amax(-1, keepdim=True)).to(seen[0].dtype)
    # D + wave - D - wave; a clone, because the layer may add to its own output in place
    error = run(lambda output: wave.view(output.shape).clone()) - rest - wave.float()
    sizes = torch.linalg.vector_norm(wave.float(), dim=-1) + torch.linalg.vector_norm(rest, dim=-1)
    errors = torch.linalg.vector_norm(error, dim=-1) / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)
    return bool(errors.mean() <= _ROUNDED * torch.finfo(wave.dtype).eps)


class LastOperator:
    """The last operator of a decoder layer: what it gets, and what its pruned outputs are added to.

    `energies` are squared norms of the rows of `W X`, [out], float64, and the same over held-out tokens if any are.

    Attributes:
        inputs: `X*`, a batch each; to be filled.
        rest: `D*`, a batch each; to be filled. `None` if the layer's output hidden states are not `carried` on.
        dense: The outputs `W X` [tokens, out] in the dense network, a batch each; to be filled if they were not given.
    """

    def __init__(
        self,
        operator: LinearOperator,
        activations: LayerActivations,
        dense: ActivationStore | None,
        energies: Sequence[Tensor],
        *,
        carried: bool,
    ) -> None:
        self.inputs = activations.store()
        self.rest = activations.store() if carried else None
        self.dense = activations.store() if dense is None else dense
        self._operator = operator
        self._activations = activations
        self._energies = energies

    def output_error(self, *, held_out: bool) -> float:
        """`|| W* X* - W X ||_F / || W X ||_F` of its pruned outputs."""
        squares, energy = torch.stack([self.results[0][held_out], self._energies[held_out].sum()]).tolist()
        return relative(squares, energy)

    @cached_property  # the errors are asked for first, the layer's outputs afterwards: no batch runs twice
    def results(self) -> tuple[dict[bool, Tensor], ActivationStore | None]:
        """Squared errors of its pruned outputs, of held-out batches and of others, and hidden states after the layer.

        The operator runs with the weights that it has when this is asked for first.
        """
        activations, operator = self._activations, self._operator
        squares = {kind: torch.zeros((), dtype=torch.float64, device=activations.device) for kind in (False, True)}
        outputs = None if self.rest is None else activations.store()
        for batch, inputs in enumerate(self.inputs):
            output = run_module(operator.module, inputs)
            if outputs is not None and self.rest is not None:
                rest = self.rest[batch]
                outputs.append(rest + output.view(rest.shape))
            found = operator.outputs_without_bias(activations.rows(output, batch, operator))
            difference = found - self.dense[batch].to(found.device).float()
            squares[activations.held_out[batch]] += difference.square().sum(1).double().sum()
        return squares, outputs

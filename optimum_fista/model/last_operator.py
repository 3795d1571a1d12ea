"""The last operator of a decoder layer, which may compensate for the errors of all operators before it.

It can do so if the layer returns the rest of its output plus the output of this operator (`is_added_to_output`). The
residual correction (`correction.Correction`) then fits the operator to targets that are made from the rest.
`LastOperator` keeps what the layer's last pass has shown, so that only the operator itself runs after its pruning.

Letters in comments: `W` is the dense weight of the operator [out, in], `W*` the pruned one, `X` its inputs in the dense
network, `X*` in the pruned one, `D` and `D*` the rest of the layer's output in the two networks.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from optimum_fista.model.activations import ActivationStore
from optimum_fista.model.inputs import LayerActivations
from optimum_fista.model.operators import LinearOperator
from optimum_fista.model.precision import quick_products
from optimum_fista.solve.problem import relative_norm

_ROUNDED = 0.5
"""Largest mean error of a rounded sum, in units of its last place; layers of 172 families that add show at most .29."""


@dataclass
class LastOperator:
    """The last operator of a decoder layer, with what the layer's last pass before its pruning has shown.

    Attributes:
        operator: The operator.
        activations: Runs the decoder layer.
        inputs: `X*` by batch, as the operator was called with.
        rest: `D*` by batch; `None` if the hidden states after the layer are not needed.
        dense_outputs: `W X` by batch, [tokens, out].
        energy: `|| W X ||_F^2` over the tokens to fit, float64.
        held_out_energy: The same over held-out tokens; 0 if there are none.
        squared_error: `|| W* X* - W X ||_F^2` over the tokens to fit, float64; 0 before `run_pruned`.
        held_out_squared_error: The same over held-out tokens.
        hidden_states: After the layer, by batch; `None` if nothing needs these, and before `run_pruned`.
    """

    operator: LinearOperator
    activations: LayerActivations
    inputs: ActivationStore
    rest: ActivationStore | None
    dense_outputs: ActivationStore
    energy: Tensor
    held_out_energy: Tensor
    squared_error: Tensor = field(init=False)
    held_out_squared_error: Tensor = field(init=False)
    hidden_states: ActivationStore | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Begin with errors of 0."""
        self.squared_error = torch.zeros_like(self.energy)
        self.held_out_squared_error = torch.zeros_like(self.energy)

    def run_pruned(self) -> None:
        """Run the operator once on all batches, with the weights that it has now.

        Sets `self.hidden_states`, if the rest of the layer's output is kept, and adds to the squared errors.
        """
        if self.rest is not None:
            self.hidden_states = self.activations.store()
        for batch, inputs in enumerate(self.inputs):
            with quick_products():  # in the precision that the run has chosen
                output = self.operator.module(inputs)
            if self.rest is not None and self.hidden_states is not None:
                rest = self.rest[batch]
                self.hidden_states.append(rest + output.view(rest.shape))

            # without padding; an error that names the operator if there is not a row for every token
            output = self.activations.rows(output, batch, self.operator)
            product = self.operator.outputs_without_bias(output)  # W* X*
            difference = product - self.dense_outputs[batch].to(product.device).float()
            squared_error = difference.square().sum(1).double().sum()
            if self.activations.held_out[batch]:
                self.held_out_squared_error += squared_error
            else:
                self.squared_error += squared_error

    def output_error(self, *, held_out: bool) -> float:
        """`|| W* X* - W X ||_F / || W X ||_F` after `run_pruned`, over held-out tokens or over the tokens to fit."""
        squared_error = self.held_out_squared_error if held_out else self.squared_error
        energy = self.held_out_energy if held_out else self.energy
        # both numbers in one transfer from the device
        square_of_error, square_of_output = torch.stack([squared_error, energy]).tolist()
        return relative_norm(square_of_error, square_of_output)


def is_added_to_output(
    activations: LayerActivations, module: nn.Module, hidden_states: Tensor
) -> bool:
    """Tell whether the decoder layer's output is something plus the output of one of its modules, on one batch.

    `activations` is the layer with its recorded arguments. `module` is the last operator of the layer, or its mixture
    of experts. `hidden_states` [batch, sequence, hidden] are those of the first batch.

    The layer runs twice. First zeros take the place of the module's output: what the layer returns then is the rest D.
    Then a wave takes its place, and the layer must return D plus the wave. The module's own output would not do: it may
    be smaller than a rounding error of D in half precision. The wave is as large as D. A constant would not do either,
    because a norm may leave it as it is.

    A hook is on the module while the layer runs; nothing else is changed.
    """
    call = activations.calls[0]
    hidden_states = hidden_states.to(activations.device)
    outputs: list[Tensor] = []  # of the module
    with module.register_forward_hook(partial(_replace_by_zeros, outputs)):
        rest = call.run(activations.layer, hidden_states).float()  # D
    is_called_once = len(outputs) == 1
    if not is_called_once or outputs[0].numel() != rest.numel():
        return False

    # At every token the wave is as large as the rest is there. Some tokens have huge activations: a wave of one size
    # for all tokens would be lost in their rounding, or drown the others.
    sizes = rest.abs().amax(-1, keepdim=True)
    wave = torch.arange(rest.numel(), device=rest.device).float().sin_()
    wave = wave.view(rest.shape).mul_(sizes).to(outputs[0].dtype)
    with module.register_forward_hook(partial(_replace_by_wave, wave)):
        # (D + wave) - D - wave
        error = call.run(activations.layer, hidden_states).float() - rest - wave.float()

    # relative errors of the tokens; a token of zeros has the error 0, not NaN
    norms = torch.linalg.vector_norm(wave.float(), dim=-1) + torch.linalg.vector_norm(rest, dim=-1)
    least_norm = torch.finfo(norms.dtype).tiny
    errors = torch.linalg.vector_norm(error, dim=-1) / norms.clamp_min(least_norm)
    rounding = torch.finfo(wave.dtype).eps
    return bool(errors.mean() <= _ROUNDED * rounding)


def _replace_by_zeros(outputs: list[Tensor], _: nn.Module, __: object, output: Tensor) -> Tensor:
    """Append the output of a module to `outputs`, and replace it by zeros; a forward hook."""
    outputs.append(output)
    return torch.zeros_like(output)


def _replace_by_wave(wave: Tensor, _: nn.Module, __: object, output: Tensor) -> Tensor:
    """Replace the output of a module by a wave with as many numbers; a forward hook."""
    # a clone, because some layers add to it in place
    return wave.view(output.shape).clone()

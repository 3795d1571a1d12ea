"""Residual correction: the last operator of a decoder layer makes up for what the layer's residual stream lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_fista.model.activation_store import ActivationStore
from optimum_fista.model.layer_sums import add_energies
from optimum_fista.model.operator import LinearOperator
from optimum_fista.model.paused import PausedForwards
from optimum_fista.model.replay import watching
from optimum_fista.model.statistics import DenseRecord, LayerActivations
from optimum_fista.solve.problem import LayerProblem

_ROUNDED = 0.5
"""Largest error of a rounded sum, in units of its last place; layers of 172 families that add show at most .32."""


def is_added_to_output(activations: LayerActivations, operator: LinearOperator, hidden_states: Tensor) -> bool:
    """Whether the decoder layer's output is something plus this operator's output, tried on one batch.

    Its own output may be smaller than a rounding error of the layer's in half precision, so an output as large as the
    rest takes its place: a wave, because a norm may leave a constant as it is. Some layers add to it in place.
    """
    if operator.tokens is not None:
        return False
    seen: list[Tensor] = []

    def run(replace: Callable[[Tensor], Tensor]) -> Tensor:
        def hook(_: object, __: object, output: Tensor) -> Tensor:
            seen.append(output)
            return replace(output)

        with operator.module.register_forward_hook(hook):
            output = activations.calls[0].run(activations.layer, hidden_states.to(activations.device))
        assert output is not None
        return output.float()

    rest = run(torch.zeros_like)
    if len(seen) != 1 or seen[0].numel() != rest.numel():
        return False
    wave = torch.arange(rest.numel(), device=rest.device).float().sin_().view(seen[0].shape)
    wave = wave.mul_(rest.abs().max()).to(seen[0].dtype)
    error = run(lambda _: wave.clone()) - rest - wave.float().view(rest.shape)
    size = torch.linalg.vector_norm(wave.float()) + torch.linalg.vector_norm(rest)
    return bool(torch.linalg.vector_norm(error) <= _ROUNDED * torch.finfo(wave.dtype).eps * size)


@dataclass
class ResidualProblem:
    """The layer problem of a decoder layer's last operator, and what its pruned weights will be added to.

    Attributes:
        problem: Its target outputs are `W (a X + (1 - a) X*) - b (D* - D)`, `D` and `D*` the rest of the decoder
            layer's output in the dense and in the pruned network: `b = 1` aims at the dense layer's output.
        rest: `D*` [batch, sequence, hidden], a batch each.
        inputs: `X*` [batch, sequence, in], a batch each.
    """

    problem: LayerProblem
    rest: ActivationStore
    inputs: ActivationStore

    def outputs(self, activations: LayerActivations, operator: LinearOperator) -> ActivationStore:
        """Output hidden states of the decoder layer with the operator's weights as they are now, a batch each."""
        outputs = activations.store()
        for rest, x in zip(self.rest, self.inputs, strict=True):
            outputs.append(rest + operator.module(x).view(rest.shape))
        return outputs


def residual_problem(
    activations: LayerActivations,
    operator: LinearOperator,
    record: DenseRecord,
    dense_outputs: Sequence[Tensor],
    forwards: PausedForwards,
    stop: int,
    *,
    dense_share: float,
    residual_share: float,
    keep: bool,
) -> ResidualProblem:
    """Form the problem of the last operator; every batch runs to the end of the layer with its dense weights.

    Args:
        activations: The decoder layer, all other groups pruned.
        operator: Its last operator, still dense.
        record: What the dense network showed of the operator; used up. It gets the sums over held-out tokens.
        dense_outputs: Output hidden states of the dense layer, a batch each.
        forwards: Passes paused in front of the operator or before.
        stop: The operator's index among the stops.
        dense_share: `a` above.
        residual_share: `b` above.
        keep: Whether the outputs of the pruned layer will be asked for.
    """
    device = operator.parameter.device
    record.energies, record.held_out_energies = {}, {}  # of the dense outputs, which are no longer the target
    sums = record.begin_sums(activations, [operator], narrow=True, dense_share=1.0)
    kept_rest, kept_inputs = activations.store(), activations.store()
    weight = operator.read()
    put_out: list[Tensor] = []  # by the operator, in the pass that runs to the end
    with watching({}, {operator.module: lambda output: put_out.append(output.clone())}):
        for batch, inputs in enumerate(forwards.inputs(stop)):
            output = forwards.output(batch)
            own = put_out.pop().view(output.shape)
            same = operator.outputs_without_bias(activations.rows(own, batch, operator))
            kept = record.kept[batch].to(device).float()
            kept = kept if record.narrow else kept @ weight.T
            drift = activations.rows(output - dense_outputs[batch].to(device), batch, operator).float() - same + kept
            wanted = same.mul(1 - dense_share).add_(kept, alpha=dense_share).sub_(drift, alpha=residual_share)
            into = record.held_out if activations.is_held_out(batch) else sums
            assert into is not None
            into.add(activations.rows(inputs, batch, operator).float(), wanted)
            add_energies(into.energies, operator.name, wanted)
            if keep:
                kept_inputs.append(inputs)
                kept_rest.append(output - own)
    record.kept.clear()
    (problem,) = sums.problems([operator], [weight])
    return ResidualProblem(problem, kept_rest, kept_inputs)

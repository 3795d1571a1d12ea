"""Whether an operator's output is added to the output of its decoder layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from optimum_fista.model.activations import LayerActivations
from optimum_fista.model.operator import LinearOperator

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

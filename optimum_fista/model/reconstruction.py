"""Reconstruction of a decoder layer: its kept weights, trained together on what the dense network returns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optimum_fista.model.activation_store import ActivationStore
from optimum_fista.model.activations import LayerActivations
from optimum_fista.model.operator import LinearOperator
from optimum_fista.model.products import quick_products

_WARM_UP = 0.1  # share of the steps
_TINY = 1e-30  # hidden states of zero would divide by zero


@dataclass(frozen=True)
class Reconstruction:
    """A decoder layer before and after its kept weights were trained.

    Attributes:
        error_before: `sqrt(mean over tokens of || h* - h ||^2 / || h ||^2)` of its output hidden states before: `h`
            those wanted, `h*` its own.
        error: The same with the weights that it has now: never more.
        outputs: Its output hidden states now, a batch each; `None` if the trained weights were worse or not finite,
            and the layer has its old weights again.
        held_out_error_before: `error_before` on held-out tokens; `None` if there are none.
        held_out_error: `error` on held-out tokens.
    """

    error_before: float
    error: float
    outputs: ActivationStore | None
    held_out_error_before: float | None
    held_out_error: float | None


@quick_products()
def reconstruct(
    activations: LayerActivations,
    operators: Sequence[LinearOperator],
    masks: Mapping[str, Tensor],
    entering: Sequence[Tensor],
    wanted: Sequence[Tensor],
    outputs: Sequence[Tensor] | None = None,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
) -> Reconstruction:
    """Train the kept weights of a pruned decoder layer on its output hidden states, in place.

    It minimizes `sum over tokens of || h* - h ||^2 / || h ||^2` by Adam (arXiv 1412.6980), one batch a step in an order
    that `seed` decides, a pass over all batches before any comes again. The learning rate rises over the first tenth
    of the steps and falls to zero on a cosine. Weights outside the masks stay zero; all other parameters of the
    layer stay as they are, and nothing is fitted to held-out batches. It is EBFT (arXiv 2402.12419), but EBFT's squared
    distances are not relative to each token's, so that a few tokens with huge hidden states outweigh all others.

    Adam works in float32 whatever the dtype of the weights, which are rounded before every forward pass.

    Args:
        activations: The decoder layer, pruned, with what it is called with.
        operators: Its pruned operators.
        masks: Their masks by operator name, bool [out, in], True = kept.
        entering: Hidden states that enter the layer, a batch each.
        wanted: Output hidden states to aim at, a batch each.
        outputs: Output hidden states of the layer as it is, a batch each; `None`: they are computed.
        steps: Number of steps.
        learning_rate: The largest learning rate.
        seed: Decides the order of the batches.
    """
    device = activations.device
    trained = _trained(operators, masks)
    # Put back if training makes the layer worse.
    before = [weights.parameter.detach().clone() for weights in trained]
    error_before, held_out_before = _errors(activations, outputs or activations.outputs(entering), wanted)
    # One kernel, which takes the memory of a weight as one piece: a view of a larger tensor is not. On other devices
    # PyTorch's own choice takes many tensors at once.
    fused = True if device.type == "cpu" and all(weights.master.is_contiguous() for weights in trained) else None
    optimizer = torch.optim.Adam([weights.master for weights in trained], lr=learning_rate, fused=fused)
    fitted = [batch for batch in range(len(activations.calls)) if not activations.is_held_out(batch)]
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    with _training(activations.layer, trained), torch.enable_grad():
        for step in range(steps):
            order = order or torch.randperm(len(fitted), generator=generator).tolist()
            batch = fitted[order.pop()]
            output = activations.calls[batch].run(activations.layer, entering[batch].to(device))
            _squares(activations, batch, output, wanted[batch].to(device)).sum().backward()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * rate_factor(step, steps, _WARM_UP)
            for weights in trained:
                weights.take_gradient()
            optimizer.step()
            for weights in trained:
                weights.round()
    # Its moments are twice the weights in float32.
    del optimizer
    remade = activations.outputs(entering)
    error, held_out = _errors(activations, remade, wanted)
    # False for NaN as well.
    if error < error_before:
        return Reconstruction(error_before, error, remade, held_out_before, held_out)
    for weights, old in zip(trained, before, strict=True):
        weights.parameter.data.copy_(old)
    return Reconstruction(error_before, error_before, None, held_out_before, held_out_before)


class _Trained:
    """A parameter of the layer that holds the weights of one operator or several (the experts of a mixture)."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        # Nothing is kept until an operator's mask says so: other experts of the parameter may stay dense.
        self.kept = torch.zeros_like(parameter, dtype=torch.bool)
        self.master = parameter.detach().float()  # the parameter's own memory if that is float32

    def take_gradient(self) -> None:
        # Moved from the parameter to the master, which Adam steps. It is zero for all other weights: they never move.
        gradient, self.parameter.grad = self.parameter.grad, None
        if gradient is None:  # no token of the batch reached it
            self.master.grad = None
            return
        self.master.grad = gradient.float().mul_(self.kept)

    def round(self) -> None:
        if self.parameter.dtype != self.master.dtype:
            self.parameter.data.copy_(self.master)


def _trained(operators: Sequence[LinearOperator], masks: Mapping[str, Tensor]) -> list[_Trained]:
    found: dict[tuple[int, str], _Trained] = {}
    for operator in operators:
        key = (id(operator.owner), operator.tensor)
        if key not in found:
            found[key] = _Trained(getattr(operator.owner, operator.tensor))
        # A view: writing to it frees weights of the whole parameter.
        kept = operator.select(found[key].kept)
        kept.copy_(masks[operator.name].T if operator.transposed else masks[operator.name])
    return list(found.values())


@contextmanager
def _training(layer: nn.Module, trained: Sequence[_Trained]) -> Iterator[None]:
    """Gradients flow into the trained parameters of a layer alone."""
    chosen = {id(weights.parameter) for weights in trained}
    before = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)
        for weights in trained:
            weights.parameter.grad = None


def rate_factor(step: int, steps: int, warm_up: float) -> float:
    """Factor of the learning rate in a step: a linear rise over a share of the steps, then a cosine to zero."""
    rise = max(1, round(warm_up * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def _squares(activations: LayerActivations, batch: int, output: Tensor, wanted: Tensor) -> Tensor:
    """`|| h* - h ||^2 / || h ||^2` of every real token of a batch, float32, [tokens]."""
    output, wanted = (activations.real_tokens(h, batch).float() for h in (output, wanted))
    return (output - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(_TINY)


def _errors(
    activations: LayerActivations, outputs: Sequence[Tensor], wanted: Sequence[Tensor]
) -> tuple[float, float | None]:
    """The error on the tokens that are fitted, and on those that are held out."""
    sums = {False: [0.0, 0.0], True: [0.0, 0.0]}
    for batch, (output, target) in enumerate(zip(outputs, wanted, strict=True)):
        squares = _squares(activations, batch, output, target.to(output.device))
        into = sums[activations.is_held_out(batch)]
        into[0], into[1] = into[0] + float(squares.double().sum()), into[1] + squares.numel()
    fitted, held_out = (math.sqrt(total / tokens) if tokens else None for total, tokens in sums.values())
    return fitted or 0.0, held_out

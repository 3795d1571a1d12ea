"""Repairs of a mixture that has lost experts, for `experts.py`.

A repair changes the weights of a `SmallerLayer`, a copy of a decoder layer without the removed experts, so that the sum
of the experts that stay comes close to its targets `Y`: what all experts returned, corrected for errors of the layers
before (`LayerTargets.expert_targets`). Several repairs are made one after the other. All are tested as the package
tests its refit (`solve.tested_refit`): a fit to the other parts of the calibration must lessen the error on each part.

A removed expert's mean output as a constant (MoNE, arXiv 2507.00390) is not among them: no class of Transformers has
an expert without matrices, so a plain checkpoint can't hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from expert_view import MixtureView, RouterRule, squared_norms
from torch import Tensor, nn

from optimum_fista.model.activations import ActivationStore
from optimum_fista.model.experts import FusedExperts
from optimum_fista.model.inputs import LayerActivations
from optimum_fista.removal.mixture_refit import SmallerMixture
from optimum_fista.solve.problem import InputStatistics, LayerProblem
from optimum_fista.solve.tested_refit import refit_that_helps

_SHARES = (1.0, 0.5, 0.25)  # of a step that are tried
_ROUTER_ROUNDS = 2  # steps of the router
_ROUTER_RIDGE = 0.03  # as a share of the mean diagonal of the Gram matrix of its inputs
_CONJUGATE_STEPS = 10


@dataclass
class SmallerLayer:
    """A decoder layer that has lost experts, and what its mixture should return.

    Attributes:
        view: What the mixture computed with all experts.
        kept: Numbers of the experts that stay, rising.
        all_experts: Those of the mixture before the removal.
        experts: Those that stay, in the smaller layer.
        router: Of the smaller layer.
        activations: Run the smaller layer on the calibration.
        hidden_states: That enter the layer, [batch, sequence, hidden] of each batch.
        targets: `Y` of each batch, [batch, sequence, hidden]. A repair of something else than routed experts replaces
            them by what is left for these.
    """

    view: MixtureView
    kept: tuple[int, ...]
    all_experts: FusedExperts
    experts: FusedExperts
    router: Any
    activations: LayerActivations
    hidden_states: Sequence[Tensor]
    targets: ActivationStore

    def all_targets(self) -> Tensor:
        """`Y` of all tokens, float32 [tokens, hidden]."""
        return torch.cat([target.flatten(0, 1).float() for target in self.targets])

    def router_weights(self) -> Tensor:
        """The weights that the smaller layer's router gives to the experts that stay, [tokens, kept]."""
        logits = self.view.hidden_states @ self.router.weight.float().T
        return RouterRule(self.router).weights(logits)


def refit(layer: SmallerLayer) -> None:
    """Refit the down projections of the experts that stay, as the package does by default."""
    mixture = SmallerMixture(
        layer.experts, layer.activations, layer.hidden_states, targets=layer.targets
    )
    mixture.refit(lambda *_: None)  # the weights are those of the smaller layer itself


def merge(layer: SmallerLayer) -> None:
    """Add each removed expert to the nearest one that stays: means of their matrices, weighted by use (REAM).

    Two experts are near if their outputs have a large cosine over all tokens. Use is the sum of the router's weights.
    As in REAM (arXiv 2604.04356), but the channels of two experts are not matched first: in experts that are copies of
    one MLP they have the same order.
    """
    products = layer.view.grams.sum(0, dtype=torch.float64)  # [experts, experts]
    norms = products.diagonal().clamp_min(1e-30).sqrt()
    cosines = products / (norms[:, None] * norms)
    use = layer.view.weights.sum(0, dtype=torch.float64)
    use_of_kept = [float(use[expert]) for expert in layer.kept]

    smaller = dict(layer.experts.module.named_parameters(recurse=False))
    removed = sorted(set(range(layer.view.num_experts)) - set(layer.kept))
    for expert in removed:
        nearest = int(cosines[expert, list(layer.kept)].argmax())
        total = use_of_kept[nearest] + float(use[expert])
        if total == 0:
            continue
        share = float(use[expert]) / total
        for name, matrices in layer.all_experts.module.named_parameters(recurse=False):
            merged = smaller[name].data[nearest].float()
            merged = merged.lerp(matrices[expert].float(), share)
            smaller[name].data[nearest] = merged.to(matrices.dtype)
        use_of_kept[nearest] = total


def heal_router(layer: SmallerLayer) -> None:
    """Fit the router's matrix `A` [kept, hidden] to the targets, by steps of least squares.

    The output of the mixture is `E* = sum_f w_f o_f` with `w_f = c a_f / sum_g a_g`, where `a` are sigmoids or
    exponentials of the logits `A x`, and the weights of a token sum to `c`. While the choice of experts stays the same,
    a small change `D` of `A` changes `E*` by

        sum_f (D x)_f v_f,    v_f = w_f (a_f' / a_f) (o_f - E* / c),

    so `D` is the solution of a least-squares problem with a ridge (Gauss-Newton):

        min  sum_tokens || Y - E* - sum_f (D x)_f v_f ||^2 + r || D ||^2.

    The next step begins with the experts that the router chooses then. The greatest share of a step is taken for which
    each part's true error, with experts chosen again, is less after the step that was fitted to the other parts. A bias
    that selects stays as it is.
    """
    problem = _RouterProblem(layer)
    num_parts = int(layer.view.parts.max()) + 1
    all_tokens = torch.ones_like(layer.view.parts, dtype=torch.bool)
    matrix = layer.router.weight.float()
    for _ in range(_ROUTER_ROUNDS):
        shares = list(_SHARES)
        for part in range(num_parts):
            is_part = layer.view.parts == part
            step = problem.step(matrix, ~is_part)
            before = problem.error(matrix, is_part)
            shares = [s for s in shares if problem.error(matrix + s * step, is_part) < before]
        if not shares:
            break
        matrix = matrix + shares[0] * problem.step(matrix, all_tokens)
    layer.router.weight.data.copy_(matrix)


class _RouterProblem:
    """The errors of a smaller mixture as a function of its router's matrix `A` [kept, hidden].

    All products are of `grams`, those of the outputs of two experts, and of `products_with_targets`, those of the
    outputs with `Y`. The symbols are those of `heal_router`.
    """

    def __init__(self, layer: SmallerLayer) -> None:
        """Compute the products of outputs and targets of all tokens."""
        view = layer.view
        kept = list(layer.kept)
        self._rule = RouterRule(layer.router)
        self._inputs = view.hidden_states
        self._grams = view.grams[:, kept][:, :, kept]
        self._products_with_targets = torch.empty(len(self._inputs), len(kept))
        self._energies = torch.empty(len(self._inputs))  # squared norms of targets
        start = 0
        for batch in layer.targets:
            target = batch.flatten(0, 1).float()
            tokens = slice(start, start + len(target))
            start = tokens.stop
            outputs = view.outputs[tokens][:, kept].float()
            self._products_with_targets[tokens] = (outputs @ target[:, :, None]).squeeze(2)
            self._energies[tokens] = target.square().sum(1)

    def error(self, matrix: Tensor, tokens: Tensor) -> float:
        """`|| E* - Y ||^2` over some tokens, bool [tokens], with the experts that the router chooses."""
        weights = self._rule.weights(self._inputs[tokens] @ matrix.T)
        errors = self._energies[tokens] - 2 * (weights * self._products_with_targets[tokens]).sum(1)
        errors = errors + squared_norms(self._grams[tokens], weights)
        return float(errors.sum(dtype=torch.float64))

    def step(self, matrix: Tensor, tokens: Tensor) -> Tensor:
        """`D` [kept, hidden] for some tokens, bool [tokens], by conjugate gradients."""
        inputs = self._inputs[tokens]
        grams = self._grams[tokens]
        logits = inputs @ matrix.T
        weights = self._rule.weights(logits)
        total = self._rule.total

        # o_f . E*, then E* . E*
        with_sum = (grams @ weights[:, :, None]).squeeze(2)
        of_sum = (weights * with_sum).sum(1)
        # o_f . (Y - E*), then E* . (Y - E*)
        with_residual = self._products_with_targets[tokens] - with_sum
        sum_with_residual = (weights * with_residual).sum(1, keepdim=True)
        slopes = weights  # w_f a_f' / a_f
        if self._rule.is_sigmoid:
            slopes = weights * (1 - logits.sigmoid())
        right = slopes * (with_residual - sum_with_residual / total)  # v_f . (Y - E*)
        left = grams - with_sum[:, :, None] / total - with_sum[:, None, :] / total
        left = left + (of_sum / total**2)[:, None, None]
        left = left * slopes[:, :, None] * slopes[:, None, :]  # v_f . v_g

        gram_of_inputs = inputs.T @ inputs
        ridge = _ROUTER_RIDGE * float(gram_of_inputs.diagonal().mean())
        gram_of_inputs.diagonal().add_(ridge)
        factor = torch.linalg.cholesky(gram_of_inputs)
        sizes = left.diagonal(dim1=1, dim2=2).mean(0).clamp_min(1e-20)[:, None]  # [kept, 1]

        def product(step: Tensor) -> Tensor:
            """The problem's matrix times a step."""
            changes = (left @ (inputs @ step.T)[:, :, None]).squeeze(2)
            return changes.T @ inputs + ridge * sizes * step

        def preconditioned(residual: Tensor) -> Tensor:
            """The solution if the `v_f` of a token had equal sizes and were orthogonal."""
            return torch.cholesky_solve((residual / sizes).T, factor).T

        return _conjugate_gradients(product, preconditioned, right.T @ inputs)


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], preconditioned: Callable[[Tensor], Tensor], right: Tensor
) -> Tensor:
    """Solve `product(x) = right` from zero by a few steps of preconditioned conjugate gradients."""
    solution = torch.zeros_like(right)
    residual = right.clone()
    direction = preconditioned(residual)
    energy = (residual * direction).sum()
    for _ in range(_CONJUGATE_STEPS):
        image = product(direction)
        length = energy / (direction * image).sum()
        if not bool(torch.isfinite(length)):  # nothing is left to solve
            break
        solution += length * direction
        residual -= length * image
        next_direction = preconditioned(residual)
        next_energy = (residual * next_direction).sum()
        direction = next_direction + next_energy / energy * direction
        energy = next_energy
    return solution


def refit_shared(layer: SmallerLayer) -> None:
    """Refit the down projection of the shared expert, which gets all tokens, to what the routed experts lack.

    The targets of the layer become what is left for the routed experts. Without a shared expert nothing is done.
    """
    shared = [
        module
        for name, module in layer.activations.layer.named_modules()
        if name.endswith("shared_experts.down_proj")
    ]
    if not shared:
        return
    (down_projection,) = shared
    assert isinstance(down_projection, nn.Linear)
    weight = down_projection.weight.detach().float()
    calls = layer.activations.arguments_of(down_projection, layer.hidden_states)
    inputs = torch.cat([arguments[0].flatten(0, 1).float() for arguments, _ in calls])
    targets = layer.all_targets()
    lack = targets - _sum_of_experts(layer)

    problems = []
    for part in range(int(layer.view.parts.max()) + 1):
        tokens = layer.view.parts == part
        wanted = lack[tokens] + inputs[tokens] @ weight.T
        problems.append(
            LayerProblem(
                weight,
                InputStatistics(inputs[tokens].T @ inputs[tokens], int(tokens.sum())),
                target=wanted.T @ inputs[tokens],
                output_energies=wanted.square().sum(0, dtype=torch.float64),
            )
        )
    result = refit_that_helps(problems, _SHARES)
    if result is None:
        return
    # The smaller layer shares this weight with the dense one, so it gets a tensor of its own.
    new_weight = result.weight.to(down_projection.weight.dtype)
    down_projection.weight = nn.Parameter(new_weight, requires_grad=False)

    rest = layer.activations.store()
    change = inputs @ (new_weight.float() - weight).T
    start = 0
    for target in layer.targets:
        num_tokens = target.shape[:2].numel()
        left = target.float() - change[start : start + num_tokens].view(target.shape)
        rest.append(left.to(target.dtype))
        start += num_tokens
    layer.targets = rest


def _sum_of_experts(layer: SmallerLayer) -> Tensor:
    """What the experts that stay return together before their own weights change, float32 [tokens, hidden]."""
    weights = layer.router_weights()
    outputs = layer.view.outputs
    sums = torch.empty(len(weights), outputs.shape[2])
    for start in range(0, len(weights), 2048):
        tokens = slice(start, start + 2048)
        of_kept = outputs[tokens][:, list(layer.kept)].float()
        sums[tokens] = (weights[tokens][:, None, :] @ of_kept).squeeze(1)
    return sums


REPAIRS: dict[str, Callable[[SmallerLayer], None]] = {
    "merge": merge,
    "router": heal_router,
    "shared": refit_shared,
    "refit": refit,
}


def repair(names: str, layer: SmallerLayer) -> None:
    """Make the repairs whose names `names` joins by "+", such as "router+refit", in this order; "none" makes none."""
    if names == "none":
        return
    for name in names.split("+"):
        REPAIRS[name](layer)

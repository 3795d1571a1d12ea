"""A refit that is taken only if it helps on tokens that it was not fitted to.

The tokens that reach an operator are divided into *parts*, such as the texts of the calibration. A part is a
`LayerProblem`: the weight `W` [out, in] of the operator, and sums over the tokens of the part. With their
inputs `X_t` and the outputs `Y_t` that the operator should give, its squared error on a part t is

    e_t(V) = || V X_t - Y_t ||_F^2.

`W_t` is the refit to all parts but t. It shows what a refit does to tokens like those of t if it has not seen them: a
refit may help on the tokens that it was fitted to, and harm others. So a part votes on a share s of the refit:

    e_t(W + s (W_t - W)) < e_t(W).

`refit_that_helps` takes the greatest share for which all parts vote, and returns `W + s (W_all - W)`, where `W_all` is
the refit to all parts. A refit is `refit_columns` of all columns: least squares with a ridge towards `W`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from optimum_fista.solve.problem import InputStatistics, LayerProblem
from optimum_fista.solve.refit import refit_columns


class Refit(NamedTuple):
    """New weights of an operator."""

    weight: Tensor  # [out, in]
    # s, in (0, 1]: 1 is the refit itself, less is shrunk towards the weights before it
    share: float
    message: str  # of a factorisation that needed help, or ""


def refit_that_helps(parts: Sequence[LayerProblem], shares: Sequence[float]) -> Refit | None:
    """Refit an operator to all parts, by the greatest of the `shares` that lowers the error on every left-out part.

    `parts` are two or more problems with the same weight `W`; they stay as they are. `shares` are numbers in (0, 1],
    from the greatest to the least, such as (1, 1/2, 1/4). Returns `None` if no share does.
    """
    remaining = list(shares)  # those that no part has voted against
    for number, part in enumerate(parts):
        others = [*parts[:number], *parts[number + 1 :]]
        fitted_to_others = refit_to_all(others).weight  # W_t
        shares_that_help = list[float]()
        for share in remaining:
            weight = _moved(part.weight, fitted_to_others, share)
            if part.change_of_error(weight) < 0:
                shares_that_help.append(share)
        remaining = shares_that_help
        if not remaining:
            return None

    greatest = remaining[0]
    refit = refit_to_all(parts)
    weight = _moved(parts[0].weight, refit.weight, greatest)
    return Refit(weight, greatest, refit.message)


def refit_to_all(parts: Sequence[LayerProblem]) -> Refit:
    """Refit an operator to all tokens of the parts together, without a test."""
    problem = _joined(parts)
    # a fit of all weights, none of which has to be zero
    all_columns = torch.ones_like(problem.weight[0], dtype=torch.bool)
    weight, message = refit_columns(problem, all_columns)
    return Refit(weight, share=1.0, message=message)


def _moved(weight: Tensor, fitted: Tensor, share: float) -> Tensor:
    """Return `W + s (fitted - W)`; both are [out, in]. With the share 1 it is `fitted` itself, not rounded."""
    if share == 1:
        return fitted
    return torch.lerp(weight, fitted, share)


def _joined(parts: Sequence[LayerProblem]) -> LayerProblem:
    """Make the problem of the tokens of all parts; that of a single part is returned as it is.

    All have the same weight, targets of their own and the energies of these. The sums over all tokens are the sums of
    the parts. The parts are not changed.
    """
    first, *others = parts
    if not others:
        return first
    gram = first.gram
    num_tokens = first.statistics.num_tokens
    target = first.target
    output_energies = first.output_energies
    for part in others:
        gram = gram + part.gram
        num_tokens += part.statistics.num_tokens
        target = target + part.target
        output_energies = output_energies + part.output_energies
    return LayerProblem(
        weight=first.weight,
        statistics=InputStatistics(gram, num_tokens),
        target=target,
        output_energies=output_energies,
        name=first.name,
    )

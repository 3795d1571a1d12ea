"""Least-squares refits of the kept weights: by conjugate gradients, or exactly if whole columns are kept.

After a method has chosen which weights of an operator stay (the *mask*), a refit gives these the values with the least
error. If each row has its own mask, each row is a separate linear system. These are too many to factorise; a few steps
for all rows at once are nearly as good (`refit`, and `refit_stack` for operators of one shape together). If all rows
keep the same columns, one Cholesky factor solves the single system (`refit_columns`). Symbols are those of
`LayerProblem`: `W` [out, in] are the dense weights of an operator, `W*` the refitted ones, `G` [in, in] the Gram matrix
of its inputs `X*` over the calibration tokens, `Y` the outputs that `W*` shall give for them, and `C = Y X*^T`
[out, in] the target.
"""

import torch
from torch import Tensor

from optimum_fista.solve.linalg import damped_cholesky, diagonals
from optimum_fista.solve.problem import LayerProblem, inner_by_rows

# Tokens that tell as much as one that is independent of all others: neighbours are alike, and a few are large. On
# held-out tokens of SmolLM2-135M the error was least with 8 or 16 of 4, 8 and 16, for both projections.
_DEPENDENT_TOKENS = 8.0
_LEAST_RIDGE = 1e-5  # of the diagonal: enough for float32
_MOST_RIDGE = 1.0  # of the diagonal: as much as the data itself


def refit(
    gram: Tensor,
    target: Tensor,
    start: Tensor,
    mask: Tensor,
    *,
    max_iterations: int = 10,
    tolerance: float = 1e-5,
    in_place: bool = False,
    singular: bool = False,
) -> tuple[Tensor, Tensor]:
    """Minimize `1/2 <W G, W> - <W, C>` over weights that vanish outside a fixed mask.

    Every row is a least-squares problem of its own; all rows take a conjugate-gradient step together, each with its own
    step length, preconditioned by the diagonal of G. The objective falls in every step. The *energy* of a row is its
    squared residual, divided by the diagonal. A row without energy is *at rest*: its weights change no more.

    Args:
        gram: `G` [in, in], symmetric positive semidefinite.
        target: `C` [out, in].
        start: Starting weights [out, in]; values outside the mask are ignored.
        mask: Boolean [out, in], True = kept.
        max_iterations: Steps at most.
        tolerance: Stop when the preconditioned residual of all rows together has fallen by this factor.
        singular: Whether `gram` may be singular. Then an energy counts as zero if it is no larger than that of the
            row's rounding errors. These also point along directions in which no token has an input, and a step there
            would have no bound.
        in_place: Whether `target` and `start` may be overwritten: then the result is in the memory of `start`, and two
            matrices of their shape are made; otherwise four.

    Returns the weights, zero outside the mask, and the number of steps taken, a scalar on the device.
    """
    weights, steps = refit_stack(
        gram[None],
        target[None],
        start[None],
        mask[None],
        max_iterations=max_iterations,
        tolerance=tolerance,
        in_place=in_place,
        singular=singular,
    )
    return weights[0], steps[0]


def refit_stack(
    grams: Tensor,
    targets: Tensor,
    starts: Tensor,
    masks: Tensor,
    *,
    max_iterations: int = 10,
    tolerance: float = 1e-5,
    in_place: bool = False,
    singular: bool = False,
) -> tuple[Tensor, Tensor]:
    """Refit a stack of operators, each as `refit` does, with its own Gram matrix and its own end.

    All arguments are those of `refit`, with operators as the first dimension: `grams` [operators, in, in]; `targets`,
    `starts` and `masks` [operators, out, in]. With `in_place`, `targets` and `starts` are overwritten.

    Returns the weights [operators, out, in], and the numbers of steps, int64 [operators].
    """
    # 1 where the mask is True, otherwise 0: PyTorch multiplies with bytes twice as fast as with booleans.
    factors = masks.view(torch.uint8)
    weight = starts.mul_(factors) if in_place else starts * factors
    # The squared rounding error of each row's residual, [operators, out]; an energy up to it counts as zero.
    noise = torch.zeros_like(weight[..., 0])
    if singular:
        memory = torch.empty_like(weight[0])
        noise = torch.stack(
            [
                _rounding_errors(gram, target, start, mask, memory=memory)
                for gram, target, start, mask in zip(grams, targets, weight, masks, strict=True)
            ]
        )
        del memory
    # From here on the targets are not read again, so the residual takes their memory if that may be overwritten.
    residual = torch.baddbmm(targets, weight, grams, alpha=-1, out=targets if in_place else None)
    steps = descend(
        grams,
        residual,
        weight,
        masks,
        max_iterations=max_iterations,
        tolerance=tolerance,
        noise=noise,
    )
    return weight, steps


def descend(
    grams: Tensor,
    residual: Tensor,
    weight: Tensor,
    masks: Tensor,
    *,
    max_iterations: int,
    tolerance: float = 1e-5,
    noise: Tensor | float = 0.0,
) -> Tensor:
    """Take the steps of `refit_stack` from weights whose residual `C - W G` is known.

    `weight` [operators, out, in] vanishes outside of the masks; it is overwritten by the result. `residual` is
    overwritten, too. `noise` are the squared rounding errors of its rows, [operators, out]. The other arguments, and
    the numbers of steps that are returned, are those of `refit_stack`.

    The Gram matrices may have a dtype of 16 bits. Then the directions are rounded to it before they are multiplied.
    Each residual is the one before minus such a product, which is rounded by 0.4%, so a few steps go nearly as far as
    exact ones. But if inputs have much in common, most of a curvature `<D G, D>` may be rounding. A row takes no step
    along a direction `D` whose curvature is at most `2 eps <D diag(G), D>`: it could be far too long.
    """
    factors = masks.view(torch.uint8)
    scale = _preconditioner(grams)[:, None].to(weight.dtype)  # [operators, 1, in]
    product = torch.empty_like(weight)  # memory for products, used again and again
    residual.mul_(factors)
    direction = residual * scale
    is_rounded = grams.dtype != direction.dtype
    energy = _energies(residual, direction, noise)  # [operators, out], 0 for rows at rest

    # How much of the diagonal of G may be rounding, [operators, in]. No other entry of G is larger than the geometric
    # mean of two on the diagonal.
    rounding = 2 * torch.finfo(grams.dtype).eps * diagonals(grams).to(weight.dtype)
    stop = tolerance**2 * energy.sum(-1).double()  # energies are squares
    steps = torch.zeros(len(grams), dtype=torch.int64, device=grams.device)
    # To learn whether all rows have converged, the host must wait for the device, so it rarely asks. Steps after
    # convergence have the length 0: they change neither weights nor residual, and are not counted.
    steps_between_questions = 1 if grams.device.type == "cpu" else 10
    for iteration in range(1, max_iterations + 1):
        has_converged = energy.sum(-1) <= stop  # all rows of an operator together
        if iteration % steps_between_questions == 0 and bool(has_converged.all()):
            break
        steps += ~has_converged  # adds 1 or 0

        # The step of each row to the minimum along its direction D: energy / <D G, D>. There is none along directions
        # that no token has, nor after the end.
        least_curvature: Tensor | float = 0.0  # [operators, out]
        if is_rounded:
            torch.mul(direction, rounding[:, None], out=product)
            least_curvature = _inner_by_rows(direction, product)
            product.copy_(torch.bmm(direction.to(grams.dtype), grams))
        else:
            torch.bmm(direction, grams, out=product)
        product.mul_(factors)
        curvature = _inner_by_rows(direction, product).to(residual.dtype)
        may_step = (curvature > least_curvature) & ~has_converged[:, None]
        length = _divide_where(may_step, energy, curvature)
        weight.addcmul_(length[..., None], direction)
        if iteration == max_iterations:
            break  # the rest prepares the next step
        residual.addcmul_(length[..., None], product, value=-1)

        # Fletcher and Reeves: the next direction is conjugate to the last one.
        preconditioned = torch.mul(residual, scale, out=product)
        energy_next = _energies(residual, preconditioned, noise)
        momentum = _divide_where(energy > 0, energy_next, energy)
        direction.mul_(momentum[..., None]).add_(preconditioned)
        energy = energy_next
    return steps


def _preconditioner(gram: Tensor) -> Tensor:
    """Return one over the diagonal of G, [in]; 1 for inputs without energy, whose residual is zero.

    That of a stack of Gram matrices is [operators, in].
    """
    diagonal = diagonals(gram)
    return torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).reciprocal()


def _inner_by_rows(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of the rows of two stacks [operators, out, in], [operators, out], float64 (`inner_by_rows`)."""
    return inner_by_rows(left.flatten(0, 1), right.flatten(0, 1)).view(left.shape[:2])


def _energies(residual: Tensor, preconditioned: Tensor, noise: Tensor | float) -> Tensor:
    """Return the squared residual of each row, [operators, out], in units of the Gram diagonal; 0 for rows at rest.

    `residual` [operators, out, in] is the negative gradient on the mask, and `preconditioned` is the same divided by
    the diagonal of G. A row is at rest if its residual is within `noise`, its squared rounding error, [operators, out].
    """
    energy = _inner_by_rows(residual, preconditioned).to(residual.dtype)
    energy.masked_fill_(energy <= noise, 0.0)  # NaN stays
    return energy


def _rounding_errors(
    gram: Tensor, target: Tensor, weight: Tensor, mask: Tensor, *, memory: Tensor
) -> Tensor:
    """Return the squared rounding error of each row of the residual `C - W G`, [out], in units of the Gram diagonal.

    The residual is a sum of n = in terms, so it is rounded by about sqrt(n) eps of its terms, which are as large as
    those of `C` and of `W diag(G)`. `memory` [out, in] is overwritten.
    """
    of_target = torch.mul(target, mask, out=memory).square_() @ _preconditioner(gram)
    of_weight = torch.square(weight, out=memory) @ gram.diagonal()
    return (of_target + of_weight) * (gram.shape[0] * torch.finfo(gram.dtype).eps ** 2)


def _divide_where(condition: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return `numerator / denominator` where `condition` holds, otherwise 0; all are [operators, out]."""
    # 1e-38 is about the least normal float32.
    quotient = numerator / denominator.clamp_min(1e-38)
    return torch.where(condition, quotient, torch.zeros_like(numerator))


def refit_columns(
    problem: LayerProblem, kept: Tensor, ridge: float | None = None
) -> tuple[Tensor, str]:
    """Least squares over weights whose columns outside `kept`, booleans [in], are zero, with a ridge.

    `kept` is a row of the mask of a method that removes whole columns, all of whose rows are the same.

    It minimizes `|| W* X* - Y ||_F^2 + r sum_ij G_jj (W*_ij - W_ij)^2` exactly: all rows share one linear system, and
    its Cholesky factor. The more inputs are removed, the more the others have to change, and the more these changes
    follow the noise of the calibration tokens. The ridge is therefore that of Hoerl, Kennard & Baldwin (1975), number
    of inputs times variance of the noise over squared norm of the change. In units of the diagonal it is

        r = 8 p / N * e / (e0 - e),   e = e_K / (1 - p / N),   at most 1,

    with p kept inputs, N tokens (eight of them count as one), the squared error `e_K` of the refit without a ridge, and
    `e0` of the dense weights without their removed columns. If the kept inputs can replace the removed ones exactly,
    there is no error and no ridge. If there are no more tokens than inputs, r is 1.

    `ridge` is r if it is known. Returns the weights [out, in], and the message of a factorisation that needed help
    (`damped_cholesky`), otherwise an empty one. The tensors of `problem` stay as they are.
    """
    kept_inputs = kept.nonzero().flatten()  # int64 [p]

    def solve(ridge: float) -> tuple[Tensor, str]:
        """Solve `problem` with this r: `W_K = C_K (G_KK)^-1` in coordinates of unit diagonal; K are `kept_inputs`.

        `ridge` is r, in units of the diagonal of the Gram matrix. `problem` is that of the outer function, which has
        found `kept_inputs`, int64 [p]. Returns new weights [out, in], and the message of the factorisation ("" if it
        needed no help).
        """
        gram, target, scale = problem.with_ridge(problem.statistics.diagonal * ridge)
        # Of the rows and columns of the inputs that stay: G_KK, made anew for each attempt.
        factor, message = damped_cholesky(
            lambda: gram.index_select(0, kept_inputs).index_select(1, kept_inputs)
        )
        solved = torch.cholesky_solve(target.index_select(1, kept_inputs).mT, factor)
        weight = torch.zeros_like(target).index_copy_(1, kept_inputs, solved.mT).mul_(scale)
        return weight, message

    if ridge is None:
        share = len(kept_inputs) / max(1, problem.statistics.num_tokens)  # p / N
        ridge = _MOST_RIDGE
        if share < 1:
            plain, _ = solve(_LEAST_RIDGE)
            error = problem.squared_error(plain) / (1 - share)  # e
            explained = problem.squared_error(problem.weight * kept) - error  # e0 - e
            if explained > 0:  # otherwise the refit gains nothing, and the ridge is the highest
                wanted = _DEPENDENT_TOKENS * share * error / explained
                # The ridge that is wanted, within its limits.
                ridge = min(_MOST_RIDGE, max(_LEAST_RIDGE, wanted))
    return solve(ridge)

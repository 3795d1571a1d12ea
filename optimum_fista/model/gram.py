"""Sums over the calibration tokens, above all the Gram matrix, and the layer problems made from them.

`model.correction` makes a `GroupSums` for the operators of a group, which share their inputs, calls `add` for each
batch, and then `problems` once.

Sums replace the activations: `|| W* X* - Y ||_F^2` is a function of `W*`, `G = X* X*^T` and `C = Y X*^T` alone. So a
problem takes the same memory for any number of tokens. Sums are in float32, even if activations have half precision,
because thousands of tokens are added. SparseGPT's code (arXiv 2301.00774) rescales its Hessian to a mean with every
batch; here nothing is scaled, and only one half of the symmetric matrix is computed.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from optimum_fista.model.operators import Group
from optimum_fista.model.precision import as_multiplied, in_few_sizes, quick_products
from optimum_fista.solve.linalg import add_upper_half, fill_lower_half, row_blocks
from optimum_fista.solve.problem import DenseOutputs, InputStatistics, LayerProblem, inner_by_rows


class GroupSums:
    """Sums over the tokens of operators that share their inputs `X*`; in the dense network these are `X`.

    `cross` has sums with the dense network by name. `"inputs"` is `X X*^T` [in, in]; `"outputs"` is `W X X*^T` of all
    operators, one below the other, [out, in]; the smaller of the two is used. `"targets"` is `Y X*^T` [out, in] of a
    single operator. `cross` is empty if the dense network is not known, or if `X* = X`.
    """

    def __init__(self, size: int, device: torch.device, *, same_inputs: bool = False) -> None:
        """Begin with empty sums for operators with `size` inputs; `same_inputs` says that `X* = X`.

        `device` is where the sums are, and where the operators compute. The Gram matrix itself is made later.
        """
        self.same_inputs = same_inputs
        self.num_tokens = 0
        self.cross: dict[str, Tensor] = {}
        # squared norms of the rows of W X, [out], float64, by operator, and of Y as "targets"
        self.energies: dict[str, Tensor] = {}
        # the upper half of the Gram matrix; made with the first tokens, so that only one group has it
        self._gram: Tensor | None = None
        self._total = torch.zeros(size, device=device)  # of each input, over the tokens

    @quick_products()
    def add(self, inputs: Tensor, kind: str = "", others: Tensor | None = None) -> None:
        """Add the inputs `X*` [tokens, in] of a batch to the sums.

        `others` [tokens, n] belong to the same tokens: dense inputs, dense outputs side by side, or targets. `kind` is
        accordingly "inputs", "outputs" or "targets", a key of `self.cross`. Both arguments are in any floating-point
        dtype, and are not changed.

        Changes `self.num_tokens`, the upper half of the Gram matrix (`self._gram`), the sums of inputs (`self._total`
        [in]), the cross-Gram matrix of this kind in `self.cross`, and for targets `self.energies`, which has the sum of
        squares of each column. Inside `quick_products`, matrices are multiplied in the precision of the run.
        """
        self.num_tokens += inputs.shape[0]
        # Rounded as the run multiplies, for instance to bfloat16, and float32 again. Rows of zeros may be appended so
        # that oneDNN sees few shapes; they add nothing.
        inputs = in_few_sizes(as_multiplied(inputs))
        self._add_gram(inputs)
        self._total += inputs.sum(0)
        if others is None:
            return
        others = in_few_sizes(as_multiplied(others))
        if kind not in self.cross:
            self.cross[kind] = torch.zeros(others.shape[1], inputs.shape[1], device=inputs.device)
        self.cross[kind].addmm_(others.T, inputs)  # in place: no second matrix of this size
        if kind == "targets":
            self.add_energies(kind, others)

    def _add_gram(self, inputs: Tensor) -> None:
        """Add `inputs^T inputs` of a batch [tokens, in] to the upper half of the Gram matrix, `self._gram`.

        With the first tokens that matrix is made. `inputs` are float32, and rounded as the run multiplies.
        """
        if self._gram is None:
            self._gram = self._total.new_zeros(len(self._total), len(self._total))
        add_upper_half(self._gram, inputs)

    def add_energies(self, name: str, outputs: Tensor) -> None:
        """Add the squares of outputs `W X` [tokens, out] to the energies of the operator `name`, in `self.energies`.

        `name` is that of the operator in the model, or "targets" if the outputs are targets `Y`.
        """
        # one batch in float32, the sum of batches in float64, because it has many terms
        energies = as_multiplied(outputs).square().sum(0).double()
        if name in self.energies:
            energies = self.energies[name] + energies
        self.energies[name] = energies

    def statistics(self) -> InputStatistics:
        """The symmetric Gram matrix and the mean of the inputs; nothing can be added afterwards.

        Until now `self._gram` has the sums in its upper half only. The lower half is filled in place, and the result
        has the same memory. `self._total` are the sums of the inputs, [in].
        """
        gram = self._gram
        if gram is None:  # there was no token
            gram = self._total.new_zeros(len(self._total), len(self._total))
        fill_lower_half(gram)
        return InputStatistics(gram, self.num_tokens, self._total / max(1, self.num_tokens))

    def problems(
        self, group: Group, weights: Iterable[Tensor], dense_share: float
    ) -> Iterator[LayerProblem]:
        """Yield the problems of the operators of a group, one by one; the sums are used up.

        `weights` are the dense weights `W` [out, in] of the operators. `dense_share` is `a` in the targets

            W (a X + (1 - a) X*).

        It is not used if the inputs are those of the dense network (`X* = X`), or if the targets themselves were
        summed. All problems share the memory of the Gram matrix, which is completed in place. Cross-Gram matrices in
        `self.cross` are overwritten.
        """
        statistics = self.statistics()
        # the smallest and the largest element: NaN if any element is NaN
        extremes = torch.stack(statistics.gram.aminmax())
        if not bool(torch.isfinite(extremes).all()):
            raise ValueError(
                f"the inputs of {group[0].name} hold NaN or Inf (or overflow when squared in float32): the model is "
                "damaged there, or overflows its dtype: load it in float32 or bfloat16 (--dtype float32)."
            )
        first_row = 0  # of the operator, among the outputs of all operators of the group
        for operator, weight in zip(group, weights, strict=True):
            name = operator.name
            if not self.cross:
                # Nothing is known of the dense network, or X* = X: the target is W X*. With X* = X it is the dense
                # output.
                yield LayerProblem(weight, statistics, name=name, aims_at_dense=self.same_inputs)
            elif "targets" in self.cross:
                # The group has one operator, whose targets were given for each token.
                yield LayerProblem(
                    weight,
                    statistics,
                    target=self.cross["targets"],
                    output_energies=self.energies["targets"],
                    name=name,
                )
            else:
                # W X X*^T of this operator. `_problem` may overwrite it: it is needed only once.
                end_row = first_row + weight.shape[0]
                if "outputs" in self.cross:
                    cross = self.cross["outputs"][first_row:end_row]
                else:
                    cross = weight @ self.cross["inputs"]
                first_row = end_row
                yield _problem(
                    weight,
                    statistics,
                    cross=cross,
                    energies=self.energies[name],
                    dense_share=dense_share,
                    name=name,
                )


def _problem(
    weight: Tensor,
    statistics: InputStatistics,
    cross: Tensor,
    energies: Tensor,
    dense_share: float,
    name: str,
) -> LayerProblem:
    """Make the problem whose target outputs lie between those of the dense and of the pruned network.

    With a = `dense_share`, the target outputs `Y` [out, tokens] and the target `C` [out, in] are

        Y = W (a X + (1 - a) X*),
        C = Y X*^T = a W X X*^T + (1 - a) W G.

    Args:
        weight: `W` [out, in], the dense weights.
        statistics: Of the inputs `X*`; their Gram matrix is `G = X* X*^T` [in, in].
        cross: The cross-Gram matrix `W X X*^T` [out, in]. `C` overwrites this matrix if `a` is above 0. Otherwise the
            matrix is kept, and errors against the dense outputs are measured with it.
        energies: Squared norms of the rows of `W X`, [out], float64.
        dense_share: `a`, in [0, 1].
        name: Of the operator, for messages.
    """
    if dense_share == 1:  # Y = W X: the cross-Gram matrix and the energies are the target's already
        return LayerProblem(
            weight,
            statistics,
            target=cross,
            output_energies=energies,
            name=name,
            aims_at_dense=True,
        )
    # inner products of the rows of W X and W X*, [out], before `cross` is overwritten
    mixed_energies = inner_by_rows(weight, cross)
    same_energies = torch.empty_like(energies)  # || W X* ||^2 by rows
    for rows in row_blocks(weight):  # so that W X* X*^T is never held whole
        same = weight[rows] @ statistics.gram  # these rows of W X* X*^T
        same_energies[rows] = inner_by_rows(weight[rows], same)
        if dense_share > 0:
            # C = a W X X*^T + (1 - a) W G, in place
            cross[rows].mul_(dense_share).add_(same, alpha=1 - dense_share)
    # || W X* - W X ||^2 by rows; computed from Y, a small share would magnify its rounding error
    unpruned_errors = energies - 2 * mixed_energies + same_energies
    if dense_share == 0:  # Y = W X*: nothing is mixed into the cross-Gram
        return LayerProblem(
            weight, statistics, name=name, dense=DenseOutputs(energies, unpruned_errors, cross)
        )
    dense = DenseOutputs(energies, unpruned_errors, dense_share=dense_share)
    # || a W X + (1 - a) W X* ||^2 by rows, expanded
    target_energies = (
        dense_share**2 * energies
        + 2 * dense_share * (1 - dense_share) * mixed_energies
        + (1 - dense_share) ** 2 * same_energies
    )
    return LayerProblem(
        weight,
        statistics,
        target=cross,
        output_energies=target_energies,
        name=name,
        dense=dense,
    )

"""Refitting the experts that stay in a mixture, so that their sum comes close to what all experts returned.

An expert is refitted only if this also helps on text that the fit did not see (`solve.tested_refit`): a fit to all
other texts of the calibration must lessen the error on each text whose tokens reach the expert. If the fit fails that,
a half of it is tried, then a quarter. An expert that gets tokens of a single text is not refitted: nothing would tell
whether the fit harms other text, and with one text it mostly does (docs/results.md, experts).

`experts.remove_experts` makes a `SmallerMixture`, asks it for its `errors`, and calls `refit`.

A *mixture* is a module with several experts, and a router that sends each token to some of them. A `LayerProblem` is a
least-squares problem for one weight: it has the weight, the Gram matrix of its inputs, and the product of inputs and
targets. A batch may be *held out*: its tokens only measure. `AssignedTokens` are the tokens of a batch that the router
sends to each expert.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from optimum_fista.model.activations import ActivationStore
from optimum_fista.model.correction import sum_of_experts
from optimum_fista.model.experts import AssignedTokens, FusedExperts
from optimum_fista.model.gram import GroupSums
from optimum_fista.model.inputs import LayerActivations
from optimum_fista.solve.problem import LayerProblem, relative_norm
from optimum_fista.solve.tested_refit import Refit, refit_that_helps, refit_to_all

ROUNDS = 3  # of refits of every expert, with the others as they are then; each round gains less
# Shares of a refit that are tried: 1 is the whole refit, less is shrunk towards the present weights.
_SHARES = (1.0, 0.5, 0.25)


class MixtureErrors(NamedTuple):
    """`|| E* - Y ||_F / || Y ||_F` of the outputs `E*` of a mixture and their targets `Y`."""

    fitted: float  # on the tokens to fit
    held_out: float | None  # on those held out; None if there are none


class Refits(NamedTuple):
    """What became of the experts of a mixture."""

    num_refitted: int
    num_shrunk: int  # of these, by less than the whole refit
    message: str  # advice for the user, or ""


class SmallerMixture:
    """A mixture without some of its experts, on the tokens that its router now sends to the others.

    Its experts return together, for a token that the router sends to the experts e with the weights p_e,

        E* = sum_e p_e (D_e z_e + b_e),

    where `D_e` is the down projection of expert e and `z_e` its input. Only down projections are refitted, so `E*` is
    linear in them. The inputs of an expert are not kept: they are computed again from the input of the mixture each
    time.
    """

    def __init__(
        self,
        experts: FusedExperts,
        activations: LayerActivations,
        hidden_states: Sequence[Tensor],
        targets: ActivationStore,
    ) -> None:
        """Run the smaller decoder layer up to its mixture on all batches, then the experts on what enters them.

        The inputs of the mixture and `Y - E*` are kept at the layer's storage.

        Args:
            experts: Those that stay.
            activations: Runs the decoder layer, which has these experts only.
            hidden_states: [batch, sequence, hidden] of each batch, which enter the layer.
            targets: `Y` of each batch, [batch, sequence, out]: what all experts returned together, corrected for the
                error in the rest of the layer (`LayerTargets.expert_targets`). `E*` should come close to it.
        """
        self.experts = experts
        self._down = [operator for operator in experts.operators if operator.kind == "down_proj"]
        self._activations = activations
        # Y - E* of each batch [batch, sequence, out]; not in a file, because every refit changes it
        self._residuals: list[Tensor] = []
        # || Y ||^2 of tokens to fit (False), and of those held out (True)
        self._energies = {False: 0.0, True: 0.0}
        # Residuals wait where the layer's hidden states do, or on the device if these are in files.
        place = activations.storage
        if isinstance(place, Path):
            place = activations.device

        def add_batch(batch: int, assigned: AssignedTokens) -> None:
            """Add `Y - E*` of a batch to `self._residuals`, and the energy of `Y` to `self._energies`.

            `assigned` has the inputs of the mixture in the batch, on which the experts run.
            """
            target = targets[batch].to(activations.device)
            num_tokens = target.shape[:2].numel()
            output = sum_of_experts(experts.outputs(assigned), num_tokens).view(target.shape)
            self._residuals.append((target - output).to(place))
            is_held_out = activations.held_out[batch]
            self._energies[is_held_out] += self._energy_without_padding(batch, target)

        # inputs of the mixture, and which experts get which tokens
        self._batches = activations.assigned_tokens(experts, hidden_states, see=add_batch)

    def errors(self) -> MixtureErrors:
        """Measure how far the outputs of the mixture are from their targets now, on all batches.

        The targets are `Y`, and the sum of the experts that stay is `E*`, both [tokens, out]. An error is

            || Y - E* || / || Y ||.

        `self._residuals` has the difference `Y - E*` of each batch. `self._energies` has the squared norms of `Y`, by
        whether the tokens are held out. Nothing runs.
        """
        squares = {False: 0.0, True: 0.0}  # || Y - E* ||^2, by whether the tokens are held out
        for batch, residual in enumerate(self._residuals):
            is_held_out = self._activations.held_out[batch]
            squares[is_held_out] += self._energy_without_padding(batch, residual)
        fitted = relative_norm(squares[False], self._energies[False])
        held_out = None
        if any(self._activations.held_out):
            held_out = relative_norm(squares[True], self._energies[True])
        return MixtureErrors(fitted, held_out)

    def refit(self, write: Callable[[int, Tensor], None]) -> Refits:
        """Refit the down projections, one expert after another (block coordinate descent).

        With all other experts fixed, expert e minimizes, over the tokens that reach it,

            || p_e D_e z_e - (Y - sum_{f != e} p_f (D_f z_f + b_f) - p_e b_e) ||_F^2,

        with the ridge of `refit_columns` towards its present weights, if that passes the test of `refit_that_helps`.
        The weights of `self.experts` are overwritten, and `Y - E*` follows. At the end `write` is called with the
        number of every refitted expert and its weights [out, in], because these experts are a copy of those in the
        model.
        """
        # such outputs are not linear in the weights; the module says so itself
        if getattr(self.experts.module, "has_post_expert_norm", False):
            return Refits(0, 0, "not refitted: a norm follows every expert")

        # The first round tests each refit.
        shares = dict[int, float]()  # of the refit that was taken, by the number of the expert
        messages = list[str]()  # "" for most refits
        for expert in range(len(self._down)):
            problems = self._problems_by_text(expert)
            if len(problems) < 2:
                continue
            refit = refit_that_helps(problems, _SHARES)
            if refit is not None:
                shares[expert] = refit.share
                messages.append(self._take(expert, refit))

        # Further rounds are without a test: the weights are fitted to all texts by now. A shrunk refit is not repeated:
        # another step would take the expert further than the test allows.
        refitted_whole = [expert for expert, share in shares.items() if share == 1]
        for _ in range(ROUNDS - 1):
            for expert in refitted_whole:
                problems = self._problems_by_text(expert)
                messages.append(self._take(expert, refit_to_all(problems)))

        for expert in sorted(shares):
            down_projection = self._down[expert]
            write(expert, down_projection.read())
        num_shrunk = sum(share < 1 for share in shares.values())
        message = "; ".join(message for message in messages if message)
        return Refits(len(shares), num_shrunk, message)

    def _take(self, expert: int, refit: Refit) -> str:
        """Write the weights of a refit into an expert, and update `self._residuals`, which are `Y - E*`.

        `self._down` has the operators of the down projections, by the number of the expert. Returns the message of the
        refit with the number of the expert; "" if the refit has none. RuntimeError if the refit is not finite.
        """
        operator = self._down[expert]
        if not bool(torch.isfinite(refit.weight).all()):
            raise RuntimeError(
                f"the refit of {operator.name} failed: weights hold NaN or Inf. Pass expert_refit=False."
            )
        weight_before = operator.read()
        operator.write(refit.weight)
        # `write` rounds to the dtype of the operator, so the change is not that of `refit.weight`
        change = operator.read() - weight_before
        self._update_residuals(expert, change)
        return f"expert {expert}: {refit.message}" if refit.message else ""

    def _problems_by_text(self, expert: int) -> list[LayerProblem]:
        """Sum up the problem of an expert on each text of the calibration whose tokens reach it.

        Such a problem asks for a weight [out, in] of the down projection, so that the sum of all experts comes close to
        its targets `Y`. Held-out batches and padding are left out. `self._residuals` has `Y - E*` of each batch, and
        `self._down` the operators of the down projections, by the number of the expert. Nothing is changed.
        """
        operator = self._down[expert]
        weight = operator.read()
        device = self._activations.device
        sums = {text: GroupSums(weight.shape[1], device) for text in self._texts_of(expert)}
        for batch, residual in enumerate(self._residuals):
            text = self._activations.sources[batch]
            if self._activations.held_out[batch] or text not in sums:
                continue

            # inputs of the tokens that reach the expert, and the numbers of these tokens in the batch
            inputs, tokens = self._weighted_inputs(expert, batch)
            by_token = residual.flatten(0, 1)  # [batch, sequence, out] -> [tokens, out]
            residual_rows = by_token.index_select(0, tokens.to(residual.device))
            # what the expert should add to E*: what is missing, and what it adds now
            targets = residual_rows.to(device).float() + inputs @ weight.T
            is_real = self._mask(batch).reshape(-1)[tokens]
            sums[text].add(inputs[is_real], "targets", targets[is_real])

        problems = list[LayerProblem]()
        for of_text in sums.values():
            # One problem each, because there is one operator. `dense_share` counts only without "targets".
            problems += of_text.problems([operator], [weight], dense_share=1.0)
        return problems

    def _texts_of(self, expert: int) -> list[str | None]:
        """Name the texts of which tokens to fit reach an expert, in the order of the batches; changes nothing.

        `self._batches` has what the router has assigned in each batch, and `self._activations.sources` the text of each
        batch. A calibration on one text has one name, which may be `None`.
        """
        texts = list[str | None]()
        for batch, assigned in enumerate(self._batches):
            source = self._activations.sources[batch]
            if self._activations.held_out[batch] or source in texts:
                continue
            is_real = self._mask(batch).reshape(-1)
            if bool(is_real[assigned.tokens_of(expert)].any()):
                texts.append(source)
        return texts

    def _mask(self, batch: int) -> Tensor:
        """Tell which tokens of a batch are real, and no padding: bool [batch, sequence], on the layer's device."""
        mask = self._activations.token_masks[batch]
        if mask is None:
            shape = self._residuals[batch].shape[:2]
            mask = torch.ones(shape, dtype=torch.bool, device=self._activations.device)
        return mask

    def _update_residuals(self, expert: int, change: Tensor) -> None:
        """Update `self._residuals`, which are `Y - E*` of each batch, after one down projection has changed; in place.

        `E*` are the outputs of the experts that stay, and `Y` their targets. `expert` is the number of the expert, from
        0, among those that stay. `change` [out, in] is its new weight minus the one before. The inputs of the expert
        are computed again: nothing else runs or changes.
        """
        for batch, residual in enumerate(self._residuals):
            # inputs times the router's weights, and the numbers of their tokens in the batch
            inputs, tokens = self._weighted_inputs(expert, batch)
            change_of_outputs = (inputs @ change.T).to(residual.device)  # [tokens, out]
            tokens = tokens.to(residual.device)
            # [batch, sequence, out] -> [tokens, out], a view because a residual is contiguous: `residual` is written
            by_token = residual.flatten(0, 1)
            changed = by_token.index_select(0, tokens).float() - change_of_outputs
            by_token[tokens] = changed.to(by_token.dtype)

    def _weighted_inputs(self, expert: int, batch: int) -> tuple[Tensor, Tensor]:
        """Compute `p_e z_e` [tokens, in], float32: router's weights `p_e`, inputs `z_e` of an expert's down projection.

        Returns also the numbers in the batch of the tokens that reach the expert, int64. `self._batches` has what the
        router has assigned in each batch. Nothing is changed.
        """
        assigned = self._batches[batch]
        inputs = self._down[expert].inputs(assigned, self._activations.device).float()
        part = assigned.part(expert)  # the slice of the expert
        if assigned.weights is not None:  # otherwise the inputs are weighted already
            inputs = inputs * assigned.weights[part].float()
        return inputs, assigned.tokens[part]

    def _energy_without_padding(self, batch: int, values: Tensor) -> float:
        """Compute the squared norm of `values` [batch, sequence, out] of the batch with a number, without padding."""
        of_real_tokens = self._activations.rows(values.to(self._activations.device), batch)
        return float(torch.linalg.vector_norm(of_real_tokens.float()).double().square())

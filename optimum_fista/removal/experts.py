"""Removing experts of a mixture: which experts are removed, and how the others compensate for them.

Experts are chosen as in REAP (arXiv 2510.13999). Unlike there, the kept experts are refitted afterwards, on the tokens
that the router then sends them. An expert is refitted only if this also helps on tokens that the fit did not use.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from optimum_fista.model.activations import ActivationStore
from optimum_fista.model.correction import LayerTargets, tokens_of
from optimum_fista.model.experts import AssignedTokens, FusedExperts, split_experts
from optimum_fista.model.gram import GroupSums
from optimum_fista.model.inputs import LayerActivations
from optimum_fista.removal.parts import Part
from optimum_fista.solve.problem import InputStatistics, LayerProblem, relative
from optimum_fista.solve.refit import refit_columns

ROUNDS = 3  # of refits of every expert, with the others as they are then; each round gains less


def experts_of(part: Part, layer_name: str, layer: nn.Module) -> FusedExperts:
    """The experts of a mixture in a decoder layer, or in a copy of it."""
    return FusedExperts(part.name, layer.get_submodule(part.name.removeprefix(f"{layer_name}.")))


def score_experts(
    experts: FusedExperts, targets: LayerTargets
) -> tuple[Tensor, Tensor, ActivationStore]:
    """Run the decoder layer on its inputs, and measure the saliency of its experts on tokens that are not held out.

    Returns how many tokens the router sends to each expert, int64 [experts]; its saliency, float64 [experts]: the mean
    over these tokens of the norm of its output times the router's weight (REAP, eq. 9); and the targets for the sum of
    all experts (`LayerTargets.expert_targets`).
    """
    activations = targets.activations
    norms = torch.zeros(len(experts), dtype=torch.float64, device=activations.device)
    counts = torch.zeros(len(experts), dtype=torch.int64, device=activations.device)
    wanted = activations.store()

    def see(expert: int, tokens: Tensor, outputs: Tensor) -> None:
        batch = len(wanted)  # the number of this batch: its target is added after it has run
        if not activations.held_out[batch]:
            mask = activations.token_masks[batch]
            real = outputs if mask is None else outputs[mask.reshape(-1)[tokens]]
            # Norms in float32, their sum over all tokens in float64: only that has many terms.
            norms[expert] += torch.linalg.vector_norm(real.detach().float(), dim=-1).sum(
                dtype=torch.float64
            )
            counts[expert] += len(real)

    with split_experts(experts.operators, see):
        for target in targets.expert_targets():
            wanted.append(target)
    if not bool(torch.isfinite(norms).all()):
        why = "the model is damaged there, or overflows its dtype; try float32 or bfloat16"
        raise ValueError(f"the outputs of {experts.name} hold NaN or Inf: {why}.")
    return counts.cpu(), (norms / counts.clamp_min(1)).cpu(), wanted


def experts_to_keep(saliency: Tensor, count: int, equal_runs: int = 1) -> tuple[int, ...]:
    """Choose the most salient experts, in rising order, equally many of every run; the first ones if equal."""
    by_run = saliency.view(equal_runs, -1)  # [experts] -> [runs, experts of a run]
    best = by_run.argsort(dim=1, descending=True, stable=True)[:, : count // equal_runs]
    first = torch.arange(equal_runs)[:, None] * by_run.shape[1]
    return tuple(sorted((best + first).flatten().tolist()))


class SmallerMixture:
    """A mixture without some of its experts, on the tokens that its router now sends to the others.

    Its experts return together, for a token that the router sends to the experts e with the weights p_e,

        E* = sum_e p_e (D_e z_e + b_e),

    where `D_e` is the down projection of expert e and `z_e` its input. Only down projections are refitted, so `E*` is
    linear in them. `hidden_states` enter the layer, and `wanted` are the targets `Y` [batch, sequence, out] for `E*`.
    The inputs of an expert are not kept: they are computed again from the input of the mixture each time.
    """

    def __init__(
        self,
        experts: FusedExperts,
        activations: LayerActivations,
        hidden_states: Sequence[Tensor],
        wanted: ActivationStore,
    ) -> None:
        self.experts = experts
        self._down = [operator for operator in experts.operators if operator.kind == "down_proj"]
        self._activations = activations
        self._residuals: list[Tensor] = []  # Y - E*; not in a file, because every refit changes it
        self._energies = dict.fromkeys(
            (False, True), 0.0
        )  # || Y ||^2 of tokens to fit, and of those held out
        place = activations.device if isinstance(activations.storage, Path) else activations.storage

        def see(batch: int, assigned: AssignedTokens) -> None:
            target = wanted[batch].to(activations.device)
            found = tokens_of(experts.outputs(assigned), target.shape[:2].numel()).view(
                target.shape
            )
            self._residuals.append((target - found).to(place))
            self._energies[activations.held_out[batch]] += self._energy(batch, target)

        self._batches = activations.assigned_tokens(experts, hidden_states, see)

    def errors(self) -> tuple[float, float | None]:
        """`|| E* - Y ||_F / || Y ||_F` on the tokens to fit, and on those held out, `None` if there are none."""
        squares = dict.fromkeys((False, True), 0.0)
        for batch, residual in enumerate(self._residuals):
            squares[self._activations.held_out[batch]] += self._energy(batch, residual)
        fitted, unseen = (relative(squares[kind], self._energies[kind]) for kind in (False, True))
        return fitted, unseen if any(self._activations.held_out) else None

    def refit(self, write: Callable[[int, Tensor], None]) -> tuple[int, str]:
        """Refit the down projections, one expert after another (block coordinate descent).

        With all other experts fixed, expert e minimizes, over the tokens that reach it,

            || p_e D_e z_e - (Y - sum_{f != e} p_f (D_f z_f + b_f) - p_e b_e) ||_F^2,

        with the ridge of `refit_columns` towards its present weights. `write` is called with the number of every
        refitted expert and its weights [out, in]. Returns the number of refitted experts, and advice for the user.
        """
        if getattr(self.experts.module, "has_post_expert_norm", False):
            return 0, "not refitted: a norm follows every expert"
        refitted, messages = dict.fromkeys(range(len(self._down)), False), []
        for number in range(ROUNDS):
            for expert, operator in enumerate(self._down):
                weight = operator.read()
                halves = self._problems(expert, weight) if refitted[expert] or not number else ()
                # Tested in the first round only: afterwards the weights are fitted to both halves.
                if not halves or (not number and not _gain(*halves)):
                    continue
                first, last = halves
                statistics = InputStatistics(
                    first.gram + last.gram, sum(p.statistics.num_tokens for p in halves)
                )
                energies = first.output_energies + last.output_energies
                problem = LayerProblem(
                    weight, statistics, first.target + last.target, energies, first.name
                )
                found, message = refit_columns(
                    problem, torch.ones_like(weight[0], dtype=torch.bool)
                )
                if not bool(torch.isfinite(found).all()):
                    raise RuntimeError(
                        f"the refit of {operator.name} failed: weights hold NaN or Inf."
                    )
                operator.write(found)
                self._move(expert, operator.read() - weight)
                refitted[expert] = True
                messages += [f"expert {expert}: {message}"] * bool(message)
        chosen = [expert for expert, done in refitted.items() if done]
        for expert in chosen:
            write(expert, self._down[expert].read())
        return len(chosen), "; ".join(messages)

    def _problems(self, expert: int, weight: Tensor) -> tuple[LayerProblem, ...]:
        """The problems of an expert on the first and last halves of sequences; empty if a half has no token for it."""
        operator, device = self._down[expert], self._activations.device
        sums = [GroupSums(weight.shape[1], device) for _ in range(2)]
        for batch, residual in enumerate(self._residuals):
            if self._activations.held_out[batch]:
                continue
            inputs, tokens = self._inputs(expert, batch)
            mask = self._activations.token_masks[batch]
            if mask is None:
                mask = torch.ones(residual.shape[:2], dtype=torch.bool, device=device)
            real = mask.reshape(-1)[tokens]
            early = (mask.cumsum(1) <= mask.sum(1, keepdim=True) // 2).reshape(-1)[
                tokens
            ]  # of the real tokens
            own = (
                residual.flatten(0, 1)[tokens.to(residual.device)].to(device).float()
            )  # of the tokens that it gets
            targets = own + inputs @ weight.T  # Y - E* without what these weights add to E*
            for half, counted in zip(sums, (early & real, ~early & real), strict=True):
                half.add(inputs[counted], "targets", targets[counted])
        if not all(half.num_tokens for half in sums):
            return ()
        return tuple(next(half.problems([operator], [weight], 1.0)) for half in sums)

    def _move(self, expert: int, change: Tensor) -> None:
        """Update `Y - E*` for a change of an expert's weights."""
        for batch, residual in enumerate(self._residuals):
            inputs, tokens = self._inputs(expert, batch)
            moved, places = (inputs @ change.T).to(residual.device), tokens.to(residual.device)
            flat = residual.flatten(0, 1)  # a view
            flat[places] = (flat[places].float() - moved).to(flat.dtype)

    def _inputs(self, expert: int, batch: int) -> tuple[Tensor, Tensor]:
        """`p_e z_e` [tokens, in] of an expert, float32, and the tokens that reach it."""
        assigned = self._batches[batch]
        inputs = self._down[expert].inputs(assigned, self._activations.device).float()
        part = assigned.part(expert)
        return inputs if assigned.weights is None else inputs * assigned.weights[
            part
        ].float(), assigned.tokens[part]

    def _energy(self, batch: int, values: Tensor) -> float:
        """Squared norm of the real tokens."""
        real = self._activations.rows(values.to(self._activations.device), batch)
        return float(torch.linalg.vector_norm(real.float()).double().square())


def _gain(first: LayerProblem, last: LayerProblem) -> bool:
    """Tell whether a fit to each of two problems is better on the other than the present weights: no overfitting."""
    for fitted, other in ((first, last), (last, first)):
        weight, _ = refit_columns(fitted, torch.ones_like(fitted.weight[0], dtype=torch.bool))
        if not other.squared_error(weight) < other.squared_error(other.weight):
            return False
    return True

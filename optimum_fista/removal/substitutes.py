"""The experts that replace removed ones in a routing table, chosen by what the mixture then returns.

A *routing table* [vocabulary, k] names the k experts of a token (`routing_table`). If an expert e is removed, its
entries need a substitute among the experts that stay. A mixture returns, for a token with the row r of the table,

    y = sum_j p_j E_(r_j)(x),

where `E` are the experts and `p` the weights that its router gives to those in the row. With the expert s in place of
e the router gives other weights, and the mixture returns `y_s`. The best substitute has the least mean of

    || y_s - y ||^2

over calibration tokens that the table sends to e. Only one entry of the row changes at a time: if more experts of the
row are removed, the others are taken as they are.

`experts.remove_experts` calls `choose_substitutes` for each mixture whose `Part` has a table, once it is known which
experts stay. A token is numbered by its place in the flattened batch [batch * sequence].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from optimum_fista import internals
from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.correction import LayerTargets
from optimum_fista.model.experts import FusedExperts
from optimum_fista.model.precision import quick_products
from optimum_fista.removal.parts import Part
from optimum_fista.removal.routing_table import removed_experts

# Calibration tokens on which the substitutes of one expert are compared: the first ones that it gets. All kept experts
# run on them.
NUM_TOKENS = 128


def choose_substitutes(
    part: Part, layer_name: str, experts: FusedExperts, targets: LayerTargets, kept: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """Choose the experts that may replace each removed one in the routing table of a mixture.

    The decoder layer runs once on all batches, up to its experts; held-out batches and padding are not used. Nothing is
    changed.

    Args:
        part: The mixture; `part.table` is the name of its table in the model.
        layer_name: The name of its decoder layer, such as "model.layers.3".
        experts: Those of the mixture, all of them.
        targets: Has the decoder layer (`targets.activations.layer`), and the hidden states that enter it.
        kept: Numbers of the experts that stay, rising.

    Returns:
        For each removed expert, in the order of their numbers: as many kept experts as a row of the table has entries,
        the best one first. So there is one that a row does not name yet.

    Raises:
        UnsupportedArchitectureError: If the router does not read its experts from the table in the known way.
        ValueError: If the table names experts that do not exist.
    """
    removed = removed_experts(part.groups, kept)
    samples = _Samples(part, layer_name, experts, targets, removed)
    substitutes = list[tuple[int, ...]]()
    for expert in removed:
        sample = samples.of(expert)
        with quick_products():
            errors = _errors_with_substitutes(sample, expert, kept, experts, samples.router)
        # The sort is stable: of equally good experts, that with the lower number comes first.
        best_first = sorted(kept, key=lambda candidate: errors[candidate])
        num_entries = sample.rows.shape[1]  # of a row of the table
        substitutes.append(tuple(best_first[:num_entries]))
    return tuple(substitutes)


class _TableRouter:
    """A router that reads the experts of a token from a table, with any other rows in place of the table's."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        arguments: tuple[Any, ...],
        keywords: Mapping[str, Any],
    ) -> None:
        """Remember how the router is called; nothing runs.

        `name` is that of the table in the model, such as "model.layers.0.mlp.gate.tid2eid", and `module` is the router,
        which has it. `arguments` and `keywords` are those of one call: hidden states [..., hidden] and ids of tokens.
        """
        self.name = name
        self.module = module
        self._leaf = name.rpartition(".")[2]
        self._call = (arguments, keywords)

    @property
    def table(self) -> Tensor:
        """The table itself, whole numbers [vocabulary, k]."""
        table: Tensor = getattr(self.module, self._leaf)
        return table

    def weights(self, hidden_states: Tensor, rows: Tensor) -> Tensor:
        """Run the router on tokens with the given rows of the table; returns its weights for them, float32 [tokens, k].

        `hidden_states` [tokens, hidden] enter the router, and `rows` [tokens, k] are numbers of experts. The router
        runs with `rows` as its table, and with the tokens' places in it as their ids. Its own table stays as it is.
        """
        ids = torch.arange(len(rows), device=rows.device)

        def replaced(tensor: Tensor) -> Tensor:
            """Return the hidden states, or the ids, with as many axes as the `tensor` of the recorded call has."""
            values = hidden_states if tensor.is_floating_point() else ids
            new_axes = (None,) * (tensor.ndim - values.ndim)  # such as [tokens] -> [1, tokens]
            return values[new_axes]

        arguments, keywords = internals.tensors_replaced(self._call, replaced)
        rows_as_table = {self._leaf: rows.to(self.table.dtype)}
        output = functional_call(self.module, rows_as_table, arguments, keywords)
        for value in internals.leaves_of(output):
            is_weights = isinstance(value, Tensor) and value.is_floating_point()
            if is_weights and value.shape[-1] == rows.shape[1]:
                return value.reshape(rows.shape).float()
        raise self.unknown()

    def unknown(self) -> UnsupportedArchitectureError:
        """Make the error that says that the router uses its table in an unknown way."""
        return UnsupportedArchitectureError(
            f"{self.name} ({type(self.module).__name__}) is not read as a table with the experts of every token, so "
            "experts can't be removed: use a pattern that removes no experts, such as '2:4'."
        )


@dataclass(frozen=True)
class _Sample:
    """Calibration tokens of one expert, as they enter the mixture."""

    hidden_states: Tensor  # [tokens, hidden], that enter the experts
    router_states: Tensor  # [tokens, hidden], that enter the router
    rows: Tensor  # int64 [tokens, k], the experts of each token; the expert is one of them


class _Samples:
    """Calibration tokens of the experts that are removed, up to `NUM_TOKENS` for each."""

    router: _TableRouter

    def __init__(
        self,
        part: Part,
        layer_name: str,
        experts: FusedExperts,
        targets: LayerTargets,
        removed: Sequence[int],
    ) -> None:
        """Run the decoder layer on all batches up to its experts, and keep the first tokens of each removed expert.

        `removed` are the numbers of these experts; the other arguments are those of `choose_substitutes`. Sets
        `router`. Hooks are on the router and on the experts only while the layer runs.
        """
        assert part.table is not None
        activations = targets.activations
        name_in_layer = part.table.removeprefix(f"{layer_name}.")
        router = activations.layer.get_submodule(name_in_layer.rpartition(".")[0])
        router_calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def see_router(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            """Append the arguments of the router to `router_calls`; a forward pre-hook."""
            router_calls.append((arguments, keywords))

        # By the number of the expert; `None` has tokens of any expert.
        self._of_expert = dict[int | None, list[_Sample]]()
        for expert in (None, *removed):
            self._of_expert[expert] = []
        hidden_states_of_batches = targets.entering.to_prune_on
        with router.register_forward_pre_hook(see_router, with_kwargs=True):
            calls = activations.arguments_of(experts.module, hidden_states_of_batches)
            for batch, (arguments, keywords) in enumerate(calls):
                router_arguments, router_keywords = router_calls.pop()
                if batch == 0:
                    self.router = _TableRouter(
                        part.table, router, router_arguments, router_keywords
                    )
                    self._require_experts(part.groups)
                if activations.held_out[batch]:
                    continue
                mask = activations.token_masks[batch]  # [batch, sequence], True = no padding
                is_real = None if mask is None else mask.reshape(-1)
                self._add_batch(
                    experts.values(arguments, keywords),
                    router_values=internals.leaves_of((router_arguments, router_keywords)),
                    is_real=is_real,
                )

    def of(self, expert: int) -> _Sample:
        """Return the tokens of an expert.

        If the table sends no calibration token to it, these are tokens of other experts, and it takes the place of the
        first expert of each.
        """
        of_expert = self._of_expert[expert]
        if of_expert:
            return _joined(of_expert)
        sample = _joined(self._of_expert[None])
        rows = sample.rows.clone()
        rows[:, 0] = expert
        return _Sample(sample.hidden_states, sample.router_states, rows)

    def _require_experts(self, num_experts: int) -> None:
        """Refuse a table that names experts beyond the `num_experts` of the mixture; `self.router` has the table."""
        least = int(self.router.table.min())
        largest = int(self.router.table.max())
        if least < 0 or largest >= num_experts:
            raise ValueError(
                f"{self.router.name} names experts from {least} to {largest}, and the mixture has {num_experts}: the "
                "model is damaged there; download it again."
            )

    def _add_batch(
        self,
        values: Sequence[Any],
        *,
        router_values: Sequence[Any],
        is_real: Tensor | None,
    ) -> None:
        """Add tokens of a batch to the samples that have fewer than `NUM_TOKENS`.

        Args:
            values: The arguments of the experts: hidden states [tokens, hidden], the experts that the router has
                chosen for each token [tokens, k], and its weights for them [tokens, k].
            router_values: Everything that the router was called with: hidden states [..., hidden], ids of tokens [...].
            is_real: Bool [tokens], False for padding; `None` if all tokens are real.

        Raises:
            UnsupportedArchitectureError: If the router is not known (`_states_of_router`).
        """
        hidden_states, chosen, weights = values
        hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        chosen = chosen.reshape(len(hidden_states), -1).long()
        router_states = self._states_of_router(
            router_values, chosen=chosen, weights=weights.reshape(chosen.shape)
        )
        # In most models router and experts get the same hidden states, which are kept once then.
        are_same = torch.equal(router_states, hidden_states)

        if is_real is None:
            is_real = torch.ones(len(chosen), dtype=torch.bool, device=chosen.device)
        for expert, samples in self._of_expert.items():
            num_missing = NUM_TOKENS - sum(len(sample.rows) for sample in samples)
            if num_missing <= 0:
                continue
            is_own = is_real
            if expert is not None:
                is_own = is_real & (chosen == expert).any(dim=1)
            tokens = is_own.nonzero()[:num_missing, 0]
            if len(tokens):
                states_of_tokens = hidden_states[tokens]
                router_states_of_tokens = states_of_tokens if are_same else router_states[tokens]
                samples.append(_Sample(states_of_tokens, router_states_of_tokens, chosen[tokens]))

    def _states_of_router(
        self, router_values: Sequence[Any], *, chosen: Tensor, weights: Tensor
    ) -> Tensor:
        """Return the hidden states [tokens, hidden] that entered the router; refuse a router that is not known.

        The experts must get what the table says, with the weights that the router gives to rows of the table
        (`self.router`). Otherwise an UnsupportedArchitectureError is raised.

        Args:
            router_values: As in `_add_batch`.
            chosen: The experts that each token was sent to, int64 [tokens, k].
            weights: The router's weights for them, [tokens, k].
        """
        tensors = [value for value in router_values if isinstance(value, Tensor)]
        states = [tensor for tensor in tensors if tensor.is_floating_point()]
        ids = [tensor for tensor in tensors if not tensor.is_floating_point()]
        if len(states) != 1 or len(ids) != 1:
            raise self.router.unknown()
        rows = self.router.table[ids[0].reshape(-1)].long()
        if not torch.equal(rows, chosen):
            raise self.router.unknown()

        router_states = states[0].reshape(-1, states[0].shape[-1])
        # The first tokens are enough to see whether weights for other rows can be computed.
        some = slice(16)
        weights_again = self.router.weights(router_states[some], chosen[some])
        if not torch.allclose(weights_again, weights[some].float(), rtol=2e-2, atol=1e-4):
            raise self.router.unknown()
        return router_states


def _joined(samples: Sequence[_Sample]) -> _Sample:
    """Join samples of several batches."""
    return _Sample(
        torch.cat([sample.hidden_states for sample in samples]),
        torch.cat([sample.router_states for sample in samples]),
        torch.cat([sample.rows for sample in samples]),
    )


def _errors_with_substitutes(
    sample: _Sample,
    expert: int,
    candidates: Sequence[int],
    experts: FusedExperts,
    router: _TableRouter,
) -> dict[int, float]:
    """Measure how much the output of the mixture changes if one expert is replaced, by the number of the substitute.

    It is the mean of `|| y_s - y ||^2` over the tokens of `sample`, all of which `expert` gets. Tokens whose row names
    the candidate already are left out, because they would get another substitute; with no token left, the error is
    infinite. Changes nothing.
    """
    rows = sample.rows
    outputs = _outputs_of_rows(sample, experts)  # [tokens, k, hidden]
    dense_weights = router.weights(sample.router_states, rows)
    expected = (dense_weights[..., None] * outputs).sum(dim=1)  # y, [tokens, hidden]
    is_replaced = rows == expert  # [tokens, k]
    tokens = torch.arange(len(rows), device=rows.device)

    errors = dict[int, float]()
    for candidate in candidates:
        new_rows = torch.where(is_replaced, candidate, rows)
        weights = router.weights(sample.router_states, new_rows)
        weights_of_others = weights.masked_fill(is_replaced, 0.0)
        weight_of_candidate = (weights - weights_of_others).sum(dim=1, keepdim=True)
        of_others = (weights_of_others[..., None] * outputs).sum(dim=1)
        of_candidate = experts.output_of(candidate, sample.hidden_states, tokens).float()
        change = of_others + weight_of_candidate * of_candidate - expected  # y_s - y

        is_named_already = (rows == candidate).any(dim=1)
        squares = change.square().sum(dim=1)[~is_named_already]
        errors[candidate] = float(squares.double().mean()) if len(squares) else float("inf")
    return errors


def _outputs_of_rows(sample: _Sample, experts: FusedExperts) -> Tensor:
    """Run the experts that each token of a sample has in its row; float32 [tokens, k, hidden], without weights."""
    rows = sample.rows
    outputs = torch.zeros(
        (*rows.shape, sample.hidden_states.shape[1]), dtype=torch.float32, device=rows.device
    )
    for expert in rows.unique().tolist():
        tokens, places = (rows == expert).nonzero(as_tuple=True)
        of_expert = experts.output_of(expert, sample.hidden_states[tokens], tokens)
        outputs[tokens, places] = of_expert.float()
    return outputs

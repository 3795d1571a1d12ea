"""How many zeros every operator gets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from optimum_fista.config import FistaPruningConfig
from optimum_fista.memory import is_out_of_memory
from optimum_fista.model.operator import ExpertOperator, LinearOperator
from optimum_fista.model.sensitivity import DenseLoss, measure_sensitivities
from optimum_fista.solve.allocation import allocate, removal_cost
from optimum_fista.solve.pattern import SparsityPattern

_LEAST_TOKENS = 64
"""Outputs of an operator are weighted by gradients on no fewer tokens."""


@dataclass
class Budgets:
    """Sparsity patterns of all operators."""

    config: FistaPruningConfig
    # Of the operators that share the zeros of the model.
    sparsities: dict[str, float] = field(default_factory=dict)
    # What an error in each of their outputs costs, [out], nats; they share the zeros of their group.
    output_weights: dict[str, Tensor] = field(default_factory=dict)
    # Operators that the loss did not feel; they keep the average sparsity.
    unseen: list[str] = field(default_factory=list)
    # Decoder layers to remove, in the order in which they were chosen, each with the loss without it and those before.
    removed_layers: list[tuple[int, float]] = field(default_factory=list)

    def pattern_for(self, name: str) -> SparsityPattern:
        """The sparsity pattern of the operator called `name`."""
        pattern = self.config.pattern_for(name)
        return replace(pattern, sparsity=self.sparsities[name]) if name in self.sparsities else pattern


def share_budgets(loss: DenseLoss, operators: Mapping[str, LinearOperator], config: FistaPruningConfig) -> Budgets:
    """Allocate the zeros of `config` to the operators that take part. Uniform budgets run nothing.

    Experts of a mixture see few tokens each, so all of a kind in a decoder layer get the same sparsity.
    """
    budgets = Budgets(config)
    sharing = {name: operator for name, operator in operators.items() if config.shares_budget(name)}
    if not sharing or not config.sparsity:
        return budgets
    instead = "allocation='uniform' (--allocation uniform)"
    try:
        found = measure_sensitivities(loss, sharing)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise ValueError(
                f"allocation='fisher' takes gradients of the loss, and they can't be computed: {error}. If the model "
                f"runs but can't be differentiated, pass {instead}."
            ) from error
        # It is one sequence at a time already.
        raise torch.OutOfMemoryError(
            f"the device ran out of memory in the gradients of the loss on one sequence: pass {instead} or shorter "
            f"sequences (--sequence-length) [{error}]"
        ) from error
    pools: dict[str, list[str]] = {}
    for name, operator in sharing.items():
        key = f"{operator.experts.name} {operator.kind}" if isinstance(operator, ExpertOperator) else name
        pools.setdefault(key, []).append(name)
    costs: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for key, names in pools.items():
        if not any(found[name].is_felt for name in names):
            budgets.unseen.extend(names)
            continue
        saliencies = (found[n].saliency(sharing[n].read()) for n in names)
        costs[key] = sum(removal_cost(saliency, config.sparsity) for saliency in saliencies)
        sizes[key] = sum(math.prod(sharing[n].shape) for n in names)
        if config.scope == "matrix":
            budgets.output_weights |= {n: found[n].outputs for n in names if found[n].seen >= _LEAST_TOKENS}
    if costs:
        for key, sparsity in allocate(costs, sizes, config.sparsity).items():
            names = pools[key]
            # whole zeros: experts of one kind get equal numbers, the first ones one more if it doesn't divide
            fewest, more = divmod(round(sparsity * sizes[key]), len(names))
            size = sizes[key] // len(names)
            budgets.sparsities |= {n: (fewest + (i < more)) / size for i, n in enumerate(names)}
    return budgets

"""Choosing the operators to prune."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.architecture import (
    DecoderLayers,
    find_operators,
    left_out,
    matches,
    shared_weights,
)
from optimum_fista.model.offload import offload_hook
from optimum_fista.model.operator import LinearOperator
from optimum_fista.run.config import FistaPruningConfig


def require_finite(operators: Sequence[LinearOperator]) -> None:
    """Refuse damaged weights, with one transfer for all operators."""
    if not operators:
        return
    place = operators[0].parameter.device
    finite = torch.stack([torch.isfinite(operator.parameter).all().to(place) for operator in operators])
    for operator, is_finite in zip(operators, finite.tolist(), strict=True):
        if not is_finite:
            raise ValueError(f"the weight of {operator.name} holds NaN or Inf: the model is damaged, load it again.")


def require_parameter(operator: LinearOperator) -> None:
    """Refuse a weight that is computed from other tensors in every forward pass: zeros in it would not last."""
    if operator.tensor not in operator.owner._parameters:
        raise UnsupportedArchitectureError(
            f"the weight of {operator.name} is computed from other tensors (weight_norm, spectral_norm, "
            "torch.nn.utils.prune or a parametrization): make it a parameter again (remove_weight_norm, "
            "remove_spectral_norm, prune.remove, remove_parametrizations), or leave it dense by exclude."
        )


def choose_operators(
    layers: DecoderLayers, config: FistaPruningConfig, *, may_be_none: bool = False
) -> tuple[dict[str, dict[str, LinearOperator]], dict[str, str]]:
    """Operators to prune by decoder layer, and those left dense with the reason."""
    chosen: dict[str, dict[str, LinearOperator]] = {}
    left_dense: dict[str, str] = {}
    shared = shared_weights(layers)
    for layer_name, layer in layers:
        chosen[layer_name] = {}
        left_dense |= left_out(layer_name, layer, config.exclude)
        for name, operator in find_operators(layer_name, layer, config.exclude).items():
            reason = config.reason_left_dense(name) or shared.get(name)
            if reason is not None:
                left_dense[name] = reason
                continue
            require_parameter(operator)
            config.pattern_for(name).require_shape(operator.shape, name)
            chosen[layer_name][name] = operator
    # others are checked when they are onloaded; a plan has no weights
    here = [
        o for group in chosen.values() for o in group.values() if not (offload_hook(o.owner) or o.parameter.is_meta)
    ]
    require_finite(here)
    if not any(chosen.values()) and not may_be_none:
        raise UnsupportedArchitectureError(
            f"no linear operator to prune in {layers.name}: looked for nn.Linear and Conv1D modules with "
            f"include={list(config.include)}, exclude={list(config.exclude)}, and found "
            f"{len(left_dense)}, all left dense: {', '.join(list(left_dense)[:4]) or 'none'}."
        )
    return chosen, left_dense


def idle_patterns(config: FistaPruningConfig, pruned: Sequence[str], left_dense: Sequence[str]) -> Iterator[str]:
    """What to say of name patterns of a configuration that match no operator, such as those that end with ".weight"."""
    names = [*pruned, *left_dense]
    for option in ("include", "exclude", "overrides"):
        idle = [p for p in getattr(config, option) if not any(matches(name, (p,)) for name in names)]
        if idle:
            shown = ", ".join(map(repr, idle))
            yield f"{option}: {shown} matches no linear operator of the decoder layers: {names[0]!r} is one."

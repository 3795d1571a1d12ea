"""What a run prunes: its operators, and the configuration that it has for each of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from optimum_fista.config import FistaPruningConfig
from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.architecture import DecoderLayers, find_operators, left_out
from optimum_fista.model.offload import offload_hook
from optimum_fista.model.operator import LinearOperator
from optimum_fista.model.parts import find_parts
from optimum_fista.prune.removal import PartsRemoval, Removal
from optimum_fista.solve.patterns import PartShare, WholeParts

logger = logging.getLogger(__name__)


def plan_run(
    model: PreTrainedModel, layers: DecoderLayers, config: FistaPruningConfig
) -> tuple[Removal, FistaPruningConfig, dict[str, dict[str, LinearOperator]], dict[str, str]]:
    """The removal that a resolved configuration asks for, and what it makes of the configuration.

    Also the operators to prune, by decoder layer, and those left dense with the reason.
    """
    if config.whole_parts is None:
        return Removal(config), config, *choose_operators(layers, config)
    if config.whole_parts.size is not None:
        config = _with_channels_for_size(model, config, config.whole_parts)
    removal = PartsRemoval.planned(model, config)
    mixtures = any(part.is_mixture for part in removal.plan.parts.values())
    may_be_none = bool(removal.num_removed_layers) or mixtures  # then something goes although no operator is pruned
    operators, left_dense = choose_operators(layers, removal.config, may_be_none=may_be_none)
    operators = removal.with_repairs(layers, operators)
    return removal, removal.config, operators, removal.reasons_left_dense(left_dense, operators)


def choose_operators(
    layers: DecoderLayers, config: FistaPruningConfig, *, may_be_none: bool = False
) -> tuple[dict[str, dict[str, LinearOperator]], dict[str, str]]:
    """Operators to prune by decoder layer, and those left dense with the reason."""
    chosen: dict[str, dict[str, LinearOperator]] = {}
    left_dense: dict[str, str] = {}
    for layer_name, layer in layers:
        chosen[layer_name] = {}
        left_dense |= left_out(layer_name, layer, config.exclude)
        for name, operator in find_operators(layer_name, layer, config.exclude).items():
            reason = config.reason_left_dense(name) or layers.shared.get(name)
            if reason is not None:
                left_dense[name] = reason
                continue
            if operator.tensor not in operator.owner._parameters:  # zeros in it would not last
                raise UnsupportedArchitectureError(
                    f"the weight of {operator.name} is computed from other tensors (weight_norm, spectral_norm, "
                    "torch.nn.utils.prune or a parametrization): make it a parameter again (remove_weight_norm, "
                    "remove_spectral_norm, prune.remove, remove_parametrizations), or leave it dense by exclude."
                )
            config.pattern_for(name).require_shape(operator.shape, name)
            chosen[layer_name][name] = operator
    # others are checked when they are onloaded; a plan has no weights
    here = (operator for group in chosen.values() for operator in group.values())
    require_finite([o for o in here if not (offload_hook(o.owner) or o.parameter.is_meta)])
    if not any(chosen.values()) and not may_be_none:
        raise UnsupportedArchitectureError(
            f"no linear operator to prune in {layers.name}: looked for nn.Linear and Conv1D modules with "
            f"include={list(config.include)}, exclude={list(config.exclude)}, and found "
            f"{len(left_dense)}, all left dense: {', '.join(list(left_dense)[:4]) or 'none'}."
        )
    return chosen, left_dense


def require_finite(operators: Sequence[LinearOperator]) -> None:
    """Refuse damaged weights, with one transfer for all operators."""
    if not operators:
        return
    place = operators[0].parameter.device
    finite = torch.stack([torch.isfinite(operator.parameter).all().to(place) for operator in operators])
    for operator, is_finite in zip(operators, finite.tolist(), strict=True):
        if not is_finite:
            raise ValueError(f"the weight of {operator.name} holds NaN or Inf: the model is damaged, load it again.")


def _with_channels_for_size(
    model: PreTrainedModel, config: FistaPruningConfig, pattern: WholeParts
) -> FistaPruningConfig:
    """Replace a pattern such as `bytes:0.75` by the share of the channels that has to go for it.

    All bytes of the weights count, each shared tensor once. Channels go because they cost least of all parts at every
    share that was measured (docs/results.md).
    """
    assert pattern.size is not None
    parts = find_parts(model, "channels")
    tensors = dict(model.named_parameters())
    whole = sum(tensor.nbytes for tensor in tensors.values())
    shrinking = [tensors[name] for part in parts.parts for name in part.tensors if name in tensors]
    channel = sum(tensor.nbytes for tensor in shrinking) / parts.groups  # one of every decoder layer
    step = PartShare.usual_step("channels", parts.groups)
    least = -(-parts.at_least // step) * step
    kept = math.floor((parts.groups - (1 - pattern.size) * whole / channel) / step) * step
    kept = min(kept, (parts.groups - 1) // step * step)
    if kept < least:
        smallest = 1 - (parts.groups - least) * channel / whole
        raise ValueError(
            f"pattern={config.pattern!r}: {smallest:.4f} of the model's bytes are left if {least} of {parts.groups} "
            f"channels stay in every decoder layer: pass at least {math.ceil(smallest * 1e4) / 1e4:g}."
        )
    found = str(PartShare.keeping("channels", kept, parts.groups))
    left = 1 - (parts.groups - kept) * channel / whole
    logger.info("pattern %s: %s leaves %.4f of the model's bytes", config.pattern, found, left)
    return replace(config, pattern=found, sparsity=None)

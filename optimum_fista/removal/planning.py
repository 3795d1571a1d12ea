"""Plan what a run takes from a model, before the run: `plan_removal` is the entry of this package.

The plan is a `Removal`. A *pattern* says which weights of a linear operator become zero, such as "2:4", or which whole
*parts* are removed, such as "heads:0.25" (channels, heads, experts or decoder layers). An operator without a pattern is
*left dense*, with a reason. Runs that remove tokens are planned by `tokens`.
"""

from collections.abc import Collection
from functools import partial

from optimum_fista.config import FistaPruningConfig
from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.choice import operators_to_prune
from optimum_fista.model.layers import DecoderLayers
from optimum_fista.removal.earlier_masks import EarlierMasks
from optimum_fista.removal.model_outline import ModelOutline
from optimum_fista.removal.parts import Part
from optimum_fista.removal.parts_removal import PartsRemoval
from optimum_fista.removal.removal import Removal, first_names
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.source.names import divided_weights


def plan_removal(
    layers: DecoderLayers, config: FistaPruningConfig, *, num_texts: int = 1
) -> Removal:
    """Decide what a run takes from a model: which operators get zeros, and which parts are removed.

    `config` is the user's; `layers` are those of the model, as `prunable_layers` finds them. `num_texts` says of how
    many texts the calibration is: experts are refitted to several texts only. Nothing is changed, and no weight is read
    except to refuse NaN and Inf. The loss of the model decides later which decoder layers are removed
    (`Removal.without_layers`). Raises ValueError if the pattern does not fit the model, and
    UnsupportedArchitectureError if there is nothing to prune or to remove.
    """
    refuse_tokens_removal(config)
    config = config.resolved()  # a copy with a choice for every option
    removal: Removal
    if config.whole_parts is not None:
        removal = PartsRemoval.planned(layers, config, num_texts=num_texts)
    else:
        removal = _removal_of_zeros(layers, config)
    for operators in removal.operators.values():  # those of each decoder layer
        for name, operator in operators.items():
            removal.patterns[name].require_shape(operator.shape, name)

    prunes_operators = any(removal.operators.values())
    # for these, no operator need be pruned
    removes_layers_or_experts = removal.num_removed_layers > 0 or bool(removal.mixtures)
    if not prunes_operators and not removes_layers_or_experts:
        left_dense = removal.left_dense
        reasons = [f"{name} ({reason})" for name, reason in left_dense.items()]
        shown = first_names(reasons) if reasons else "none"
        raise UnsupportedArchitectureError(
            f"no linear operator to prune in {layers.name}: of nn.Linear and Conv1D modules, include="
            f"{list(config.include)}, exclude={list(config.exclude)} found {len(left_dense)}, all left dense: {shown}."
        )
    return removal


def _removal_of_zeros(layers: DecoderLayers, config: FistaPruningConfig) -> Removal:
    """Choose the operators that get zeros, with the user's pattern for each.

    In `config`, options that the user left to the method are filled in. With `reorder_channels`, also the channels that
    change places before the run prunes them are found. Nothing in the model is changed.
    """
    channels = dict[str, Part]()  # by the name of the operator that reads them
    if config.reorder_channels:
        try:
            parts = ModelOutline(layers).parts("channels").parts
        except UnsupportedArchitectureError as error:
            raise UnsupportedArchitectureError(
                f"reorder_channels=True: {error} Leave it out."
            ) from error
        channels = {part.name: part for part in parts}

    divided = divided_weights(layers.model, layers.name)
    operators, left_dense = operators_to_prune(
        layers, config.exclude, partial(_reason_left_dense, config, divided)
    )
    patterns: dict[str, SparsityPattern] = {}  # by the name of the operator
    for operators_of_layer in operators.values():
        for name in operators_of_layer:
            patterns[name] = config.pattern_for(name)
    return Removal(
        layers=layers,
        config=config,
        operators=operators,
        patterns=patterns,
        left_dense=left_dense,
        channels=channels,
        earlier_masks=EarlierMasks.find(layers),
    )


def _reason_left_dense(
    config: FistaPruningConfig, divided: Collection[str], name: str
) -> str | None:
    """Say why the operator `name` stays dense; `None` if it is to be pruned.

    Either `config` leaves it dense, or its weight is among those that the files divide (`divided`).
    """
    reason = config.reason_left_dense(name)
    if reason is None and name in divided:
        reason = "the files keep its weight as several matrices, so its mask can't be saved"
    return reason


def refuse_tokens_removal(config: FistaPruningConfig) -> None:
    """Refuse a configuration that removes tokens for a model in memory, whose files are not known."""
    if config.tokens_removal is not None:
        raise ValueError(
            f"pattern={config.pattern!r} removes tokens from files, and their tokenizer: pass the model's folder or "
            "Hub id, and output_dir, to FistaPruner.prune."
        )


def require_zeros_to_pack(config: FistaPruningConfig, packed: bool) -> None:
    """Refuse `packed` for a run that removes whole parts or tokens."""
    removes = config.whole_parts is not None or config.tokens_removal is not None
    if packed and removes:
        raise ValueError(
            f"packed=True: pattern={config.pattern!r} leaves a dense model: there are no zeros to pack, unless an "
            "earlier run set some. Leave packed out, and pack the result then (optimum-fista pack)."
        )

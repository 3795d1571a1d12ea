"""Plan what a run takes from a model, before the run: `plan_removal` is the entry of this package.

Runs that remove tokens are planned by `tokens`.
"""

from optimum_fista.config import FistaPruningConfig
from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.choice import choose_operators
from optimum_fista.model.layers import DecoderLayers
from optimum_fista.removal.parts import ModelOutline, Part
from optimum_fista.removal.parts_removal import PartsRemoval
from optimum_fista.removal.removal import Removal, first_names
from optimum_fista.solve.pattern import SparsityPattern


def plan_removal(layers: DecoderLayers, config: FistaPruningConfig) -> Removal:
    """Decide what a run takes from a model: which operators get zeros, and which parts are removed.

    `config` is the user's; `layers` come from `prunable_layers`. Nothing is changed, and no weight is read except to
    refuse NaN and Inf. The loss of the model decides later which decoder layers go (`Removal.without_layers`).
    """
    if config.tokens_removal is not None:
        raise ValueError(
            f"pattern={config.pattern!r} removes tokens from files, and their tokenizer: pass the model's folder or "
            "Hub id, and output_dir, to FistaPruner.prune."
        )
    config = config.resolved()
    removal: Removal
    if config.whole_parts is not None:
        removal = PartsRemoval.planned(layers, config)
    else:
        removal = _removal_of_zeros(layers, config)
    for operators in removal.operators.values():
        for name, operator in operators.items():
            removal.patterns[name].require_shape(operator.shape, name)

    # to remove experts or decoder layers, no operator need be pruned
    prunes_operators = any(removal.operators.values())
    if not prunes_operators and not removal.num_removed_layers and not removal.mixtures:
        left_dense = removal.left_dense
        shown = first_names([f"{name} ({reason})" for name, reason in left_dense.items()]) or "none"
        raise UnsupportedArchitectureError(
            f"no linear operator to prune in {layers.name}: of nn.Linear and Conv1D modules, include="
            f"{list(config.include)}, exclude={list(config.exclude)} found {len(left_dense)}, all left dense: {shown}."
        )
    return removal


def _removal_of_zeros(layers: DecoderLayers, config: FistaPruningConfig) -> Removal:
    """Choose the operators that get zeros, with the user's pattern for each."""
    channels = dict[str, Part]()
    if config.reorder_channels:
        try:
            parts = ModelOutline(layers).parts("channels").parts
        except UnsupportedArchitectureError as error:
            raise UnsupportedArchitectureError(
                f"reorder_channels=True: {error} Leave it out."
            ) from error
        channels = {part.name: part for part in parts}

    patterns = dict[str, SparsityPattern]()

    def reason_left_dense(name: str) -> str | None:
        """Say why the operator `name` stays dense; otherwise note its pattern, so that it is read once."""
        reason = config.reason_left_dense(name)
        if reason is None:
            patterns[name] = config.pattern_for(name)
        return reason

    operators, left_dense = choose_operators(layers, config.exclude, reason_left_dense)
    return Removal(
        layers=layers,
        config=config,
        operators=operators,
        patterns=patterns,
        left_dense=left_dense,
        channels=channels,
    )


def require_zeros_to_pack(config: FistaPruningConfig, packed: bool) -> None:
    """Refuse `packed` for a run that removes whole parts or tokens."""
    removes = config.whole_parts is not None or config.tokens_removal is not None
    if packed and removes:
        raise ValueError(
            f"packed=True: pattern={config.pattern!r} leaves a dense model: there are no zeros to pack."
        )

"""Settings of a configuration that differ between decoder layers: `per_layer_config` of Transformers 5.24 and later.

Most configurations state one value for all decoder layers. Seven families of Transformers 5.24 (Gemma 4 is one) also
have *overrides*: settings of single decoder layers, by the number of the layer, such as `{5: {"head_dim": 512}}`. A
setting that has an override can't be read from the configuration itself: Transformers raises an error. This module is
the only one that reads and writes overrides. `parts` reads them to count the parts of every layer, and to scale their
numbers; `shrinking` gives them new numbers if decoder layers are removed; `described_model` writes them.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

from transformers import PreTrainedConfig

Overrides = dict[
    int, dict[str, Any]
]  # settings of single decoder layers, by the number of the layer


def overrides_of(config: PreTrainedConfig) -> Overrides | None:
    """Read the overrides of a text configuration; `None` if it has none, or if this Transformers knows none."""
    if not getattr(config, "is_heterogeneous", False):
        return None
    written = config.to_dict()["per_layer_config"]  # its keys are text, such as "05"
    return {int(number): dict(settings) for number, settings in written.items()}


def without_overrides(config: PreTrainedConfig) -> PreTrainedConfig:
    """Copy a text configuration without its overrides, so that every setting can be read.

    The copy is shallow: lists and dictionaries are shared. `config` is not changed.
    """
    common: Any = copy.copy(config)
    if overrides_of(config) is not None:
        common.per_layer_config = None
    return cast(PreTrainedConfig, common)


def values_by_layer(config: PreTrainedConfig, word: str) -> list[Any]:
    """The value of the setting `word` in every decoder layer that has one; a single value if there are no overrides."""
    common = getattr(without_overrides(config), word, None)
    overrides = overrides_of(config) or {}
    if not any(word in settings for settings in overrides.values()):
        return [] if common is None else [common]
    values = [
        overrides.get(number, {}).get(word, common) for number in range(config.num_hidden_layers)
    ]
    return [value for value in values if value is not None]


def scaled(overrides: Overrides, words: Collection[str], count: int, groups: int) -> Overrides:
    """Copy overrides, with the numbers of the settings `words` for `count` instead of `groups` groups."""
    return {
        number: {
            word: value * count // groups if word in words and value is not None else value
            for word, value in settings.items()
        }
        for number, settings in overrides.items()
    }


def renumbered(overrides: Overrides, stay: Sequence[int]) -> Overrides:
    """Copy the overrides of the decoder layers `stay`, a rising list, under their new numbers from 0."""
    return {new: dict(overrides[old]) for new, old in enumerate(stay) if old in overrides}


def change_settings(
    config: PreTrainedConfig, settings: Mapping[str, Any], overrides: Overrides | None
) -> None:
    """Write settings for all decoder layers into a text configuration, and its overrides, in place.

    A number replaces all entries of a list with an entry for each layer. `overrides` replace those of the
    configuration. `None` means that it has none.
    """
    text_config: Any = config  # older versions of Transformers declare no `per_layer_config`
    if overrides is not None:
        text_config.per_layer_config = None
    for word, value in settings.items():
        present = getattr(text_config, word, None)
        if isinstance(present, list) and present and not isinstance(value, list):
            value = [value] * len(present)  # an entry for each layer
        setattr(text_config, word, value)
    # last, because Transformers checks overrides against the other settings
    if overrides is not None:
        text_config.per_layer_config = overrides

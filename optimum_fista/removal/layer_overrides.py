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

# Settings of single decoder layers, by the number of the layer.
Overrides = dict[int, dict[str, Any]]


def overrides_of(config: PreTrainedConfig) -> Overrides | None:
    """Read the overrides of a text configuration; `None` if it has none, or if this Transformers knows none."""
    if not getattr(config, "is_heterogeneous", False):
        return None
    written = config.to_dict()["per_layer_config"]  # its keys are text, such as "05"
    return {int(number): dict(settings) for number, settings in written.items()}  # copies


def without_overrides(config: PreTrainedConfig) -> PreTrainedConfig:
    """Copy a text configuration without its overrides, so that every setting can be read.

    The copy is shallow: it shares lists and dictionaries with `config`, which is not changed.
    """
    common: Any = copy.copy(config)
    # Older versions of Transformers do not know the attribute, and have no overrides.
    if overrides_of(config) is not None:
        common.per_layer_config = None
    return cast(PreTrainedConfig, common)


def values_by_layer(config: PreTrainedConfig, word: str) -> list[Any]:
    """Read the values of the setting `word` from a text configuration, in the order of the decoder layers.

    There is one value for each decoder layer that has the setting, or a single value if no layer overrides it.
    """
    # `without_overrides` returns a copy, which can be read; `config` would raise an error for an overridden setting.
    common = getattr(without_overrides(config), word, None)
    overrides = overrides_of(config) or {}
    is_overridden = any(word in settings for settings in overrides.values())
    if not is_overridden:
        return [] if common is None else [common]

    values = list[Any]()
    for number in range(config.num_hidden_layers):
        settings_of_layer = overrides.get(number, {})
        value = settings_of_layer.get(word, common)
        if value is not None:
            values.append(value)
    return values


def scaled(
    overrides: Overrides, words: Collection[str], *, new_groups: int, old_groups: int
) -> Overrides:
    """Copy overrides, with some numbers in the proportion in which the number of groups of a part falls.

    `words` are the settings that change, such as "num_key_value_heads". Each of their values becomes `value *
    new_groups / old_groups`: 8 heads become 6 if 3 of 4 groups stay. Settings that a layer leaves open (None) and all
    other settings stay. Values are multiples of `old_groups`, so the result is exact. Only `_smaller_outline` passes
    other numbers, and takes the quotient rounded down.
    """
    scaled_overrides: Overrides = {}
    for number, settings in overrides.items():
        settings_of_layer = dict(settings)  # a copy
        for word in words:
            value = settings_of_layer.get(word)
            if value is not None:
                settings_of_layer[word] = (value * new_groups) // old_groups
        scaled_overrides[number] = settings_of_layer
    return scaled_overrides


def renumbered(overrides: Overrides, remaining: Sequence[int]) -> Overrides:
    """Copy the overrides of the decoder layers `remaining`, a rising list of numbers, under new numbers from 0."""
    return {new: dict(overrides[old]) for new, old in enumerate(remaining) if old in overrides}


def change_settings(
    config: PreTrainedConfig, settings: Mapping[str, Any], overrides: Overrides | None
) -> None:
    """Change the text configuration `config` in place: settings of all decoder layers, and the overrides.

    `settings` are by their names, such as {"intermediate_size": 24}. If the configuration has a list with an entry for
    each layer, a number replaces all entries. `overrides` replace all that the configuration has; `None` leaves them as
    they are.
    """
    text_config: Any = config  # older versions of Transformers declare no `per_layer_config`
    if overrides is not None:
        # so that every setting can be read
        text_config.per_layer_config = None
    for word, value in settings.items():
        present = getattr(text_config, word, None)
        # such a list has an entry for each layer
        if isinstance(present, list) and present and not isinstance(value, list):
            value = [value] * len(present)
        setattr(text_config, word, value)
    # last, because Transformers checks overrides against the other settings
    if overrides is not None:
        text_config.per_layer_config = overrides

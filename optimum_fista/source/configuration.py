"""Write a model's configuration in the words of the `config.json` from which it was loaded.

Transformers 5 gives several keys a new form when it saves a configuration: `rope_theta` moves into `rope_parameters`,
`torch_dtype` becomes `dtype`. Programs that know the old form then take default values without a word. So a result
keeps the keys of its source, and only values that the run has changed are others.

Three things are compared, all as JSON: the *source*, which is what its `config.json` holds; what Transformers makes of
the source (`before`); and the configuration to write (`after`). What differs between the last two is changed in the
first. A *section* is a dictionary in it that describes a part of the model, such as `text_config`. A *key* is that of a
JSON object; the attribute of a configuration may have another name (`attribute_map`).
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from optimum_fista import internals

# Keys that say from where, and by which version of Transformers, a configuration was read: no content of the model.
_NO_CONTENT = (internals.LOADED_FROM, "transformers_version")
_OLD_NAMES = {"dtype": "torch_dtype"}  # in every class; others have an `attribute_map`
logger = logging.getLogger(__name__)


def content_of(config: PreTrainedConfig, source: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the content of a `config.json` for `config`, in the form of its source where that is possible.

    Otherwise it is in the form of this version of Transformers, and a warning says so. Changes nothing.

    Args:
        config: The configuration of a result.
        source: The content of its source's `config.json`; `None` if it has none, as a GGUF file has none. If `config`
            describes a part of that model, such as its text decoder, the section of the part is the source.
    """
    in_new_form: dict[str, Any] = json.loads(config.to_json_string())
    section = None if source is None else _section_of(source, config)
    if section is None:
        return in_new_form

    try:
        content = _in_form_of(section, config)
    except Exception as error:
        # Transformers raises many kinds of errors, and a finished run is not lost for one.
        logger.debug("the source's config.json can't be compared: %s", error)
        content = None
    if content is None:
        logger.warning(
            "config.json is written in the form of this version of Transformers: the changes of %s can't be said in "
            "the form of its source",
            type(config).__name__,
        )
        return in_new_form
    return content


def _in_form_of(section: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any] | None:
    """Return a copy of `section` with the values of `config`; `None` if Transformers would read others from it.

    `section` is the content of the source's `config.json`, or the part of it that describes what `config` describes.
    Changes nothing.
    """
    content = copy.deepcopy(section)
    before = _all_values(_as_read(content, config))
    after = _all_values(config)
    _change_copies(content, before, after, config)  # this may change `after`, too
    # Keys of the source get their new values first, because the values of other keys, such as `layer_types`, may follow
    # from these. Only then are keys added.
    for may_add in (False, True):
        before = _all_values(_as_read(content, config))
        if before != after:
            _change(content, before, after, config, may_add=may_add)
    is_equal = _all_values(_as_read(content, config)) == after
    return content if is_equal else None


def source_content(source: Path | None) -> dict[str, Any] | None:
    """Return the content of `config.json` in a model's folder; `None` if there is none, or it is damaged by now."""
    if source is None:
        return None
    try:
        content = json.loads((source / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _section_of(source: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, Any] | None:
    """Copy what describes the model of `config` in `source`: all of it, or one section; `None` if nothing does.

    `source` is the content of a `config.json`. The first dictionary counts whose `model_type` is that of `config`.
    """
    inner_sections = [value for value in source.values() if isinstance(value, dict)]
    for section in (source, *inner_sections):
        if section.get("model_type") == config.model_type:
            return dict(section)
    return None


def _as_read(content: Mapping[str, Any], config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration, of the class of `config`, that Transformers makes of the content of a `config.json`."""
    return type(config).from_dict(copy.deepcopy(dict(content)))


def _all_values(config: PreTrainedConfig) -> dict[str, Any]:
    """Return all values of a configuration as JSON, defaults included, except those in `_NO_CONTENT`."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))

    def without_origin(section: dict[str, Any]) -> dict[str, Any]:
        """Return a section and those in it without the keys that say where it was read."""
        return {
            key: without_origin(value) if isinstance(value, dict) else value
            for key, value in section.items()
            if key not in _NO_CONTENT
        }

    return without_origin(values)


def _change(
    content: dict[str, Any],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    config: Any,
    *,
    may_add: bool,
) -> None:
    """Change `content` where `after` differs from `before`; the other arguments are only read.

    Args:
        content: The content of a `config.json`, or a section of it.
        before: What Transformers makes of `content`, as JSON.
        after: What Transformers is to make of it.
        config: The configuration that `after` describes; a plain dictionary or `None` if `content` is a section
            without a configuration of its own, such as `rope_parameters`.
        may_add: Whether keys may be added.
    """
    removed_keys = before.keys() - after.keys()
    for key in removed_keys:
        for name in _names_of(key, content, config):
            content.pop(name)

    for key, value in after.items():
        old: Any = before.get(key)
        is_unchanged = key in before and old == value
        if is_unchanged:
            continue
        # Where the value stands in `content`; empty if it is not there.
        names = _names_of(key, content, config)
        # Not `getattr`: some configurations refuse values that differ between decoder layers.
        inner_config = vars(config).get(key) if isinstance(config, PreTrainedConfig) else None
        is_section = isinstance(old, dict) and isinstance(value, dict)
        inner_content = content[names[0]] if names else None
        if is_section and isinstance(inner_content, dict):
            _change(inner_content, old, value, inner_config, may_add=may_add)
        elif is_section and not names and _has_changed_keys(content, old, value, inner_config):
            # Old multimodal models have the keys of their text decoder at the top, where programs read them.
            _change(content, old, value, inner_config, may_add=False)
        elif names:
            for name in names:
                content[name] = value
        elif may_add:
            content[key] = value


def _change_copies(
    content: dict[str, Any],
    before: Mapping[str, Any],
    after: dict[str, Any],
    config: PreTrainedConfig,
) -> None:
    """Change values at the top of `content` that repeat a value of a section, if the section's value is another now.

    Some models have the keys of their text decoder at the top and in `text_config`, too. Transformers reads those of
    the section, and other programs may read those at the top.

    Args:
        content: The content of a `config.json`, which is changed at the top only.
        before: What Transformers makes of `content`, as JSON.
        after: What Transformers is to make of it. Is changed, too: Transformers may keep values at the top as
            attributes, and these get the new values.
        config: The configuration that `after` describes. It is only read.
    """
    for section_name, old_section in before.items():
        new_section: Any = after.get(section_name)
        forms = (old_section, new_section, content.get(section_name))
        is_section_in_all = all(isinstance(form, dict) for form in forms)
        if not is_section_in_all:
            continue
        section_config = vars(config).get(section_name)
        for key, new_value in new_section.items():
            old_value = old_section.get(key)
            if old_value == new_value:
                continue
            # under which the key stands at the top: its name, or an old one
            for name in _names_of(key, content, section_config):
                repeats_old_value = content[name] == old_value
                if repeats_old_value:
                    content[name] = new_value
                    # The run itself has not changed the value at the top.
                    if name in after and after[name] == before.get(name):
                        after[name] = new_value


def _has_changed_keys(
    content: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any], config: Any
) -> bool:
    """Tell whether a value of a section that differs between `before` and `after` stands at the top of `content`.

    `content` is that of a whole `config.json`; `before` and `after` are the section as Transformers reads it and as it
    is to be, and `config` is its configuration.
    """
    changed = [key for key, value in after.items() if before.get(key) != value]
    return any(_names_of(key, content, config) for key in changed)


def _names_of(key: str, content: Mapping[str, Any], config: Any) -> list[str]:
    """Return the keys of `content` under which the value `key` of a configuration stands: the new key, or old ones.

    `config` is the configuration that `content` describes; its class names old keys in `attribute_map`. If `config` is
    something else, only `key` and `_OLD_NAMES` are tried.
    """
    names = [key]
    if key in _OLD_NAMES:
        names.append(_OLD_NAMES[key])
    if isinstance(config, PreTrainedConfig):
        # `attribute_map` has the attribute of each other name.
        names += [name for name, attribute in config.attribute_map.items() if attribute == key]
    return [name for name in names if name in content]

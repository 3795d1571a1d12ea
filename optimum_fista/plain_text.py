"""Text of other people, made harmless for a terminal.

Names of models, tensors and texts come from files that anybody may have written. A terminal obeys control characters in
them: they could erase lines, or colour and hide text.
"""

from __future__ import annotations

import re
from typing import Any

# All control characters except tab and line feed, and the marks that reverse the direction of writing.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def spell_out_controls(text: str) -> str:
    r"""Return the text with its control characters spelled out: an escape becomes the four characters `\x1b`.

    Tab and line feed stay, so the text may have several lines. Carriage return and the marks that reverse the direction
    of writing are spelled out, too (`_CONTROL`).
    """

    def spelled_out(match: re.Match[str]) -> str:
        r"""Write the control character of a match as Python writes it in a string, such as `\x1b`."""
        return match[0].encode("unicode_escape").decode()

    return _CONTROL.sub(spelled_out, text)


def spell_out_controls_in_json(value: Any) -> Any:
    """Return a copy of parsed JSON in which `spell_out_controls` is applied to all texts, keys of objects too."""
    if isinstance(value, str):
        return spell_out_controls(value)
    if isinstance(value, list):
        return [spell_out_controls_in_json(part) for part in value]
    if isinstance(value, dict):
        return {
            spell_out_controls_in_json(key): spell_out_controls_in_json(part)
            for key, part in value.items()
        }
    return value

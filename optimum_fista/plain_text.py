"""Text of other people, made harmless for a terminal.

Names of models, tensors and texts come from files that anybody may have written. A terminal obeys control characters in
them: they could erase lines, or colour and hide text.
"""

from __future__ import annotations

import re
from typing import Any

# All control characters except tab and line feed, and the marks that reverse the direction of writing.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def plain_text(text: str) -> str:
    r"""Return the text with its control characters spelled out: an escape becomes the four letters `\x1b`."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def plain_values(value: Any) -> Any:
    """Return parsed JSON with `plain_text` of all its strings, of the keys of objects too."""
    if isinstance(value, str):
        return plain_text(value)
    if isinstance(value, list):
        return [plain_values(part) for part in value]
    if isinstance(value, dict):
        return {plain_values(key): plain_values(part) for key, part in value.items()}
    return value

"""Names that may be read by anybody: of models and texts, in files that may be uploaded."""

from __future__ import annotations

import os

from optimum_fista.plain_text import spell_out_controls

HUB_DATASETS = {
    "wikitext2": "Salesforce/wikitext",
    "c4": "allenai/c4",
    "ptb": "ptb-text-only/ptb_text_only",
}
"""Repositories of the data sets that have a short name here."""


def public_name(name: str) -> str:
    """Return the name to write into a folder that may be uploaded: for a path only its last part.

    Args:
        name: Of a model or a text, as the user gave it: a Hub id such as "meta-llama/Llama-3.2-1B", a short name, or a
            path. A text with a slash is a path only if there is such a file, or if it begins as no Hub id does.
    """
    is_path = os.path.exists(name) or os.path.isabs(name) or name.startswith(("~", "."))
    if is_path:
        name = os.path.basename(os.path.abspath(name))
    return spell_out_controls(name)

"""Names that may be read by anybody: of models and texts, in files that may be uploaded."""

from __future__ import annotations

import os

from optimum_fista.plain_text import plain_text

HUB_DATASETS = {
    "wikitext2": "Salesforce/wikitext",
    "c4": "allenai/c4",
    "ptb": "ptb-text-only/ptb_text_only",
}
"""Repositories of the data sets that have a short name here."""


def public_name(name: str) -> str:
    """The name to write into a folder that may be uploaded: for a path only its last part."""
    is_path = os.path.exists(name) or os.path.isabs(name) or name.startswith(("~", "."))
    public = os.path.basename(os.path.abspath(name)) if is_path else name
    return plain_text(public)

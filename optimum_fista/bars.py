"""Progress bars: the one place that makes them, so that they are hidden together.

Bars are hidden if `transformers.utils.logging.disable_progress_bar()` was called, if the environment has
`HF_HUB_DISABLE_PROGRESS_BARS=1`, and inside `hidden_bars` (`optimum-fista COMMAND --quiet`).
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from tqdm.auto import tqdm as _AnyBar


class tqdm(_AnyBar):  # the name that everybody knows
    """The bar of tqdm, in a terminal or a notebook; while bars are hidden, it shows and writes nothing."""

    def __init__(self, *arguments: Any, disable: bool = False, **options: Any) -> None:
        """Begin a bar with the arguments of tqdm; it is disabled if `disable`, or if bars are hidden."""
        # Asking the Hub's client is enough: if Transformers is told to show no bars, it tells this client.
        is_hidden = are_progress_bars_disabled()
        super().__init__(*arguments, disable=disable or is_hidden, **options)

    @classmethod
    def write(cls, *arguments: Any, **options: Any) -> None:
        """Print a line above the bars with the arguments of tqdm; nothing while bars are hidden."""
        if not are_progress_bars_disabled():
            super().write(*arguments, **options)


@contextmanager
def hidden_bars() -> Iterator[None]:
    """Hide the bars of this package, of Transformers and of the Hub's client; afterwards they are as before.

    Changes the settings of both libraries inside the context. They belong to the whole process.
    """
    were_hidden = are_progress_bars_disabled()
    _show_bars(False)
    try:
        yield
    finally:
        _show_bars(not were_hidden)


def _show_bars(shown: bool) -> None:
    """Show the bars of the Hub's client and of Transformers, or hide them if not `shown`, for the whole process.

    If Transformers is not imported yet, it will ask the Hub's client when it is.
    """
    transformers_logging = sys.modules.get("transformers.utils.logging")
    if shown:
        enable_progress_bars()
        if transformers_logging is not None:
            transformers_logging.enable_progress_bar()
    else:
        disable_progress_bars()
        if transformers_logging is not None:
            transformers_logging.disable_progress_bar()

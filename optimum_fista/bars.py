"""Progress bars: the one place that makes them, so that they are hidden together.

Bars are hidden if `transformers.utils.logging.disable_progress_bar()` was called, if the environment has
`HF_HUB_DISABLE_PROGRESS_BARS=1`, and inside `hidden_bars` (`optimum-fista COMMAND --quiet`).
"""

import sys
import warnings
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

    inside_hidden_bars = False  # whether a `hidden_bars` hides all bars of this class

    def __init__(self, *arguments: Any, disable: bool = False, **options: Any) -> None:
        """Begin a bar with the arguments of tqdm; it is disabled if `disable`, or if bars are hidden."""
        super().__init__(*arguments, disable=disable or self._are_hidden(), **options)

    @classmethod
    def write(cls, *arguments: Any, **options: Any) -> None:
        """Print a line above the bars with the arguments of tqdm; nothing while bars are hidden."""
        if not cls._are_hidden():
            super().write(*arguments, **options)

    @classmethod
    def _are_hidden(cls) -> bool:
        """Whether bars are hidden now."""
        # Asking the Hub's client is enough: if Transformers is told to show no bars, it tells this client.
        return tqdm.inside_hidden_bars or are_progress_bars_disabled()


@contextmanager
def hidden_bars() -> Iterator[None]:
    """Hide the bars of this package, of Transformers and of the Hub's client; afterwards they are as before.

    Changes the settings of both libraries inside the context. They belong to the whole process. If the environment asks
    for the bars of the Hub's client (`HF_HUB_DISABLE_PROGRESS_BARS=0`), these alone stay.
    """
    were_hidden = tqdm.inside_hidden_bars
    hub_shows_bars = not are_progress_bars_disabled()
    transformers_logging = sys.modules.get("transformers.utils.logging")
    # If it is not imported yet, it asks the Hub's client when it is.
    transformers_shows_bars = hub_shows_bars
    if transformers_logging is not None:
        transformers_shows_bars = transformers_logging.is_progress_bar_enabled()

    tqdm.inside_hidden_bars = True
    _show_bars(of_transformers=False, of_hub=False)
    try:
        yield
    finally:
        tqdm.inside_hidden_bars = were_hidden
        _show_bars(of_transformers=transformers_shows_bars, of_hub=hub_shows_bars)


def _show_bars(*, of_transformers: bool, of_hub: bool) -> None:
    """Show or hide the bars of Transformers, if it is imported, and of the Hub's client, for the whole process."""
    # The Hub's client warns if the environment has decided already.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Transformers tells the Hub's client, too, so it comes first.
        transformers_logging = sys.modules.get("transformers.utils.logging")
        if transformers_logging is not None and of_transformers:
            transformers_logging.enable_progress_bar()
        elif transformers_logging is not None:
            transformers_logging.disable_progress_bar()
        if of_hub:
            enable_progress_bars()
        else:
            disable_progress_bars()

"""What the processes of a command say while they run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils.logging import disable_progress_bar, set_verbosity_error


@contextmanager
def first_process_speaks(index: int, name: str) -> Iterator[None]:
    """Print the messages of the logger called `name` in process 0; the others show no warnings and no bars."""
    if index:
        set_verbosity_error()
        disable_progress_bar()
        yield
        return
    handler, logger = logging.StreamHandler(), logging.getLogger(name)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)

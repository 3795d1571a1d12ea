"""The processes of a command, and what they say while they run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import PartialState
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from optimum_fista.prune.ranks import Ranks, joined_ranks


@contextmanager
def speaking_ranks(device: str | None, name: str) -> Iterator[Ranks]:
    """Join the processes of a command, and take them apart when it succeeds.

    Process 0 prints the messages of the logger called `name`; the others show no warnings and no bars.
    """
    handler, logger = logging.StreamHandler(), logging.getLogger(name)
    before = logger.level
    with joined_ranks(device) as ranks:
        if ranks.index:
            set_verbosity_error()
            disable_progress_bar()
        else:
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
        try:
            yield ranks
        finally:
            logger.setLevel(before)
            logger.removeHandler(handler)
    if ranks.count > 1:
        PartialState().destroy_process_group()

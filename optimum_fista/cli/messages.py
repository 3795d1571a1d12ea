"""The processes of a command, and what they say while they run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import PartialState
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from optimum_fista.prune.ranks import Ranks, joined_ranks


@contextmanager
def command_ranks(device: str | None) -> Iterator[Ranks]:
    """Join the processes of a command into one process group, which ends if the command succeeds.

    `device` is that of the user's options, such as "cuda"; `None`: where Accelerate says. All processes but the first
    show no warnings of Transformers and no bars from here on.
    """
    with joined_ranks(device) as ranks:
        if ranks.index > 0:
            set_verbosity_error()
            disable_progress_bar()
        yield ranks
    if ranks.count > 1:
        PartialState().destroy_process_group()


@contextmanager
def messages_shown(name: str) -> Iterator[None]:
    """Print the messages of the logger called `name`, such as "optimum_fista.train", to the standard error.

    The logger is as before afterwards.
    """
    handler = logging.StreamHandler()
    logger = logging.getLogger(name)
    level_before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level_before)
        logger.removeHandler(handler)

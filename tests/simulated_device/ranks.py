"""The work of a process of several that prune one model, each on a device of its own."""

from pathlib import Path

import simulated_device.backend  # noqa: F401
from tiny_llama import tiny_tokens

from optimum_fista import FistaPruner, FistaPruningConfig


def prune_on_device(rank: int, source: Path, output: Path, config: FistaPruningConfig) -> None:
    pruner = FistaPruner(config, progress=False)
    pruner.prune(source, tiny_tokens().split(4), output_dir=output, device=f"simulated:{rank}")

"""One-shot pruning of large language models, one linear operator after another."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimum_fista.run.callback import MaskedTrainingCallback
    from optimum_fista.run.config import FistaPruningConfig
    from optimum_fista.run.lora import mask_adapters, merge_adapters
    from optimum_fista.run.pruner import FistaPruner
    from optimum_fista.run.report import PruningReport
    from optimum_fista.run.retrained import save_masked
    from optimum_fista.run.training import masked_training
    from optimum_fista.solve.pruned import PrunedOperator

__version__ = "0.1.0"
__all__ = [
    "FistaPruner",
    "FistaPruningConfig",
    "MaskedTrainingCallback",
    "PrunedOperator",
    "PruningReport",
    "mask_adapters",
    "masked_training",
    "merge_adapters",
    "save_masked",
]

_HOMES = {
    "FistaPruner": "optimum_fista.run.pruner",
    "FistaPruningConfig": "optimum_fista.run.config",
    "MaskedTrainingCallback": "optimum_fista.run.callback",
    "PrunedOperator": "optimum_fista.solve.pruned",
    "PruningReport": "optimum_fista.run.report",
    "mask_adapters": "optimum_fista.run.lora",
    "masked_training": "optimum_fista.run.training",
    "merge_adapters": "optimum_fista.run.lora",
    "save_masked": "optimum_fista.run.retrained",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that `import optimum_fista` and `--help` stay quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'optimum_fista' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

"""One-shot pruning of large language models, one linear operator after another."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimum_fista.run.callbacks.pruning_callback import PruningCallback
    from optimum_fista.run.callbacks.tracking import TrackingCallback
    from optimum_fista.run.config import FistaPruningConfig
    from optimum_fista.run.packed_folders.packed_loading import FistaPackedConfig
    from optimum_fista.run.pruner import FistaPruner
    from optimum_fista.run.reports.report import PruningReport
    from optimum_fista.run.retraining.recovery import recover
    from optimum_fista.run.retraining.training import MaskedTrainingCallback, masked_training, save_masked
    from optimum_fista.solve.pruned import PrunedOperator

__version__ = "0.1.0"
__all__ = [
    "FistaPackedConfig",
    "FistaPruner",
    "FistaPruningConfig",
    "MaskedTrainingCallback",
    "PrunedOperator",
    "PruningCallback",
    "PruningReport",
    "TrackingCallback",
    "masked_training",
    "recover",
    "save_masked",
]

_HOMES = {
    "FistaPackedConfig": "optimum_fista.run.packed_folders.packed_loading",
    "FistaPruner": "optimum_fista.run.pruner",
    "FistaPruningConfig": "optimum_fista.run.config",
    "MaskedTrainingCallback": "optimum_fista.run.retraining.training",
    "PrunedOperator": "optimum_fista.solve.pruned",
    "PruningCallback": "optimum_fista.run.callbacks.pruning_callback",
    "PruningReport": "optimum_fista.run.reports.report",
    "TrackingCallback": "optimum_fista.run.callbacks.tracking",
    "masked_training": "optimum_fista.run.retraining.training",
    "recover": "optimum_fista.run.retraining.recovery",
    "save_masked": "optimum_fista.run.retraining.training",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that the imports of one do not cost the others."""
    if name not in _HOMES:
        raise AttributeError(f"module 'optimum_fista' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

"""One-shot pruning of large language models, one linear operator after another."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimum_fista.run.callbacks.pruning_callback import PruningCallback
    from optimum_fista.run.checkpoints.loading import load_model
    from optimum_fista.run.config import FistaPruningConfig
    from optimum_fista.run.evaluation.generation import continue_prompts
    from optimum_fista.run.evaluation.perplexity import evaluate_perplexity
    from optimum_fista.run.evaluation.verification import verify_checkpoint
    from optimum_fista.run.hub import push_folder
    from optimum_fista.run.packed_folders.packed_folder import pack_folder, unpack_folder
    from optimum_fista.run.packed_folders.packed_loading import FistaPackedConfig
    from optimum_fista.run.pruner import FistaPruner
    from optimum_fista.run.reports.report import PruningReport
    from optimum_fista.run.retraining.recovery import recover
    from optimum_fista.run.retraining.training import MaskedTrainingCallback, masked_training, save_masked
    from optimum_fista.run.texts.calibration_source import calibration_tokens
    from optimum_fista.run.texts.text import load_text
    from optimum_fista.run.texts.windows import calibration_windows, evaluation_windows
    from optimum_fista.solve.method import PrunedOperator

__version__ = "0.1.0"
__all__ = [
    "FistaPackedConfig",
    "FistaPruner",
    "FistaPruningConfig",
    "MaskedTrainingCallback",
    "PrunedOperator",
    "PruningCallback",
    "PruningReport",
    "calibration_tokens",
    "calibration_windows",
    "continue_prompts",
    "evaluate_perplexity",
    "evaluation_windows",
    "load_model",
    "load_text",
    "masked_training",
    "pack_folder",
    "push_folder",
    "recover",
    "save_masked",
    "unpack_folder",
    "verify_checkpoint",
]

_HOMES = {
    "FistaPackedConfig": "optimum_fista.run.packed_folders.packed_loading",
    "FistaPruner": "optimum_fista.run.pruner",
    "FistaPruningConfig": "optimum_fista.run.config",
    "MaskedTrainingCallback": "optimum_fista.run.retraining.training",
    "PrunedOperator": "optimum_fista.solve.method",
    "PruningCallback": "optimum_fista.run.callbacks.pruning_callback",
    "PruningReport": "optimum_fista.run.reports.report",
    "calibration_tokens": "optimum_fista.run.texts.calibration_source",
    "calibration_windows": "optimum_fista.run.texts.windows",
    "continue_prompts": "optimum_fista.run.evaluation.generation",
    "evaluate_perplexity": "optimum_fista.run.evaluation.perplexity",
    "evaluation_windows": "optimum_fista.run.texts.windows",
    "load_model": "optimum_fista.run.checkpoints.loading",
    "load_text": "optimum_fista.run.texts.text",
    "masked_training": "optimum_fista.run.retraining.training",
    "pack_folder": "optimum_fista.run.packed_folders.packed_folder",
    "push_folder": "optimum_fista.run.hub",
    "recover": "optimum_fista.run.retraining.recovery",
    "save_masked": "optimum_fista.run.retraining.training",
    "unpack_folder": "optimum_fista.run.packed_folders.packed_folder",
    "verify_checkpoint": "optimum_fista.run.evaluation.verification",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that the imports of one do not cost the others."""
    if name not in _HOMES:
        raise AttributeError(f"module 'optimum_fista' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

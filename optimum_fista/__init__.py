"""One-shot pruning of large language models, one linear operator after another."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimum_fista.config import FistaPruningConfig
    from optimum_fista.evaluate.generation import continue_prompts
    from optimum_fista.evaluate.perplexity import evaluate_perplexity
    from optimum_fista.evaluate.verification import verify_checkpoint
    from optimum_fista.folder.hub import push_folder
    from optimum_fista.folder.loading import load_model
    from optimum_fista.folder.packed_folder import pack_folder, unpack_folder
    from optimum_fista.packed.quantizer import FistaPackedConfig
    from optimum_fista.prune.callback import PruningCallback
    from optimum_fista.pruner import FistaPruner
    from optimum_fista.report import PruningReport
    from optimum_fista.solve.method import PrunedOperator
    from optimum_fista.text.calibration_tokens import calibration_tokens
    from optimum_fista.text.sources import load_text
    from optimum_fista.text.windows import calibration_windows, evaluation_windows
    from optimum_fista.train.recovery import recover
    from optimum_fista.train.training import MaskedTrainingCallback, masked_training, save_masked

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
    "FistaPackedConfig": "optimum_fista.packed.quantizer",
    "FistaPruner": "optimum_fista.pruner",
    "FistaPruningConfig": "optimum_fista.config",
    "MaskedTrainingCallback": "optimum_fista.train.training",
    "PrunedOperator": "optimum_fista.solve.method",
    "PruningCallback": "optimum_fista.prune.callback",
    "PruningReport": "optimum_fista.report",
    "calibration_tokens": "optimum_fista.text.calibration_tokens",
    "calibration_windows": "optimum_fista.text.windows",
    "continue_prompts": "optimum_fista.evaluate.generation",
    "evaluate_perplexity": "optimum_fista.evaluate.perplexity",
    "evaluation_windows": "optimum_fista.text.windows",
    "load_model": "optimum_fista.folder.loading",
    "load_text": "optimum_fista.text.sources",
    "masked_training": "optimum_fista.train.training",
    "pack_folder": "optimum_fista.folder.packed_folder",
    "push_folder": "optimum_fista.folder.hub",
    "recover": "optimum_fista.train.recovery",
    "save_masked": "optimum_fista.train.training",
    "unpack_folder": "optimum_fista.folder.packed_folder",
    "verify_checkpoint": "optimum_fista.evaluate.verification",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that the imports of one do not cost the others."""
    if name not in _HOMES:
        raise AttributeError(f"module 'optimum_fista' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

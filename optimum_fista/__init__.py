"""One-shot pruning of large language models, one linear operator after another.

The public names are imported when they are first used: `_HOMES` says from which module.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers and editors do not run __getattr__
    from optimum_fista.config import FistaPruningConfig as FistaPruningConfig
    from optimum_fista.evaluate.perplexity import evaluate_perplexity as evaluate_perplexity
    from optimum_fista.evaluate.verification import verify_checkpoint as verify_checkpoint
    from optimum_fista.folder.hub import push_folder as push_folder
    from optimum_fista.folder.packed_folder import pack_folder as pack_folder
    from optimum_fista.folder.packed_folder import unpack_folder as unpack_folder
    from optimum_fista.on_load import FistaOnLoadConfig as FistaOnLoadConfig
    from optimum_fista.prune.callback import PruningCallback as PruningCallback
    from optimum_fista.pruner import FistaPruner as FistaPruner
    from optimum_fista.report import PruningReport as PruningReport
    from optimum_fista.solve.method import PrunedOperator as PrunedOperator
    from optimum_fista.source.loading import load_model as load_model
    from optimum_fista.text.calibration_tokens import calibration_tokens as calibration_tokens
    from optimum_fista.text.sources import load_text as load_text
    from optimum_fista.text.windows import calibration_windows as calibration_windows
    from optimum_fista.text.windows import evaluation_windows as evaluation_windows
    from optimum_fista.train.recovery import recover as recover
    from optimum_fista.train.training import MaskedTrainingCallback as MaskedTrainingCallback
    from optimum_fista.train.training import masked_training as masked_training
    from optimum_fista.train.training import save_masked as save_masked

__version__ = "0.1.0"

_HOMES = {
    "FistaOnLoadConfig": "on_load",
    "FistaPruner": "pruner",
    "FistaPruningConfig": "config",
    "MaskedTrainingCallback": "train.training",
    "PrunedOperator": "solve.method",
    "PruningCallback": "prune.callback",
    "PruningReport": "report",
    "calibration_tokens": "text.calibration_tokens",
    "calibration_windows": "text.windows",
    "evaluate_perplexity": "evaluate.perplexity",
    "evaluation_windows": "text.windows",
    "load_model": "source.loading",
    "load_text": "text.sources",
    "masked_training": "train.training",
    "pack_folder": "folder.packed_folder",
    "push_folder": "folder.hub",
    "recover": "train.recovery",
    "save_masked": "train.training",
    "unpack_folder": "folder.packed_folder",
    "verify_checkpoint": "evaluate.verification",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that the imports of one do not cost the others."""
    if name not in _HOMES:
        raise AttributeError(f"module 'optimum_fista' has no attribute {name!r}")
    module = importlib.import_module(f"optimum_fista.{_HOMES[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    """List the names of this module, and the public ones too, which it lacks before their first use."""
    return sorted({*globals(), *__all__})

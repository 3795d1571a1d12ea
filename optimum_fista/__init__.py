"""One-shot pruning of large language models, one linear operator after another."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimum_fista.run.callbacks.pruning_callback import PruningCallback
    from optimum_fista.run.callbacks.tracking_callback import TrackingCallback
    from optimum_fista.run.config import FistaPruningConfig
    from optimum_fista.run.packed_folders.packed_loading import FistaPackedConfig
    from optimum_fista.run.pruner import FistaPruner
    from optimum_fista.run.reports.report import PruningReport
    from optimum_fista.run.retraining.lora import mask_adapters, merge_adapters
    from optimum_fista.run.retraining.retrained import save_masked
    from optimum_fista.run.retraining.training import masked_training
    from optimum_fista.run.retraining.training_callback import MaskedTrainingCallback
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
    "mask_adapters",
    "masked_training",
    "merge_adapters",
    "save_masked",
]

_HOMES = {
    "FistaPackedConfig": "optimum_fista.run.packed_folders.packed_loading",
    "FistaPruner": "optimum_fista.run.pruner",
    "FistaPruningConfig": "optimum_fista.run.config",
    "MaskedTrainingCallback": "optimum_fista.run.retraining.training_callback",
    "PrunedOperator": "optimum_fista.solve.pruned",
    "PruningCallback": "optimum_fista.run.callbacks.pruning_callback",
    "PruningReport": "optimum_fista.run.reports.report",
    "TrackingCallback": "optimum_fista.run.callbacks.tracking_callback",
    "mask_adapters": "optimum_fista.run.retraining.lora",
    "masked_training": "optimum_fista.run.retraining.training",
    "merge_adapters": "optimum_fista.run.retraining.lora",
    "save_masked": "optimum_fista.run.retraining.retrained",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that `import optimum_fista` and `--help` stay quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'optimum_fista' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


_QUANTIZERS = "transformers.quantizers.auto"
_PACKED_LOADING = "optimum_fista.run.packed_folders.packed_loading"  # registers itself


class _PackedLoading(importlib.abc.MetaPathFinder):
    """Makes packed checkpoints known to Transformers as soon as it is imported, and not before."""

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None,  # noqa: ARG002, the finder's protocol
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        """Find the module with the list of quantizers as usual, and add to it once it has run."""
        if name != _QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                importlib.import_module(_PACKED_LOADING)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _QUANTIZERS in sys.modules:
    importlib.import_module(_PACKED_LOADING)
else:
    sys.meta_path.insert(0, _PackedLoading())

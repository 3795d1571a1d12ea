"""Fine-tuning of one decoder layer once its operators are pruned."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from torch import Tensor

from optimum_fista.model.activations import HiddenStates, LayerActivations
from optimum_fista.model.operator import LinearOperator
from optimum_fista.model.reconstruction import reconstruct
from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.reports.report import FinetuningReport


def finetune_layer(
    activations: LayerActivations,
    operators: Sequence[LinearOperator],
    masks: Mapping[str, Tensor],
    entering: HiddenStates,
    after: HiddenStates,
    config: FistaPruningConfig,
) -> FinetuningReport:
    """Train the kept weights of a pruned decoder layer in place, towards the dense network's hidden states after it.

    Args:
        activations: The decoder layer.
        operators: Its pruned operators.
        masks: Their masks by operator name, bool [out, in], True = kept.
        entering: Hidden states that enter it.
        after: Those after it; the pruned ones become those of the trained weights.
        config: Steps, learning rate and seed.
    """
    started = time.perf_counter()
    assert after.dense is not None
    made = reconstruct(
        activations,
        operators,
        masks,
        entering.entering,
        after.dense,
        after.pruned,
        steps=config.finetune_steps,
        learning_rate=config.finetune_learning_rate,
        seed=config.seed,
    )
    if after.pruned is not None and made.outputs is not None:
        after.pruned = made.outputs
    seconds = time.perf_counter() - started
    return FinetuningReport(made.error_before, made.error, seconds, made.held_out_error_before, made.held_out_error)

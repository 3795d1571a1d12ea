"""Batches that fit into the memory, foreseen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from transformers import PreTrainedModel

from optimum_fista.model.activation_store import Storage
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.offload import execution_device
from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.memory.available_memory import available_bytes
from optimum_fista.run.planning.memory import LIBRARIES_PART
from optimum_fista.run.planning.plan import plan_pruning
from optimum_fista.run.pruning.batch_size import halves


@dataclass(frozen=True)
class FittedBatches:
    """Batches for the memory that is free.

    Attributes:
        sizes: Numbers of sequences.
        message: What the user should know; empty where nothing changes.
    """

    sizes: list[int]
    message: str = ""


def fit_batches(
    model: PreTrainedModel, config: FistaPruningConfig, batches: Sequence[CalibrationBatch], storage: Storage
) -> FittedBatches:
    """Halve the batches until the plan of the run fits into the memory that the model's device has free.

    Args:
        model: The model to prune.
        config: The configuration.
        batches: The batches as they are.
        storage: Where activations wait.
    """
    sizes = [batch.input_ids.shape[0] for batch in batches]
    device = execution_device(model.get_input_embeddings())
    available = available_bytes(device)
    if max(sizes) == 1 or available is None:
        return FittedBatches(sizes)
    peak = _planned_peak(model, config, batches, storage, device)
    try:
        fitting = fitting_sizes(sizes, peak, available)
        needed = peak(max(fitting))
    except Exception as error:  # plans are made of a model without weights, which not every family allows
        return FittedBatches(sizes, f"the memory of a batch could not be foreseen ({error}): batches stay as they are")
    if needed <= available and fitting == sizes:
        return FittedBatches(sizes)
    return FittedBatches(
        fitting,
        f"{available / 2**30:.1f} GiB are free on {device}, too little for batches of {max(sizes)} sequences: going on "
        f"with batches of {max(fitting)}, which take about {needed / 2**30:.1f} GiB",
    )


def fitting_sizes(sizes: Sequence[int], peak: Callable[[int], int], available: int) -> list[int]:
    """Numbers of sequences, halved until the largest batch fits or is one sequence.

    Args:
        sizes: Numbers of sequences as they are.
        peak: Bytes that a run needs with batches of so many sequences.
        available: Bytes that are free.
    """
    fitting = list(sizes)
    while max(fitting) > 1 and peak(max(fitting)) > available:
        fitting = halves(fitting)
    return fitting


def _planned_peak(
    model: PreTrainedModel,
    config: FistaPruningConfig,
    batches: Sequence[CalibrationBatch],
    storage: Storage,
    device: torch.device,
) -> Callable[[int], int]:
    """Bytes that a run will hold on the device besides the libraries, by the size of a batch."""

    @cache
    def peak(batch_size: int) -> int:
        plan = plan_pruning(
            model.config,
            config,
            num_samples=sum(batch.input_ids.shape[0] for batch in batches),
            sequence_length=max(batch.input_ids.shape[1] for batch in batches),
            batch_size=batch_size,
            device=device.type,
            dtype=model.dtype,
            storage_device="disk" if isinstance(storage, Path) else storage.type,
            measure=False,
        )
        found = plan.peaks["host" if device.type == "cpu" else "device"]
        return found.total - found.parts.get(LIBRARIES_PART, 0)

    return peak

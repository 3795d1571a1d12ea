"""Calibration batches on their way through the decoder layers, and what happens if the device runs out of memory.

A step of the run is a function of the batches and their hidden states. So a step that runs out of memory is called
again, with half as many sequences in a batch (`retried`). Only the rounding of sums over tokens changes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from optimum_fista.memory import is_out_of_memory, release_memory
from optimum_fista.model.calibration import (
    CalibrationBatch,
    cut_batches,
    describe_batches,
    hold_out,
    read_batches,
    shapes_of,
)
from optimum_fista.model.experts import split_experts
from optimum_fista.model.held_out import HeldOut
from optimum_fista.model.inputs import HiddenStates, RecordedInputs, cut_states, record_inputs
from optimum_fista.model.layers import token_limits
from optimum_fista.model.media import media_arguments, targets_of
from optimum_fista.model.offload import execution_device
from optimum_fista.prune.notes import begin_report
from optimum_fista.prune.plan import Plan
from optimum_fista.public_names import public_name
from optimum_fista.report import PruningReport

T = TypeVar("T")


@dataclass(frozen=True)
class Calibration:
    """Batches, with their hidden states before one decoder layer."""

    batches: Sequence[CalibrationBatch]  # first those to fit to, then the held-out ones
    states: HiddenStates | None = None  # inputs of the layer; None before the first one
    recorded: RecordedInputs | None = (
        None  # other arguments of the layers; None until batches of this size were run
    )


def begin(
    plan: Plan, calib_dataloader: Iterable[Any], source: str | None
) -> tuple[Calibration, HeldOut | None, PruningReport]:
    """Read the calibration text and begin the report.

    Returns a `HeldOut` if a perplexity can be measured.
    """
    report, inputs = (
        begin_report(plan),
        {name: o.shape[1] for name, o in plan.all_operators.items()},
    )
    model, media = plan.layers.model, media_arguments(plan.layers.model)
    given = read_batches(calib_dataloader, *token_limits(model), media, report.warn)
    measured = [batch for batch in given if batch.held_out]
    batches = hold_out([batch for batch in given if not batch.held_out], plan.config.held_out)
    report.calibration = {"source": source and public_name(source)} | describe_batches(
        batches + measured
    )
    report.environment["batches"] = shapes_of(batches + measured)
    if media.names and not any(batch.media for batch in batches):
        kinds = " or ".join(sorted({kind for kind, _ in media.placeholders})) or "image"
        which = f"{type(model).__name__} saw no {kinds}"
        report.warn(
            f"the calibration is text alone: {which}. Pass batches as its processor makes them, for all uses."
        )
    tokens, widest = (
        report.calibration["num_tokens"],
        max(inputs, key=inputs.__getitem__, default=None),
    )
    if widest is not None and tokens < inputs[widest]:
        few = f"{tokens} calibration tokens for the {inputs[widest]} inputs of {widest}"
        report.warn(
            f"{few}: its Gram matrix is rank-deficient, and the result fits these tokens only. Pass more."
        )
    if empty := sum(
        not b.media and bool((targets_of(b.input_ids, model.config) < 0).any()) for b in given
    ):
        why = "hold tokens that mark images or sounds, but no images or sounds"
        report.warn(f"{empty} batches {why}: pass all that the model's processor returns.")
    measured = measured or [replace(batch, text=source) for batch in batches if batch.held_out]
    if (
        not measured or plan.removal.mixtures
    ):  # the decoder layer without experts is not in the model
        return Calibration(batches), None, report
    return Calibration(batches), HeldOut(plan.layers, measured, plan.storage), report


def record(plan: Plan, calibration: Calibration) -> Calibration:
    """Record the arguments of the decoder layers, unless they are recorded already."""
    if calibration.recorded is not None:
        return calibration
    with split_experts(plan.all_operators.values()):
        recorded = record_inputs(
            plan.layers, calibration.batches, plan.storage, progress=plan.progress
        )
    states = calibration.states or plan.config.correction.enter(recorded.hidden_states)
    del (
        recorded.hidden_states
    )  # only `states` has them now, so that they are freed with the first layer
    return replace(calibration, states=states, recorded=recorded)


def retried(
    step: Callable[[Calibration], T],
    calibration: Calibration,
    where: str,
    plan: Plan,
    report: PruningReport,
    undo: Callable[[], None] = lambda: None,
) -> T:
    """Return `step(calibration)`; if memory runs out, call `undo`, and repeat the step with batches half as large."""
    while True:
        try:
            return step(calibration)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error) or repr(error)
        # after the handler: the error holds the frames, and the frames hold the tensors that filled the memory
        undo()
        calibration = _halved(calibration, plan, report, reason)
        release_memory(collect=True)
        most = max(batch.input_ids.shape[0] for batch in calibration.batches)
        report.warn(
            f"out of memory in {where}: batches of {most} sequences from here on ({reason.splitlines()[0]})"
        )


def _halved(
    calibration: Calibration, plan: Plan, report: PruningReport, reason: str
) -> Calibration:
    """Cut every batch in two; `reason` is what the device said."""
    sizes = [batch.input_ids.shape[0] for batch in calibration.batches]
    if max(sizes) == 1:
        longest = max(batch.input_ids.shape[1] for batch in calibration.batches)
        raise torch.OutOfMemoryError(
            f"the device ran out of memory on a batch of one sequence of {longest} tokens: pass "
            f"storage_device='cpu' (--storage-device cpu) or shorter sequences (--sequence-length) [{reason}]"
        )
    sizes = [part for size in sizes for part in ((size + 1) // 2, size // 2) if part]
    if calibration.recorded is not None and calibration.recorded.handed_on and report.operators:
        raise torch.OutOfMemoryError(  # a new record needs the dense network, which is partly pruned now
            f"the device ran out of memory after the first decoder layer of a {type(plan.layers.model).__name__}, "
            f"whose decoder layers pass more than hidden states to the next one: pass batches of at most {max(sizes)} "
            "sequences."
        )
    states = calibration.states
    if states is not None:
        device = execution_device(plan.layers.model.get_input_embeddings())
        states = cut_states(states, sizes, plan.storage or device, device)
    return Calibration(cut_batches(calibration.batches, sizes), states)

"""Calibration batches on their way through the decoder layers, and what happens if the device runs out of memory.

`read_calibration` reads the calibration text before the run, into `CalibrationBatch`es: token ids [batch, sequence]
with a mask, images or sounds, and a flag if they are held out. `HeldOut` runs held-out sequences to measure
perplexities. The `Plan` says what is pruned and how; it holds the model. `record_arguments` then runs the model up to
its first decoder layer. A `Calibration` goes from decoder layer to decoder layer, with the hidden states that enter the
next one. A step of the run is a function of it. So a step that runs out of memory is called again, with half as many
sequences in a batch (`retried`). Only the rounding of sums over tokens changes.
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
    sources_of,
)
from optimum_fista.model.experts import split_experts
from optimum_fista.model.held_out import HeldOut
from optimum_fista.model.inputs import HiddenStates, RecordedInputs, cut_states, record_inputs
from optimum_fista.model.layers import token_limits
from optimum_fista.model.media import MediaArguments, media_arguments, targets_of
from optimum_fista.model.offload import execution_device
from optimum_fista.prune.notes import begin_report
from optimum_fista.prune.plan import Plan
from optimum_fista.public_names import public_name
from optimum_fista.report import PruningReport

T = TypeVar("T")


@dataclass(frozen=True)
class Calibration:
    """Batches, with their hidden states before one decoder layer.

    Attributes:
        batches: First those to fit to, then the held-out ones.
        states: Inputs of the decoder layer; `None` before the first one.
        recorded: Other arguments of the decoder layers; `None` until batches of this size were run.
    """

    batches: Sequence[CalibrationBatch]
    states: HiddenStates | None = None
    recorded: RecordedInputs | None = None


def read_calibration(
    plan: Plan, calib_dataloader: Iterable[Any], source: str | None
) -> tuple[Calibration, HeldOut | None, PruningReport]:
    """Read the calibration text, and begin the report of the run; the model does not run yet, and is not changed.

    `calib_dataloader` is what the user passed to `FistaPruner.prune`, and `source` the name of its text, such as "c4";
    the iterable is read to its end. `plan` has the model and the options of the run. The returned `HeldOut` measures
    the perplexity; it is `None` if nothing is held out, or if the model loses experts.
    """
    report = begin_report(plan)
    model = plan.layers.model
    # The names of the model's arguments for images and sounds.
    media = media_arguments(model)
    # How many tokens have an embedding, and how many tokens a sequence may have (`None`: any number).
    vocab_size, longest = token_limits(model)
    given = read_batches(calib_dataloader, vocab_size, longest, media, warn=report.warn)
    # Batches that the user marked as held out measure the perplexity, and nothing else.
    measured = [batch for batch in given if batch.held_out]
    unmarked = [batch for batch in given if not batch.held_out]
    # Of the others, the last `config.held_out` sequences are held out, to measure the errors of operators.
    batches = hold_out(unmarked, plan.config.held_out)
    report.calibration = {
        "source": _public_source(source, batches),
        **describe_batches(batches + measured),
    }
    if len(sources_of(batches)) > 1:
        report.calibration["sources"] = _described_sources(batches)
    report.environment["batches"] = shapes_of(batches + measured)
    _warn_of_missing_media(plan, report, batches, media)
    _warn_of_few_tokens(plan, report)
    _warn_of_experts_without_refit(plan, report)
    _warn_of_empty_placeholders(plan, report, given)

    calibration = Calibration(batches)
    # Without marked batches, the perplexity is measured on those that are held out here.
    if not measured:
        text = source or report.calibration["source"]
        measured = [replace(batch, text=text) for batch in batches if batch.held_out]
    # A decoder layer that has lost experts is a smaller copy of that in the model, so `HeldOut` can't run it there.
    if not measured or plan.removal.mixtures:
        return calibration, None, report
    return calibration, HeldOut(plan.layers, measured, plan.storage), report


def _public_source(source: str | None, batches: Sequence[CalibrationBatch]) -> str | None:
    """Return the name of the calibration text for the report, without folders of the user; `None` if it has none.

    `source` is what the caller of the run calls it. If that is `None` and the batches name their texts, their names are
    taken.
    """
    if source:
        return public_name(source)
    names = [public_name(name) for name in sources_of(batches) if name]
    return ", ".join(names) or source


def _described_sources(batches: Sequence[CalibrationBatch]) -> list[dict[str, Any]]:
    """Count for the report how much of each text a run is calibrated on, in the order of the texts.

    `batches` name their texts; held-out ones are not counted.
    """
    described = []
    for source in sources_of(batches):
        fitted = [batch for batch in batches if batch.source == source and not batch.held_out]
        described.append(
            {
                "source": public_name(source or ""),
                "num_sequences": sum(batch.input_ids.shape[0] for batch in fitted),
                "num_tokens": sum(batch.num_tokens for batch in fitted),
            }
        )
    return described


def _warn_of_missing_media(
    plan: Plan, report: PruningReport, batches: Sequence[CalibrationBatch], media: MediaArguments
) -> None:
    """Add a warning to the report if a model for images or sounds gets text alone.

    `media` has the names of the model's arguments for images and sounds, and their placeholders in the text. `batches`
    are those of the calibration.
    """
    if not media.names or any(batch.media for batch in batches):
        return
    kinds = " or ".join(sorted({kind for kind, _ in media.placeholders})) or "image"
    report.warn(
        f"the calibration is text alone: {type(plan.layers.model).__name__} saw no {kinds}. Pass batches as its "
        "processor makes them, for all uses."
    )


def _warn_of_few_tokens(plan: Plan, report: PruningReport) -> None:
    """Add a warning to the report if there are fewer tokens than inputs of an operator.

    `report.calibration`, which `read_calibration` has filled, has the number of tokens.
    """
    num_tokens = report.calibration["num_tokens"]
    # Operators have the shape [out, in].
    num_inputs = {name: operator.shape[1] for name, operator in plan.operators.items()}
    if not num_inputs:
        return
    widest = max(num_inputs, key=lambda name: num_inputs[name])
    if num_tokens < num_inputs[widest]:
        report.warn(
            f"{num_tokens} calibration tokens for the {num_inputs[widest]} inputs of {widest}: its Gram matrix is "
            "rank-deficient, and the result fits these tokens only. Pass more."
        )


def _warn_of_experts_without_refit(plan: Plan, report: PruningReport) -> None:
    """Add a warning to the report if experts were to be refitted, and the calibration is a single text."""
    if not plan.config.may_refit_experts or plan.removal.refits_experts:
        return
    report.warn(
        "the experts that stay are not refitted, because the calibration is one text: a refit to one text mostly "
        "harms others. Pass a text of each kind that the model will read (--calibration once for each, or a 'source' "
        "in each batch), or expert_refit=False (--no-expert-refit)."
    )


def _warn_of_empty_placeholders(
    plan: Plan, report: PruningReport, batches: Sequence[CalibrationBatch]
) -> None:
    """Add a warning to the report if batches mark images or sounds by tokens, and bring no images or sounds.

    `batches` are those that the user passed; the configuration of the plan's model says which tokens are such marks.
    """
    num_empty = 0
    for batch in batches:
        if batch.media:
            continue
        # Tokens that stand for images and sounds are no targets: their entries are negative.
        targets = targets_of(batch.input_ids, plan.layers.model.config)
        has_placeholders = bool((targets < 0).any())
        if has_placeholders:
            num_empty += 1
    if num_empty:
        report.warn(
            f"{num_empty} batches hold tokens that mark images or sounds, but no images or sounds: pass all that the "
            "model's processor returns."
        )


def record_arguments(plan: Plan, calibration: Calibration) -> Calibration:
    """Record the arguments of the decoder layers, unless they are recorded already.

    The model runs once on all batches, without its decoder layers; afterwards it is as before. Returns the calibration
    with the arguments, and with the hidden states that enter the first layer if it had none. The calibration that is
    passed is not changed. `plan` has the model and its operators.
    """
    if calibration.recorded is not None:
        return calibration
    # Mixtures call the matrices of their experts as modules of their own, as they will when these are pruned.
    with split_experts(plan.operators.values()):
        recorded = record_inputs(
            plan.layers, calibration.batches, plan.storage, progress=plan.progress
        )
    states = calibration.states
    if states is None:
        # Of the dense network, of the pruned one, or both, as the error correction needs them.
        states = plan.config.correction.enter(recorded.hidden_states)
    # Only `states` has them now, so that they are freed with the first layer.
    del recorded.hidden_states
    return replace(calibration, states=states, recorded=recorded)


def retried(
    step: Callable[[Calibration], T],
    calibration: Calibration,
    *,
    where: str,
    plan: Plan,
    report: PruningReport,
    undo: Callable[[], None] | None = None,
) -> T:
    """Return `step(calibration)`; if memory runs out, repeat the step with batches half as large.

    `step` is a part of the run, such as `prune_layer` with all arguments but the last. `where` names it for the warning
    that `report` gets, such as "model.layers.3". `undo` takes back what the step had changed before it failed; `None`:
    it changes nothing. When batches are cut (`_halved`), their hidden states are cut with them, and those of the given
    calibration are freed: the caller goes on with what `step` returns. `plan` has the model, and is not changed.
    `report` gets the warnings.

    Raises OutOfMemoryError, which ends the loop, if all batches have one sequence only, or if arguments of the layers
    would have to be recorded again from a dense network that is partly pruned. Other errors of `step` pass.
    """
    while True:
        try:
            return step(calibration)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error) or repr(error)  # a MemoryError may have no text

        # After the handler: the error holds the frames, and the frames hold the tensors that filled the memory.
        if undo is not None:
            undo()
        # Raises if batches can't be cut. `plan`, `report` and `reason` are only read, to find that out and to say it.
        calibration = _halved(calibration, plan, report, reason)
        release_memory(collect=True)
        num_sequences = max(batch.input_ids.shape[0] for batch in calibration.batches)
        first_line, *_ = reason.splitlines()
        report.warn(
            f"out of memory in {where}: batches of {num_sequences} sequences from here on ({first_line})"
        )


def _halved(
    calibration: Calibration, plan: Plan, report: PruningReport, reason: str
) -> Calibration:
    """Cut every batch in two, with its hidden states; the arguments of the layers have to be recorded again.

    Returns a new calibration; the hidden states of the old one are freed. `report`, which is only read, says whether
    operators are pruned or experts removed already. `reason` is what the device said. Raises OutOfMemoryError if all
    batches have one sequence only, or if the arguments can't be recorded again.
    """
    sizes = [batch.input_ids.shape[0] for batch in calibration.batches]
    if max(sizes) == 1:
        longest = max(batch.input_ids.shape[1] for batch in calibration.batches)
        raise torch.OutOfMemoryError(
            f"the device ran out of memory on a batch of one sequence of {longest} tokens: pass "
            f"storage_device='cpu' (--storage-device cpu) or shorter sequences (--sequence-length) [{reason}]"
        )

    # Numbers of sequences of the new batches, in order: of an odd number, the first half has one more.
    halves: list[int] = []
    for size in sizes:
        halves.append((size + 1) // 2)
        if size > 1:
            halves.append(size // 2)
    recorded = calibration.recorded
    # Whether layers pass more than hidden states to the next one: then new records need the dense network.
    needs_dense_network = recorded is not None and recorded.layers_pass_more
    is_partly_pruned = bool(report.operators or report.mixtures)
    if needs_dense_network and is_partly_pruned:
        raise torch.OutOfMemoryError(
            f"the device ran out of memory after the first decoder layer of a {type(plan.layers.model).__name__}, "
            f"whose decoder layers pass more than hidden states to the next one: pass batches of at most {max(halves)} "
            "sequences."
        )

    states = calibration.states
    if states is not None:
        device = execution_device(plan.layers.model.get_input_embeddings())
        states = cut_states(states, halves, plan.storage or device, device)
    return Calibration(cut_batches(calibration.batches, halves), states)

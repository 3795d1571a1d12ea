"""Counts of a plan: operators and zeros by group, disk, and what the reader should know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from optimum_fista.packed.bits import mask_bytes
from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.planning.model import PlannedModel, operator_names
from optimum_fista.run.planning.settings import PlanSettings
from optimum_fista.run.pruning.operators import idle_patterns


@dataclass
class GroupCount:
    """Operators of the same last name.

    Attributes:
        operators: How many there are, experts counted one by one.
        parameters: Their weights.
        zeros: Zeros after pruning; where operators share the zeros, as if each had the average sparsity.
    """

    operators: int = 0
    parameters: int = 0
    zeros: int = 0


def count_groups(planned: PlannedModel, config: FistaPruningConfig) -> dict[str, GroupCount]:
    """Operators to prune by their last name, in the order of their first."""
    found: dict[str, GroupCount] = {}
    for name, shape in _matrices(planned):
        pattern = config.pattern_for(name)
        pattern.require_shape(shape, name)
        group = found.setdefault(name.rsplit(".", 1)[-1], GroupCount())
        group.operators += 1
        group.parameters += shape[0] * shape[1]
        group.zeros += shape[0] * shape[1] - pattern.num_kept(shape)
    return found


def masked_weights(planned: PlannedModel, config: FistaPruningConfig) -> int:
    """Weights of all operators to prune."""
    return sum(group.parameters for group in count_groups(planned, config).values())


def disk_bytes(planned: PlannedModel, settings: PlanSettings, packed: bool = False) -> dict[str, int]:
    """Bytes on disk by part, when the last decoder layer is written; packed weights bring their masks."""
    pruned = masked_weights(planned, settings.config)
    states = int(planned.hidden_bytes * settings.batches) * settings.streams
    masks = 2 * (pruned // 8)  # in the journal, and in the finished folder
    experts = sum(e.count * e.shape[0] * e.shape[1] for e in planned.experts) * settings.element_size
    saved = _packed_away(planned, settings) if packed else 0
    return {
        "model, packed" if packed else "model": planned.weight_bytes - saved,
        "hidden states (two layers' at a time)": 2 * states,
        "masks (journal and model folder)": masks // 2 if packed else masks,
        "fused experts, copied by the lazy reader": experts,
    }


def _packed_away(planned: PlannedModel, settings: PlanSettings) -> int:
    """Bytes that the pruned weights are smaller by when they are packed."""
    saved = 0
    for name, shape in _matrices(planned):
        pattern = settings.config.pattern_for(name)
        mask = min(mask_bytes(shape[1], kind) for kind in (None, pattern.n_of_m))
        zeros = shape[0] * shape[1] - pattern.num_kept(shape)
        saved += zeros * settings.element_size - shape[0] * mask
    return saved


def notes_on(planned: PlannedModel, settings: PlanSettings) -> list[str]:
    """What the reader should know."""
    notes = list(idle_patterns(settings.config, *operator_names(planned)))
    if settings.calibration == "self":
        notes.append(
            "--calibration self has the model sample its text, for which it is loaded whole; with a text it never is."
        )
    if planned.in_memory:
        notes.append("a GGUF file can't be read a weight at a time: it is dequantized, and the whole model is held.")
    widest = max((shape[1] for _, shape in _matrices(planned)), default=0)
    if settings.fitted_tokens < widest:
        notes.append(
            f"{settings.fitted_tokens} calibration tokens for {widest} inputs: the Gram matrix is rank-deficient."
        )
    if any(experts.pruned for experts in planned.experts):
        notes.append(
            "fused experts are counted one by one, each solved on the tokens that it sees on average; no trained "
            "mixture has been pruned yet."
        )
    if settings.allocates:
        notes.append("operators share the zeros: counts by group are those of the average sparsity, the sum is exact.")
    return notes


def _matrices(planned: PlannedModel) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and shapes of operators to prune."""
    for operators in planned.operators.values():
        for name, operator in operators.items():
            yield name, operator.shape
    for experts in planned.experts:
        for pruned in experts.pruned:
            yield from pruned

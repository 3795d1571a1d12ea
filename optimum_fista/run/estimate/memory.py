"""The most that a run holds, by place and by part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import NamedTuple

from optimum_fista.model.held_out import LOGITS_TOGETHER
from optimum_fista.run.estimate.planned_run import PlannedRun
from optimum_fista.run.reports.operator_grid import layer_and_kind
from optimum_fista.run.texts.self_sampling import num_batches, num_texts

LIBRARIES = 295 * 2**20
"""Python with torch (a build for CPUs) and Transformers, and what their first calls add, in bytes; measured."""
_LAYER = 2**20 // 4
"""Modules, hooks and records of a decoder layer, in bytes; measured."""
_PICTURE, _PICTURE_OF_OPERATOR = 30 * 2**20, 2**20 // 14
"""Matplotlib, which draws the picture of the model card when all is pruned, and an operator in it; measured."""
_KEPT_FREE = 64 * 2**20
"""What the C library keeps of freed memory, at most; it is a tenth of what was held if that is less."""


class Peak(NamedTuple):
    """The most that is held in one place: the moment, and what is held then, in bytes by part."""

    moment: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(self.parts.values())


def peak_memory(run: PlannedRun) -> dict[str, Peak]:
    """The most that is held by place: `"device"` and `"host"`, or `"host"` alone on a CPU."""
    peaks: dict[str, Peak] = {}
    always = {"Python and libraries": float(LIBRARIES), "calibration tokens": 8.0 * run.tokens}
    always["modules and records"] = float(_LAYER * run.num_layers)
    whole = {"whole model": float(run.weight_bytes)} if run.whole else {}
    num_weights = sum(rows * columns for rows, columns in run.shapes.operators.values())
    end = {"masks": num_weights / 8}
    if find_spec("matplotlib") is not None:
        drawn = {layer_and_kind(name) for name in run.shapes.operators}  # the experts of a mixture are one
        end["picture of the model card"] = float(_PICTURE + _PICTURE_OF_OPERATOR * len(drawn))
    peaks["host"] = Peak("model card", always | end)
    for moment, computing, waiting in moments(run):
        held = {"device": whole | dict(computing), "host": dict(always), "disk": {}}
        held[run.storage]["activations that wait"] = waiting
        if run.on_cpu:
            held["host"] |= held.pop("device")
        for place in held.keys() - {"disk"}:
            found = Peak(moment, {part: count for part, count in held[place].items() if count})
            peaks[place] = max(peaks.get(place, found), found, key=lambda peak: peak.total)
    kept = min(_KEPT_FREE, 0.1 * (peaks["host"].total - LIBRARIES))
    peaks["host"].parts["freed, not given back"] = kept
    return dict(sorted(peaks.items()))


def moments(run: PlannedRun) -> Iterator[tuple[str, Mapping[str, float], float]]:
    """Moments of a run: what is held where it computes, and bytes of activations that wait at the storage."""
    config, stream, value, layers = run.config, run.stream_bytes, run.value, run.num_layers
    ends = {"embedding and head": 2.0 * value * run.vocabulary * run.hidden * run.reads}
    if run.samples_itself:
        together = -(-run.num_sampled // num_batches(run.num_sampled))
        cache = 2 * value * together * run.length * layers * run.key_width
        # of the next token of every text, their copy in float32, probabilities and what they are drawn by
        next_ones = together * num_texts(run.length) * run.vocabulary * (value + 12.0)
        held = {"whole model": float(run.weight_bytes), "keys and values": cache, "logits": next_ones}
        yield "calibration text", held, 0
    gradients = bool(run.differentiates) * layers * stream / run.num_samples  # hidden states between all layers
    if run.differentiates:  # a sequence at a time; the loss and its gradients are float32 in between
        yield "loss", ends | {"logits and gradients": run.length * run.vocabulary * (2 * value + 12)}, gradients
    if run.num_unseen:
        logits = {"logits": min(run.length, LOGITS_TOGETHER) * run.vocabulary * (value + 8.0)}
        yield "perplexity", ends | logits, 0
    if run.rounds:  # as many models as there are layers, a sequence at a time after the layers
        first = min(run.tokens, -(-config.allocation_tokens // run.length) * run.length)
        logits = {"logits": run.length * run.vocabulary * (value + 8.0)}
        yield "choice of decoder layers", ends | logits, (layers + 2.0) * value * first * run.hidden
    for kind in run.shapes.kinds:
        layer = {"decoder layer": float(kind.num_bytes * run.reads)}
        linear = [g for g in kind.groups if not g.of_expert]
        saved = 1.8 * value * sum(g.outputs + g.columns for g in linear)  # of a token, for its gradients
        widest = max((max(g.rows) for g in linear), default=run.hidden)
        batch = {"one batch": float(value * run.batch * (2 * run.hidden + 3 * widest))}
        if run.differentiates:
            yield "gradients", layer | {"activations": run.length * saved}, gradients
        grams = sum(4.0 * g.columns**2 for g in kind.groups if g.sees_dense)  # all made in one pass, solved later
        # Of the dense network, inputs or outputs are kept, what is less.
        recorded = {g: value * run.tokens * min(g.outputs, g.columns) for g in linear if not g.sees_dense}
        for g in kind.groups:
            gram, matrix, small = 4 * g.columns**2, 4 * g.outputs * g.columns, min(g.outputs, g.columns)
            cross = matrix if g.last else 4 * small * g.columns * run.corrects
            cross *= not g.sees_dense
            grams += (gram + cross) * bool(config.held_out) - gram * g.sees_dense
            held = layer | {"other Gram matrices": grams}
            # Outputs of finished parts wait: at most the group's inputs and one stream. If the last operator
            # compensates for the residual stream, its inputs and that stream are these; experts keep what entered.
            waiting = run.streams_bytes + stream + run.records * sum(recorded.values())
            waiting += 0 if g.sees_dense else value * run.tokens * (run.hidden + g.columns)
            waiting += 2 * stream if g.last or g.of_expert else 0
            rows = {"its rows in float32": 4 * run.batch * (g.columns + (5 if g.last else 1) * small)}
            yield "statistics", held | batch | rows | {"Gram matrix": gram, "targets": cross}, waiting
            yield "statistics", held | {"Gram matrix": 2.5 * gram, "targets": cross}, waiting
            problems = {"Gram matrix": gram, "weights and targets": 2 * matrix}
            yield "solving", held | problems | {"solver": run.solved(g)[1]}, waiting
            grams -= (gram + cross) * bool(config.held_out)
            recorded.pop(g, None)
        if kind.mixture is not None:
            # Outputs of all experts and what is wanted of them, inputs of those that stay and what they still lack.
            on_disk, waiting = run.storage == "disk", run.streams_bytes + 4 * stream
            stay = {"experts that stay": float(kind.mixture.num_bytes), "what they lack": on_disk * stream}
            gram, matrix = 4 * kind.mixture.columns**2, 4 * kind.mixture.rows * kind.mixture.columns
            refit = {"Gram matrices": run.refits * 5 * gram, "weights and targets": run.refits * 6 * matrix}
            yield "experts", layer | batch | stay | refit, waiting - on_disk * stream
    yield "embedding and head", ends, 0

"""Peak memory of a run, foretold: what is held when, in the order in which `run.pruning.layer_pruning` holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from optimum_fista.run.planning.counts import masked_weights
from optimum_fista.run.planning.model import LayerKind, PlannedModel
from optimum_fista.run.planning.settings import PlanSettings
from optimum_fista.solve.blocks import SCALE_ON_DEVICES
from optimum_fista.solve.cost import SolveCost

LIBRARIES_PART = "Python and libraries"
LIBRARIES = 295 * 2**20
"""Python with torch (a build for CPUs) and Transformers, and what their first calls add, in bytes."""
_HEAP = 64 * 2**20
_HEAP_SHARE = 0.1
"""What glibc's allocator keeps of freed tensors although it is asked not to, measured as this share of the rest."""


@dataclass
class Peak:
    """The largest sum of what is held in one place.

    Attributes:
        moment: When.
        parts: What is held then, in bytes.
    """

    moment: str = ""
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


class Ledger:
    """Keeps account of what is held on the device and on the host; both are one where the device is the CPU.

    Attributes:
        peaks: By place, `"device"` and `"host"`.
    """

    def __init__(self, one_place: bool) -> None:
        self.one_place = one_place
        self.peaks: dict[str, Peak] = {"host": Peak()} if one_place else {"device": Peak(), "host": Peak()}
        self._held: dict[tuple[str, str], int] = {}

    def hold(self, name: str, size: float, place: str = "device") -> None:
        """Hold something from now on, in place of what had its name; what lies on disk is not held."""
        self._held[self._place(place), name] = int(size) if place != "disk" else 0

    def free(self, *names: str) -> None:
        """Hold it no more."""
        self._held = {key: size for key, size in self._held.items() if key[1] not in names}

    def moment(self, label: str, *passing: tuple[str, float] | tuple[str, float, str]) -> None:
        """A moment at which something more is held: names, sizes and places."""
        held = dict(self._held)
        for name, size, *where in passing:
            key = (self._place(where[0] if where else "device"), name)
            held[key] = held.get(key, 0) + (0 if "disk" in where else int(size))
        for place, peak in self.peaks.items():
            parts = {name: size for (kept, name), size in held.items() if kept == place and size}
            if sum(parts.values()) > peak.total:
                self.peaks[place] = Peak(label, parts)

    def _place(self, place: str) -> str:
        return "host" if self.one_place else place


def plan_memory(model: PlannedModel, settings: PlanSettings) -> Ledger:
    """Walk through a run and note what is held."""
    ledger = Ledger(settings.on_cpu)
    ledger.hold(LIBRARIES_PART, LIBRARIES, "host")
    if model.in_memory or settings.calibration == "self":
        cache = settings.cache_bytes(model.model) if settings.calibration == "self" else 0
        ledger.moment("calibration text", ("whole model", model.weight_bytes), ("keys and values", cache))
    if model.in_memory:
        ledger.hold("whole model, dequantized", model.weight_bytes)
    ledger.hold("calibration tokens", 8 * settings.tokens, "host")
    if settings.allocates:
        _allocation(ledger, model, settings)
    hidden = model.hidden_bytes * settings.batches
    ledger.hold("arguments of decoder layers", model.call_bytes)
    embedding = 0 if settings.maps_files else settings.embedding_bytes(model.model)
    ledger.moment("embedding", ("hidden states", hidden), ("embedding", embedding))
    if settings.storage != "device":
        ledger.moment("embedding", ("hidden states", hidden), ("hidden states", hidden, settings.storage))
    for kind in model.kinds:
        _Layer(ledger, model, settings, kind).walk()
    masks = masked_weights(model, settings.config) // 8
    rest = ("embedding and head", 2 * embedding)
    ledger.moment("the rest of the model", rest, ("masks of all operators, a bit a weight", masks, "host"))
    host = ledger.peaks["host"]
    tensors = host.total - LIBRARIES
    host.parts["freed, kept by the allocator"] = int(min(_HEAP, _HEAP_SHARE * tensors))
    return ledger


def _allocation(ledger: Ledger, model: PlannedModel, settings: PlanSettings) -> None:
    """The pass forwards and backwards, and the costs of zeros."""
    share = 1 / settings.batch_size  # one sequence at a time
    hidden = model.hidden_bytes * share
    embedding = 0 if model.in_memory or settings.maps_files else settings.embedding_bytes(model.model)
    for kind in model.kinds:
        weights = 0 if model.in_memory or settings.maps_files else kind.weight_bytes
        ledger.moment(
            "gradients of the loss",
            ("embedding", embedding),
            ("decoder layer", weights),
            ("activations of one sequence", kind.probe.saved_bytes * share + 3 * hidden),
            ("hidden states between layers", len(model.layers) * hidden, settings.storage),
        )
    logits = settings.sequence_length * settings.vocabulary(model.model)
    ledger.moment(
        "loss",
        ("logits and their gradients", logits * (2 * settings.element_size + 3 * 4)),
        ("hidden states between layers", len(model.layers) * hidden, settings.storage),
        ("embedding and head", 2 * embedding),
    )
    largest = max(o.shape[0] * o.shape[1] for group in model.operators.values() for o in group.values())
    ledger.moment("costs of zeros", ("saliencies of one operator", 4 * 4.25 * largest))


class _Layer:
    """One decoder layer, as `run.pruning.layer_pruning.LayerPruning.prune` goes through it."""

    def __init__(self, ledger: Ledger, model: PlannedModel, settings: PlanSettings, kind: LayerKind) -> None:
        self.ledger, self.settings, self.kind = ledger, settings, kind
        self.in_memory = model.in_memory
        self.hidden = model.hidden_bytes * settings.batches
        self.cost: SolveCost = settings.cost
        self.size = settings.element_size
        self.groups = [[o.shape for o in group] for group in kind.probe.groups]

    def walk(self) -> None:
        """Note all that is held."""
        ledger, settings = self.ledger, self.settings
        storage, probe = settings.storage, self.kind.probe
        ledger.hold("decoder layer", 0 if self.in_memory else self.kind.weight_bytes)
        ledger.hold("hidden states, dense", self.hidden if settings.runs_dense else 0, storage)
        ledger.hold("hidden states, pruned", self.hidden if settings.carries_on else 0, storage)
        sees_dense = [settings.sees_dense(index) for index in range(len(self.groups))]
        corrected = [index for index, sees in enumerate(sees_dense) if not sees]
        if settings.runs_dense:
            self._record(corrected, range(len(self.groups) if settings.records_dense else 0))
        for index, group in enumerate(self.groups):
            if sees_dense[index]:
                self._solve(index, group)
        batch = self.hidden / settings.batches
        for stop, index in enumerate(corrected):
            before = probe.paused_bytes[corrected[stop - 1]] if stop else 0
            last = settings.corrects_residual(self.kind, index)
            after = 0 if last else probe.paused_bytes[index]
            before = 0 if last and storage == "device" and settings.carries_on else before  # becomes what is kept
            ledger.hold("paused activations", max(before, after) * settings.batches, storage)
            self._statistics(index, self.groups[index], last)
            ledger.hold("paused activations", 0 if last else after * settings.batches, storage)
            self._solve(index, self.groups[index])
        self._experts(2 * self.hidden if storage == "device" else 2 * batch)
        if settings.carries_on:
            ledger.moment(
                "output of the decoder layer",
                ("one batch", max(probe.running_bytes)),
                ("hidden states, pruned, behind the layer", self.hidden, storage),
            )
        if settings.finetunes:
            self._finetune()
        written = 0 if settings.on_cpu else self.kind.weight_bytes
        states = 0 if settings.on_cpu or storage == "host" else self.hidden * settings.streams
        ledger.free("paused activations", *(f"recorded activations {i}" for i in corrected))
        ledger.free("kept for the last operator")
        ledger.moment("writing", ("decoder layer", written, "host"), ("hidden states", states, "host"))
        ledger.free("hidden states, dense, behind the layer", "hidden states, dense", "hidden states, pruned")
        ledger.free("decoder layer")

    def _finetune(self) -> None:
        """`model.reconstruction.reconstruct`: masks, weights from before, gradients, two moments, float32 weights."""
        settings, kind = self.settings, self.kind
        self.ledger.free("paused activations", "kept for the last operator")
        self.ledger.free(*(f"recorded activations {index}" for index in range(len(self.groups))))
        a_weight = 2 + self.size + 4 * (3 if self.size == 4 else 4)
        inputs = sum(group[0][1] for group in self.groups)
        inputs += sum(expert.active * sum(expert.shape) for expert in kind.experts)
        saved = kind.probe.saved_bytes + self.size * settings.batch_tokens * inputs
        self.ledger.moment(
            "fine-tuning",
            ("trained weights, their gradients and moments", a_weight * kind.pruned_weights),
            ("activations of one batch", saved),
            ("hidden states, pruned, behind the layer", self.hidden * settings.streams, settings.storage),
        )

    def _record(self, corrected: Sequence[int], seen: Sequence[int]) -> None:
        """`model.statistics.record_dense` of the groups `seen`."""
        settings, ledger = self.settings, self.ledger
        tokens, passing = settings.tokens, [0.0]
        for index in seen:
            group = self.groups[index]
            rows, columns = sum(out for out, _ in group), group[0][1]
            if index not in corrected:
                ledger.hold(f"Gram matrix {index}", 4 * columns**2)
                self._hold_out(index, 4 * columns**2)
                passing.append(4 * settings.batch_tokens * columns)
            else:
                kept = self.size * min(rows, columns)
                ledger.hold(f"recorded activations {index}", kept * tokens, settings.storage)
                passing.append(3 * 4 * settings.batch_tokens * rows)
        ledger.hold("hidden states, dense, behind the layer", self.hidden, settings.storage)
        running = max(self.kind.probe.running_bytes) + max(passing)
        ledger.moment("recording the dense decoder layer", ("one batch", running))

    def _experts(self, paused: float) -> None:
        """Experts, one at a time, from the inputs of all of them."""
        pruned = [experts for experts in self.kind.experts if experts.pruned]
        if not pruned:
            return
        self.ledger.hold("paused activations", paused)
        self.ledger.hold("inputs of the experts", self.hidden * self.settings.streams, self.settings.storage)
        for index, expert in enumerate(pruned, len(self.groups)):
            gram = 4 * expert.shape[1] ** 2
            cross = 4 * expert.shape[1] * min(expert.shape)
            self._hold_out(index, gram + cross)
            self.ledger.moment("statistics", (f"Gram matrix {index}", 2.5 * gram), ("cross-Gram matrix", cross))
            self._solve(index, list(max(expert.groups, key=lambda shapes: sum(rows for rows, _ in shapes))))
        self.ledger.free("inputs of the experts")

    def _statistics(self, index: int, group: list[tuple[int, int]], last: bool) -> None:
        """`model.statistics.problems_corrected` and `model.residual.residual_problem`."""
        settings, ledger = self.settings, self.ledger
        rows, columns = sum(out for out, _ in group), group[0][1]
        width = rows if rows < columns or last else columns
        gram, cross = 4 * columns**2, 4 * width * columns * bool(settings.dense_share or last)
        batch = self.kind.probe.running_bytes[index] + 4 * settings.batch_tokens * (
            columns + (5 if last else 1) * width
        )
        if last and settings.carries_on:
            copies = settings.storage != "device"
            kept = self.settings.tokens * columns * self.size
            place = settings.storage if copies else "device"
            ledger.hold("kept for the last operator", kept + self.hidden, place)
        weight = 4 * rows * columns if last else 0
        self._hold_out(index, gram + cross)
        ledger.moment(
            "statistics",
            (f"Gram matrix {index}", gram),
            ("cross-Gram matrix", cross + weight),
            ("one batch", batch),
        )
        ledger.moment("statistics", (f"Gram matrix {index}", 2.5 * gram), ("cross-Gram matrix", cross + weight))
        ledger.free(f"recorded activations {index}")
        ledger.moment(
            "layer problems",
            (f"Gram matrix {index}", gram),
            ("cross-Gram matrix", cross),
            ("layer problems", 4 * columns * (2 * rows + 2 * max(out for out, _ in group)) - (cross if last else 0)),
        )

    def _solve(self, index: int, group: list[tuple[int, int]]) -> None:
        """`run.pruning.layer_pruning.LayerPruning._solve`, and the report after it."""
        settings, ledger = self.settings, self.ledger
        rows, columns = sum(out for out, _ in group), group[0][1]
        largest = max(out for out, _ in group)
        problem = 4 * columns * 2 * rows
        scale = 1 if settings.on_cpu else SCALE_ON_DEVICES
        ledger.hold(f"Gram matrix {index}", 4 * columns**2)
        ledger.hold("layer problems", problem)
        if settings.stacks:
            working = self.cost.working_bytes(rows, columns, scale)
            ledger.moment("stacking", ("stacked problems", 4 * columns * 2 * largest))
            ledger.moment("solving", ("solver's working set", working))
        else:
            others = 4 * columns * 1.25 * (rows - largest)
            working = self.cost.working_bytes(rows if self.cost.shares_factor else largest, columns, scale)
            ledger.moment("solving", ("solver's working set", working), ("results", others))
        results = 4 * columns * 1.25 * rows
        if self.size < 4:
            ledger.moment("report", ("results", results), ("solver's working set", 4 * columns * 3 * largest))
        if settings.config.held_out:
            ledger.moment("report", ("results", results), ("held-out problem", 4 * columns * 3 * largest))
        ledger.free(f"Gram matrix {index}", "layer problems", f"sums over held-out tokens {index}")

    def _hold_out(self, index: int, size: int) -> None:
        """Gram and cross-Gram matrices of held-out tokens, kept until the group's errors are measured."""
        if self.settings.config.held_out:
            self.ledger.hold(f"sums over held-out tokens {index}", size)

"""What a run will take, from the configuration of a model: operators, peak memory, time and disk.

docs/scale.md says how far real runs were from it.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator
from functools import cached_property

import numpy as np
from tqdm import tqdm

from optimum_fista.packed.masks import smallest_encoding
from optimum_fista.run.estimate.memory import Peak, peak_memory
from optimum_fista.run.estimate.planned_run import PlannedRun
from optimum_fista.run.estimate.stages import work_by_stage
from optimum_fista.run.estimate.work import work
from optimum_fista.run.pruning.operators import idle_patterns

_TOKENS_TOGETHER = 8192
"""Tokens a forward pass that keep an accelerator busy."""


class Estimate(PlannedRun):
    """What a run from files to files will take, by the settings of `PlannedRun`. Nothing is written."""

    @cached_property
    def memory(self) -> dict[str, Peak]:
        """Peak memory by place: `"device"` and `"host"`, or `"host"` alone on a CPU."""
        return peak_memory(self)

    @cached_property
    def work(self) -> dict[str, np.ndarray]:
        """Work by stage."""
        return work_by_stage(self)

    @property
    def seconds(self) -> dict[str, float]:
        """Time by stage; empty without rates."""
        rates = self.rates
        return {} if rates is None else {name: float((n / rates).sum()) for name, n in self.work.items()}

    @cached_property
    def operators(self) -> dict[str, Counter[str]]:
        """`"number"`, `"weights"` and `"zeros"` of the operators to prune by their last name, and of all together.

        If whole parts go, `"zeros"` are the weights of the operators that are removed with them.
        If operators share the zeros, those of a name are as if each had the average sparsity.
        """
        found: dict[str, Counter[str]] = {}
        for name, shape in self.shapes.operators.items():
            weights = shape[0] * shape[1]
            counts = {"number": 1, "weights": weights, "zeros": weights - self.config.pattern_for(name).num_kept(shape)}
            for key in (name.rpartition(".")[2], "together"):
                found.setdefault(key, Counter()).update(counts)
        found["together"] = found.pop("together", Counter())  # to the end
        return found

    @cached_property
    def disk_bytes(self) -> dict[str, int]:
        """Bytes on disk by part when the last decoder layer is written; packed weights bring their masks.

        Hidden states are gone when the weight files are joined, one of them at a time.
        """
        together, saved = self.operators["together"], self.num_removed * self.value
        masks = (together["weights"] - (together["zeros"] if self.only_removes else 0)) // 8
        for name, shape in self.shapes.operators.items() if self.packed else ():
            pattern = self.config.pattern_for(name)
            saved += (shape[0] * shape[1] - pattern.num_kept(shape)) * self.value
            saved -= shape[0] * smallest_encoding(shape[1], pattern.n_of_m).row_bytes(shape[1])
        model = self.weight_bytes - saved
        return {
            "model": model,
            "hidden states of two layers": 2 * self.streams_bytes,
            "masks (journal and model folder)": masks if self.packed else 2 * masks,
            "fused experts, copied by the lazy reader": self.shapes.fused_bytes,
        }

    @cached_property
    def notes(self) -> list[str]:
        """What the reader should know."""
        return list(self._notes())

    def _notes(self) -> Iterator[str]:
        yield from idle_patterns(self.config, list(self.shapes.operators), list(self.shapes.left_dense))
        if self.samples_itself:
            yield "--calibration self has the model sample its text, for which it is loaded whole: a text avoids that."
        if self.whole:
            yield "a GGUF file can't be read one weight at a time: it is dequantized, and the whole model is held."
        fitted = self.tokens - self.config.held_out * self.length
        widest = max((columns for _, columns in self.shapes.operators.values()), default=0)
        if fitted < widest:
            yield f"{fitted} calibration tokens for {widest} inputs: the Gram matrix is rank-deficient."
        if self.shapes.fused_bytes:
            yield "every expert is counted with the tokens that it sees on average."
        if self.rounds:
            yield f"the run chooses which decoder layers go: this estimate assumes {self.rounds} after the first one."
        if self.allocates:
            yield "operators share the zeros: counts by name are those of the average sparsity, the sum is exact."
        if self.why_untimed:
            yield f"time is not estimated: {self.why_untimed}"

    @property
    def total_seconds(self) -> float | None:
        """Time of the whole run; `None` without rates."""
        return sum(self.seconds.values()) + self.start_seconds if self.seconds else None

    def best_batch_size(self, free_bytes: int | None) -> int:
        """Sequences a forward pass that use an accelerator well: 8192 tokens, if `free_bytes` of its memory suffice.

        On a CPU it is 1: one sequence keeps it busy (docs/streaming.md).
        """
        if self.on_cpu:
            return 1
        size = max(1, min(self.num_samples, _TOKENS_TOGETHER // self.length))
        while (
            size > 1 and free_bytes is not None and self.with_batch_size(size).memory["device"].total > 0.8 * free_bytes
        ):
            size //= 2
        return size

    def with_batch_size(self, batch_size: int) -> Estimate:
        """The same run with other batches."""
        other = copy.copy(self)
        other.batch_size, other.batch = batch_size, batch_size * self.length
        for name in ("memory", "work"):
            vars(other).pop(name, None)
        return other

    @property
    def _model_size(self) -> str:
        dtype = str(self.model.dtype).removeprefix("torch.")
        parameters = f"{self.model.num_parameters():,} parameters in {dtype} ({size(self.weight_bytes)})"
        return f"{parameters}, {self.num_layers} decoder layers"

    def overview(self) -> str:
        """What the run will do and take, in a few lines."""
        model, together, config = self.model, self.operators["together"], self.config
        pruned = f"{together['number']} operators with {together['weights']:,} weights"
        if self.num_removed:
            share = self.num_removed / model.num_parameters()
            pruned += f"; {self.num_removed:,} parameters go ({share:.1%})"
        if together["weights"] and not self.only_removes:
            pruned += f"; {together['zeros']:,} become zero ({together['zeros'] / together['weights']:.1%})"
        text = "that the model writes itself" if self.samples_itself else "of text"
        seconds = self.total_seconds
        slowest = sorted(self.seconds.items(), key=lambda stage: -stage[1])[:3]
        stages = ", ".join(f"{name} {tqdm.format_interval(taken)}" for name, taken in slowest)
        time_taken = "not known" if seconds is None else f"about {tqdm.format_interval(seconds)} ({stages})"
        memory = ", ".join(f"{size(peak.total)} of the {place} ({peak.moment})" for place, peak in self.memory.items())
        lines = {
            "model": f"{type(model).__name__}, {self._model_size}",
            "pruned": pruned,
            "pattern": str(config.sparsity if self.asked.pattern == "unstructured" else self.asked.pattern),
            "method": f"{config.method}, error correction {config.error_correction}",
            "calibration": f"{self.num_samples} x {self.length} tokens {text}, batches of {self.batch_size}",
            "time": f"{time_taken}, on {self.device}",
            "memory": f"{memory}, at most",
            "disk": size(sum(self.disk_bytes.values())),
        }
        return "\n".join(f"{name:<13}{text}" for name, text in lines.items())

    def __str__(self) -> str:
        model, held_out, together = self.model, self.config.held_out, self.operators["together"]
        removed, others = self.num_removed, model.num_parameters() - together["weights"]
        heads, more = ("zeros", "everything else, dense"), 0
        if self.only_removes:
            heads, more = ("removed", "everything else"), max(0, removed - together["zeros"])
        else:
            others -= removed
        lines = [
            f"{type(model).__name__}: {self._model_size}",
            f"{self.config.method}, error correction {self.config.error_correction}, {self.num_samples} x "
            f"{self.length} calibration tokens{f' ({held_out} sequences held out)' * bool(held_out)}, "
            f"batches of {self.batch_size}, on {self.device}",
            "",
            f"{'operators':<24}{'number':>8}{'weights':>20}{heads[0]:>20}",
            *(f"{k:<24}{c['number']:>8}{c['weights']:>20,}{c['zeros']:>20,}" for k, c in self.operators.items()),
            f"{heads[1]:<32}{others:>20,}{more:>20,}",
        ]
        if removed:
            left = model.num_parameters() - removed
            lines.append(f"{removed:,} parameters go ({removed / model.num_parameters():.2%}), {left:,} are left")
        # "loses the rows that model.layers.*.mlp.down_proj no longer reads"
        left_dense = {name: re.sub(r"\.\d+\.", ".*.", why) for name, why in self.shapes.left_dense.items()}
        for reason, count in Counter(left_dense.values()).items():
            names = [name for name, why in left_dense.items() if why == reason]
            lines.append(f"left dense ({reason}): {', '.join(names[:3])}{f' and {count - 3} more' * (count > 3)}")
        tables = {f"peak memory, {place}: {peak.moment}": peak.parts for place, peak in self.memory.items()}
        for title, parts in (tables | {"disk": self.disk_bytes}).items():
            lines += ["", f"{title:<44}{size(sum(parts.values())):>12}"]
            lines += [f"  {name:<42}{size(n):>12}" for name, n in sorted(parts.items(), key=lambda p: -p[1]) if n]
        lines += ["", f"{'products, TFLOP; time, minutes:seconds':<44}"]
        start = {"imports, reading": self.start_seconds}
        stages = {"together": sum(self.work.values(), work()), **self.work, **dict.fromkeys(start, work())}
        for name, amounts in stages.items():
            seconds = (self.seconds | start).get(name, sum(self.seconds.values()) + self.start_seconds)
            took = tqdm.format_interval(seconds) if self.seconds else ""
            lines.append(f"  {name:<42}{amounts[:2].sum() / 1e12:>12,.2f}{took:>12}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def size(count: float) -> str:
    """Bytes for people."""
    return tqdm.format_sizeof(count, "iB", 1024)

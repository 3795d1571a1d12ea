"""What a run will take, from the configuration of a model: operators, peak memory, time and disk.

docs/scale.md says how far real runs were from it.
"""

from __future__ import annotations

import copy
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedConfig

from optimum_fista.model.architecture import input_embedding
from optimum_fista.model.expert_removal import ROUNDS
from optimum_fista.model.losses import PROBED_TOGETHER
from optimum_fista.packed.masks import smallest_encoding
from optimum_fista.run.checkpoints.loading import (
    default_device,
    floating_dtype,
    gguf_file,
    read_config,
    usable_device,
)
from optimum_fista.run.checkpoints.shards import FILE_BYTES
from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.estimate.shapes import Group, model_shapes
from optimum_fista.run.estimate.work import CALL, LAYER_CALL, measure_device, measure_method, work
from optimum_fista.run.memory import LARGE_BLOCK
from optimum_fista.run.pruning.operators import idle_patterns
from optimum_fista.run.pruning.removal import require_zeros_to_pack
from optimum_fista.run.texts.calibration_source import usual_length
from optimum_fista.run.texts.self_sampling import num_batches, num_texts

LIBRARIES = 295 * 2**20
"""Python with torch (a build for CPUs) and Transformers, and what their first calls add, in bytes; measured."""
IMPORT_SECONDS = 6.0
"""Python's imports of torch and Transformers, measured on a CPU."""
_LAYER_SECONDS = 0.25
"""What Python takes for each decoder layer, most of it to look for unused objects; measured on a CPU."""
_CARD_SECONDS = 1.5
"""What the model card and its picture take, with the import that draws it; measured on a CPU."""
_CALLS = 40
"""Calls of PyTorch that add a batch to the sums of a group and read it, for each network that it is seen in."""
_WATCHED = 36
"""Those that see an operator on a sequence, forwards and backwards, to add up how the loss feels it."""
_BROUGHT = 4e-4
"""Seconds that Accelerate takes to bring one tensor of a checkpoint and to take it away; measured on a CPU."""
_DEQUANTIZING = 5e-8
"""Seconds that a weight of a GGUF file takes, measured on a CPU."""
_KEPT_FREE = 64 * 2**20
"""What the C library keeps of freed memory, at most; it is a tenth of what was held if that is less."""
_TOKENS_TOGETHER = 8192
"""Tokens a forward pass that keep an accelerator busy."""
_SWEEP = 8
"""Bytes of a float32 that is read and written."""
_LOGIT = 14
"""Bytes moved for a logit: it becomes float32, and log-softmax reads and writes it."""
_LOGIT_GRADIENT = 34
"""Bytes moved for its gradient, back through both, the choice of the next token, and that of the tokens with a loss."""


class Peak(NamedTuple):
    """The most that is held in one place: the moment, and what is held then, in bytes by part."""

    moment: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(self.parts.values())


class Estimate:
    """What a run from files to files will take. Nothing is read but the model's configuration, nothing is written.

    Attributes:
        shapes: The model without weights, and its operators.
        rates: What the device does in a second; `None` if it was not measured.
        start_seconds: What a run takes before it begins: imports, and reading a GGUF file, which is done to sample or
            cut the text, and to prune.
        notes: What the reader should know.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedConfig,
        config: FistaPruningConfig | None = None,
        *,
        num_samples: int = 128,
        sequence_length: int | None = None,
        batch_size: int = 1,
        num_unseen: int = 0,
        calibration: str = "text",
        device: str | None = None,
        dtype: str | torch.dtype = "auto",
        storage_device: str | None = None,
        packed: bool = False,
        timed: bool = True,
    ) -> None:
        """Take the settings of a run.

        Args:
            model: Hub id, model folder, folder with one GGUF file, a configuration file alone, or a configuration.
            config: What to prune and how; `FistaPruningConfig()` by default.
            num_samples: Calibration sequences, held-out ones (`config.held_out`) included.
            sequence_length: Tokens a sequence; `None`: 2048, or the model's maximum if that is shorter.
            batch_size: Sequences a forward pass.
            num_unseen: Sequences to measure the perplexity on, besides.
            calibration: Source of the text; `"self"` has the model, held whole, sample it.
            device: `None`: the accelerator if there is one, otherwise the CPU. It need not be in this machine.
            dtype: Dtype of the model; `"auto"` takes the checkpoint's.
            storage_device: Where hidden states wait, as in `FistaPruner`; `None`: on the device, in files on the CPU.
            packed: Whether a packed folder is to be written.
            timed: Whether to measure the device, about one second; without it there are no times.

        Raises:
            ValueError: If the model or an option can't be used.
        """
        self.config = config = (config or FistaPruningConfig()).resolved()
        numbers = {"num_samples": num_samples, "sequence_length": sequence_length, "batch_size": batch_size}
        for name, number in numbers.items():
            if number is not None and number < 1:
                raise ValueError(f"{name}={number}: pass at least 1.")
        if config.held_out >= num_samples:
            raise ValueError(
                f"held_out={config.held_out}: of num_samples={num_samples} sequences none is left to calibrate on: "
                "pass a smaller number, or more sequences."
            )
        require_zeros_to_pack(config, packed)
        self.chooses = None if config.whole_parts is None else config.whole_parts.measure
        started = time.perf_counter()
        given = model if isinstance(model, PreTrainedConfig) else read_config(str(model))
        reading = time.perf_counter() - started
        self.whole = not isinstance(model, PreTrainedConfig) and gguf_file(str(model)) is not None
        stored = floating_dtype((None if self.whole else getattr(given, "dtype", None)) or torch.float32)
        self.shapes = model_shapes(given, config, stored if dtype == "auto" else floating_dtype(dtype))
        self.model, self.config = self.shapes.model, self.shapes.config
        config = self.config
        self.device = (device or default_device()).partition(":")[0]
        self.on_cpu = self.device == "cpu"
        place = (storage_device or ("disk" if self.on_cpu else self.device)).partition(":")[0]
        self.storage = "device" if place == self.device else {"cpu": "host"}.get(place, "disk")
        # On the CPU, weights in the stored dtype are pages of the checkpoint's files, which the system can drop.
        self.reads = not self.whole and not (self.on_cpu and stored == self.model.dtype)
        self.samples_itself, self.packed = calibration == "self", packed
        self.num_samples, self.batch_size, self.num_unseen = num_samples, batch_size, num_unseen
        self.length = sequence_length or usual_length(given)
        self.num_layers = sum(kind.count for kind in self.shapes.kinds)
        self.tokens, self.batch = num_samples * self.length, batch_size * self.length
        self.vocabulary, self.hidden = input_embedding(self.model).shape
        text = self.model.config.get_text_config(decoder=True)
        self.heads = getattr(text, "num_attention_heads", None) or 1
        self.key_width = self.hidden * (getattr(text, "num_key_value_heads", None) or self.heads) / self.heads
        self.large_block = LARGE_BLOCK if self.on_cpu else math.inf
        self.value = self.model.dtype.itemsize
        self.weight_bytes = sum(p.nbytes for p in self.model.parameters())
        dequantizing = self.model.num_parameters() * _DEQUANTIZING
        self.start_seconds = IMPORT_SECONDS + (3 * reading + 2 * dequantizing) * self.whole
        self.corrects, self.records = config.correction.dense_share > 0, config.correction.needs_dense
        streams = (self.records or config.finetune is not None) + (not config.correction.independent_layers)
        self.stream_bytes = self.value * self.tokens * self.hidden
        self.streams_bytes = streams * self.stream_bytes
        removal = self.shapes.removal
        smaller = self.model if removal is None else removal.plan.model
        self.num_sampled = num_samples + num_unseen
        self.num_removed = self.model.num_parameters() - smaller.num_parameters()
        self.only_removes = removal is not None and removal.choice is None
        self.refits = removal is not None and removal.asked.expert_refit
        self.rounds = 0 if removal is None else removal.num_removed_layers
        self.allocates = any(map(config.shares_budget, self.shapes.operators))
        self.differentiates = self.allocates + config.needs_gradients + (self.chooses is not None)  # how often
        self.rates, self.notes = None, list(self._notes())
        self._solving: dict[Group, tuple[np.ndarray, float]] = {}
        if timed:
            try:
                columns = max((columns for _, columns in self.shapes.operators.values()), default=self.hidden)
                options = self.model.dtype, columns, self.config.compute_dtype, self.large_block
                self.rates = measure_device(usable_device(device), *options)
            except ValueError as error:
                self.notes.append(f"time is not estimated: {error}")

    @cached_property
    def memory(self) -> dict[str, Peak]:
        """Peak memory by place: `"device"` and `"host"`, or `"host"` alone on a CPU."""
        peaks: dict[str, Peak] = {}
        always = {"Python and libraries": float(LIBRARIES), "calibration tokens": 8.0 * self.tokens}
        whole = {"whole model": float(self.weight_bytes)} if self.whole else {}
        peaks["host"] = Peak("masks", always | {"masks": self.operators["together"]["weights"] / 8})
        for moment, computing, waiting in self._moments():
            held = {"device": whole | dict(computing), "host": dict(always), "disk": {}}
            held[self.storage]["activations that wait"] = waiting
            if self.on_cpu:
                held["host"] |= held.pop("device")
            for place in held.keys() - {"disk"}:
                found = Peak(moment, {part: count for part, count in held[place].items() if count})
                peaks[place] = max(peaks.get(place, found), found, key=lambda peak: peak.total)
        kept = min(_KEPT_FREE, 0.1 * (peaks["host"].total - LIBRARIES))
        peaks["host"].parts["freed, not given back"] = kept
        return dict(sorted(peaks.items()))

    def _moments(self) -> Iterator[tuple[str, Mapping[str, float], float]]:
        """Moments of a run: what is held where it computes, and bytes of activations that wait at the storage."""
        config, stream, value, layers = self.config, self.stream_bytes, self.value, self.num_layers
        ends = {"embedding and head": 2.0 * value * self.vocabulary * self.hidden * self.reads}
        if self.samples_itself:
            together = -(-self.num_sampled // num_batches(self.num_sampled))
            cache = 2 * value * together * self.length * layers * self.key_width
            # of the next token of every text, their copy in float32, probabilities and what they are drawn by
            next_ones = together * num_texts(self.length) * self.vocabulary * (value + 12.0)
            held = {"whole model": float(self.weight_bytes), "keys and values": cache, "logits": next_ones}
            yield "calibration text", held, 0
        gradients = bool(self.differentiates) * layers * stream / self.num_samples  # hidden states between all layers
        if self.differentiates:  # a sequence at a time; the loss and its gradients are float32 in between
            yield "loss", ends | {"logits and gradients": self.length * self.vocabulary * (2 * value + 12)}, gradients
        if self.num_unseen:
            yield (
                "perplexity",
                ends | {"logits": min(self.length, PROBED_TOGETHER) * self.vocabulary * (value + 8.0)},
                0,
            )
        if self.rounds:  # as many models as there are layers, a sequence at a time after the layers
            first = min(self.tokens, -(-config.allocation_tokens // self.length) * self.length)
            logits = {"logits": self.length * self.vocabulary * (value + 8.0)}
            yield "choice of decoder layers", ends | logits, (layers + 2.0) * value * first * self.hidden
        for kind in self.shapes.kinds:
            layer = {"decoder layer": float(kind.num_bytes * self.reads)}
            linear = [g for g in kind.groups if not g.of_expert]
            saved = 1.8 * value * sum(g.outputs + g.columns for g in linear)  # of a token, for its gradients
            widest = max((max(g.rows) for g in linear), default=self.hidden)
            batch = {"one batch": float(value * self.batch * (2 * self.hidden + 3 * widest))}
            if self.differentiates:
                yield "gradients", layer | {"activations": self.length * saved}, gradients
            grams = sum(4.0 * g.columns**2 for g in kind.groups if g.sees_dense)  # all made in one pass, solved later
            # Of the dense network, inputs or outputs are kept, what is less.
            recorded = {g: value * self.tokens * min(g.outputs, g.columns) for g in linear if not g.sees_dense}
            for g in kind.groups:
                gram, matrix, small = 4 * g.columns**2, 4 * g.outputs * g.columns, min(g.outputs, g.columns)
                cross = matrix if g.last else 4 * small * g.columns * self.corrects
                cross *= not g.sees_dense
                grams += (gram + cross) * bool(config.held_out) - gram * g.sees_dense
                held = layer | {"other Gram matrices": grams}
                # Outputs of finished parts wait: at most the group's inputs and one stream. If the last operator
                # compensates for the residual stream, its inputs and that stream are these; experts keep what entered.
                waiting = self.streams_bytes + stream + self.records * sum(recorded.values())
                waiting += 0 if g.sees_dense else value * self.tokens * (self.hidden + g.columns)
                waiting += 2 * stream if g.last or g.of_expert else 0
                rows = {"its rows in float32": 4 * self.batch * (g.columns + (5 if g.last else 1) * small)}
                yield "statistics", held | batch | rows | {"Gram matrix": gram, "targets": cross}, waiting
                yield "statistics", held | {"Gram matrix": 2.5 * gram, "targets": cross}, waiting
                problems = {"Gram matrix": gram, "weights and targets": 2 * matrix}
                yield "solving", held | problems | {"solver": self._solved(g)[1]}, waiting
                grams -= (gram + cross) * bool(config.held_out)
                recorded.pop(g, None)
            if kind.mixture is not None:
                # Outputs of all experts and what is wanted of them, inputs of those that stay and what they still lack.
                on_disk, waiting = self.storage == "disk", self.streams_bytes + 4 * stream
                stay = {"experts that stay": float(kind.mixture.num_bytes), "what they lack": on_disk * stream}
                gram, matrix = 4 * kind.mixture.columns**2, 4 * kind.mixture.rows * kind.mixture.columns
                refit = {"Gram matrices": self.refits * 5 * gram, "weights and targets": self.refits * 6 * matrix}
                yield "experts", layer | batch | stay | refit, waiting - on_disk * stream
            pruned = sum(count * g.outputs * g.columns for g, count in kind.groups.items())
            if config.finetune is not None:  # masks, weights from before, gradients, moments, weights in float32
                training = (2 + value + 4 * (3 if value == 4 else 4)) * pruned
                parts = layer | {"weights in training": training, "activations": self.batch * saved}
                yield "fine-tuning", parts, 2 * self.streams_bytes
        yield "embedding and head", ends, 0

    def _solved(self, group: Group) -> tuple[np.ndarray, float]:
        """Work of solving a group, and the most bytes that it holds besides the layer problems."""
        if group not in self._solving:
            method = self.config.create_method(self.model.config.model_type)
            stacked = self.allocates and self.config.scope == "matrix"
            rows = (group.outputs,) if stacked else group.rows
            needs, held = measure_method(method, group.pattern, rows, group.columns, self.on_cpu, self.large_block)
            # the error of what is written, after rounding to the model's dtype and after stacking
            needs += work(products=2.0 * ((self.value < 4) + 2 * stacked) * group.outputs * group.columns**2)
            self._solving[group] = needs, held + stacked * 8 * max(group.rows) * group.columns
        return self._solving[group]

    def _moved(self, amount: float, block: float) -> np.ndarray:
        """Work of operations that move so many bytes and make blocks of so many."""
        return work(large_bytes=amount) if block >= self.large_block else work(moved_bytes=amount)

    def _loss(self, tokens: float, gradients: bool = False) -> np.ndarray:
        """Work of the head and of the loss, a sequence at a time."""
        moved = self._moved((_LOGIT + gradients * _LOGIT_GRADIENT) * self.vocabulary, 4 * self.vocabulary * self.length)
        return tokens * (work(2.0 * (1 + gradients) * self.vocabulary * self.hidden) + moved)

    @cached_property
    def work(self) -> dict[str, np.ndarray]:
        """Work by stage."""
        config, names = self.config, ("calibration text", "allocation", "forward passes", "statistics", "solving")
        stages = {name: work() for name in (*names, "fine-tuning", "files and Python")}
        head = 2.0 * self.vocabulary * self.hidden
        if self.samples_itself:  # a token at a time, all weights read for each
            every = sum(kind.count * 2 * kind.num_active for kind in self.shapes.kinds) + head
            steps = -(-self.length // num_texts(self.length)) * num_batches(self.num_sampled)
            stages["calibration text"] = work(
                every * self.length * self.num_sampled,
                moved_bytes=steps * self.weight_bytes,
                python=steps * self.num_layers * LAYER_CALL,
            )
        first = min(self.tokens, -(-config.allocation_tokens // self.length) * self.length)
        gradients = self.differentiates * first
        # To choose decoder layers, each round tries the model without each of them; all run half of it on average.
        tried = first * sum(self.num_layers + 1 - done for done in range(self.rounds))
        stages["forward passes"] += self._loss(2 * self.num_unseen * self.length)
        stages["allocation"] = self._loss(gradients, gradients=True) + self._loss(tried)
        for kind in self.shapes.kinds:
            # A token's forward pass: products with weights, and all around them. Attention (half of all pairs of
            # tokens) is half as fast as products, and its softmax reads and writes scores in float32 on a CPU.
            products = work(2 * kind.num_active)
            around = work(4 * self.length * self.hidden, python=LAYER_CALL / self.batch)
            around += work(moved_bytes=8 * self.heads * self.length * self.on_cpu)
            for g in (g for g in kind.groups if not g.of_expert):  # norms and rotations are float32 in any model
                moved = (6 + 1.75 * self.value) * (g.outputs + g.columns)
                around += self._moved(moved, self.value * self.batch * max(*g.rows, g.columns))
            token = products + around
            # In the pruned network, what is not pruned is taken to run once.
            again = float(any(g.passes for g in kind.groups))
            more = sum((g.passes - again) * n * g.outputs * g.columns * g.share for g, n in kind.groups.items())
            passes = (self.records or config.finetune is not None) + again + more / kind.num_active
            unseen = 2 * self.num_unseen * self.length
            stages["forward passes"] += token * (kind.count * (self.tokens * passes + 3 * self.batch + unseen))
            # Gradients: forwards, again, and backwards, which takes twice as long but for products with weights.
            backwards = (3 * products + 4.5 * around) * gradients
            bringing = 2 * gradients / self.length * kind.num_tensors * _BROUGHT * (not self.whole)
            stages["allocation"] += kind.count * (backwards + token * (tried / 2) + work(python=bringing))
            for g, count in kind.groups.items():
                times, tokens, square = kind.count * count, self.tokens * g.share, float(g.columns) ** 2
                # Its operators are watched: all that is seen of them becomes float32, twice; inputs are squared,
                # multiplied and added up, gradients squared and multiplied.
                seen, converted = len(g.rows) * g.columns, 2 * (self.value + 4) * (self.value < 4)
                moved = gradients * g.share * (16 * seen + 12 * g.outputs + converted * (seen + g.outputs))
                calls = gradients / self.length * _WATCHED * len(g.rows)
                stages["allocation"] += times * (
                    self._moved(moved, 4 * self.length * g.columns) + work(python=calls * CALL)
                )
                sums = tokens * square  # half of each product of a Gram matrix is formed
                if not g.sees_dense and (self.corrects or g.last):
                    sums += 2 * tokens * g.columns * (g.outputs if g.last else min(g.outputs, g.columns))
                problems = 2 * g.outputs * square * (2 - g.sees_dense) * (1 + bool(config.held_out))
                moved = tokens * (12 * g.columns + (0 if g.sees_dense else 24 * g.outputs))
                stages["statistics"] += times * self._moved(moved, 4 * self.batch * g.columns)
                moved = 10 * _SWEEP * (square + g.outputs * g.columns)
                stages["statistics"] += times * self._moved(moved, 4 * square)
                calls = _CALLS * (2 - g.sees_dense) * self.tokens / self.batch
                stages["statistics"] += times * work(products=sums + problems, python=calls * CALL)
                stages["solving"] += self._solved(g)[0] * times
            mixture = kind.mixture
            if mixture is not None:  # with all experts, with those that stay, and once they are refitted
                stages["forward passes"] += token * (kind.count * 3 * self.tokens)
                experts, square = kind.count * mixture.number * self.refits, float(mixture.columns) ** 2
                sums = self.tokens * mixture.share * (square + 8 * mixture.rows * mixture.columns)
                once = square * mixture.columns / 3 + 4 * mixture.rows * square
                fits = 6 * once  # on both halves and on all, twice each
                stages["statistics"] += work(products=ROUNDS * experts * sums)
                stages["solving"] += work(products=ROUNDS * experts * fits)
            sweeps = kind.count * _SWEEP * sum(count * g.outputs * g.columns for g, count in kind.groups.items())
            stages["allocation"] += work(moved_bytes=self.allocates * 24 * sweeps)
            if config.finetune is not None:  # forwards and backwards; Adam, masks and rounding take twelve passes
                stages["fine-tuning"] += token * (kind.count * (3 * config.finetune_steps * self.batch + self.tokens))
                stages["fine-tuning"] += work(moved_bytes=config.finetune_steps * 12 * sweeps)
            layer = work(file_bytes=2 * kind.num_bytes + self.streams_bytes, python=_LAYER_SECONDS)
            stages["files and Python"] += layer * kind.count
        stages["files and Python"] += work(python=_CARD_SECONDS)
        stages["allocation"] += work(python=_LAYER_SECONDS * bool(gradients + tried))
        return {name: amount for name, amount in stages.items() if amount.any()}

    @property
    def seconds(self) -> dict[str, float]:
        """Time by stage; empty without rates."""
        rates = self.rates
        return {} if rates is None else {name: float((n / rates).sum()) for name, n in self.work.items()}

    @cached_property
    def operators(self) -> dict[str, Counter[str]]:
        """`"number"`, `"weights"` and `"zeros"` of the operators to prune by their last name, and of all together.

        If only whole parts go, `"zeros"` are the weights of the operators that are removed with them; if zeros follow,
        weights and zeros are those of what stays.
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
            "hidden states of two layers, then a joined file": max(2 * self.streams_bytes, min(model, FILE_BYTES)),
            "masks (journal and model folder)": masks if self.packed else 2 * masks,
            "fused experts, copied by the lazy reader": self.shapes.fused_bytes,
        }

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
        if self.chooses is not None:
            how = ", with time in proportion to weights" * (self.chooses == "latency")
            yield (
                "the run chooses what goes by gradients and losses, and logs it before it prunes: this estimate "
                f"assumes {self.shapes.chosen}{how}."
            )
        if self.rounds:
            yield f"the run chooses which decoder layers go: this estimate assumes {self.rounds} after the first one."
        if self.allocates:
            yield "operators share the zeros: counts by name are those of the average sparsity, the sum is exact."

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
            "pattern": str(
                config.pattern if self.shapes.removal or config.pattern != "unstructured" else config.sparsity
            ),
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

"""A run that is planned: its settings, the model without weights, and the sizes that follow from both."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedConfig

from optimum_fista.model.architecture import input_embedding
from optimum_fista.run.checkpoints.loading import default_device, floating_dtype, gguf_file, read_config, usable_device
from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.estimate.shapes import Group, model_shapes
from optimum_fista.run.estimate.work import measure_device, measure_method, work
from optimum_fista.run.memory import LARGE_BLOCK
from optimum_fista.run.pruning.removal import require_zeros_to_pack
from optimum_fista.run.texts.calibration_source import usual_length

IMPORT_SECONDS = 6.0
"""Python's imports of torch and Transformers, measured on a CPU."""
_DEQUANTIZING = 5e-8
"""Seconds that a weight of a GGUF file takes, measured on a CPU."""


class PlannedRun:
    """What is known of a run from files to files before it starts. Nothing is read but the model's configuration.

    Attributes:
        shapes: The model without weights, and its operators.
        rates: What the device does in a second; `None` if it was not measured.
        why_untimed: Why it could not be measured; empty if it was, or was not asked for.
        start_seconds: What a run takes before it begins: imports, and reading a GGUF file, which is done to sample or
            cut the text, and to prune.
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
            num_unseen: Sequences that are drawn besides; the perplexity is then measured on 4,096 tokens.
            calibration: Source of the text; `"self"` has the model, held whole, sample it.
            device: `None`: the accelerator if there is one, otherwise the CPU. It need not be in this machine.
            dtype: Dtype of the model; `"auto"` takes the checkpoint's.
            storage_device: Where hidden states wait, as in `FistaPruner`; `None`: on the device, in files on the CPU.
            packed: Whether a packed folder is to be written.
            timed: Whether to measure the device, about one second; without it there are no times.

        Raises:
            ValueError: If the model or an option can't be used.
        """
        self.config = self.asked = config = (config or FistaPruningConfig()).resolved()
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
        self.num_samples, self.batch_size = num_samples, batch_size
        self.num_unseen = num_unseen
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
        streams = self.records + (not config.correction.independent_layers)
        self.stream_bytes = self.value * self.tokens * self.hidden
        self.streams_bytes = streams * self.stream_bytes
        removal = self.shapes.removal
        smaller = self.model if removal is None else removal.plan.model
        self.num_sampled = num_samples + num_unseen
        self.num_removed = self.model.num_parameters() - smaller.num_parameters()
        self.only_removes = removal is not None
        self.refits = removal is not None and removal.asked.expert_refit
        self.rounds = 0 if removal is None else removal.num_removed_layers
        self.allocates = any(map(config.shares_budget, self.shapes.operators))
        self.differentiates = int(self.allocates)
        self.rates, self.why_untimed = None, ""
        self._solving: dict[Group, tuple[np.ndarray, float]] = {}
        if timed:
            try:
                columns = max((columns for _, columns in self.shapes.operators.values()), default=self.hidden)
                options = self.model.dtype, columns, self.config.compute_dtype, self.large_block
                self.rates = measure_device(usable_device(device), *options)
            except ValueError as error:
                self.why_untimed = str(error)

    def solved(self, group: Group) -> tuple[np.ndarray, float]:
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

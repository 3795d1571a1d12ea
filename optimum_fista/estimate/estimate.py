"""Estimate what a run from files to files takes: memory and disk by closed formulas, time by a trial.

`Estimate` is a `RunSizes`: the run, planned on a model without weights exactly as `FistaPruner` does. The text and the
batch size are chosen here if the user leaves them open. There are three answers, each computed when it is asked for:
`memory` (`peak_memory.py`), `disk_bytes`, and `seconds` (`trial.py`).

Words: activations that *wait*, such as the hidden states between two decoder layers, are in the run's storage: on the
device, on the host or on disk. An *operator* is a linear operator of a decoder layer, a matrix [out, in], called by the
name of its module, such as "model.layers.3.mlp.up_proj".

Fields that `RunSizes` sets: `num_samples` sequences of `length` tokens, and `num_held_out` to measure the perplexity
on; `sequence_bytes` of hidden states in a sequence, and `stream_bytes` in all of one network; `num_streams` networks (0
to 2: dense and pruned). `weight_bytes` are those of the whole model, and `value_bytes` of one weight. `on_cpu`: whether
the device that computes is the CPU; `place` is that device as the user named it. `storage` is "device", "host" or
"disk".
"""

import math
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from optimum_fista.config import FistaPruningConfig
from optimum_fista.estimate.peak_memory import moments, peak_memory, whole_model_parts
from optimum_fista.estimate.run_sizes import RunSizes
from optimum_fista.estimate.trial import seconds_by_stage
from optimum_fista.memory import available_bytes, total_bytes
from optimum_fista.model.experts import is_fused_experts
from optimum_fista.text.sources import usual_texts

_TOKENS_TOGETHER = 8192  # in a forward pass: more make an accelerator no faster


class Estimate(RunSizes):
    """What a run takes; arguments are those of `optimum-fista prune`, and of the model only the configuration is read.

    `calibration=None` is the model's own text if it can be loaded whole, otherwise c4 or Python's documentation.
    `num_samples` counts held-out sequences too. `batch_size=None` is one sequence on a CPU, on other devices as many as
    have 8192 tokens if memory suffices. The device need not be in this machine. `measures_perplexity` is False for a
    run without further text to measure the perplexity on. Wrong options raise `ValueError`.

    Attributes besides those of `RunSizes`:
        calibration: The source of the text: `"self"`, a file or a data set.
        too_large_to_write: Whether the model would have written its own text if it fitted into memory.
        batch_size: Sequences in a forward pass, chosen if the user passes none.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedConfig,
        config: FistaPruningConfig | None = None,
        *,
        num_samples: int = 128,
        sequence_length: int | None = None,
        batch_size: int | None = None,
        calibration: str | None = "text",
        device: str | None = None,
        dtype: str | torch.dtype = "auto",
        storage_device: str | None = None,
        packed: bool = False,
        measures_perplexity: bool = True,
        num_sources: int = 1,
    ) -> None:
        """Plan the run on a model without weights, and choose the text and the batch size.

        The base class sets `self.place`, the device that the user named or `None`, and `self.device`, the kind of
        device where the run computes, such as "cuda". `_choose_calibration` sets the text.

        Reads the model's configuration, which the Hub's client may download, and the headers of the files of a model
        folder. Arguments are the flags of `optimum-fista prune`, such as `storage_device`, where activations wait. If
        `calibration` or `batch_size` is `None`, it is chosen here. If another argument is `None`, it has its usual
        value. `calibration` is the source of text, such as "c4". It only matters whether it is "self", so the default
        "text" stands for any text that is given; `num_sources` says how many texts there are.
        """
        super().__init__(
            model,
            config,
            num_samples=num_samples,
            sequence_length=sequence_length,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            storage_device=storage_device,
            packed=packed,
            measures_perplexity=measures_perplexity,
            num_sources=num_sources,
        )
        self._free_bytes = available_bytes(torch.device(self.place or self.device))
        self._choose_calibration(calibration)
        if batch_size is None:
            self.batch_size = self._best_batch_size()

    def _choose_calibration(self, calibration: str | None) -> None:
        """Set `self.calibration`, the source of the text, and `self.too_large_to_write`.

        `calibration` is the user's; `None` is the model's own text ("self") if the whole model fits into memory.
        `self._free_bytes` are free on the device; `None` or 0 if the device does not say.
        """
        if self.on_cpu:
            # A run that resumes must decide alike: all memory counts, not what is free at the moment.
            most: float = total_bytes()
        elif self._free_bytes:
            most = self._free_bytes
        else:
            most = math.inf  # the device does not say
        needed = sum(whole_model_parts(self).values())
        self.too_large_to_write = calibration is None and needed > most
        if calibration is not None:
            self.calibration = calibration
        elif self.too_large_to_write:
            self.calibration = usual_texts().to_calibrate_on
        else:
            self.calibration = "self"

    def _best_batch_size(self) -> int:
        """Return how many sequences run together: one on a CPU, otherwise as many as make the device fast and fit.

        Sets `self.batch_size` to one number after another, because `self.memory` depends on it. `self.length` are the
        tokens of a sequence. `self._free_bytes` are free on the device; `None` or 0 if the device does not say.
        """
        if self.on_cpu:
            return 1
        fast_enough = _TOKENS_TOGETHER // self.length  # more sequences make the device no faster
        self.batch_size = max(1, min(self.num_samples, fast_enough))
        if self._free_bytes:
            # A fifth of the device stays free for what the formulas do not know.
            most = 0.8 * self._free_bytes
            while self.batch_size > 1 and sum(self.memory["device"].values()) > most:
                self.batch_size //= 2
        return self.batch_size

    @property
    def disk_bytes(self) -> dict[str, int]:
        """Bytes on disk by part, such as "model" or "masks", when the last decoder layer is written. Writes nothing.

        `self.weights` and `self.zeros` are numbers by the name of an operator, such as "model.layers.3.mlp.up_proj".
        `self.value_bytes` are those of a weight, and `self.num_removed` parameters are removed from the model.
        `self.packed`: the result is stored without its zeros. `self.quantized` is None if the source is not quantized.
        `self.storage_device` is the place that the user named for activations that wait.
        """
        num_zeros = sum(self.zeros.values())  # or weights that are removed with their inputs
        num_masked = sum(self.weights.values())
        if self.num_removed:  # removed weights have no mask
            num_masked -= num_zeros
        masks = num_masked // 8  # a bit a weight

        # How much smaller the files are than all parameters of the dense model (`self.weight_bytes`).
        saved = self.num_removed * self.value_bytes
        if self.packed:
            saved += num_zeros * self.value_bytes - masks
        # Tensors that the model's class does not load are copied: they are no parameters of the model.
        saved -= sum(tensor.num_bytes for tensor in self.source.tensors_to_copy.values())

        # Hidden states that the journal keeps between two layers: held-out ones of the dense and the pruned network,
        # and those of the calibration text if errors are carried from layer to layer.
        hidden_states = 2 * self.num_held_out * self.sequence_bytes
        if self.config.correction.carry == "full":
            hidden_states += self.num_streams * self.stream_bytes
        waiting = 0.0
        # If the user names a folder for them, they are not on the disk of the output.
        names_no_folder = self.storage_device in (None, "disk")
        if self.storage == "disk" and names_no_folder:
            # While most activations wait, the journal, in which the run keeps what it needs to resume, has the hidden
            # states of one layer, not of two. A moment is a step of the run, with the bytes that wait then.
            all_moments = moments(self, writes_own_text=self.calibration == "self")
            largest = max((moment.waiting for moment in all_moments), default=0.0)
            waiting = max(0.0, largest - hidden_states)
        return {
            "model": self.weight_bytes - saved,
            "masks": masks if self.packed else 2 * masks,  # the journal's too
            "fused experts, copied by the lazy reader": self._fused_experts_bytes(),
            "layers that predict more tokens, copied to run them": self.prediction_bytes,
            "hidden states of two layers": 2 * hidden_states,
            "activations that wait": int(waiting),
        }

    def _fused_experts_bytes(self) -> int:
        """Bytes of experts that share tensors [experts, out, in]; they are copied, to be read layer by layer.

        Those of a quantized model are not.
        """
        if self.quantized:
            return 0
        num_bytes = 0
        for module in self.model.modules():
            if is_fused_experts(module):
                parameters = module.parameters(recurse=False)
                num_bytes += sum(p.nbytes for p in parameters if p.ndim == 3)
        return num_bytes

    @property
    def memory(self) -> dict[str, dict[str, float]]:
        """Bytes by part when most is held, by place: `"device"` and `"host"`, or `"host"` alone on a CPU.

        Activations that wait are counted where the run stores them (`self.storage`), unless that is the disk.
        """
        return peak_memory(self, writes_own_text=self.calibration == "self")

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage, such as "solving". Imports, and text that the model writes itself, do not count.

        Prunes a small random model in a temporary folder, when it is asked for the first time. ValueError if that would
        take too long or too much memory.
        """
        return seconds_by_stage(self, self.memory)

"""Estimate what a run from files to files takes: memory and disk by closed formulas, time by a trial.

`Estimate` builds the model without weights (on the meta device), plans the run exactly as `FistaPruner` does
(`plan_run`), and counts bytes. A *moment* of a run is a step at which much memory is held; the peak is that of the
largest moment. Bytes are held in two *places*: on the device where the run computes, and on the host (on a CPU both are
one). Activations that *wait*, such as the hidden states between two decoder layers, are in the run's storage: on the
device, on the host or on disk.

For the time, a model with one decoder layer of each kind gets random weights and is really pruned on random tokens: the
seconds of a layer, times the layers of its kind. If all tokens would take long, a part of them is taken, and the time
besides solving grows in proportion. No formula knows the speed of a machine, but a trial needs the device, the memory
of a layer and less than half a minute to solve it; otherwise a run shows the time left once its first layer is pruned.

Words: an *operator* is a linear operator of a decoder layer, a matrix [out, in], called by the name of its module, such
as "model.layers.3.mlp.up_proj". A *group* of operators has the same inputs, and so one Gram matrix. A *stream* is the
hidden states of all calibration sequences in one network, dense or pruned. *Held-out* sequences are not fitted to.
Matrices are *widened* if they are copied to float32 for each product, because the CPU is slow in their dtype.
"""

import copy
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch.utils.benchmark import Timer
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_fista.config import FistaPruningConfig
from optimum_fista.devices import default_device, floating_dtype, usable_device
from optimum_fista.memory import available_bytes, total_bytes
from optimum_fista.model.experts import is_fused_experts
from optimum_fista.model.held_out import LOGITS_TOGETHER
from optimum_fista.model.layers import prunable_layers, token_limits
from optimum_fista.model.precision import WEIGHTS_WIDENED_TOGETHER, choose_products
from optimum_fista.model.predictor import POSITIONS_ON_CPU, positions_per_chunk
from optimum_fista.prune.plan import Budgets, Plan, plan_run
from optimum_fista.pruner import FistaPruner
from optimum_fista.removal.parts import ModelOutline
from optimum_fista.removal.planning import plan_removal, require_zeros_to_pack
from optimum_fista.removal.shrinking import plan_shrinking
from optimum_fista.report import PruningReport
from optimum_fista.solve.linalg import SCALE_ON_DEVICES, rows_in_block
from optimum_fista.solve.methods import largest_memory_factors, method_class
from optimum_fista.source import loading
from optimum_fista.source.formats.dequantizer import read_dequantized
from optimum_fista.source.quantization import forget_quantization, quantization
from optimum_fista.source.sorting import source_tensors
from optimum_fista.text.calibration_tokens import usual_length
from optimum_fista.text.self_sampling import num_batches, num_texts
from optimum_fista.text.sources import usual_texts
from optimum_fista.verdict import LEAST_TOKENS

LIBRARIES = 325 * 2**20  # bytes of Python, torch and Transformers
_FLOAT32 = 4  # bytes
_TOKENS_TOGETHER = 8192  # in a forward pass: more make an accelerator no faster
_TRIED_SECONDS = 10  # of a trial, without solving
_SOLVING_SECONDS = 30  # of solving in a trial, at most


@dataclass(frozen=True)
class _Moment:
    """Bytes that a run holds at one moment, besides what it always holds."""

    computing: Mapping[str, float]  # where the run computes, by part, such as "decoder layer"
    waiting: float = 0.0  # of activations in the storage


class Estimate:
    """What a run takes; arguments are those of `optimum-fista prune`, and of the model only the configuration is read.

    `calibration=None` is the model's own text if it can be loaded whole, otherwise c4 or Python's documentation.
    `num_samples` counts held-out sequences too. `batch_size=None` is one sequence on a CPU, on other devices as many as
    have 8192 tokens if memory suffices. The device need not be in this machine. `measures_perplexity` is False for a
    run without further text to measure the perplexity on. Wrong options raise `ValueError`.

    Attributes that messages use:
        model: The dense model on the meta device.
        config: The configuration as the user passed it, with a value for each option.
        layers: The decoder layers, with their names.
        operators: Shapes [out, in] of the operators to prune or to fit anew, by name (`"model.layers.3.mlp.up_proj"`).
        weights, zeros: Numbers of their weights, and of those that become zero or are removed, by the same names.
        left_dense: Reasons why other operators stay dense, by name.
        num_removed: Parameters that the result lacks.
        source: The tensors of the files (`SourceTensors`).
        as_stored: Whether tensors are written as they are stored, because the run only removes parts.
        quantized: The quantization settings of the source; None if it is not quantized.
        weight_bytes: Of all parameters of the dense model.
        device: Type of the device, such as `"cuda"`.
        calibration: The source of the text: `"self"`, a file or a data set.
        too_large_to_write: Whether the model would have written its own text if it fitted into memory.
        batch_size, num_samples, length: Sequences in a forward pass, all sequences, and tokens in each.
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
    ) -> None:
        """Plan the run on a model without weights. Each step sets fields that later steps use.

        Arguments are those of `optimum-fista prune`. Reads the model's configuration, which the Hub's client may
        download, and the headers of the files of a model folder.
        """
        if config is None:
            config = FistaPruningConfig()
        config = config.resolved()
        require_zeros_to_pack(config, packed)
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} (--num-samples): pass at least 1.")
        self.num_samples = num_samples
        self.packed = packed

        self._choose_places(device, storage_device)
        model_config = self._describe_model(model, dtype)
        self.length = sequence_length or usual_length(model_config)
        _, longest = token_limits(self.model)  # None: any length
        if longest is not None and self.length > longest:
            raise ValueError(
                f"sequence_length={self.length} (--sequence-length): the model has {longest} positions "
                f"(max_position_embeddings), so pass at most {longest}."
            )
        # Whether a matrix is copied to float32 for each product.
        products = choose_products(config.compute_dtype, torch.device("cpu"), self.model.dtype)
        self._widens = self._on_cpu and products == "widened"

        is_folder = not isinstance(model, PreTrainedConfig) and Path(model).is_dir()
        folder = Path(str(model)) if is_folder else None
        plan = self._plan_run(config, folder, files_dtypes=dtype == "auto")
        self._take_plan(plan)
        # A network whose experts are removed is not measured, because its dense layers are gone by then.
        self._measures = measures_perplexity and not self._removes_experts

        self._free_bytes = available_bytes(torch.device(self._place or self.device))
        self._choose_calibration(calibration)
        self.batch_size = batch_size or self._best_batch_size()

    def _choose_places(self, device: str | None, storage_device: str | None) -> None:
        """Set `device`, the type of the device that computes, and `_storage`, where activations wait.

        `_storage` becomes "device", "host" or "disk". The arguments are the user's, such as "cuda:1". `_place` and
        `_storage_device` keep them as they are, for the trial.
        """
        self._place = device
        self.device, _, _ = (device or default_device()).partition(":")
        self._on_cpu = self.device == "cpu"

        self._storage_device = storage_device
        default_storage = "disk" if self._on_cpu else self.device
        storage, _, _ = (storage_device or default_storage).partition(":")
        self._storage: Literal["device", "host", "disk"]
        if storage == self.device:
            self._storage = "device"
        elif storage == "cpu":
            self._storage = "host"
        else:
            self._storage = "disk"

    def _describe_model(
        self, model: str | Path | PreTrainedConfig, dtype: str | torch.dtype
    ) -> PreTrainedConfig:
        """Build the dense model without weights and set it, with the properties that bytes depend on.

        `model` and `dtype` are the user's; a configuration that is passed stays as it is. Returns a configuration
        without quantization settings.
        """
        if isinstance(model, PreTrainedConfig):
            stored_config = model
            # A GGUF file is read whole: its weights are unpacked to float32.
            self._is_loaded_whole = False
        else:
            stored_config = loading.read_config(str(model))
            self._is_loaded_whole = loading.gguf_file(str(model)) is not None
        self.quantized = quantization(stored_config)
        model_config = copy.deepcopy(stored_config)
        if self.quantized:
            # Both change the copy. The first one sets its dtype, and refuses formats that can't be read.
            read_dequantized(model_config)
            forget_quantization(model_config)

        stored_dtype = torch.float32
        named_dtype = getattr(model_config, "dtype", None)
        if named_dtype and not self._is_loaded_whole:
            stored_dtype = floating_dtype(named_dtype)
        used_dtype = stored_dtype if dtype == "auto" else floating_dtype(dtype)
        # On the CPU, weights in the stored dtype are pages of the checkpoint's files, which the system can drop.
        maps_files = self._on_cpu and stored_dtype == used_dtype and not self.quantized
        self._reads_files = not self._is_loaded_whole and not maps_files

        self.model: PreTrainedModel = loading.model_without_weights(model_config, used_dtype)
        self.weight_bytes = sum(parameter.nbytes for parameter in self.model.parameters())
        self._value_bytes = used_dtype.itemsize  # of a weight, and of a hidden state
        embedding = next(self.model.get_input_embeddings().parameters())
        self._vocabulary, self._hidden = embedding.shape
        return model_config

    def _plan_run(
        self, config: FistaPruningConfig, folder: Path | None, *, files_dtypes: bool
    ) -> Plan:
        """Plan the run as `FistaPruner` does, on `self.model`, which has no weights. Changes nothing.

        `folder` holds the model's files; `None`: they are not known. `files_dtypes`: tensors keep the dtypes that they
        have in the files, because the user asks for no other.
        """
        removal = plan_removal(prunable_layers(self.model, loaded=False), config)
        source = None
        if folder is not None:
            # Tensors stay as they are stored if the run only removes parts.
            stays_quantized = files_dtypes and removal.keeps_values
            with loading.reading(str(folder)):  # errors name the folder
                source = source_tensors(
                    self.model,
                    folder,
                    removal.part_of,
                    quantized=stays_quantized,
                    layers_name=removal.layers.name,
                )
        return plan_run(removal, source, loaded=False, files_dtypes=files_dtypes)

    def _take_plan(self, plan: Plan) -> None:
        """Set the fields that follow from the plan of the run: operators, their weights and zeros, and the steps.

        Uses `model`, `length`, `num_samples` and the sizes of `_describe_model`, which are set before.
        """
        self.source = plan.source
        self.as_stored = plan.as_stored
        # Values decide which decoder layers are removed. For the numbers it does not matter.
        self._num_removed_layers = plan.removal.num_removed_layers
        removed_layers = [(index, 0.0) for index in range(1, 1 + self._num_removed_layers)]
        plan = plan.with_budgets(Budgets(removed_layers=removed_layers))
        removal = plan.removal
        self.layers = plan.layers
        self.config = plan.config
        self.left_dense = removal.left_dense
        self.num_removed = self.model.num_parameters() - removal.num_parameters
        self.removed_parts = removal.removed_parts
        self._removes_experts = bool(removal.mixtures)

        # Operators to solve for: they get zeros, lose inputs, or are the last of their decoder layer, which compensates
        # for the errors of the others.
        self.operators: dict[str, tuple[int, int]] = {}
        for operators_of_layer in removal.operators.values():
            names = list(operators_of_layer)
            for name, operator in operators_of_layer.items():
                is_last = name == names[-1]
                if is_last or removal.patterns[name].sparsity > 0:
                    self.operators[name] = operator.shape
        self._operators_of_layers = [  # names, by the number of the layer
            [name for name in self.operators if name.startswith(f"{layer_name}.")]
            for layer_name, _ in self.layers
        ]
        self.weights = {name: rows * columns for name, (rows, columns) in self.operators.items()}
        self.zeros = {
            name: self.weights[name] - removal.patterns[name].num_kept(shape)
            for name, shape in self.operators.items()
        }

        self._allocates = any(self.config.shares_budget(name) for name in self.operators)
        # Hidden states of the dense network, and of the pruned one.
        correction = self.config.correction
        has_pruned_stream = correction.carry == "full"
        self._num_streams = int(correction.needs_dense) + int(has_pruned_stream)
        self._sequence_bytes = self._value_bytes * self.length * self._hidden  # of hidden states
        self._stream_bytes = self.num_samples * self._sequence_bytes

    def _choose_calibration(self, calibration: str | None) -> None:
        """Set `calibration`, the source of the text, and `too_large_to_write`.

        `calibration` is the user's; `None` is the model's own text ("self") if the whole model fits into memory.
        """
        if self._on_cpu:
            # A run that resumes must decide alike: all memory counts, not what is free at the moment.
            most: float = total_bytes()
        elif self._free_bytes:
            most = self._free_bytes
        else:
            most = math.inf  # the device does not say
        needed = sum(self._whole_model_parts().values())
        self.too_large_to_write = calibration is None and needed > most
        if calibration is not None:
            self.calibration = calibration
        elif self.too_large_to_write:
            self.calibration = usual_texts().to_calibrate_on
        else:
            self.calibration = "self"

    def _best_batch_size(self) -> int:
        """Return how many sequences run together: one on a CPU, otherwise as many as make the device fast and fit.

        Sets `self.batch_size` to one number after another, because `self.memory` depends on it.
        """
        if self._on_cpu:
            return 1
        self.batch_size = max(1, min(self.num_samples, _TOKENS_TOGETHER // self.length))
        if self._free_bytes:
            # A fifth of the device stays free for what the formulas do not know.
            most = 0.8 * self._free_bytes
            while self.batch_size > 1 and sum(self.memory["device"].values()) > most:
                self.batch_size //= 2
        return self.batch_size

    @property
    def _num_held_out(self) -> int:
        """Number of sequences to measure the perplexity on; 0 if the run does not measure it (`self._measures`).

        These are as many as have `LEAST_TOKENS` tokens, and at most the user's `held_out` if there is one.
        """
        if not self._measures:
            return 0
        sequences = math.ceil(LEAST_TOKENS / self.length)  # tokens that a perplexity needs
        if self.config.held_out:
            return min(sequences, self.config.held_out)
        return sequences

    @property
    def disk_bytes(self) -> dict[str, int]:
        """Bytes on disk by part, such as "model" or "masks", when the last decoder layer is written.

        `self.weights` and `self.zeros` are numbers by the name of an operator.
        """
        num_zeros = sum(self.zeros.values())  # or weights that are removed with their inputs
        num_masked = sum(self.weights.values())
        if self.num_removed:
            num_masked -= num_zeros
        masks = num_masked // 8  # a bit a weight

        saved = self.num_removed * self._value_bytes
        if self.packed:
            saved += num_zeros * self._value_bytes - masks
        saved -= sum(tensor.num_bytes for tensor in self.source.tensors_to_copy.values())

        fused_experts = 0
        if not self.quantized:
            for module in self.model.modules():
                if is_fused_experts(module):
                    parameters = module.parameters(recurse=False)
                    fused_experts += sum(p.nbytes for p in parameters if p.ndim == 3)
        # The dense and the pruned network have held-out hidden states of their own.
        held_out = 2 * self._num_held_out * self._sequence_bytes
        hidden_states = self._num_streams * self._stream_bytes + held_out
        waiting = 0.0
        in_output = self._storage_device in (None, "disk")  # not in a folder of the user
        if self._storage == "disk" and in_output:
            # While most activations wait, the journal has the hidden states of one layer, not of two.
            largest = max((moment.waiting for moment in self._moments()), default=0.0)
            waiting = max(0.0, largest - hidden_states)
        return {
            "model": self.weight_bytes - saved,
            "masks": masks if self.packed else 2 * masks,  # the journal's too
            "fused experts, copied by the lazy reader": fused_experts,
            "hidden states of two layers": 2 * hidden_states,
            "activations that wait": int(waiting),
        }

    @property
    def memory(self) -> dict[str, dict[str, float]]:
        """Bytes by part when most is held, by place: `"device"` and `"host"`, or `"host"` alone on a CPU.

        Activations that wait are counted where the run stores them (`self._storage`), unless that is the disk.
        """
        always = self._always()
        masks = sum(self.weights.values()) // 8
        peaks: dict[str, dict[str, float]] = {"host": {**always, "masks": masks}}
        for moment in self._moments():
            held: dict[str, dict[str, float]] = {
                "device": {
                    **moment.computing,
                    "all weights": self.weight_bytes if self._is_loaded_whole else 0,
                },
                "host": dict(always),
                "disk": {},
            }
            held[self._storage]["activations that wait"] = moment.waiting
            if self._on_cpu:  # both places are one
                held["host"] |= held.pop("device")
            for place in ("device", "host"):
                if place in held:
                    peaks[place] = max(peaks.get(place, {}), held[place], key=_total)
        return peaks

    def _always(self) -> dict[str, float]:
        """Count the bytes that the host holds at every moment, by part.

        `self._allocates` tells whether gradients are computed, and `self._value_bytes` are those of a weight.
        """
        parts: dict[str, float] = {
            "Python and libraries": LIBRARIES,
            "calibration tokens": 8 * self.num_samples * self.length,  # int64
        }
        has_experts = any(".experts." in name for name in self.operators)
        is_half = self._value_bytes == 2
        if self._on_cpu and is_half and has_experts and not self._widens:
            # oneDNN keeps half a MiB for each shape of six products, and of as many for gradients. Experts get any
            # number of tokens, which is rounded up to one of these sizes (`in_few_sizes`).
            sizes = max(0.0, 8 + 4 * math.log2(self.batch_size * self.length / 128))
            products = 12 if self._allocates else 6
            parts["kept by oneDNN"] = 0.55 * 2**20 * products * sizes
        return parts

    def _moments(self) -> Iterator[_Moment]:
        """Yield the moments at which a run may hold most, in their order: only the steps that this run has."""
        if self.calibration == "self":
            yield _Moment(self._whole_model_parts())
        if self._num_removed_layers:
            yield self._choosing_layers()
        if self._allocates:
            yield self._allocating()
        for (_, layer), names in zip(self.layers, self._operators_of_layers, strict=True):
            yield from self._pruning_layer(layer, names)
        if self._num_held_out:
            yield from self._measuring()

    def _whole_model_parts(self) -> dict[str, float]:
        """Bytes that are held while the model writes its own text, by part."""
        # Texts that are written together.
        texts = math.ceil(self.num_samples / num_batches(self.num_samples))
        # Keys and values of as many features as a hidden state: fewer heads of both are not counted on.
        keys = 2 * texts * len(self.layers) * self._sequence_bytes
        # Of the newest token of every text, with float32 copies for softmax and sampling.
        num_logits = texts * num_texts(self.length) * self._vocabulary
        logits = num_logits * (self._value_bytes + 3 * _FLOAT32)
        return {"whole model": self.weight_bytes, "keys and values": keys, "logits": logits}

    def _embedding_and_head(self) -> float:
        """Count the bytes of the embedding and the head; 0 if they are pages of files, or of a model loaded whole.

        `self._reads_files` is False then. Each is a matrix of `self._vocabulary` * `self._hidden` weights.
        """
        if not self._reads_files:
            return 0
        num_matrices = 2
        return num_matrices * self._value_bytes * self._vocabulary * self._hidden

    def _loss_bytes(self, tokens: int, *, copied: bool = False) -> float:
        """Count the bytes of logits [tokens, vocabulary] and of what their loss takes, without gradients.

        The loss takes a float32 copy (unless the logits are float32: `self._value_bytes` each) and the logarithms of
        the probabilities. `copied`: the logits are copied once more, because the last one of each of several sequences
        is cut off.
        """
        bytes_per_logit = self._value_bytes + _FLOAT32
        if self._value_bytes != _FLOAT32:
            bytes_per_logit += _FLOAT32
        if copied:
            bytes_per_logit += self._value_bytes
        return tokens * self._vocabulary * bytes_per_logit

    def _choosing_layers(self) -> _Moment:
        """The moment at which the run chooses decoder layers to remove: it computes the loss without each of them."""
        sequences = min(self.num_samples, math.ceil(self.config.allocation_tokens / self.length))
        # Those of all these models, of the model as it is, and of the first layer, which further rounds start from.
        streams = len(self.layers) + 2
        parts = {
            "embedding and head": self._embedding_and_head(),
            "logits": self._loss_bytes(min(self.length, positions_per_chunk(self.model))),
            "float32 copies": self._head_copy(),
        }
        return _Moment(parts, streams * sequences * self._sequence_bytes)

    def _head_copy(self) -> float:
        """Count the bytes of the float32 copy of the head, or of a part of it, for a product; 0 if there is none."""
        if not self._widens:
            return 0
        return _FLOAT32 * min(WEIGHTS_WIDENED_TOGETHER, self._vocabulary * self._hidden)

    def _allocating(self) -> _Moment:
        """The moment at which the run computes gradients of the loss to share the zeros, of a sequence at a time.

        The head runs on few positions at a time (`Predictor`), and is assumed to be of a model that can be cut.
        """
        layer_sizes = [sum(p.numel() for p in layer.parameters()) for _, layer in self.layers]
        widest = max(max(shape) for shape in self.operators.values())
        positions = min(self.length, positions_per_chunk(self.model))
        positions_in_float32 = min(positions, POSITIONS_ON_CPU) if self._on_cpu else positions
        # Logits and their gradient, and four float32 copies of some.
        logits = positions * self._vocabulary * 2 * self._value_bytes
        logits += positions_in_float32 * self._vocabulary * 4 * _FLOAT32
        # Activations of a decoder layer that is recomputed, of which two are squared in float32.
        activations = self.length * self._value_bytes * (12 * self._hidden + 6 * widest)
        activations += self.length * 2 * _FLOAT32 * widest
        # The graph of a decoder layer keeps float32 copies of its weights, and that of the head keeps none.
        widened = max(*layer_sizes, min(WEIGHTS_WIDENED_TOGETHER, self._vocabulary * self._hidden))
        parts = {
            "embedding and head": self._embedding_and_head(),
            "logits, gradients": logits,
            "one sequence": activations,
            "float32 copies": _FLOAT32 * widened if self._widens else 0,
        }
        # Hidden states of all layers wait for the backward pass.
        return _Moment(parts, len(self.layers) * self._sequence_bytes)

    def _pruning_layer(self, layer: torch.nn.Module, names: list[str]) -> Iterator[_Moment]:
        """Yield the moments of pruning one decoder layer: dequantizing it, then solving for each group of operators.

        `names` are those of the operators to prune in `layer`; `self.operators` has their shapes.
        """
        groups = self._groups(names)
        # Groups that all tokens reach: those of experts are left out, because each expert sees a share of the tokens.
        groups_of_all_tokens = {
            (module, columns): outputs
            for (module, columns), outputs in groups.items()
            if ".experts." not in f"{module}."
        }
        held_out = 2 * self._num_held_out * self._sequence_bytes
        layer_bytes = 0 if self._is_loaded_whole else sum(p.nbytes for p in layer.parameters())
        parts: dict[str, float] = {"decoder layer": layer_bytes}
        if self.quantized:
            # Experts are dequantized one by one and then put together, before the layer runs.
            largest = max(p.nbytes for p in layer.parameters())
            waiting = self._num_streams * self._stream_bytes + held_out
            yield _Moment({**parts, "dequantizing": largest}, waiting)

        batch_tokens = self.batch_size * self.length
        if self._widens:
            copies = [0]
            for name in names:
                rows, columns = self.operators[name]
                copies.append(rows * columns + batch_tokens * (rows + columns))
            parts["float32 copies"] = _FLOAT32 * max(copies)
        widest = 0
        for (_, columns), outputs in groups_of_all_tokens.items():
            widest = max(widest, columns, *outputs)
        parts["one batch"] = self._value_bytes * batch_tokens * (2 * self._hidden + 3 * widest)
        if self.config.correction.carry == "none" or self.config.held_out:
            # All groups of a decoder layer are summed in one pass over the tokens.
            parts["other Gram matrices"] = sum(_FLOAT32 * columns**2 for _, columns in groups)

        # Features of the dense network that are kept: outputs of a group, or its inputs if they are fewer.
        recorded = 0
        if self.config.correction.needs_dense:
            for (_, columns), outputs in groups_of_all_tokens.items():
                recorded += min(sum(outputs), columns)
        for (_, columns), outputs in groups.items():
            features = recorded + columns + (self._num_streams + 2) * self._hidden
            waiting = self._value_bytes * self.num_samples * self.length * features + held_out
            yield _Moment({**parts, **self._solving(outputs, columns)}, waiting)

    def _groups(self, names: list[str]) -> dict[tuple[str, int], list[int]]:
        """Return the numbers of outputs of operators, by the module that contains them and their number of inputs.

        Operators of one module with as many inputs are counted as a group: they may share a Gram matrix. `names` are
        such as "model.layers.3.mlp.up_proj", whose module is "model.layers.3.mlp"; `self.operators` has their shapes.
        """
        groups: dict[tuple[str, int], list[int]] = {}
        for name in names:
            rows, columns = self.operators[name]
            module, _, _ = name.rpartition(".")
            groups.setdefault((module, columns), []).append(rows)
        return groups

    def _solving(self, rows: list[int], columns: int) -> dict[str, float]:
        """Count the bytes, by part, of solving for operators that share `columns` inputs.

        `rows` are their numbers of outputs. A method's `memory_factors` say how many such matrices it holds.
        """
        gram = _FLOAT32 * columns**2
        matrix = _FLOAT32 * sum(rows) * columns
        scale = 1 if self._on_cpu else SCALE_ON_DEVICES
        block = _FLOAT32 * columns * rows_in_block(max(rows), columns, scale)
        factors = method_class(self.config.method).memory_factors
        if factors is None:  # not measured
            factors = largest_memory_factors()
        solver = (
            factors.gram_matrices * gram
            + factors.weight_matrices * matrix
            + factors.row_blocks * min(block, matrix)
        )
        return {
            "Gram matrix": gram,
            "weights and targets": 2 * matrix,
            "solver": max(1.5 * gram, solver),
        }

    def _measuring(self) -> Iterator[_Moment]:
        """Yield the moments of measuring the perplexity after the last decoder layer: first the head, then the loss."""
        most = min(LOGITS_TOGETHER, positions_per_chunk(self.model))
        together = max(1, LOGITS_TOGETHER // self.length)  # sequences in a batch
        tokens = min(most, together * self.length)
        ends = {"embedding and head": self._embedding_and_head()}
        waiting = 2 * self._num_held_out * self._sequence_bytes
        if self._widens:
            # The product is float32, and then rounded.
            logits = tokens * self._vocabulary * (_FLOAT32 + self._value_bytes)
            yield _Moment({**ends, "logits": logits, "float32 copies": self._head_copy()}, waiting)
        loss = self._loss_bytes(tokens, copied=together > 1)
        yield _Moment({**ends, "logits of held-out text": loss}, waiting)

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage, without imports and text that the model writes itself; `ValueError` if not estimated.

        Prunes a small random model in a temporary folder, when it is asked for the first time.
        """
        device = usable_device(self._place)
        layers_by_kind = self._layers_by_kind()
        firsts = [numbers[0] for numbers in layers_by_kind]
        self._require_quick_trial(device, firsts)
        trial = self._try(firsts)

        layer_seconds = [layer.seconds for layer in trial.report.layers]  # one of each kind
        solving = trial.report.totals["solve_seconds"]
        solving_share = solving / sum(layer_seconds)
        all_layers = sum(
            seconds * len(numbers)
            for seconds, numbers in zip(layer_seconds, layers_by_kind, strict=True)
        )
        more_tokens = self.num_samples / trial.num_samples

        # A pass over the whole model for the allocation takes as much longer as it has more weights, and sequences.
        allocation = trial.report.seconds.get("allocation", 0.0)
        sizes = [sum(p.numel() for p in layer.parameters()) for _, layer in self.layers]
        head = self._vocabulary * self._hidden
        more_weights = (head + sum(sizes)) / (head + sum(sizes[first] for first in firsts))
        wanted = self.config.allocation_tokens / self.length  # sequences
        more_sequences = min(wanted, self.num_samples) / min(wanted, trial.num_samples)
        return {
            "solving": all_layers * solving_share,
            "forward passes, statistics, files": all_layers * (1 - solving_share) * more_tokens,
            "allocation": allocation * more_weights * more_sequences,
            "around the layers": trial.seconds - allocation - sum(layer_seconds),
        }

    def _layers_by_kind(self) -> list[list[int]]:
        """Return the numbers of the decoder layers of each kind: the same class, shapes and operators to prune."""
        kinds: dict[object, list[int]] = {}
        for number, (layer_name, layer) in enumerate(self.layers):
            shapes = tuple(parameter.shape for parameter in layer.parameters())
            names = self._operators_of_layers[number]
            names_in_layer = tuple(name.removeprefix(layer_name) for name in names)
            kind = type(layer), shapes, names_in_layer
            kinds.setdefault(kind, []).append(number)
        return list(kinds.values())

    def _require_quick_trial(self, device: torch.device, firsts: Iterable[int]) -> None:
        """Refuse to try the decoder layers with the numbers `firsts` if that takes long, or more memory than is free.

        Times a product of matrices on `device`. What else the machine does must not decide: on a CPU, the time of this
        thread counts, and not that of the clock. Changes nothing.
        """
        square = torch.randn(1024, 1024, device=device)
        timed: dict[str, Any] = {"timer": time.thread_time} if self._on_cpu else {}
        timer = Timer("square @ square", globals={"square": square}, **timed)
        seconds_of_product = timer.timeit(5).median
        # A bound on the work: a hundred products of weights [out, in] with a matrix [in, in].
        work = 0
        for first in firsts:
            for name in self._operators_of_layers[first]:
                _, columns = self.operators[name]
                work += 100 * self.weights[name] * columns
        solving_seconds = work / 1024**3 * seconds_of_product

        place = "host" if self._on_cpu else "device"
        needed = sum(self.memory[place].values())
        if self._on_cpu:
            needed -= LIBRARIES  # they are loaded already
        free = available_bytes(device)
        is_too_large = free is not None and 0 < free < needed  # None: the device does not say
        if solving_seconds > _SOLVING_SECONDS or is_too_large:
            raise ValueError("one decoder layer takes too much time or memory here to be tried.")

    def _try(self, firsts: list[int]) -> "_Trial":
        """Prune a random model that has only the decoder layers with the numbers `firsts`, and return the trial.

        It is pruned twice in a temporary folder, without warnings: on few sequences, and on as many as fit into the
        time. `self.model` stays as it is. The random state of PyTorch moves on.
        """
        small = self.model
        if len(firsts) < len(self.layers):
            small = plan_shrinking(ModelOutline(self.layers), layers=firsts).model
        num_tried = min(self.num_samples, self.batch_size + self.config.held_out)
        with (
            TemporaryDirectory(prefix="optimum-fista-") as folder,
            warnings.catch_warnings(action="ignore"),
        ):
            # Pruned from files to files, as the run will be, so that reading and writing count.
            small = loading.model_class(small.config).from_config(
                small.config, dtype=self.model.dtype
            )
            small.save_pretrained(f"{folder}/dense")
            first = self._prune_randomly(folder, "first", num_tried)
            # The first attempt says how many sequences fit into the time.
            layer_seconds = sum(layer.seconds for layer in first.report.layers)
            seconds_of_tokens = layer_seconds - first.report.totals["solve_seconds"]
            fitting = int(num_tried * _TRIED_SECONDS / seconds_of_tokens)
            num_tried = max(num_tried, min(self.num_samples, fitting))
            return self._prune_randomly(folder, "second", num_tried)

    def _prune_randomly(self, folder: str, attempt: str, num_samples: int) -> "_Trial":
        """Prune the model in the folder FOLDER/dense on random tokens, and write the result to FOLDER/ATTEMPT.

        `num_samples` is the number of sequences. Returns the report and the time. The random state of PyTorch moves on.
        """
        tokens = torch.randint(0, self._vocabulary, (num_samples, self.length))
        pruner = FistaPruner(self.config, progress=False, storage_device=self._storage_device)
        started = time.perf_counter()
        report = pruner.prune(
            f"{folder}/dense",
            tokens.split(self.batch_size),
            output_dir=f"{folder}/{attempt}",
            device=self._place,
        )
        return _Trial(report, time.perf_counter() - started, num_samples)


@dataclass(frozen=True)
class _Trial:
    """A run on random weights and tokens."""

    report: PruningReport
    seconds: float  # of the whole run
    num_samples: int  # sequences of random tokens


def _total(parts: Mapping[str, float]) -> float:
    """Sum the bytes of parts."""
    return sum(parts.values())

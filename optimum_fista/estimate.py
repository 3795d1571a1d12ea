"""What a run from files to files will take: memory and disk by closed formulas, time by trying.

For the time, a model with one decoder layer of each kind gets random weights and is really pruned on random tokens: the
seconds of a layer, times the layers of its kind. If all tokens would take long, a part of them is taken, and the time
besides solving grows in proportion. No formula knows the speed of a machine, but a trial needs the device, the memory
of a layer and less than half a minute to solve it; otherwise a run shows the time left once its first layer is pruned.
"""

import copy
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.utils.benchmark import Timer
from transformers import PreTrainedConfig

from optimum_fista.config import FistaPruningConfig
from optimum_fista.devices import default_device, floating_dtype, usable_device
from optimum_fista.memory import available_bytes, total_bytes
from optimum_fista.model.experts import is_fused_experts
from optimum_fista.model.layers import prunable_layers
from optimum_fista.model.precision import choose_products
from optimum_fista.prune.plan import Budgets, plan_run
from optimum_fista.pruner import FistaPruner
from optimum_fista.removal.parts import ModelOutline
from optimum_fista.removal.parts_removal import plan_removal, require_zeros_to_pack
from optimum_fista.removal.shrinking import plan_shrinking
from optimum_fista.solve.linalg import SCALE_ON_DEVICES, rows_in_block
from optimum_fista.solve.methods import largest_memory_factors, method_class
from optimum_fista.source import loading
from optimum_fista.source.formats.dequantizer import read_dequantized
from optimum_fista.source.quantization import forget_quantization, quantization
from optimum_fista.source.source_tensors import source_tensors
from optimum_fista.text.calibration_tokens import usual_length
from optimum_fista.text.self_sampling import num_batches, num_texts
from optimum_fista.text.sources import usual_texts

LIBRARIES = 325 * 2**20  # bytes of Python, torch and Transformers
_TOKENS_TOGETHER = 8192  # in a forward pass: more make an accelerator no faster
_TRIED_SECONDS, _SOLVING_SECONDS = 10, 30


class Estimate:
    """What a run takes; arguments are those of `optimum-fista prune`, and of the model only the configuration is read.

    `calibration=None` is the model's own text if it can be loaded whole, otherwise c4 or Python's documentation.
    `num_samples` counts held-out sequences too. `batch_size=None` is one sequence on a CPU, on other devices as many as
    have 8192 tokens if memory suffices. The device need not be in this machine. Wrong options raise `ValueError`."""

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
    ) -> None:
        config = (config or FistaPruningConfig()).resolved()
        require_zeros_to_pack(config, packed)
        given = model if isinstance(model, PreTrainedConfig) else loading.read_config(str(model))
        # A GGUF file is read whole: its weights are unpacked to float32.
        self.whole = (
            not isinstance(model, PreTrainedConfig) and loading.gguf_file(str(model)) is not None
        )
        given, self.quantized = copy.deepcopy(given), quantization(given)
        if self.quantized:
            forget_quantization(read_dequantized(given))
        stored = floating_dtype(
            (None if self.whole else getattr(given, "dtype", None)) or torch.float32
        )
        keeps, dtype = dtype == "auto", stored if dtype == "auto" else floating_dtype(dtype)
        self.model = loading.described(given, dtype)
        self.place, self.device = device, (device or default_device()).partition(":")[0]
        self.on_cpu, self.storage_device = self.device == "cpu", storage_device
        storage = (storage_device or ("disk" if self.on_cpu else self.device)).partition(":")[0]
        self.storage = "device" if storage == self.device else {"cpu": "host"}.get(storage, "disk")
        # On the CPU, weights in the stored dtype are pages of the checkpoint's files, which the system can drop.
        self.reads = not self.whole and not (self.on_cpu and stored == dtype and not self.quantized)
        # a matrix is copied to float32 for each product
        self.widens = (
            self.on_cpu
            and choose_products(config.compute_dtype, torch.device("cpu"), dtype) == "widened"
        )
        self.num_samples, self.packed = num_samples, packed
        self.length, self.value = sequence_length or usual_length(given), dtype.itemsize
        self.vocabulary, self.hidden = next(self.model.get_input_embeddings().parameters()).shape
        folder = (
            None if isinstance(model, PreTrainedConfig) or not Path(model).is_dir() else Path(model)
        )
        removal = plan_removal(prunable_layers(self.model, loaded=False), config)
        source = None
        if folder is not None:
            with loading.reading(str(folder)):
                source = source_tensors(
                    self.model, folder, removal.part_of, quantized=keeps and removal.keeps_values
                )
        plan = plan_run(removal, source, loaded=False, files_dtypes=keeps)
        self.source, self.as_stored = plan.source, plan.as_stored
        going = [
            (index, 0.0) for index in range(1, 1 + plan.removal.num_removed_layers)
        ]  # which, the values decide
        plan = plan.with_budgets(Budgets(removed_layers=going))
        removal = plan.removal
        self.layers, self.config = plan.layers, plan.config
        self.left_dense, chosen = removal.left_dense, removal.operators
        shapes = {
            key: operator.shape for those in chosen.values() for key, operator in those.items()
        }
        repaired = {
            key for those in chosen.values() for key in [*those][-1:]
        }  # the last one of a decoder layer
        self.num_removed = self.model.num_parameters() - removal.num_parameters
        # only these get zeros, lose inputs, or are fitted anew
        shapes = {k: s for k, s in shapes.items() if k in repaired or removal.patterns[k].sparsity}
        self.operators = shapes
        self.pruned = [
            [key for key in shapes if key.startswith(f"{name}.")] for name, _ in self.layers
        ]
        self.weights = {key: rows * columns for key, (rows, columns) in self.operators.items()}
        self.zeros = {
            k: self.weights[k] - removal.patterns[k].num_kept(s) for k, s in self.operators.items()
        }
        self.allocates = any(map(self.config.shares_budget, self.operators))
        self.weight_bytes = sum(p.nbytes for p in self.model.parameters())
        free = available_bytes(
            torch.device(self.place or self.device)
        )  # None: the device does not say
        # A run that resumes on a CPU decides alike: all memory counts, not what is free at the moment.
        most = total_bytes() if self.on_cpu else free or math.inf
        self.too_large_to_write = calibration is None and sum(self._whole_model.values()) > most
        self.calibration = calibration or (usual_texts()[1] if self.too_large_to_write else "self")
        # Hidden states of the dense network, and of the pruned one.
        self.streams = self.config.correction.needs_dense + (self.config.correction.carry == "full")
        self.stream_bytes = self.value * num_samples * self.length * self.hidden
        most = 1 if self.on_cpu else max(1, min(num_samples, _TOKENS_TOGETHER // self.length))
        self.batch_size = batch_size or most
        while (
            batch_size is None
            and self.batch_size > 1
            and free
            and sum(self.memory["device"].values()) > 0.8 * free
        ):
            self.batch_size //= (
                2  # until a fifth of the device stays free for what the formulas do not know
            )

    @property
    def disk_bytes(self) -> dict[str, int]:
        """Bytes on disk by part when the last decoder layer is written."""
        zeros = sum(self.zeros.values())  # or weights that are removed with their inputs
        masks = (
            sum(self.weights.values()) - (zeros if self.num_removed else 0)
        ) // 8  # a bit a weight
        saved = self.num_removed * self.value + self.packed * (zeros * self.value - masks)
        saved -= sum(tensor.num_bytes for tensor in self.source.unplaced.values())
        fused = [
            p
            for m in filter(is_fused_experts, self.model.modules())
            for p in m.parameters(False)
            if p.ndim == 3
        ]
        return {
            "model": self.weight_bytes - saved,
            "masks": masks if self.packed else 2 * masks,  # the journal's too
            "fused experts, copied by the lazy reader": 0
            if self.quantized
            else sum(p.nbytes for p in fused),
            "hidden states of two layers": 2 * self.streams * self.stream_bytes,
        }

    @property
    def memory(self) -> dict[str, dict[str, float]]:
        """Bytes by part when most is held, by place: `"device"` and `"host"`, or `"host"` alone on a CPU."""
        tokens = 8 * self.num_samples * self.length  # int64
        always: dict[str, float] = {"Python and libraries": LIBRARIES, "calibration tokens": tokens}
        if (
            self.on_cpu
            and not self.widens
            and self.value == 2
            and any(".experts." in key for key in self.operators)
        ):
            # for each shape of six products, and of as many for gradients, with the sizes of `in_few_sizes`
            sizes = max(0.0, 8 + 4 * math.log2(self.batch_size * self.length / 128))
            always["kept by oneDNN"] = 0.55 * 2**20 * 6 * (1 + self.allocates) * sizes
        peaks: dict[str, dict[str, float]] = {
            "host": always | {"masks": sum(self.weights.values()) // 8}
        }
        for computing, waiting in self._moments():
            host, device = (
                dict(always),
                {**computing, "all weights": self.weight_bytes * self.whole},
            )
            {"device": device, "host": host, "disk": {}}[self.storage]["activations that wait"] = (
                waiting
            )
            for place, parts in (
                {"host": host | device} if self.on_cpu else {"device": device, "host": host}
            ).items():
                peaks[place] = max(peaks.get(place, {}), parts, key=lambda held: sum(held.values()))
        return peaks

    @property
    def _whole_model(self) -> dict[str, float]:
        """Bytes that are held while the model writes its own text, by part."""
        texts = -(-self.num_samples // num_batches(self.num_samples))  # that are written together
        # Keys and values of as many features as a hidden state: fewer heads of both are not counted on.
        keys = 2 * self.value * texts * self.length * len(self.layers) * self.hidden
        # Of the newest token of every text, with float32 copies for softmax and sampling.
        logits = texts * num_texts(self.length) * self.vocabulary * (self.value + 12)
        return {"whole model": self.weight_bytes, "keys and values": keys, "logits": logits}

    def _moments(self) -> Iterator[tuple[Mapping[str, float], float]]:
        """Bytes that are held where the run computes, by part, and those of activations that wait."""
        value, batch, tokens = (
            self.value,
            self.batch_size * self.length,
            self.value * self.num_samples * self.length,
        )
        if self.calibration == "self":
            yield self._whole_model, 0
        ends = {"embedding and head": 2 * value * self.vocabulary * self.hidden * self.reads}
        if self.allocates:  # a sequence at a time, in float32; hidden states of all layers wait
            logits = self.length * self.vocabulary * (2 * value + 12)
            # a graph keeps the float32 copies of the head, and later those of one decoder layer
            sizes = [sum(p.numel() for p in layer.parameters()) for _, layer in self.layers]
            largest = max(self.vocabulary * self.hidden, *sizes)
            ends |= {"logits, gradients": logits, "float32 copies": 4 * largest * self.widens}
            yield ends, len(self.layers) * self.stream_bytes / self.num_samples
        factors = method_class(self.config.method).memory_factors or largest_memory_factors()
        for (_, layer), names in zip(self.layers, self.pruned, strict=True):
            groups: dict[
                tuple[str, int], list[int]
            ] = {}  # outputs of the operators of a module with as many inputs
            for key in names:
                groups.setdefault((key.rpartition(".")[0], self.operators[key][1]), []).append(
                    self.operators[key][0]
                )
            # Experts are left out: each sees a share of the tokens.
            seen = {
                place: those for place, those in groups.items() if ".experts." not in f"{place[0]}."
            }
            features = sum(
                min(sum(those), columns) for (_, columns), those in seen.items()
            )  # outputs, or inputs
            recorded = features * self.config.correction.needs_dense
            held: dict[str, float] = {
                "decoder layer": sum(p.nbytes for p in layer.parameters()) * (not self.whole)
            }
            if (
                self.quantized
            ):  # experts are dequantized one by one and then put together, before the layer runs
                largest = max(p.nbytes for p in layer.parameters())
                yield held | {"dequantizing": largest}, tokens * self.streams * self.hidden
            matrices = [
                4 * (math.prod(o) + batch * sum(o)) for o in map(self.operators.__getitem__, names)
            ]
            held |= {"float32 copies": max(matrices, default=0) * self.widens}
            held |= {
                "one batch": value
                * batch
                * (2 * self.hidden + 3 * max(map(max, seen.values()), default=0))
            }
            if self.config.correction.carry == "none" or self.config.held_out:
                # All groups of a decoder layer are summed in one pass over the tokens.
                held |= {"other Gram matrices": sum(4 * columns**2 for _, columns in groups)}
            for (_, columns), those in groups.items():
                gram, matrix = 4 * columns**2, 4 * sum(those) * columns  # float32
                block = (
                    4
                    * columns
                    * rows_in_block(max(those), columns, 1 if self.on_cpu else SCALE_ON_DEVICES)
                )
                solver = (
                    factors.gram_matrices * gram
                    + factors.weight_matrices * matrix
                    + factors.row_blocks * min(block, matrix)
                )
                waiting = tokens * (recorded + columns + (self.streams + 2) * self.hidden)
                problem = {
                    "Gram matrix": gram,
                    "weights and targets": 2 * matrix,
                    "solver": max(1.5 * gram, solver),
                }
                yield held | problem, waiting

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Time by stage, without imports and text that the model writes itself; `ValueError` if it is not estimated."""
        device, kinds = usable_device(self.place), dict[object, list[int]]()
        for number, (name, layer) in enumerate(
            self.layers
        ):  # alike are those with the same shapes and operators
            kind = (
                *(p.shape for p in layer.parameters()),
                *(key.removeprefix(name) for key in self.pruned[number]),
            )
            kinds.setdefault((type(layer), kind), []).append(number)
        firsts = [alike[0] for alike in kinds.values()]
        # A bound on the work: a hundred products of weights [out, in] with a matrix [in, in].
        products = 100 * sum(
            self.weights[k] * self.operators[k][1] for first in firsts for k in self.pruned[first]
        )
        one = (
            Timer("square @ square", globals={"square": torch.randn(1024, 1024, device=device)})
            .timeit(5)
            .median
        )
        needed = (
            sum(self.memory["host" if self.on_cpu else "device"].values()) - LIBRARIES * self.on_cpu
        )
        if products / 1024**3 * one > _SOLVING_SECONDS or needed > (
            available_bytes(device) or needed
        ):
            raise ValueError("one decoder layer takes too much time or memory here to be tried.")
        small = (
            self.model
            if len(firsts) == len(self.layers)
            else plan_shrinking(ModelOutline(self.layers), layers=firsts).model
        )
        tried, most = (
            min(self.num_samples, self.batch_size + self.config.held_out),
            self.num_samples,
        )
        with (
            TemporaryDirectory(prefix="optimum-fista-") as folder,
            warnings.catch_warnings(action="ignore"),
        ):
            # Pruned from files to files, as the run will be, so that reading and writing count.
            described = loading.model_class(small.config).from_config(
                small.config, dtype=self.model.dtype
            )
            described.save_pretrained(f"{folder}/dense")
            for attempt in range(2):  # the first finds out how many sequences fit into the time
                tokens = torch.randint(0, self.vocabulary, (tried, self.length)).split(
                    self.batch_size
                )
                pruner = FistaPruner(
                    self.config, progress=False, storage_device=self.storage_device
                )
                started = time.perf_counter()
                report = pruner.prune(
                    f"{folder}/dense", tokens, output_dir=f"{folder}/{attempt}", device=self.place
                )
                total, solving = time.perf_counter() - started, report.totals["solve_seconds"]
                layers, more = [layer.seconds for layer in report.layers], most / tried
                tried = max(tried, min(most, int(tried * _TRIED_SECONDS / (sum(layers) - solving))))
        # A pass over the whole model for the allocation takes as much longer as it has more weights.
        sizes = [sum(p.numel() for p in layer.parameters()) for _, layer in self.layers]
        head, seen = self.vocabulary * self.hidden, self.config.allocation_tokens / self.length
        grown = (head + sum(sizes)) / (head + sum(sizes[first] for first in firsts))
        every = sum(spent * len(alike) for spent, alike in zip(layers, kinds.values(), strict=True))
        share, allocation = solving / sum(layers), report.seconds.get("allocation", 0.0)
        return {
            "solving": every * share,
            "forward passes, statistics, files": every * (1 - share) * more,
            "allocation": allocation * grown * min(seen, most) / min(seen, most / more),
            "around the layers": total - allocation - sum(layers),
        }

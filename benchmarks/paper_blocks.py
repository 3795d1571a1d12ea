"""Block-wise training for `paper.py`: a decoder layer learns its dense outputs by SGD, at equal time.

FISTAPruner's reviewers asked for a comparison with the training of a whole decoder layer through its loss. Here one
decoder layer is pruned in three ways, each of which starts from the hidden states of the dense model:

- by the package, with errors corrected inside the layer, which also says how much time the others get
- by SGD with momentum on the kept weights of Wanda's mask, which stays
- by SGD with momentum and an l1 penalty (proximal steps), whose result is rounded at the end

The loss is the squared error of the layer's outputs, relative to their energy. `measure_layer` yields the rows.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from shared import parse_config, pattern_of
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from optimum_fista import FistaPruner, PruningCallback
from optimum_fista.model.choice import find_operators
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.solve.proximal_gradient import soft_threshold

Row = dict[str, Any]
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
"""Lengths of the first step that are tried, as shares of the norm of each weight matrix."""
PENALTIES = (0.1, 0.3, 1.0)
"""Total shrinkage of the l1 penalty that is tried, as a share of the mean absolute weight of each matrix."""
MOMENTUM = 0.9


class PeakBytes(TorchDispatchMode):
    """Watch the bytes of all tensors that are made while it is active.

    Attributes:
        active: Whether new tensors are counted.
        peak: The most bytes that they had at one time.
    """

    def __init__(self) -> None:
        """Begin inactive, with no tensors."""
        super().__init__()
        self.active = False
        self.peak = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and count the storages of its results."""
        result = function(*args, **(kwargs or {}))
        if not self.active:
            return result
        inputs = {
            tensor.untyped_storage().data_ptr()
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(tensor, Tensor)
        }
        for tensor in torch.utils._pytree.tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in inputs:  # a view makes no memory
                self._storages[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self._storages = {
            place: (reference, size)
            for place, (reference, size) in self._storages.items()
            if not reference.expired()
        }
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))
        return result


class OneLayer(PruningCallback):
    """Time one decoder layer of a run, and count memory only there."""

    def __init__(self, index: int, memory: PeakBytes) -> None:
        """Watch the layer with this index; `memory` is made active while it is pruned."""
        self.index = index
        self.memory = memory
        self.seconds = 0.0  # of the processor, once the layer is pruned
        self._began = 0.0

    def _begin(self) -> None:
        """Start the clock of the processor, and count memory from now on."""
        self._began = time.process_time()
        self.memory.active = True

    def on_layers_begin(self, *_: Any) -> None:
        """Begin here if the layer is the first one."""
        if self.index == 0:
            self._begin()

    def on_layer_end(self, index: int, *_: Any) -> None:
        """Begin after the layer before, and end after the layer."""
        if index == self.index - 1:
            self._begin()
        elif index == self.index:
            self.seconds = time.process_time() - self._began
            self.memory.active = False


@dataclass(frozen=True)
class Recorded:
    """A decoder layer of the dense model with its inputs and outputs, one sequence each.

    Attributes:
        layer: The module; nobody changes it.
        calls: Positional and named arguments.
        outputs: Its outputs [1, tokens, hidden].
    """

    layer: nn.Module
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    outputs: list[Tensor]

    @torch.no_grad()
    def error(self, layer: nn.Module) -> float:
        """Return the squared error of another layer's outputs, relative to their energy."""
        error = 0.0
        energy = 0.0
        for (args, kwargs), output in zip(self.calls, self.outputs, strict=True):
            error += float((_hidden_states_of(layer(*args, **kwargs)) - output).square().sum())
            energy += float(output.square().sum())
        return error / energy


def _hidden_states_of(result: Any) -> Tensor:
    """The hidden states that a decoder layer returned; in some families they are the first entry of a tuple."""
    return result if isinstance(result, Tensor) else result[0]


@torch.no_grad()
def record(model: PreTrainedModel, index: int, windows: Tensor) -> Recorded:
    """Run the model on each window of token ids [windows, length], and record the decoder layer with this index."""
    _, layer = list(find_decoder_layers(model))[index]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    outputs = []

    def keep_call(
        _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """Keep the arguments of a call, and the hidden states that it returned."""
        calls.append((args, kwargs))
        outputs.append(_hidden_states_of(result))

    handle = layer.register_forward_hook(keep_call, with_kwargs=True)
    try:
        for window in windows.split(1):
            model(input_ids=window, use_cache=False)
    finally:
        handle.remove()
    return Recorded(copy.deepcopy(layer), calls, outputs)


def cut_after(model: PreTrainedModel, index: int) -> None:
    """Remove the decoder layers after the one with this index from the model: they only cost time here."""
    name, _ = next(iter(find_decoder_layers(model)))
    layers = model.get_submodule(name.rpartition(".")[0])
    assert isinstance(layers, nn.ModuleList)
    del layers[index + 1 :]
    model.config.num_hidden_layers = index + 1


def prune_one_layer(
    model: PreTrainedModel, index: int, method: str, windows: Tensor
) -> tuple[nn.Module, float, int]:
    """Prune a decoder layer of a copy of the model to 50%; returns the layer, processor seconds and peak bytes.

    `method` is such as "paper:max_trials=4". All operators have the same share of zeros. Errors are corrected inside
    the layer.
    """
    pruned = copy.deepcopy(model)
    name, layer = list(find_decoder_layers(pruned))[index]
    options = f"{method}:allocation=uniform:error_correction=intra"
    config = replace(parse_config(options, "0.5"), include=(f"{name}.*",))
    memory = PeakBytes()
    watched = OneLayer(index, memory)
    with memory:
        pruner = FistaPruner(config, progress=False, callbacks=[watched])
        pruner.prune(pruned, windows.split(1))
    return layer, watched.seconds, memory.peak


class Sgd:
    """SGD with momentum on the operators of one decoder layer, for a given time of the processor.

    The rate falls linearly to zero over this time. Each matrix has its own rate: a step along the gradient at Wanda's
    weights, on the first sequence, has the length `rate` times the norm of the matrix.

    Attributes:
        layer: The layer that is trained.
    """

    def __init__(
        self, recorded: Recorded, wanda: nn.Module, rate: float, penalty: float | None
    ) -> None:
        """Begin at a copy of a decoder layer; `recorded` and the layer `wanda`, which Wanda pruned, stay as they are.

        With `penalty=None` the layer begins at Wanda's weights, and zeros stay zero. Otherwise it begins at the dense
        weights, and proximal steps of an l1 penalty shrink a weight by `penalty` times the mean absolute weight of its
        matrix, all together.
        """
        self.layer = copy.deepcopy(wanda)
        self._recorded = recorded
        self._penalty = penalty
        self.layer.requires_grad_(False)
        self._weights = [
            operator.module.weight for operator in find_operators("", self.layer).values()
        ]
        for weight in self._weights:
            weight.requires_grad_(True)
        self._masks = [weight != 0 for weight in self._weights]

        # A step along the gradient G at Wanda's weights W has the length rate |W|.
        self._lengths = [
            rate * float(weight.detach().norm() / gradient.norm().clamp_min(1e-30))
            for weight, gradient in zip(self._weights, self._gradients(0), strict=True)
        ]
        if penalty is not None:
            self.layer.load_state_dict(recorded.layer.state_dict())

    def _gradients(self, step: int) -> tuple[Tensor, ...]:
        """Return the gradients of the loss on the sequence of this step; sequences come in turn."""
        number = step % len(self._recorded.calls)
        args, kwargs = self._recorded.calls[number]
        output = self._recorded.outputs[number]
        error = (_hidden_states_of(self.layer(*args, **kwargs)) - output).square().sum()
        return torch.autograd.grad(error / output.square().sum(), self._weights)

    def train(self, seconds: float) -> int:
        """Train `self.layer` for so many seconds of the processor; returns the number of steps."""
        velocities = [torch.zeros_like(weight) for weight in self._weights]
        steps = 0
        began = time.process_time()
        share = 0.0  # of the time that is gone
        while share < 1:
            gradients = self._gradients(steps)
            share_before = share
            share = min(1.0, (time.process_time() - began) / seconds)
            for number, weight in enumerate(self._weights):
                velocities[number].mul_(MOMENTUM).sub_(gradients[number])
                length = self._lengths[number] * (1 - share_before)
                with torch.no_grad():
                    weight.add_(velocities[number], alpha=length)
                    if self._penalty is None:
                        weight.mul_(self._masks[number])
                    else:
                        shrinkage = self._penalty * (share - share_before)
                        weight.copy_(soft_threshold(weight, shrinkage * float(weight.abs().mean())))
            steps += 1
        return steps

    @torch.no_grad()
    def round(self) -> None:
        """Round the trained weights to half of each matrix, by magnitude."""
        for weight in self._weights:
            weight.mul_(pattern_of("0.5").mask(weight))


def measure_layer(
    model: PreTrainedModel, index: int, windows: Tensor, other_windows: Tensor
) -> Iterator[Row]:
    """Prune one decoder layer in all ways, with the time that FISTAPruner takes; yields a row for each.

    Of the rates and penalties that are tried, the one with the lowest error on the calibration tokens counts; the
    time of a row is that of one of them. `model` stays dense.
    """
    recorded = record(model, index, windows)
    other = record(model, index, other_windows)

    def row_of(way: str, layer: nn.Module, seconds: float, peak_bytes: int, steps: int = 0) -> Row:
        """Make the row of a pruned layer, with its errors on both texts (`recorded` and `other`)."""
        errors = {"calibration": recorded.error(layer), "other": other.error(layer)}
        times = {"seconds": seconds, "peak_bytes": peak_bytes, "steps": steps}
        return {"way": way, "layer": index} | times | errors

    methods = {
        "Wanda": "wanda",
        "SparseGPT": "sparsegpt",
        "FISTAPruner, four trials": "paper:max_trials=4",
        "default": "default",
    }
    layers = {}
    seconds_of_ways = {}
    for way, method in methods.items():
        layer, seconds, peak_bytes = prune_one_layer(model, index, method, windows)
        layers[way] = layer
        seconds_of_ways[way] = seconds
        yield row_of(way, layer, seconds, peak_bytes)
    seconds_to_train = seconds_of_ways["FISTAPruner, four trials"]

    def trained(rate: float, penalty: float | None) -> Row:
        """Train once from the layer that Wanda pruned, for as long as FISTAPruner takes, and judge."""
        sgd = Sgd(recorded, layers["Wanda"], rate, penalty)
        memory = PeakBytes()
        with memory:
            memory.active = True
            steps = sgd.train(seconds_to_train)
        if penalty is not None:
            sgd.round()
        way = "SGD on Wanda's mask" if penalty is None else "SGD with an l1 penalty, rounded"
        row = row_of(way, sgd.layer, seconds_to_train, memory.peak, steps)
        return row | {"rate": rate, "penalty": penalty}

    on_mask = best([trained(rate, None) for rate in RATES])
    yield on_mask
    yield best([trained(on_mask["rate"], penalty) for penalty in PENALTIES])


def best(rows: Sequence[Row]) -> Row:
    """Return the row with the lowest error on the calibration tokens; training that diverged has none."""
    return min(
        rows, key=lambda row: math.inf if math.isnan(row["calibration"]) else row["calibration"]
    )

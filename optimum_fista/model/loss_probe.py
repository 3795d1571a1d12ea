"""The loss of a model before and after pruning, and the temperature at which it is most like the dense one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_fista.model.activation_store import ActivationStore, Storage
from optimum_fista.model.architecture import DecoderLayers, modules_around
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.errors import UnsupportedArchitectureError
from optimum_fista.model.hidden_states import record_inputs
from optimum_fista.model.losses import Sweep
from optimum_fista.model.offload import execution_device, onloaded
from optimum_fista.model.replay import LayerCall, watching

PROBED_TOGETHER = 512
"""Tokens whose logits are held at a time."""
_TEMPERATURES = (0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5)
"""Those that are tried; the best one lies on the parabola through the best of them and its neighbours."""
_CLOSE = 0.02
"""Error of logits, as a share of the largest one, that rounding to 16 bits may make."""


@dataclass(frozen=True)
class Temperature:
    """A temperature, and what it made of the model.

    Attributes:
        value: `T`: the logits were divided by it.
        divergence_before: Kullback-Leibler divergence of the pruned model's predictions from the dense one's, in nats a
            token.
        divergence: The same with the temperature.
        tensors: Names of the parameters that were divided by it, with what the model adds to each before it multiplies
            by it: 1 for the weight of a norm like that of Gemma, otherwise 0. Empty if nothing was gained.
    """

    value: float
    divergence_before: float
    divergence: float
    tensors: dict[str, float]


def divided(tensor: Tensor, offset: float, temperature: float) -> Tensor:
    """A parameter of any shape, plus an offset, divided by a temperature, in its dtype."""
    exact = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    # no division: some devices multiply by the reciprocal instead, and `verify` compares the bits on the CPU
    return ((exact + offset) * (1 / temperature) - offset).to(tensor.dtype)


class LossProbe:
    """The loss of a model before and after it is pruned, on sequences that no weight is fitted to.

    It goes along with a run over the decoder layers, which have to come in order: each is run on the hidden states of
    the dense network while it is dense, and on those of the pruned network once it is pruned. That takes two forward
    passes of these sequences.

    With `fits_temperature` it then finds the temperature `T` at which the predictions diverge least (arXiv 1706.04599,
    section 4, with the dense model's predictions in the place of labels), `z` the logits of the pruned model:

        minimize   sum over tokens of KL(p_dense || softmax(z / T))

    Attributes:
        next: Number of the decoder layer that is to come.
        streams: Hidden states that enter it, by network.
        losses: By network, in nats a token; empty before the last decoder layer is through. That of the pruned network
            is the loss with the temperature.
        temperature: What was found; `None` if it is not wanted, or not found yet.
        fits_temperature: Whether it is wanted.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: DecoderLayers,
        tokens: Tensor,
        storage: Storage | None,
        *,
        fits_temperature: bool = False,
    ) -> None:
        """Take token ids int64 [sequences, length], which are cut to at most 512 a sequence: logits take memory."""
        length = min(tokens.shape[1], PROBED_TOGETHER)
        rows = tokens[:, : tokens.shape[1] // length * length].reshape(-1, 1, length)
        self.next = 0
        self.streams: dict[str, ActivationStore] = {}
        self.losses: dict[str, float] = {}
        self.temperature: Temperature | None = None
        self.fits_temperature = fits_temperature
        self.tokens = rows[:, 0]
        self._calls: dict[str, list[list[LayerCall]]] = {}
        self._sweep = Sweep(model, layers, range(len(layers)), [CalibrationBatch(ids) for ids in rows], storage)
        self._scaled: _Scaled | None = None

    def begin(self) -> bool:
        """Record what the decoder layers are called with, while the whole model is dense.

        Returns:
            Whether the losses can be measured: not if layers hand on more than hidden states as arguments, nor if a run
            resumes and they share a dictionary that layers before have written to.
        """
        recorded = record_inputs(self._sweep.model, self._sweep.layers, self._sweep.sequences, self._sweep.storage)
        shared = {
            id(value): value
            for calls in recorded.calls
            for call in calls
            for value in (*call.arguments, *call.keywords.values())
            if isinstance(value, MutableMapping)
        }
        for network in ("dense", "pruned"):  # each writes to dictionaries of its own
            own = {key: copy.copy(value) for key, value in shared.items()}
            self._calls[network] = [[_with_own(call, own) for call in calls] for calls in recorded.calls]
            self.streams.setdefault(network, recorded.hidden_states)
        return not recorded.handed_on and not (shared and 0 < self.next < len(self._sweep.layers))

    def resume(self, index: int, kept: Mapping[str, Tensor]) -> bool:
        """Go on before a decoder layer with what `kept` returned then; `False` if that was of other tokens."""
        found = {name: tensor for name, tensor in kept.items() if name != "tokens"}
        if not torch.equal(kept["tokens"], self.tokens.cpu()):
            return False
        self.next = index
        if index == len(self._sweep.layers):
            numbers = {name: value.item() for name, value in found.items()}
            self.losses = {name: numbers.pop(name) for name in ("dense", "pruned")}
            if self.fits_temperature:
                value, before, after = (numbers.pop(name) for name in ("value", "divergence_before", "divergence"))
                self.temperature = Temperature(value, before, after, numbers)
            return True
        for name, hidden in found.items():
            device = execution_device(self._sweep.model.get_input_embeddings())
            self.streams[name] = ActivationStore(self._sweep.storage or device, device)
            for row in hidden:
                self.streams[name].append(row[None])
        return True

    def kept(self) -> dict[str, Tensor]:
        """The tokens, and what goes on before the next decoder layer; after the last one what was found."""
        tokens = {"tokens": self.tokens.cpu().contiguous()}
        if self.losses:
            numbers, found = dict(self.losses), self.temperature
            if found is not None:
                names = ("value", "divergence_before", "divergence")
                numbers |= {name: getattr(found, name) for name in names} | found.tensors
            return tokens | {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        hidden = {name: torch.cat([row.cpu() for row in stream.kept()]) for name, stream in self.streams.items()}
        return tokens | hidden

    def run(self, index: int, network: str) -> None:
        """Run a decoder layer, which is on its device, as it is now: `"dense"`, or `"pruned"`."""
        layer = self._sweep.layers.modules[index]
        self.streams[network] = self._sweep.run(layer, self.streams[network], self._calls[network][index])

    def leave(self, index: int) -> None:
        """A decoder layer is through; after the last one the losses are measured.

        Raises:
            UnsupportedArchitectureError: If a temperature is wanted, and there are no parameters to divide by it.
            ValueError: If a temperature is wanted, and the logits are not finite after the first decoder layer.
        """
        self.next = index + 1
        last, sweep = self.next == len(self._sweep.layers), self._sweep
        if not last and (self._scaled is not None or not self.fits_temperature):
            return
        with onloaded([*modules_around(sweep.model, sweep.layers), sweep.model.get_output_embeddings()], copy=False):
            if self.fits_temperature and self._scaled is None:  # after the first layer, not after hours
                self._scaled = _find_scaled(sweep, self.streams["pruned"])
            if last:
                scaled: AbstractContextManager[None] = nullcontext()
                if self._scaled is not None:
                    self.temperature = found = self._fit(self._scaled)
                    scaled = self._scaled.divided(found.value) if found.tensors else scaled
                self.losses = {"dense": sweep.loss(self.streams["dense"])}
                with scaled:
                    self.losses["pruned"] = sweep.loss(self.streams["pruned"])

    def _fit(self, scaled: _Scaled) -> Temperature:
        """Find the temperature; 1 if none is better."""
        tried = self._divergences(scaled, _TEMPERATURES)
        before = tried[_TEMPERATURES.index(1.0)]
        found = min(range(1, len(_TEMPERATURES) - 1), key=tried.__getitem__)
        around = [1 / temperature for temperature in _TEMPERATURES[found - 1 : found + 2]]
        best = 1 / _vertex(around, tried[found - 1 : found + 2])  # near it the divergence is a parabola in 1 / T
        (after,) = self._divergences(scaled, (best,))
        if not after < before:
            return Temperature(1.0, before, before, {})
        return Temperature(best, before, after, scaled.tensors)

    def _divergences(self, scaled: _Scaled, temperatures: tuple[float, ...]) -> list[float]:
        """`KL(p_dense || p_pruned)` at some temperatures, in nats a token."""
        total, count = torch.zeros(len(temperatures), dtype=torch.float64), 0
        rows = zip(*(self.streams[name] for name in ("dense", "pruned")), self._sweep.sequences, strict=True)
        for dense, pruned, batch in rows:
            wanted = self._sweep.logits(dense, batch.input_ids)[0].float().log_softmax(-1)
            count += len(wanted)
            for number, temperature in enumerate(temperatures):
                with scaled.divided(temperature):
                    found = self._sweep.logits(pruned, batch.input_ids)[0].float().log_softmax(-1)
                total[number] += nn.functional.kl_div(found, wanted, log_target=True, reduction="sum").item()
        return (total / count).tolist()


def _vertex(places: Sequence[float], values: Sequence[float]) -> float:
    """Where the parabola through three points is least, between the outer two."""
    (x0, x1, x2), (y0, y1, y2) = places, values
    left, right = (x1 - x0) * (y1 - y2), (x1 - x2) * (y1 - y0)
    if left == right:  # they lie on a line
        return x1
    vertex = x1 - ((x1 - x0) * left - (x1 - x2) * right) / (2 * (left - right))
    return min(max(vertex, min(places)), max(places))


@dataclass(frozen=True)
class _Scaled:
    """Parameters that the logits are proportional to.

    Attributes:
        model: The model.
        tensors: Their names in it, with what is added to each before it multiplies.
    """

    model: nn.Module
    tensors: dict[str, float]

    @contextmanager
    def divided(self, temperature: float) -> Iterator[None]:
        """Inside, the model divides its logits by a temperature."""
        own, changed = {name: self.model.get_parameter(name) for name in self.tensors}, dict[str, nn.Parameter]()
        try:
            for name, offset in self.tensors.items():
                value = divided(own[name].detach(), offset, temperature)
                changed[name] = nn.Parameter(value, requires_grad=False)
                self._put(name, changed[name])
            yield
        finally:
            for name, parameter in changed.items():
                if self.model.get_parameter(name) is parameter:  # an interrupt may have put the model back before
                    self._put(name, own[name])

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        owner, _, leaf = name.rpartition(".")
        self.model.get_submodule(owner).register_parameter(leaf, parameter)


def _find_scaled(sweep: Sweep, stream: ActivationStore) -> _Scaled:
    """Find the last norm, or another module in front of the head; else the head. A bias of the head goes with either.

    Each is proven: at a temperature of 2 the head returns half of what it returned. Parameters that are used elsewhere
    too are left alone.

    Raises:
        UnsupportedArchitectureError: If there is none.
        ValueError: If the logits are not finite.
    """
    model, hidden, ids = sweep.model, next(iter(stream)), sweep.sequences[0].input_ids
    head, names = model.get_output_embeddings(), {module: name for name, module in model.named_modules()}
    others = [module for module in modules_around(model, sweep.layers) if module is not model.get_input_embeddings()]

    def run() -> tuple[Tensor, Tensor, dict[nn.Module, Tensor]]:
        """The input of the head, its output, and what the others return."""
        inputs, outputs, made = list[Tensor](), list[Tensor](), dict[nn.Module, Tensor]()
        with watching(
            {head: inputs.append}, {head: outputs.append} | {m: partial(made.__setitem__, m) for m in others}
        ):
            sweep.logits(hidden, ids)
        return inputs[-1], outputs[-1], made

    read, whole, made = run()
    if not bool(whole.isfinite().all()):
        raise ValueError(
            f"temperature_scaling=True: the logits of the {type(model).__name__} are NaN or Inf. Leave "
            "temperature_scaling out."
        )
    bias = {} if getattr(head, "bias", None) is None else {f"{names[head]}.bias": 0.0}
    found = list[dict[str, float]]()
    for module, output in reversed(made.items()):
        own = [name for name, _ in module.named_parameters(prefix=names[module], recurse=False)]
        if own and isinstance(output, Tensor) and output.shape == read.shape:
            found += [{n: offset * n.endswith(".weight") for n in own} | bias for offset in (0.0, 1.0)]
    found.append({f"{names[head]}.weight": 0.0} | bias)
    used_elsewhere = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(parameter.data_ptr() or id(parameter), []).append(name)  # 0: it is kept elsewhere
    used_elsewhere |= {name for same in places.values() if len(same) > 1 for name in same}
    for scaled in (_Scaled(model, tensors) for tensors in found if used_elsewhere.isdisjoint(tensors)):
        with scaled.divided(2.0):
            half = run()[1]
        if bool(((2 * half - whole).abs() <= _CLOSE * whole.abs().max()).all()):
            return scaled
    raise UnsupportedArchitectureError(
        f"temperature_scaling=True: no parameter of {type(model).__name__} scales all logits: its head shares its "
        "parameters with other modules, and no norm with parameters was found in front of it. Leave "
        "temperature_scaling out."
    )


def _with_own(call: LayerCall, own: Mapping[int, Any]) -> LayerCall:
    """A call with other dictionaries, by the `id` of those that it has."""
    keywords = {name: own.get(id(value), value) for name, value in call.keywords.items()}
    return LayerCall(tuple(own.get(id(value), value) for value in call.arguments), keywords)

"""What running a decoder layer costs, learnt on the meta device, where nothing is computed."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

from optimum_fista.model.operator import LinearOperator
from optimum_fista.model.paused import PausedForwards
from optimum_fista.model.replay import LayerCall
from optimum_fista.model.sharing import trace_groups

_FORMULAS = flop_registry | {torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}


@dataclass
class Work:
    """Operations of one pass.

    Attributes:
        products: Floating-point operations of matrix products, two a multiply-add.
        attention: Those of attention.
        moved_bytes: Bytes that all other operations read and write.
        operations: Number of operations.
    """

    products: float = 0.0
    attention: float = 0.0
    moved_bytes: float = 0.0
    operations: float = 0.0

    def scaled(self, times: float) -> Work:
        """As many operations, `times` over."""
        return Work(*(times * value for value in vars(self).values()))

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass
class LayerProbe:
    """What one decoder layer takes to run on one batch.

    Attributes:
        groups: Its operators that share inputs, in execution order.
        paused_bytes: By group: activations that one batch holds while it waits in front of the group, without the
            hidden states that enter the layer.
        running_bytes: By group: most that one batch holds on its way there from the group before; then to the end.
        saved_bytes: Activations that one batch holds, at most, when gradients flow back through the layer.
        forward: Operations of a forward pass.
        backward: Operations of a backward pass, gradients by the activations only.
    """

    groups: list[list[LinearOperator]]
    paused_bytes: list[int]
    running_bytes: list[int]
    saved_bytes: int
    forward: Work
    backward: Work


def probe_layer(
    layer: nn.Module, operators: Mapping[str, LinearOperator], call: LayerCall, hidden_states: Tensor
) -> LayerProbe:
    """Run a decoder layer of a model on the meta device, and count.

    Args:
        layer: The decoder layer.
        operators: Its operators by name.
        call: Arguments of the layer for one batch.
        hidden_states: Its input [batch, sequence, hidden], on the meta device.
    """
    with _light_attention(Work()), torch.no_grad():
        groups, _ = trace_groups(layer, operators, call, hidden_states)
    paused, running = [], []
    with torch.no_grad(), Meter() as meter, _light_attention(meter.work):
        with PausedForwards(layer, [group[0].module for group in groups], [call], [hidden_states]) as forwards:
            for stop in range(len(groups)):
                for inputs in forwards.inputs(stop):
                    del inputs
                paused.append(meter.held)
                running.append(meter.take_peak())
            forwards.output(0)
            running.append(meter.take_peak())
        forward = meter.work
    entering = hidden_states.detach().requires_grad_()
    with torch.enable_grad(), Meter() as meter, _light_attention(meter.work):
        output = call.run(layer, entering)
        assert output is not None
        first = meter.work.scaled(1)
        output.backward(torch.empty_like(output))
        backward = meter.work + first.scaled(-1)
        saved = meter.take_peak()
    return LayerProbe(groups, paused, running, saved, forward, backward)


class Meter(TorchDispatchMode):
    """As a context: counts operations, and bytes that tensors made inside hold.

    Attributes:
        work: Operations so far.
        held: Bytes held now.
    """

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()
        self.held = 0
        self._peak = 0
        self._known: dict[int, int] = {}

    def take_peak(self) -> int:
        """Most bytes held since the last call."""
        peak, self._peak = self._peak, self.held
        return peak

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        outside = {value.untyped_storage()._cdata for value in inputs}
        for value in inputs:
            self._hold(value, 0)  # what was made before counts nothing
        output = function(*args, **kwargs)
        outputs = [value for value in tree_flatten(output)[0] if isinstance(value, Tensor)]
        made = [value for value in outputs if value.untyped_storage()._cdata not in outside]
        self._count(function, args, kwargs, output, inputs, outputs, bool(made))
        for value in made:
            self._hold(value, value.untyped_storage().nbytes())
        return output

    def _hold(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known[storage._cdata] = size
            self.held += size
            self._peak = max(self._peak, self.held)
            weakref.finalize(storage, self._free, storage._cdata)

    def _count(
        self, function: Any, args: Any, kwargs: Any, output: Any, inputs: list[Tensor], outputs: list[Tensor], new: bool
    ) -> None:
        if not new and not function._schema.is_mutable:
            return  # a view
        self.work.operations += 1
        formula = _FORMULAS.get(function.overloadpacket)
        if formula is not None:
            self.work.products += formula(*args, **kwargs, out_val=output)
        else:
            self.work.moved_bytes += sum(t.numel() * t.element_size() for t in inputs + outputs)

    def _free(self, key: int) -> None:
        self.held -= self._known.pop(key, 0)


class AnswerYes(TorchDispatchMode):
    """As a context: what code asks of the values of meta tensors (are these equal, is this finite) is true, or 1."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket is torch.ops.aten._local_scalar_dense and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype).item()
        if function.overloadpacket is torch.ops.aten.equal and args[0].is_meta:
            return True
        return function(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """Attention that keeps what a fused kernel keeps for its gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _Fused(TorchFunctionMode):
    """Stands for fused attention, which never holds its scores."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not nn.functional.scaled_dot_product_attention:
            return function(*args, **kwargs)
        query, key, value = args[:3]
        scores = query.shape[:-1].numel() * key.shape[-2]
        causal = 0.5 if kwargs.get("is_causal") else 1.0
        self.work.attention += 2 * causal * scores * (query.shape[-1] + value.shape[-1])
        return _Attention.apply(query, key, value)


@contextmanager
def _light_attention(work: Work) -> Iterator[None]:
    with AnswerYes(), _Fused(work):
        yield

"""Mixture of experts: the matrices of fused experts as linear operators of their own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from optimum_fista.model.errors import UnsupportedArchitectureError
from optimum_fista.model.operator import LinearOperator

_AGREEMENT = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Largest relative difference from the model's own experts; 2e-2 in other dtypes."""


class ExpertLinear(nn.Module):
    """One matrix of one expert: a view of a parameter [experts, ...] that holds those of all.

    Attributes:
        tokens: int64, the tokens of the latest call as indices into the flattened batch, in rising order.
    """

    def __init__(self, experts: FusedExperts, tensor: str, expert: int, half: int | None) -> None:
        super().__init__()
        self._experts = (experts,)
        self.tensor = tensor
        self._expert = expert
        self._half = half
        self.tokens = torch.empty(0, dtype=torch.int64)

    @property
    def weight(self) -> Tensor:
        """The matrix as stored, a view."""
        fused = getattr(self._experts[0].module, self.tensor)
        return fused[self.place(fused)]

    @property
    def bias(self) -> Tensor | None:
        """Its bias [out], a view; `None` without."""
        bias = getattr(self._experts[0].module, f"{self.tensor}_bias", None)
        return None if bias is None else bias[self._expert][self._rows(bias.shape[-1])]

    def place(self, fused: Tensor) -> tuple[int | slice, ...]:
        """Index of this matrix in a tensor that is laid out as the parameter that holds those of all experts."""
        if self._experts[0].transposed:
            return self._expert, slice(None), self._rows(fused.shape[2])
        return self._expert, self._rows(fused.shape[1]), slice(None)

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs [tokens, out] of inputs [tokens, in]."""
        weight = self.weight
        return nn.functional.linear(inputs, weight.T if self._experts[0].transposed else weight, self.bias)

    def _rows(self, width: int) -> slice:
        """Its outputs among `width` outputs of the gate and up projections together."""
        if self._half is None:
            return slice(None)
        if self._experts[0].interleaved:
            return slice(self._half, width, 2)
        return slice(self._half * (width // 2), (self._half + 1) * (width // 2))


class ExpertOperator(LinearOperator):
    """A linear operator of one expert; the router decides which tokens it sees.

    Attributes:
        experts: The experts that it belongs to.
        kind: `"gate_proj"`, `"up_proj"` or `"down_proj"`.
        expert: Number of its expert.
    """

    module: ExpertLinear

    def __init__(self, experts: FusedExperts, kind: str, expert: int, module: ExpertLinear) -> None:
        name = f"{experts.name}.{expert}.{kind}"
        super().__init__(name, module, experts.module, module.tensor, experts.transposed)
        self.experts = experts
        self.kind = kind
        self.expert = expert

    @property
    def tokens(self) -> Tensor:
        """Tokens of the latest call, int64, indices into the flattened batch in rising order."""
        return self.module.tokens

    def select(self, stored: Tensor) -> Tensor:
        """This expert's matrix of the stored tensor, a view."""
        return stored[self.module.place(stored)]


class FusedExperts:
    """A module that keeps the weights of all its experts in 3-D parameters.

    Its forward pass can be replaced by one that calls every matrix of every expert as a module of its own, in the
    order of the experts and also where the router sends no token, so that they can be watched like other operators.

    Attributes:
        name: Name of the module in the model.
        module: The module.
        gated: Whether a gate projection is kept together with the up projection.
        interleaved: Whether their outputs alternate.
        transposed: Whether matrices are stored as [in, out].
        operators: The matrices of all experts, in the order of their calls.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.gated = hasattr(module, "gate_up_proj")
        self._is_routed = hasattr(module, "is_concatenated")  # has the interface of Transformers' experts
        self.interleaved = not getattr(module, "is_concatenated", True)
        self.transposed = bool(getattr(module, "is_transposed", True))
        parts: dict[str, tuple[str, int | None]] = {"up_proj": ("up_proj", None), "down_proj": ("down_proj", None)}
        if self.gated:
            parts = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": parts["down_proj"]}
        down: Tensor = module.down_proj  # type: ignore[assignment]
        self._experts = [
            {kind: ExpertLinear(self, tensor, expert, half) for kind, (tensor, half) in parts.items()}
            for expert in range(down.shape[0])
        ]
        self.operators = [
            ExpertOperator(self, kind, expert, linear)
            for expert, linears in enumerate(self._experts)
            for kind, linear in linears.items()
        ]
        self._checked = False

    def __len__(self) -> int:
        return len(self._experts)

    def forward(self, original: Callable[..., Tensor], *arguments: Any, **keywords: Any) -> Tensor:
        """What the module computes, expert by expert; the first call is compared with the original.

        Raises:
            UnsupportedArchitectureError: If the module computes something else.
        """
        bound = inspect.signature(type(self.module).forward).bind(self.module, *arguments, **keywords)
        values = list(bound.arguments.values())[1:]
        output = self._routed(*values) if self._is_routed else self._sorted(*values)
        if not self._checked:
            with torch.no_grad():
                self._require_agreement(output, original(*arguments, **keywords))
        return output

    def _routed(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Experts of tokens [tokens, hidden] by the router's choice [tokens, k] and its weights."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        index = top_k_index.reshape(flat.shape[0], -1)
        weights = top_k_weights.reshape(index.shape)
        output = torch.zeros_like(flat)
        for expert in range(len(self._experts)):
            tokens, choice = torch.where(index == expert)
            found = self._run(expert, flat[tokens], tokens) * weights[tokens, choice, None]
            output = output.index_add(0, tokens, found.to(output.dtype))
        return output.view(hidden_states.shape)

    def _sorted(self, hidden_states: Tensor) -> Tensor:
        """Experts that each get all tokens, [experts * tokens, hidden], zero where they were not chosen (Llama-4)."""
        by_expert = hidden_states.view(len(self._experts), -1, hidden_states.shape[-1])
        outputs = []
        for expert, inputs in enumerate(by_expert):
            tokens = inputs.ne(0).any(dim=-1).nonzero()[:, 0]
            found = self._run(expert, inputs[tokens], tokens)
            outputs.append(torch.zeros_like(inputs).index_add(0, tokens, found.to(inputs.dtype)))
        return torch.stack(outputs).view(hidden_states.shape)

    def _run(self, expert: int, inputs: Tensor, tokens: Tensor) -> Tensor:
        """One expert [tokens, hidden]; each matrix learns the tokens right before it is called."""

        def call(kind: str, values: Tensor) -> Tensor:
            linear = self._experts[expert][kind]
            linear.tokens = tokens
            return linear(values)

        module: Any = self.module
        if not self.gated:
            hidden = module.act_fn(call("up_proj", inputs))
        else:
            gate, up = call("gate_proj", inputs), call("up_proj", inputs)
            if not self._is_routed:
                hidden = up * module.act_fn(gate)
            elif self.interleaved:
                hidden = module._apply_gate(torch.stack((gate, up), dim=-1).flatten(-2))
            else:
                hidden = module._apply_gate(torch.cat((gate, up), dim=-1))
        output = call("down_proj", hidden)
        return module.post_expert_norm(output) if getattr(module, "has_post_expert_norm", False) else output

    def _require_agreement(self, output: Tensor, original: Tensor) -> None:
        self._checked = True
        difference = float((output.detach() - original.detach()).float().norm())
        size = float(original.detach().float().norm())
        if not difference <= _AGREEMENT.get(output.dtype, 2e-2) * size:
            raise UnsupportedArchitectureError(
                f"{self.name} ({type(self.module).__name__}) computes its experts in a way that is not known: to "
                f"prune the rest of the model and leave them dense, pass exclude=['*.{self.name.rsplit('.', 1)[-1]}']."
            )


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module keeps matrices in 3-D parameters."""
    return not isinstance(module, _ConvNd) and any(
        p.ndim == 3 and min(p.shape) > 1 for p in module.parameters(recurse=False)
    )


def can_be_split(module: nn.Module) -> bool:
    """Whether the form of fused experts is known: an up and a down projection each, with a gate or without."""
    fused = {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    known = set(fused) in ({"gate_up_proj", "down_proj"}, {"up_proj", "down_proj"})
    return known and len({p.shape[0] for p in fused.values()}) == 1


@contextmanager
def split_experts(operators: Iterable[LinearOperator]) -> Iterator[None]:
    """Make the experts that some of the operators belong to call each of their matrices as a module of its own."""
    found = {id(o.experts): o.experts for o in operators if isinstance(o, ExpertOperator)}
    replaced = []
    try:
        for experts in found.values():
            module = experts.module
            name = "_old_forward" if "_old_forward" in vars(module) else "forward"  # the hooks of Accelerate go on
            replaced.append((module, name, vars(module).get(name)))
            setattr(module, name, partial(experts.forward, getattr(module, name)))
        yield
    finally:
        for module, name, original in replaced:
            if original is None:
                vars(module).pop(name, None)
            else:
                setattr(module, name, original)

"""Experts of a mixture, matrix by matrix.

A mixture of experts keeps its matrices in 3-D parameters and never calls them one by one. Here every matrix of every
expert is an operator: the mixture is made to call a module for each (`split_experts`), so that hooks see its inputs.
This loop over experts is slower than the grouped products of Transformers, but copies no weight.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.hooks import replaced_forwards
from optimum_fista.model.operators import LinearOperator
from optimum_fista.model.precision import in_few_sizes


@dataclass
class AssignedTokens:
    """The rows of one batch that a mixture sends to its experts."""

    hidden_states: Tensor  # [rows, hidden]
    rows: Tensor  # int64, rows of `hidden_states` for the experts, one expert after the other
    tokens: Tensor  # int64, the tokens of these rows, indices into the flattened batch, rising for each expert
    weights: (
        Tensor | None
    )  # the router's weights of the outputs [rows, 1]; None if the inputs have them already
    bounds: list[int]  # where each expert begins in the last three, and their length

    def part(self, expert: int) -> slice:
        """The place of an expert in `rows`, `tokens` and `weights`."""
        return slice(self.bounds[expert], self.bounds[expert + 1])


class ExpertLinear(nn.Module):
    """Computes one matrix of one expert, so that hooks see its inputs and outputs."""

    def __init__(self, operator: ExpertOperator) -> None:
        super().__init__()
        self.operator = operator

    @property
    def bias(self) -> Tensor | None:
        """The bias [out], a view; `None` without."""
        bias = getattr(self.operator.owner, f"{self.operator.tensor}_bias", None)
        return (
            None if bias is None else bias[self.operator.expert][self.operator.rows(bias.shape[-1])]
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs [tokens, out] of inputs [tokens, in]."""
        weight = self.operator.parameter.T if self.operator.transposed else self.operator.parameter
        return nn.functional.linear(in_few_sizes(inputs), weight, self.bias)[: len(inputs)]


class ExpertOperator(LinearOperator):
    """A linear operator of one of the `experts` of a mixture; the router decides which tokens reach it.

    Its weight is a view of the parameter `tensor` [experts, ...], which has those of all experts. If the parameter has
    both the gate and the up projection, `half` is 0 for gate and 1 for up; otherwise `None`.
    """

    def __init__(
        self, experts: FusedExperts, kind: str, expert: int, tensor: str, half: int | None
    ) -> None:
        self.experts = experts
        self.kind = kind  # gate_proj, up_proj or down_proj
        self.expert = expert
        self._half = half
        name = f"{experts.name}.{expert}.{kind}"
        super().__init__(name, ExpertLinear(self), experts.module, tensor, experts.transposed)
        self.tokens = torch.empty(0, dtype=torch.int64)

    def select(self, stored: Tensor) -> Tensor:
        """This expert's matrix of the stored tensor, a view."""
        rows = self.rows(stored.shape[2 if self.transposed else 1])
        return stored[self.expert, :, rows] if self.transposed else stored[self.expert, rows]

    def rows(self, width: int) -> slice:
        """Its outputs among `width` outputs of the gate and up projections together."""
        if self._half is None:
            return slice(None)
        if self.experts.interleaved:
            return slice(self._half, width, 2)
        return slice(self._half * (width // 2), (self._half + 1) * (width // 2))

    def inputs(self, batch: AssignedTokens, device: torch.device) -> Tensor:
        """Compute its inputs in a batch, [tokens, in], on the device of its expert."""
        part = batch.part(self.expert)
        hidden_states = batch.hidden_states[batch.rows[part]].to(device)
        self.tokens = batch.tokens[part]
        is_down = self.kind == "down_proj"
        return (
            self.experts.middle(self.expert, hidden_states, self.tokens)
            if is_down
            else hidden_states
        )


class FusedExperts:
    """A module that keeps the weights of all its experts in 3-D parameters, and how to run it matrix by matrix.

    All matrices are called, in the order of the experts, even if an expert gets no token.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.gated = hasattr(module, "gate_up_proj")  # gate and up projection in one matrix
        # Transformers' experts get the router's choices, too; Llama-4's only get hidden states.
        self._is_routed = len(inspect.signature(type(module).forward).parameters) > 2
        self.interleaved = not getattr(
            module, "is_concatenated", True
        )  # outputs of gate and up alternate (gpt-oss)
        first, down = (
            module.get_parameter(n)
            for n in ("gate_up_proj" if self.gated else "up_proj", "down_proj")
        )
        self.transposed = bool(
            getattr(module, "is_transposed", first.shape[1] == down.shape[2])
        )  # stored as [in, out]
        both = [("gate_proj", "gate_up_proj", 0), ("up_proj", "gate_up_proj", 1)]
        kinds = [
            *(both if self.gated else [("up_proj", "up_proj", None)]),
            ("down_proj", "down_proj", None),
        ]
        self._experts = [
            {kind: ExpertOperator(self, kind, i, tensor, half) for kind, tensor, half in kinds}
            for i in range(len(module.get_parameter("down_proj")))
        ]
        self.operators = [
            operator for expert in self._experts for operator in expert.values()
        ]  # as they are called
        # Called with every expert, the tokens that it gets, and its weighted outputs for them.
        self.watcher: Callable[[int, Tensor, Tensor], None] | None = None
        self._checked = False

    def __len__(self) -> int:
        return len(self._experts)

    def forward(self, original: Callable[..., Tensor], *arguments: Any, **keywords: Any) -> Tensor:
        """Compute the module's output expert by expert; the first call is compared with the original."""
        values = self._values(arguments, keywords)
        output = self.outputs(self.assigned(*arguments, **keywords)).view(values[0].shape)
        if self._checked:  # once is enough: the result does not depend on the batch
            return output
        # Some tokens are enough, and few products: `original` does not use `in_few_sizes`.
        some = slice(16 if self._is_routed and values[0].ndim == 2 else None)
        with torch.no_grad():
            expected = original(*(value[some] for value in values))
            difference, size = (
                float(each.float().norm()) for each in (output[some] - expected, expected)
            )
        self._checked = True
        exact = 2e-2 if torch.get_float32_matmul_precision() != "highest" else 1e-3
        if (
            not difference
            <= {torch.float64: 1e-6, torch.float32: exact}.get(output.dtype, 2e-2) * size
        ):  # or NaN
            raise UnsupportedArchitectureError(
                f"{self.name} ({type(self.module).__name__}) computes its experts in an unknown way: to "
                f"prune the rest of the model and leave them dense, pass exclude=['*.{self.name.rsplit('.', 1)[-1]}']."
            )
        return output

    def assigned(self, *arguments: Any, **keywords: Any) -> AssignedTokens:
        """Sort the tokens that the module is called with by expert; the host waits once."""
        hidden_states, *routing = self._values(arguments, keywords)
        flat, count = hidden_states.reshape(-1, hidden_states.shape[-1]), len(self._experts)
        if self._is_routed:
            # [tokens, k] -> [tokens * k], place p is a choice of token p // k; a stable sort keeps tokens in order.
            experts, places = routing[0].flatten().sort(stable=True)
            rows = tokens = places // (routing[0].numel() // flat.shape[0])
            weights = routing[1].flatten()[places, None]
        else:  # every expert has rows for all tokens, zero where it was not chosen (Llama-4)
            rows, weights = flat.ne(0).any(dim=-1).nonzero()[:, 0], None
            experts, tokens = rows // (flat.shape[0] // count), rows % (flat.shape[0] // count)
        # Where each expert begins among the sorted choices; choices of unknown experts are left out.
        first = torch.arange(count + 1, device=experts.device, dtype=experts.dtype)
        return AssignedTokens(
            flat, rows, tokens, weights, torch.searchsorted(experts, first).tolist()
        )

    def _values(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> list[Any]:
        # By position, however the decoder layer passes them; the first is the module itself.
        bound = inspect.signature(type(self.module).forward).bind(
            self.module, *arguments, **keywords
        )
        return list(bound.arguments.values())[1:]

    def outputs(self, batch: AssignedTokens) -> Tensor:
        """Run the experts on a batch, and sum their outputs for each row, [rows, hidden]."""
        module: Any = self.module
        output = torch.zeros_like(batch.hidden_states)
        for expert in range(len(self._experts)):
            part = batch.part(expert)
            rows, tokens = batch.rows[part], batch.tokens[part]
            middle = self.middle(expert, batch.hidden_states[rows], tokens)
            found = self._call(
                expert, "down_proj", middle, tokens
            )  # [tokens of the expert, hidden]
            if getattr(module, "has_post_expert_norm", False):
                found = module.post_expert_norm(found)
            if batch.weights is not None:  # before it is added, as Transformers does
                found = found * batch.weights[part]
            if self.watcher is not None:
                self.watcher(expert, tokens, found)
            output = output.index_add(
                0, rows, found.to(output.dtype)
            )  # which has the dtype of the hidden states
        return output

    def middle(self, expert: int, inputs: Tensor, tokens: Tensor) -> Tensor:
        """Compute the inputs of the down projection of one expert, [tokens, intermediate]."""
        module: Any = self.module
        if not self.gated:
            return module.act_fn(self._call(expert, "up_proj", inputs, tokens))
        gate, up = (self._call(expert, kind, inputs, tokens) for kind in ("gate_proj", "up_proj"))
        if not hasattr(module, "_apply_gate"):
            return up * module.act_fn(gate)
        # The module itself applies the gate; it needs both in the order of the fused matrix.
        both = (
            torch.stack((gate, up), dim=-1).flatten(-2)
            if self.interleaved
            else torch.cat((gate, up), dim=-1)
        )
        return module._apply_gate(both)  # [tokens, 2 * intermediate] -> [tokens, intermediate]

    def _call(self, expert: int, kind: str, values: Tensor, tokens: Tensor) -> Tensor:
        """Call one matrix; its operator learns the tokens right before."""
        operator = self._experts[expert][kind]
        operator.tokens = tokens
        return operator.module(values)


def is_fused_experts(module: nn.Module) -> bool:
    """Tell whether a module keeps matrices in 3-D parameters."""
    return not isinstance(module, _ConvNd) and any(
        p.ndim == 3 and min(p.shape) > 1 for p in module.parameters(recurse=False)
    )


def can_be_split(module: nn.Module) -> bool:
    """Tell whether the form of fused experts is known: an up and a down projection, with a gate or without."""
    fused = {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    known = set(fused) in ({"gate_up_proj", "down_proj"}, {"up_proj", "down_proj"})
    return known and len({p.shape[0] for p in fused.values()}) == 1


@contextmanager
def split_experts(operators: Iterable[LinearOperator]) -> Iterator[None]:
    """Make the fused experts of these operators call each of their matrices as a separate module."""
    found = {id(o.experts): o.experts for o in operators if isinstance(o, ExpertOperator)}
    with ExitStack() as replaced:
        for experts in found.values():
            module = experts.module
            name = (
                "_old_forward" if "_old_forward" in vars(module) else "forward"
            )  # the hooks of Accelerate still run
            forward = partial(experts.forward, getattr(module, name))
            replaced.enter_context(replaced_forwards([module], [forward], name))
        yield

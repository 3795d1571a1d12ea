"""Experts of a mixture, matrix by matrix.

A mixture of experts of Transformers keeps the matrices of all its experts in 3-D parameters [experts, ...] ("fused"),
and never calls them one by one. Here every matrix of every expert is an operator: inside `split_experts` the mixture
calls a module (`ExpertLinear`) for each, so that hooks see its inputs. This loop over experts is slower than the
grouped products of Transformers, but copies no weight.

The router sends each token to some experts only. In a batch of [batch, sequence] tokens, a token is numbered by its
place in the flattened batch. `AssignedTokens` has the numbers of the tokens that each expert gets, and an
`ExpertLinear` is called with them as its second argument.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from optimum_fista import internals
from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.hooks import replaced_forwards
from optimum_fista.model.operators import LinearOperator
from optimum_fista.model.precision import in_few_sizes


@dataclass
class AssignedTokens:
    """The rows of one batch that a mixture sends to its experts."""

    hidden_states: Tensor  # [rows, hidden]
    rows: Tensor  # int64, rows of `hidden_states` for the experts, one expert after the other
    tokens: Tensor  # int64, the tokens of these rows, rising for each expert
    # the router's weights of the outputs, [rows, 1]; None if the inputs are weighted already
    weights: Tensor | None
    # where each expert begins in `rows`, `tokens` and `weights`, and where the last one ends
    bounds: list[int]

    def part(self, expert: int) -> slice:
        """The place of an expert in `rows`, `tokens` and `weights`."""
        return slice(self.bounds[expert], self.bounds[expert + 1])

    def tokens_of(self, expert: int) -> Tensor:
        """The tokens that an expert gets: int64, rising."""
        return self.tokens[self.part(expert)]

    def has_weight(self, expert: int) -> Tensor:
        """Whether the weight of each token of `tokens_of(expert)` is not 0, booleans.

        A token whose weight is 0 does not count for the expert: some routers use it for tokens that skip the mixture.
        """
        if self.weights is None:
            return torch.ones_like(self.tokens_of(expert), dtype=torch.bool)
        return self.weights[self.part(expert), 0] != 0

    def num_tokens(self) -> Tensor:
        """Count the tokens that have a weight for each expert, int64 [experts], on the device of the rows."""
        num_experts = len(self.bounds) - 1
        return torch.stack([self.has_weight(expert).sum() for expert in range(num_experts)])


ExpertWatcher = Callable[[int, AssignedTokens, Tensor], None]
"""Is called with an expert's number, the rows of the batch, and the expert's outputs times the router's weights."""


class ExpertLinear(nn.Module):
    """Computes one matrix of one expert, so that hooks see its inputs and outputs."""

    def __init__(self, operator: ExpertOperator) -> None:
        super().__init__()
        self.operator = operator

    @property
    def bias(self) -> Tensor | None:
        """The bias [out] of this expert, a view; `None` without.

        `self.operator` is its matrix. The mixture has the biases of all experts in a parameter [experts, ...], such as
        "gate_up_proj_bias" beside "gate_up_proj".
        """
        bias = getattr(self.operator.owner, f"{self.operator.tensor}_bias", None)
        if bias is None:
            return None
        # the part of this expert, and of that the outputs of this matrix
        return bias[self.operator.expert][self.operator.rows(bias.shape[-1])]

    def forward(self, inputs: Tensor, tokens: Tensor) -> Tensor:
        """Outputs [tokens, out] of inputs [tokens, in], with the bias if there is one.

        `tokens`, int64 [tokens], say which tokens these are. They are not used here, but hooks see all arguments.
        `self.operator` has the weight, a view of the mixture's parameter.
        """
        weight = self.operator.parameter
        if self.operator.transposed:
            weight = weight.T
        # `in_few_sizes` may append rows of zeros, whose outputs are cut off again
        padded_outputs = nn.functional.linear(in_few_sizes(inputs), weight, self.bias)
        return padded_outputs[: len(inputs)]


class ExpertOperator(LinearOperator):
    """A linear operator of one of the `experts` of a mixture; the router decides which tokens reach it.

    Its weight is a view of the parameter `tensor` [experts, ...], which has those of all experts. If the parameter has
    both the gate and the up projection, `half` is 0 for gate and 1 for up; otherwise `None`.

    Attributes, besides those of `LinearOperator`:
        experts: The mixture.
        kind: "gate_proj", "up_proj" or "down_proj".
        expert: The number of the expert.
    """

    def __init__(
        self, experts: FusedExperts, kind: str, expert: int, tensor: str, half: int | None
    ) -> None:
        """Name one matrix of an expert, which is a part of a parameter of its mixture. Nothing is copied.

        Args:
            experts: The mixture: its module in the model and the name of that, and whether it stores matrices as
                [in, out] (`transposed`).
            kind: "gate_proj", "up_proj" or "down_proj".
            expert: The number of the expert.
            tensor: Name of the parameter, such as "gate_up_proj", with the matrices of all experts [experts, ...].
            half: If the parameter has both gate and up projections, 0 for gate and 1 for up; otherwise `None`.
        """
        self.experts = experts
        self.kind = kind
        self.expert = expert
        self._half = half
        # The base class reads the shape of this expert's matrix: the fields above say which part of `tensor` it is.
        # `ExpertLinear` only keeps the operator, and reads it when it is called.
        super().__init__(
            name=f"{experts.name}.{expert}.{kind}",
            module=ExpertLinear(self),
            owner=experts.module,
            tensor=tensor,
            transposed=experts.transposed,
        )

    def select(self, stored: Tensor) -> Tensor:
        """This expert's matrix of the `stored` tensor [experts, out, in], a view; [experts, in, out] if transposed."""
        if self.transposed:
            return stored[self.expert, :, self.rows(stored.shape[2])]
        return stored[self.expert, self.rows(stored.shape[1])]

    def rows(self, width: int) -> slice:
        """Find which outputs are this operator's, among the `width` outputs that its parameter has for an expert.

        If the parameter has gate and up projection, `self._half` is 0 for gate and 1 for up. Otherwise it is `None`,
        and all outputs are this operator's.
        """
        if self._half is None:
            return slice(None)
        if self.experts.interleaved:  # gate and up alternate
            return slice(self._half, width, 2)
        half_width = width // 2
        return slice(self._half * half_width, (self._half + 1) * half_width)

    def inputs(self, batch: AssignedTokens, device: torch.device) -> Tensor:
        """Compute the operator's inputs in a batch, [tokens, in], on `device`, which is that of its weight.

        Row i belongs to the token `batch.tokens_of(self.expert)[i]`. Gate and up projections have the hidden states of
        these tokens as their inputs. For a down projection (`self.kind`), `self.experts.middle` runs the gate and up
        projections of the expert, with the weights that they have now. Changes nothing.
        """
        # the place of the expert in `batch.rows`, which has rows of `batch.hidden_states`, and in `batch.tokens`
        part = batch.part(self.expert)
        hidden_states = batch.hidden_states.index_select(0, batch.rows[part]).to(device)
        if self.kind != "down_proj":
            return hidden_states
        return self.experts.middle(self.expert, hidden_states, batch.tokens[part])


class FusedExperts:
    """A module that keeps the weights of all its experts in 3-D parameters, and how to run it matrix by matrix.

    All matrices are called, in the order of the experts, even if an expert gets no token.

    Attributes:
        name: Of the module in the model, such as "model.layers.3.mlp.experts".
        module: The mixture of Transformers, without its router.
        gated: Whether the gate and the up projection are in one parameter.
        interleaved: Whether the outputs of gate and up alternate in that parameter (gpt-oss).
        transposed: Whether matrices are stored as [in, out].
        operators: Those of all experts, in the order in which they are called.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        """Make an operator of every matrix; `module` has a known form (`can_be_split`), and stays as it is.

        `name` is that of the module in the model, such as "model.layers.3.mlp.experts".
        """
        self.name = name
        self.module = module
        self.gated = hasattr(module, "gate_up_proj")
        self.interleaved = not getattr(module, "is_concatenated", True)
        # Most experts of Transformers get the router's choices, too. Llama-4's get only `self` and hidden states.
        self._is_routed = len(inspect.signature(type(module).forward).parameters) > 2

        first = module.get_parameter("gate_up_proj" if self.gated else "up_proj")
        down = module.get_parameter("down_proj")
        # Hidden states enter the first matrix and leave the last one. If a module does not say how it stores matrices,
        # they are [in, out] if, read so, the first has as many inputs as the last has outputs.
        has_form_of_transposed = first.shape[1] == down.shape[2]
        self.transposed = bool(getattr(module, "is_transposed", has_form_of_transposed))

        self._experts = [self._operators_of(expert) for expert in range(len(down))]
        self.operators = [operator for expert in self._experts for operator in expert.values()]
        # Whether choices beyond the number of experts are of experts that return their inputs (LongCat-Flash).
        self._has_identities = has_identities(module)
        # The shape of the down projections when the output was compared with the original one; `None`: not yet.
        self._compared_shape: torch.Size | None = None

    def __len__(self) -> int:
        return len(self._experts)

    def _operators_of(self, expert: int) -> dict[str, ExpertOperator]:
        """Make the operators of the expert with a number, by their kind, in the order in which they are called.

        `self.gated` says that the gate and the up projection are the two halves of one parameter.
        """
        operators = {}
        if self.gated:
            operators["gate_proj"] = ExpertOperator(
                self, "gate_proj", expert, tensor="gate_up_proj", half=0
            )
            operators["up_proj"] = ExpertOperator(
                self, "up_proj", expert, tensor="gate_up_proj", half=1
            )
        else:
            operators["up_proj"] = ExpertOperator(
                self, "up_proj", expert, tensor="up_proj", half=None
            )
        operators["down_proj"] = ExpertOperator(
            self, "down_proj", expert, tensor="down_proj", half=None
        )
        return operators

    def forward(
        self,
        original: Callable[..., Tensor],
        watcher: ExpertWatcher | None,
        *arguments: Any,
        **keywords: Any,
    ) -> Tensor:
        """Compute the module's output expert by expert, in place of its own forward pass `original`.

        The other arguments are those of the forward pass. `watcher` is called for every expert. The first output is
        compared with that of `original`, and the module is refused if they differ. Whether they agree does not depend
        on the batch, but it may on the sizes of the experts: a copy of the module that has fewer channels is compared
        again. `self._compared_shape` becomes the shape of the down projections then.
        """
        values = self.values(arguments, keywords)  # the first are the hidden states
        assigned = self.assigned(*arguments, **keywords)
        output = self.outputs(assigned, watcher).view(values[0].shape)
        shape = self.module.get_parameter("down_proj").shape
        if self._compared_shape != shape:
            self._compare(original, values, output)
            self._compared_shape = shape
        return output

    def _compare(self, original: Callable[..., Tensor], values: list[Any], output: Tensor) -> None:
        """Refuse the module if `output` is not what its own forward pass `original` returns, up to rounding.

        `values` are the arguments of the forward pass, by position: the hidden states, and the router's choices if the
        module gets them (`self._is_routed`). Changes nothing. If `original` returns NaN or Inf, nothing can be
        compared, and the ValueError says so.
        """
        # The first tokens are enough. With all, oneDNN would keep memory for products of many sizes, because `original`
        # does not use `in_few_sizes`. Only [tokens, hidden] can be cut so.
        is_by_token = self._is_routed and values[0].ndim == 2
        some = slice(16) if is_by_token else slice(None)
        with torch.no_grad():
            expected = original(*(value[some] for value in values))
            difference = float((output[some] - expected).float().norm())
            size = float(expected.float().norm())

        tolerance = 2e-2  # for 16 bits
        if output.dtype == torch.float64:
            tolerance = 1e-6
        elif output.dtype == torch.float32:
            is_exact = torch.get_float32_matmul_precision() == "highest"
            tolerance = 1e-3 if is_exact else 2e-2
        is_equal = difference <= tolerance * size  # False for NaN
        if is_equal:
            return

        holds_nan_or_inf = not bool(torch.isfinite(expected).all())
        if holds_nan_or_inf:
            raise ValueError(
                f"the experts of {self.name} return NaN or Inf: the model is damaged there or before, or overflows its "
                "dtype: load it again, or in float32 or bfloat16 (--dtype float32)."
            )
        name_in_parent = self.name.rpartition(".")[2]
        raise UnsupportedArchitectureError(
            f"{self.name} ({type(self.module).__name__}) computes its experts in an unknown way: to prune the rest of "
            f"the model and leave them dense, pass exclude=['*.{name_in_parent}'], with a pattern that removes no "
            "whole parts, such as '2:4'."
        )

    def assigned(self, *arguments: Any, **keywords: Any) -> AssignedTokens:
        """Sort the tokens that the module is called with by expert; the host waits once for the device.

        The arguments are those of the module's forward pass: hidden states, and if `self._is_routed` the router's
        choices. Changes nothing.
        """
        hidden_states, *routing = self.values(arguments, keywords)
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        num_experts = len(self._experts)
        if self._is_routed:
            # Numbers of the k experts that the router chooses for a token, and their weights; both are [tokens, k].
            chosen_experts, router_weights = routing
            # [tokens, k] -> [tokens * k]: choice p is of token p // k. A stable sort by expert keeps tokens in order.
            experts, choices = chosen_experts.flatten().sort(stable=True)
            num_choices = chosen_experts.numel() // flat.shape[0]  # k
            tokens = choices // num_choices
            rows = tokens  # every token has one row
            weights = router_weights.flatten()[choices, None]
        else:
            # Every expert has rows for all tokens, and they are zero if it was not chosen (Llama-4).
            num_tokens = flat.shape[0] // num_experts
            rows = flat.ne(0).any(dim=-1).nonzero()[:, 0]
            experts = rows // num_tokens
            tokens = rows % num_tokens
            weights = None
        # Where each expert begins among the sorted choices, and where the last one ends. Choices that are no number of
        # an expert come after that, so they are left out.
        numbers = torch.arange(num_experts + 1, device=experts.device, dtype=experts.dtype)
        bounds = torch.searchsorted(experts, numbers).tolist()
        return AssignedTokens(flat, rows=rows, tokens=tokens, weights=weights, bounds=bounds)

    def values(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> list[Any]:
        """The arguments of the module's forward pass by position, however the decoder layer passes them.

        The first are the hidden states. `self.module` is the mixture of Transformers.
        """
        signature = inspect.signature(type(self.module).forward)
        bound = signature.bind(self.module, *arguments, **keywords)
        _, *values = bound.arguments.values()  # the first is the module itself
        return values

    def outputs(self, batch: AssignedTokens, watcher: ExpertWatcher | None = None) -> Tensor:
        """Run the experts on a batch, and sum their outputs for each row of its hidden states, [rows, hidden].

        `watcher` is called with the number of every expert, `batch`, and the expert's outputs for its tokens times the
        router's weights. `self._experts` are the matrices of each expert. Changes nothing.
        """
        output = torch.zeros_like(batch.hidden_states)
        for expert in range(len(self._experts)):
            part = batch.part(expert)  # rows and tokens are sorted by expert
            rows = batch.rows[part]
            tokens = batch.tokens[part]
            inputs = batch.hidden_states.index_select(0, rows)
            expert_outputs = self.output_of(expert, inputs, tokens)
            if batch.weights is not None:
                # weighted before they are added, in the order of Transformers
                expert_outputs = expert_outputs * batch.weights[part]
            if watcher is not None:
                watcher(expert, batch, expert_outputs)
            # The sum has the dtype of the hidden states. In place, because a copy of all rows takes longer than a small
            # expert.
            output.index_add_(0, rows, expert_outputs.to(output.dtype))

        if self._has_identities:
            # choices beyond the last expert
            beyond = slice(batch.bounds[-1], None)
            rows = batch.rows[beyond]
            returned_inputs = batch.hidden_states[rows]
            if batch.weights is not None:
                returned_inputs = returned_inputs * batch.weights[beyond]
            output.index_add_(0, rows, returned_inputs.to(output.dtype))
        return output

    def output_of(self, expert: int, inputs: Tensor, tokens: Tensor) -> Tensor:
        """Run one expert on `inputs`; returns its outputs, not weighted by the router; both are [tokens, hidden].

        `tokens` are the numbers of these tokens in their batch, int64, for hooks on the operators. `self.module`, the
        mixture, may have a norm of its own for the outputs. Changes nothing.
        """
        module: Any = self.module
        middle = self.middle(expert, inputs, tokens)
        outputs = self._call(expert, "down_proj", middle, tokens)
        if getattr(module, "has_post_expert_norm", False):
            outputs = module.post_expert_norm(outputs)
        return outputs

    def middle(self, expert: int, inputs: Tensor, tokens: Tensor) -> Tensor:
        """Compute the inputs of the down projection of one expert, [tokens, intermediate].

        `inputs` [tokens, hidden] are the hidden states of the `tokens`, int64, that the expert gets. Hooks on the
        operators see both. `self.gated` says that the gate and the up projection are halves of one parameter. Changes
        nothing.
        """
        module: Any = self.module
        if not self.gated:
            return module.act_fn(self._call(expert, "up_proj", inputs, tokens))
        gate = self._call(expert, "gate_proj", inputs, tokens)
        up = self._call(expert, "up_proj", inputs, tokens)
        if not internals.applies_gate(module):
            return up * module.act_fn(gate)
        # The module itself applies the gate, [tokens, 2 * intermediate] -> [tokens, intermediate]. It needs the outputs
        # of gate and up in the order of the fused matrix: alternating, or one after the other.
        if self.interleaved:
            return internals.apply_gate(module, torch.stack((gate, up), dim=-1).flatten(-2))
        return internals.apply_gate(module, torch.cat((gate, up), dim=-1))

    def _call(self, expert: int, kind: str, inputs: Tensor, tokens: Tensor) -> Tensor:
        """Call one matrix of an expert on `inputs` [tokens, in]."""
        outputs: Tensor = self._experts[expert][kind].module(inputs, tokens)
        return outputs


def is_fused_experts(module: nn.Module) -> bool:
    """Tell whether a module keeps matrices in 3-D parameters of its own, as fused experts do [experts, ...]."""
    if internals.is_convolution(module):  # its 3-D weight is no stack of matrices
        return False
    parameters = module.parameters(recurse=False)
    # a parameter with a size of one is a scale or the weight of a norm
    return any(parameter.ndim == 3 and min(parameter.shape) > 1 for parameter in parameters)


def can_be_split(module: nn.Module) -> bool:
    """Tell whether the form of fused experts is known: an up and a down projection, with a gate or without.

    Both must have matrices of the same number of experts, unless the mixture also has experts that return their inputs.
    `module` is a mixture (`is_fused_experts`).
    """
    fused = {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    has_names = set(fused) in ({"gate_up_proj", "down_proj"}, {"up_proj", "down_proj"})
    if not has_names:
        return False
    numbers_of_experts = {parameter.shape[0] for parameter in fused.values()}
    if has_identities(module):  # the first matrices may have entries for them, which are never used
        return fused["down_proj"].shape[0] == min(numbers_of_experts)
    return len(numbers_of_experts) == 1


def has_identities(module: nn.Module) -> bool:
    """Tell whether a mixture has experts that return their inputs, numbered after those with weights."""
    return isinstance(getattr(module, "identity_expert", None), nn.Identity)


@contextmanager
def split_experts(
    operators: Iterable[LinearOperator], watcher: ExpertWatcher | None = None
) -> Iterator[None]:
    """Inside, the mixtures of these operators call each of their matrices as a separate module.

    Replaces the forward passes of the mixtures, and puts them back afterwards. `operators` are those of a decoder
    layer, of one mixture, or of the whole model; operators that are of no mixture are ignored. `watcher` is called for
    every expert of every mixture in every pass.
    """
    # each mixture once, although it has many operators
    mixtures = {id(o.experts): o.experts for o in operators if isinstance(o, ExpertOperator)}
    with ExitStack() as replaced:
        for experts in mixtures.values():
            module = experts.module
            # If Accelerate has put its hooks around the forward pass, they still run.
            name = internals.forward_attribute(module)
            forward = partial(experts.forward, getattr(module, name), watcher)
            replaced.enter_context(replaced_forwards([module], [forward], name))
        yield

"""A model without weights: its decoder layers by kind, and which of their operators share inputs."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from optimum_fista.model.activations import LayerActivations
from optimum_fista.model.architecture import find_decoder_layers
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.correction import Correction
from optimum_fista.model.expert_removal import experts_of
from optimum_fista.model.experts import ExpertOperator, is_fused_experts
from optimum_fista.model.hidden_states import record_inputs
from optimum_fista.model.operator import LinearOperator
from optimum_fista.model.sharing import trace_groups
from optimum_fista.run.checkpoints.loading import reading, refuse_quantized
from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.pruning.removal import Removal, plan_run
from optimum_fista.run.pruning.size import with_channels_for_size
from optimum_fista.solve.pattern import SparsityPattern


@dataclass(frozen=True)
class Group:
    """Operators of a decoder layer that share their inputs."""

    rows: tuple[int, ...]  # outputs of each
    columns: int  # their inputs
    pattern: SparsityPattern  # of the first
    share: float  # of all tokens, those that they see
    of_expert: bool
    sees_dense: bool  # their inputs are the dense network's
    last: bool  # a single one that compensates for the residual stream, to which its output is taken to be added
    passes: int  # over the calibration tokens, in the network as pruned so far

    @property
    def outputs(self) -> int:
        """Outputs of all operators."""
        return sum(self.rows)


@dataclass(frozen=True)
class Mixture:
    """The experts that stay in a decoder layer, if others go."""

    number: int
    rows: int  # outputs of a down projection
    columns: int  # its inputs
    share: float  # of all tokens, those that one of them gets
    num_bytes: int


@dataclass
class LayerKind:
    """Decoder layers that are alike."""

    count: int
    num_tensors: int  # of the weights of one
    num_bytes: int
    num_active: float  # weights that a token meets: of experts, those that it is sent to
    groups: dict[Group, int]  # operators to prune in the order of the run, and how many such groups there are
    mixture: Mixture | None = None


@dataclass
class Shapes:
    """A model on the meta device, its decoder layers, the operators to prune, and why others are left dense.

    If whole parts of the model are to go, `config` has the patterns that `removal` made of that.
    """

    model: PreTrainedModel
    config: FistaPruningConfig
    removal: Removal | None
    kinds: list[LayerKind]
    operators: dict[str, tuple[int, int]]
    left_dense: dict[str, str]
    fused_bytes: int  # of parameters that hold the weights of many experts


class _AnswerYes(TorchDispatchMode):
    """As a context: what code asks of the values of meta tensors (are these equal, is this finite) is true, or 1."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket is torch.ops.aten._local_scalar_dense and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype).item()
        if function.overloadpacket is torch.ops.aten.equal and args[0].is_meta:
            return True
        return function(*args, **(kwargs or {}))


def model_shapes(given: PreTrainedConfig, config: FistaPruningConfig, dtype: torch.dtype) -> Shapes:
    """Build a model on the meta device, where nothing is computed, and run it once on a few tokens.

    Raises:
        ValueError: If the model can't be used, or nothing is left to prune.
    """
    settings = copy.deepcopy(given)
    settings.pad_token_id = None  # there is no padding, and Transformers would look for it in the values
    with reading(settings.name_or_path or type(settings).__name__), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype, trust_remote_code=False)
    model.eval().requires_grad_(False)
    refuse_quantized(model)
    layers = find_decoder_layers(model)
    removal, config, chosen, left_dense = plan_run(model, layers, with_channels_for_size(model, config))
    if removal is not None and removal.num_removed_layers:
        # Which ones is a question of values: the next ones after the first stand for them.
        going = range(1, 1 + removal.num_removed_layers)
        chosen = removal.remove_layers(model, layers, chosen, dict.fromkeys(going, 0.0))
        config, left_dense = removal.config, removal.reasons_left_dense(left_dense, chosen)
    active = getattr(settings.get_text_config(decoder=True), "num_experts_per_tok", None) or 1
    shares: dict[int, float] = {}
    fused_bytes = 0
    for module in filter(is_fused_experts, model.modules()):
        # Which tokens an expert gets is a question of values.
        module.forward = lambda hidden_states, *_, **__: torch.empty_like(hidden_states)
        for parameter in (p for p in module.parameters(recurse=False) if p.ndim == 3):
            shares[id(parameter)] = min(1.0, active / len(parameter))
            fused_bytes += parameter.nbytes
    kinds: dict[Any, LayerKind] = {}
    pruned: dict[Any, set[str]] = {}  # the operators of each kind, without the layer's name
    with torch.no_grad(), _AnswerYes():
        tokens = torch.zeros(1, 16, dtype=torch.long, device="meta")
        recorded = record_inputs(model, layers, [CalibrationBatch(tokens)])
        for (name, layer), calls in zip(layers, recorded.calls, strict=True):
            shapes = ((key, tuple(p.shape)) for key, p in layer.named_parameters())
            part = None if removal is None else removal.mixture_of(name)
            kind = type(layer), part is None, *shapes, *(key.removeprefix(name) for key in chosen[name])
            if kind in kinds:
                kinds[kind].count += 1
                chosen[name] = {key: o for key, o in chosen[name].items() if key.removeprefix(name) in pruned[kind]}
                continue
            linear = {key: o for key, o in chosen[name].items() if not isinstance(o, ExpertOperator)}
            traced, _ = trace_groups(layer, linear, calls[0], recorded.hidden_states[0])
            groups: Counter[Group] = Counter()
            if removal is not None:
                activations = LayerActivations(layer, calls, [None], tokens.device)
                traced, others = removal.to_prune(name, traced, activations, recorded.hidden_states[0])
                chosen[name] = {key: o for key, o in chosen[name].items() if key not in others}
            pruned[kind] = {key.removeprefix(name) for key in chosen[name]}
            of_experts: dict[Any, list[LinearOperator]] = {}  # what one parameter holds for one expert
            for operator in chosen[name].values():
                if isinstance(operator, ExpertOperator):
                    of_experts.setdefault((id(operator.owner), operator.expert, operator.tensor), []).append(operator)
            groups.update(_groups(layer, traced, [*of_experts.values()], config, shares))
            num_active = sum(p.numel() * shares.get(id(p), 1.0) for p in layer.parameters())
            mixture = None
            if removal is not None and part is not None:
                experts, count = experts_of(part, name, layer), removal.plan.counts[part.name]
                outputs, inputs = experts.operators[-1].shape  # of a down projection
                held = sum(p.nbytes for p in experts.module.parameters(recurse=False))
                mixture = Mixture(count, outputs, inputs, min(1.0, active / count), held * count // part.groups)
            weights = [p.nbytes for p in layer.parameters()]
            kinds[kind] = LayerKind(1, len(weights), sum(weights), num_active, groups, mixture)
    every = {name: operator for those in chosen.values() for name, operator in those.items()}
    named = {name: operator.shape for name, operator in every.items()}
    return Shapes(model, config, removal, list(kinds.values()), named, left_dense, fused_bytes)


def _groups(
    layer: nn.Module,
    traced: Sequence[Sequence[LinearOperator]],
    of_experts: Sequence[Sequence[LinearOperator]],
    config: FistaPruningConfig,
    shares: Mapping[int, float],
) -> Counter[Group]:
    """What is pruned in one round over a decoder layer, and how often.

    `traced` are its operators that share their inputs, in execution order, `shares` the shares of the tokens that
    experts see, by the parameter that holds them.
    """
    groups: Counter[Group] = Counter()
    found = [*traced, *of_experts]
    alone = not of_experts and bool(traced) and len(traced[-1]) == 1
    last = len(found) - 1 if alone and config.correction.residual_share > 0 else None
    passes = _passes(layer, found, len(traced), config.correction, last)
    for index, operators in enumerate(found):
        first, rows = operators[0], tuple(operator.shape[0] for operator in operators)
        share = shares.get(id(getattr(first.owner, first.tensor)))
        dense, pattern = config.correction.sees_dense_inputs(index), config.pattern_for(first.name)
        of_expert, residual = share is not None, index == last
        groups[Group(rows, first.shape[1], pattern, share or 1.0, of_expert, dense, residual, passes[index])] += 1
    return groups


def _passes(
    layer: nn.Module, groups: Sequence[Sequence[LinearOperator]], of_all: int, correction: Correction, last: int | None
) -> list[int]:
    """How often the operators of each group are run on all tokens in the network as pruned so far.

    The layer runs from its start to every group, once for all groups of experts, which come after the first `of_all`
    groups; if hidden states leave it pruned, it runs to its end as well. A part of it that is finished runs once more,
    and not even that if it ends with an operator: then this operator alone does (`model.finished_parts`).
    """
    runs = [index for index in range(min(len(groups), of_all + 1)) if not correction.sees_dense_inputs(index)]
    if not correction.independent_layers and last is None:
        runs.append(len(groups))
    part_of = {module: part for part in layer.children() for module in part.modules()}
    parts = [None if part_of[group[0].owner] is group[0].module else part_of[group[0].owner] for group in groups]
    ends = {part: index for index, part in enumerate(parts)}  # the last group of each
    found = []
    for index, part in enumerate(parts):
        later, end = [run for run in runs if run > index], ends[part]
        if part is not None:
            returned = groups[end][0].ends
            again = index == end or returned is None or returned[0] is not part
            later = [run for run in later if run <= end] + [run for run in later if run > end][:again]
        # one that is fitted to the layer's output runs with the layer, and once more to see what it gives
        found.append(len(later) + 2 * (index == last))
    return found

"""A model without weights, for plans: its decoder layers by kind, what they hold, and what they take to run."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from optimum_fista.model.architecture import DecoderLayers, find_decoder_layers
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.experts import ExpertOperator, is_fused_experts
from optimum_fista.model.hidden_states import record_inputs
from optimum_fista.model.operator import LinearOperator
from optimum_fista.model.probe import AnswerYes, LayerProbe, probe_layer
from optimum_fista.model.replay import LayerCall
from optimum_fista.run.checkpoints.loading import floating_dtype, gguf_file, read_config, reading, refuse_quantized
from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.pruning.operators import choose_operators


@dataclass(frozen=True)
class PlannedExperts:
    """A 3-D parameter of a decoder layer: a matrix an expert, of one operator or of gate and up projection together.

    Attributes:
        count: Number of experts.
        shape: (out, in) of a matrix.
        active: Experts that see a token.
        pruned: Names and shapes of the operators to prune, one entry for each expert that has any.
    """

    count: int
    shape: tuple[int, int]
    active: int
    pruned: tuple[tuple[tuple[str, tuple[int, int]], ...], ...]

    @property
    def pruned_weights(self) -> int:
        """Weights of the operators to prune."""
        return sum(out * columns for operators in self.pruned for _, (out, columns) in operators)

    @property
    def groups(self) -> dict[tuple[tuple[int, int], ...], int]:
        """How many experts have operators to prune of these shapes."""
        return Counter(tuple(shape for _, shape in operators) for operators in self.pruned)


@dataclass
class LayerKind:
    """Decoder layers that are alike.

    Attributes:
        name: Name of the first.
        count: How many there are.
        weight_bytes: Bytes of its weights.
        probe: What it takes to run on one batch.
        experts: Its fused experts.
    """

    name: str
    count: int
    weight_bytes: int
    probe: LayerProbe
    experts: list[PlannedExperts]

    @property
    def pruned_weights(self) -> int:
        """Weights of the operators to prune of one."""
        linear = sum(o.shape[0] * o.shape[1] for group in self.probe.groups for o in group)
        return linear + sum(expert.pruned_weights for expert in self.experts)


@dataclass
class PlannedModel:
    """What a plan knows of a model.

    Attributes:
        model: The model on the meta device.
        layers: Its decoder layers.
        operators: Operators to prune by decoder layer, without those of fused experts.
        left_dense: Operators left dense, with the reason.
        experts: Fused experts of all decoder layers.
        kinds: Decoder layers by kind.
        hidden_bytes: Bytes of the hidden states of one batch.
        call_bytes: Bytes of the other arguments of the decoder layers, stored once.
        in_memory: Whether its weights are held, because they can't be read one at a time.
    """

    model: PreTrainedModel
    layers: DecoderLayers
    operators: dict[str, dict[str, LinearOperator]]
    left_dense: dict[str, str]
    experts: list[PlannedExperts]
    kinds: list[LayerKind]
    hidden_bytes: int
    call_bytes: int
    in_memory: bool

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    @property
    def tied(self) -> bool:
        """Whether the head is the input embedding."""
        return bool(self.model.all_tied_weights_keys)


def load_config(model: str | Path | PreTrainedConfig) -> tuple[PreTrainedConfig, bool]:
    """The configuration of a model, and whether its weights come from a GGUF file.

    Args:
        model: Hub id, model folder, folder with one GGUF file, a configuration file alone, or a configuration.

    Raises:
        ValueError: If a folder holds no model.
        OSError: If there is no such model.
    """
    if isinstance(model, PreTrainedConfig):
        return model, False
    file = gguf_file(str(model))
    return read_config(str(model)), file is not None


def stored_dtype(settings: PreTrainedConfig, in_memory: bool) -> torch.dtype:
    """Dtype of the checkpoint; GGUF files are dequantized to float32."""
    found = None if in_memory else getattr(settings, "dtype", None)
    return floating_dtype(found or torch.float32)


def planned_model(
    settings: PreTrainedConfig,
    config: FistaPruningConfig,
    batch_size: int,
    sequence_length: int,
    dtype: str | torch.dtype = "auto",
    in_memory: bool = False,
) -> PlannedModel:
    """Build a model on the meta device and run its decoder layers there, a batch and a kind each.

    Raises:
        ValueError: If the model or an option can't be used; see `run.pruning.operators.choose_operators`.
    """
    settings = copy.deepcopy(settings)
    settings.pad_token_id = None  # no padding is planned, and Transformers would look for it in the values
    wanted = stored_dtype(settings, in_memory) if dtype == "auto" else floating_dtype(dtype)
    with reading(settings.name_or_path or type(settings).__name__), torch.device("meta"):
        made = AutoModelForCausalLM.from_config(settings, dtype=wanted, trust_remote_code=False)
    made.eval().requires_grad_(False)
    refuse_quantized(made)
    layers = find_decoder_layers(made)
    chosen, left_dense = choose_operators(layers, config)
    fused = {name: fused_experts(layer, settings, chosen[name].values()) for name, layer in layers}
    operators = {
        name: {key: operator for key, operator in found.items() if not isinstance(operator, ExpertOperator)}
        for name, found in chosen.items()
    }
    experts = {id(module) for _, layer in layers for module in _expert_modules(layer)}
    for module in made.modules():
        if id(module) in experts:
            module.forward = lambda hidden_states, *_, **__: torch.empty_like(hidden_states)
    ids = torch.zeros(batch_size, sequence_length, dtype=torch.long, device="meta")
    with torch.no_grad(), AnswerYes():
        recorded = record_inputs(made, layers, [CalibrationBatch(ids)])
    hidden = recorded.hidden_states[0]
    kinds: dict[Any, LayerKind] = {}
    for (name, layer), calls in zip(layers, recorded.calls, strict=True):
        key = _kind(name, layer, chosen[name], calls[0])
        if key in kinds:
            kinds[key].count += 1
            continue
        weights = sum(p.numel() * p.element_size() for p in layer.parameters())
        probe = probe_layer(layer, operators[name], calls[0], hidden)
        kinds[key] = LayerKind(name, 1, weights, probe, fused[name])
    return PlannedModel(
        made,
        layers,
        operators,
        left_dense,
        [experts for found in fused.values() for experts in found],
        list(kinds.values()),
        hidden.numel() * hidden.element_size(),
        _call_bytes(recorded.calls),
        in_memory,
    )


def fused_experts(
    layer: nn.Module, settings: PreTrainedConfig, operators: Iterable[LinearOperator]
) -> list[PlannedExperts]:
    """Experts of a decoder layer by its 3-D parameters, given its operators to prune."""
    by_parameter: dict[tuple[int, str], dict[int, list[tuple[str, tuple[int, int]]]]] = {}
    for operator in operators:
        if isinstance(operator, ExpertOperator):
            experts = by_parameter.setdefault((id(operator.experts.module), operator.tensor), {})
            experts.setdefault(operator.expert, []).append((operator.name, operator.shape))
    active = getattr(settings.get_text_config(decoder=True), "num_experts_per_tok", None) or 1
    found = []
    for module in _expert_modules(layer):
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3:
                count, rows, columns = parameter.shape
                shape = (columns, rows) if getattr(module, "is_transposed", True) else (rows, columns)
                pruned = tuple(map(tuple, by_parameter.get((id(module), leaf), {}).values()))
                found.append(PlannedExperts(count, shape, min(active, count), pruned))
    return found


def operator_names(planned: PlannedModel) -> tuple[list[str], list[str]]:
    """Names of the operators that a run prunes, every matrix of every expert for itself, and of those left dense."""
    pruned = [name for operators in planned.operators.values() for name in operators]
    pruned += [name for experts in planned.experts for operators in experts.pruned for name, _ in operators]
    return pruned, list(planned.left_dense)


def _expert_modules(layer: nn.Module) -> list[nn.Module]:
    return [module for module in layer.modules() if is_fused_experts(module)]


def _kind(name: str, layer: nn.Module, operators: Iterable[str], call: LayerCall) -> Any:
    """What tells one kind of decoder layer from another."""
    shapes = tuple((key, tuple(p.shape)) for key, p in layer.named_parameters())
    chosen = tuple(key.removeprefix(name) for key in operators)
    masks = tuple((key, tuple(v.shape)) for key, v in call.keywords.items() if isinstance(v, Tensor))
    return type(layer), shapes, chosen, masks


def _call_bytes(calls: list[list[LayerCall]]) -> int:
    """Bytes of all tensors in the arguments of decoder layers, each counted once."""
    seen: dict[int, int] = {}
    for call in (batch for layer in calls for batch in layer):
        for tensor in torch.utils._pytree.tree_leaves((call.arguments, call.keywords)):
            if isinstance(tensor, Tensor):
                seen[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())

"""Finding what reads and writes the residual stream of a model, by structure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_fista.model.architecture import find_decoder_layers, input_embedding, require_own_weights
from optimum_fista.model.errors import UnsupportedArchitectureError
from optimum_fista.model.experts import ExpertOperator, FusedExperts, can_be_split, is_fused_experts
from optimum_fista.model.operator import LinearOperator, is_linear
from optimum_fista.model.replay import watching
from optimum_fista.model.residual_stream import Norm, ResidualStream


@torch.no_grad()
def find_residual_stream(model: PreTrainedModel, ids: Tensor) -> ResidualStream:
    """Find what reads and writes the residual stream by its shapes and by a forward pass on `ids` [1, sequence].

    A norm has a weight [hidden], and linear operators, experts or routers take its output: they read the stream. Norms
    that take the output of one of these operators, as those of queries and keys, are left alone. All other operators of
    a decoder layer with `hidden` outputs write to the stream, and so do the down projections of experts that read it.
    Whether the model computes the same afterwards is for the caller to check.

    Raises:
        UnsupportedArchitectureError: If the model has norms between its operators and the stream, or anything else that
            the basis of the stream matters to.
    """
    layers, size = find_decoder_layers(model), input_embedding(model).shape[1]
    require_own_weights(model, layers)
    head = model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    in_layers = {module for layer in layers.modules for module in layer.modules()}
    decoder = dict.fromkeys([*model.get_decoder().modules(), head])
    for module, name in names.items():
        if module not in decoder and _shapes(module):  # what reads images or sounds adds to the stream as well
            raise unsupported(model, f"{name} is outside of its text decoder and may add to it, as images do")
    norms = [module for module in decoder if [*_shapes(module).values()] in ([(size,)], [(size,), (size,)])]
    operators = {m: _operators(names[m], m) for m in decoder if m in in_layers or m is head}
    operators = {module: found for module, found in operators.items() if found}
    inputs, made_by = _trace(model, ids, [*norms, *operators])
    reads: dict[nn.Module, list[LinearOperator]] = {norm: [] for norm in norms}
    writers: list[LinearOperator] = []
    for module, found in operators.items():
        source = made_by.get(_place(inputs[module][0])) if len(inputs[module]) == 1 else None
        down = [operator for operator in found if isinstance(operator, ExpertOperator) and operator.kind == "down_proj"]
        if source in reads:
            reads[source] += [operator for operator in found if operator not in down]
            writers += down
        elif module is not head and not down and inputs[module]:
            writers += [operator for operator in found if operator.shape[0] == size]
    readers = {reader.owner for group in reads.values() for reader in group}
    for norm in norms:
        calls = inputs[norm]
        if len(calls) != 1:
            raise unsupported(model, f"{names[norm]} is called {len(calls)} times in a forward pass")
        if not reads[norm] and made_by.get(_place(calls[0])) not in readers:
            raise unsupported(model, f"no linear operator is called on the output of {names[norm]}")
    if head not in readers:
        raise unsupported(model, "its head is not called on the output of a norm")
    outside = [module for module in decoder if isinstance(module, nn.Embedding) and module not in in_layers]
    embeddings = [module for module in outside if module.weight.shape[1] == size]
    known = {*embeddings, *readers, *(writer.owner for writer in writers)}
    for module in decoder:
        for name, shape in _shapes(module).items():
            # vectors of this size also belong to norms of queries and keys, and to operators inside
            if module not in known and size in shape and len(shape) > 1:
                raise unsupported(model, f"{names[module]}.{name} {list(shape)} is neither a norm nor an operator")
    found_norms, subtract_mean = [], set[bool]()
    for norm, group in reads.items():
        if group:
            neutral, subtracts = _kind_of_norm(model, names[norm], norm)
            found_norms.append(Norm(norm, neutral, tuple(group)))
            subtract_mean.add(subtracts)
            if getattr(norm, "bias", None) is not None and float(found_norms[-1].gain.abs().min()) < 1e-6:
                raise unsupported(model, f"{names[norm]} has a bias, and a gain of zero in front of it")
            if all(isinstance(reader, ExpertOperator) for reader in group):
                raise unsupported(model, f"only experts are called on the output of {names[norm]}")
    return ResidualStream(model, layers, tuple(embeddings), tuple(found_norms), tuple(writers), any(subtract_mean))


def unsupported(model: PreTrainedModel, why: str) -> UnsupportedArchitectureError:
    """The error that says why a model can't be rotated."""
    return UnsupportedArchitectureError(
        f"the residual stream of {type(model).__name__} can't be rotated: {why}. Prune the model as it is."
    )


def _operators(name: str, module: nn.Module) -> list[LinearOperator]:
    """The matrices of a linear module, of a router (it has a weight like one), or of the experts of a mixture."""
    if is_fused_experts(module):
        return [*FusedExperts(name, module).operators] if can_be_split(module) else []
    has_matrix = len(_shapes(module).get("weight", ())) == 2 and not isinstance(module, nn.Embedding)
    return [LinearOperator(name, module)] if is_linear(module) or has_matrix else []


def _trace(
    model: PreTrainedModel, ids: Tensor, modules: Iterable[nn.Module]
) -> tuple[dict[nn.Module, list[Tensor]], dict[object, nn.Module]]:
    """The inputs of modules in a forward pass, a tensor a call, and by which module a tensor was made (`_place`)."""
    inputs: dict[nn.Module, list[Tensor]] = {module: [] for module in modules}
    # all are held until the end: memory that was freed could be that of another tensor
    outputs: dict[nn.Module, list[Tensor]] = {module: [] for module in inputs}
    with watching(
        {module: kept.append for module, kept in inputs.items()},
        {module: kept.append for module, kept in outputs.items()},
    ):
        model(input_ids=ids.to(model.device), use_cache=False)
    return inputs, {_place(y): m for m, kept in outputs.items() for y in kept if isinstance(y, Tensor)}


def _kind_of_norm(model: PreTrainedModel, name: str, module: nn.Module) -> tuple[float, bool]:
    """The weight that leaves the input of a norm unscaled, and whether it subtracts the mean.

    Raises:
        UnsupportedArchitectureError: If it is no RMSNorm or LayerNorm.
    """
    parameters: Any = module
    weight, bias = parameters.weight.detach(), getattr(module, "bias", None)
    shift = torch.zeros_like(weight) if bias is None else bias.detach()
    probe = torch.ones_like(weight)
    probe[::2] = -1  # of mean 0 and mean square 1
    probe *= 100  # so large that a norm's epsilon is nothing
    scaled = (module(probe[None, None])[0, 0] - shift) * probe.sign()
    moved = module(probe[None, None] + 100)[0, 0] - shift
    close = 1e-3 * float(scaled.abs().max())
    for neutral in (1.0, 0.0):
        gain = weight + (1 - neutral)
        if bool(torch.all((scaled - gain).abs() <= close)):
            for subtracts, expected in ((True, probe), (False, (probe + 100) / 2**0.5)):
                if bool(torch.all((moved - gain * expected / 100).abs() <= close)):
                    return neutral, subtracts
    raise unsupported(model, f"{name} ({type(module).__name__}) is neither an RMSNorm nor a LayerNorm")


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}


def _place(tensor: Tensor) -> object:
    """What tensors and their views in another shape have in common."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.numel()

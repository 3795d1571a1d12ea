"""The residual stream of a model: what reads it and what adds to it, and another basis for it.

If every operator that reads the stream undoes a rotation, and everything that adds to it does the rotation, the model
computes the same (arXiv 2401.15024, 2404.00456). Norms stand between: their gains are moved into the operators that
read them. RMSNorm then commutes with all rotations, and LayerNorm with those that leave the mean as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_fista.model.architecture import (
    DecoderLayers,
    find_decoder_layers,
    find_operators,
    input_embedding,
    require_own_weights,
)
from optimum_fista.model.errors import UnsupportedArchitectureError
from optimum_fista.model.experts import (
    ExpertOperator,
    FusedExperts,
    can_be_split,
    is_fused_experts,
    split_experts,
)
from optimum_fista.model.gram import GramAccumulator
from optimum_fista.model.loss_gradients import DenseLoss, watch_gradients
from optimum_fista.model.operator import LinearOperator, is_linear
from optimum_fista.model.replay import watching
from optimum_fista.model.sensitivity import SensitivitySums
from optimum_fista.solve.rotation import Readers, Writers

_RIDGE_TOKENS = 1.5  # as that of `obs_admm` (docs/solver.md)


@dataclass(frozen=True)
class Norm:
    """A norm of the residual stream.

    Attributes:
        name: Its name in the model.
        module: It has a `weight` [hidden], and maybe a `bias` [hidden].
        neutral: The weight with which it scales nothing: 1, or 0 if it adds 1 to its weight.
        readers: The operators that are called on its output; the head may be one of them.
    """

    name: str
    module: nn.Module
    neutral: float
    readers: tuple[LinearOperator, ...]

    @property
    def gain(self) -> Tensor:
        """What it multiplies by, [hidden], float64."""
        return _parameter(self.module, "weight").double() + (1 - self.neutral)


@dataclass(frozen=True)
class ResidualStream:
    """What reads and writes the residual stream of a model.

    Attributes:
        model: The model.
        layers: Its decoder layers.
        embeddings: Modules whose rows [.., hidden] are added to the stream: of tokens, of learned positions.
        norms: The norms that operators read it through.
        writers: The operators of the decoder layers that add to it.
        keeps_mean: Whether the norms subtract the mean, so that a rotation has to leave it as it is.
    """

    model: PreTrainedModel
    layers: DecoderLayers
    embeddings: tuple[nn.Embedding, ...]
    norms: tuple[Norm, ...]
    writers: tuple[LinearOperator, ...]
    keeps_mean: bool

    @property
    def size(self) -> int:
        """Its width, `hidden`."""
        return self.embeddings[0].weight.shape[1]

    @torch.no_grad()
    def move_gains(self) -> None:
        """Move the gains and biases of the norms into the operators that read them; the model computes the same.

        The head gets a weight of its own, if it shares that of the embedding.
        """
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if head.weight is embedding.weight:
            head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=embedding.weight.requires_grad)
        for config in (self.model.config, self.model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False
        self.model.all_tied_weights_keys = self.model.get_expanded_tied_weights_keys(all_submodels=True)
        for norm in self.norms:
            gain, bias = norm.gain, getattr(norm.module, "bias", None)
            biases = [getattr(reader.module, "bias", None) for reader in norm.readers]
            if bias is not None and all(isinstance(other, Tensor) for other in biases):
                for reader, other in zip(norm.readers, biases, strict=True):
                    assert isinstance(other, Tensor)
                    other.data.add_(reader.read().double() @ bias.double())
                bias.data.zero_()
            elif bias is not None:  # W (g n + b) = (W g) (n + b / g)
                bias.data.copy_(bias.double() / gain)
            for reader in norm.readers:
                reader.write(reader.read().double() * gain)
            _parameter(norm.module, "weight").fill_(norm.neutral)

    @torch.no_grad()
    def rotate(self, rotation: Tensor) -> None:
        """Have the stream hold `R^T x` instead of `x`, after `move_gains`; the model computes the same.

        `rotation` is `R` [hidden, hidden], orthogonal, float64. Products are taken in float64.
        """
        rotation = rotation.to(self.model.device)
        for embedding in self.embeddings:
            embedding.weight.data.copy_(embedding.weight.double() @ rotation)
        for norm in self.norms:
            bias = getattr(norm.module, "bias", None)
            if bias is not None:
                bias.data.copy_(bias.double() @ rotation)
            for reader in norm.readers:
                reader.write(reader.read().double() @ rotation)
        for writer in self.writers:
            writer.write(rotation.T @ writer.read().double())
            bias = getattr(writer.module, "bias", None)
            if bias is not None:
                bias.data.copy_(bias.double() @ rotation)

    @cached_property
    def pruned(self) -> frozenset[str]:
        """Names of the operators that a run may prune: neither the head nor routers."""
        return frozenset(name for layer in self.layers for name in find_operators(*layer))

    def measure(self, loss: DenseLoss) -> list[Readers | Writers]:
        """What a rotation is trained on, after `move_gains`: weights, inputs, and what errors in the outputs cost.

        Raises:
            ValueError: If the gradients of the loss are not finite.
        """
        # of a mixture, the router or a shared expert sees all tokens
        whole = [next(r for r in norm.readers if not isinstance(r, ExpertOperator)) for norm in self.norms]
        groups = [[reader for reader in norm.readers if reader.name in self.pruned] for norm in self.norms]
        grams = {reader: _GramSums(reader) for reader, group in zip(whole, groups, strict=True) if group}
        reading = {r: grams[r] if r in grams else SensitivitySums(r) for group in groups for r in group}
        together: dict[str, list[LinearOperator]] = {}
        for writer in self.writers:
            key = writer.experts.name if isinstance(writer, ExpertOperator) else writer.name
            together.setdefault(key, []).append(writer)
        costs = {key: torch.zeros(self.size, self.size, device=group[0].device) for key, group in together.items()}
        writing = {writer: _WriterSums(writer, costs[key]) for key, group in together.items() for writer in group}
        watchers: dict[LinearOperator, SensitivitySums] = {**grams, **reading, **writing}
        with split_experts(watchers):
            watch_gradients(loss, watchers)
        for operator, found in watchers.items():
            if not bool(torch.isfinite(found.sums.gradients).all()):
                raise ValueError(
                    f"the gradients of the loss by the outputs of {operator.name} hold NaN or Inf: pass a model in "
                    "float32 or bfloat16."
                )
        measured: list[Readers | Writers] = []
        for first, group in zip(whole, groups, strict=True):
            if group:
                outputs = [reading[reader].sums.outputs for reader in group]
                measured.append(Readers([_matrix(reader) for reader in group], outputs, grams[first].inverse()))
        for key, group in together.items():
            inputs = [writing[writer].sums.inputs / max(1, writing[writer].sums.seen) for writer in group]
            measured.append(Writers([_matrix(writer) for writer in group], costs[key], inputs))
        return measured


class _GramSums(SensitivitySums):
    """Adds what is seen of an operator that reads the stream, and the Gram matrix of its inputs."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(operator)
        self._gram = GramAccumulator(operator.shape[1], operator.device)

    def see_input(self, inputs: Tensor, num_tokens: int) -> None:
        super().see_input(inputs, num_tokens)
        self._gram.add(inputs)

    def inverse(self) -> Tensor:
        """`(G + r diag(G))^-1`, [hidden, hidden]."""
        found = self._gram.finish()
        gram, diagonal = found.gram.double(), found.diagonal.double()
        gram.diagonal().add_(diagonal * (_RIDGE_TOKENS * len(gram) / max(1, found.num_tokens)))
        return torch.cholesky_inverse(torch.linalg.cholesky(gram)).float()


class _WriterSums(SensitivitySums):
    """Adds what is seen of an operator that writes to the stream; `sum_t e_t g_t g_t^T` to `costs` [hidden, hidden]."""

    def __init__(self, operator: LinearOperator, costs: Tensor) -> None:
        super().__init__(operator)
        self._costs = costs

    def see_gradient(self, gradient: Tensor) -> None:
        super().see_gradient(gradient)
        self._costs.addmm_((gradient * self.energy[:, None]).T, gradient)


@torch.no_grad()
def find_residual_stream(model: PreTrainedModel, ids: Tensor) -> ResidualStream:
    """Find what reads and writes the residual stream by its shapes and by a forward pass on `ids` [1, sequence].

    Norms are the modules with a weight [hidden] whose output linear operators, experts or routers are called on. Norms
    of queries and keys work on the output of one of these operators, and stay inside. All other operators of a decoder
    layer with `hidden` outputs write to the stream, and so do experts. That the model computes the same afterwards is
    for the caller to check.

    Raises:
        UnsupportedArchitectureError: If the model has norms between its operators and the stream, or anything else that
            the basis of the stream matters to.
    """
    layers, size = find_decoder_layers(model), input_embedding(model).shape[1]
    require_own_weights(model, layers)
    head = model.get_output_embeddings()
    if not is_linear(head):
        raise _unsupported(model, "its head is no linear operator")
    names = {module: name for name, module in model.named_modules()}
    in_layers = {module for layer in layers.modules for module in layer.modules()}
    decoder = list(dict.fromkeys([*model.get_decoder().modules(), head]))
    normed = [m for m in decoder if [*_shapes(m).values()] in ([(size,)], [(size,), (size,)])]
    # a router is a module of its own kind, with a weight as that of an operator
    operators = {m: [LinearOperator(names[m], m)] for m in decoder if _has_matrix(m) and (m in in_layers or m is head)}
    for module in decoder:
        if is_fused_experts(module) and can_be_split(module):
            operators[module] = [*FusedExperts(names[module], module).operators]
    inputs: dict[nn.Module, list[Tensor]] = {module: [] for module in (*normed, *operators)}
    outputs: dict[nn.Module, list[Tensor]] = {module: [] for module in (*normed, *operators)}
    with watching(
        {module: kept.append for module, kept in inputs.items()},
        {module: kept.append for module, kept in outputs.items()},
    ):
        model(input_ids=ids.to(model.device), use_cache=False)
    for module in normed:
        if len(outputs[module]) != 1:
            raise _unsupported(model, f"{names[module]} is called {len(outputs[module])} times in a forward pass")
    made_by = {_place(y): m for m, kept in outputs.items() for y in kept if isinstance(y, Tensor)}
    reads: dict[nn.Module, list[LinearOperator]] = {module: [] for module in normed}
    known, reading, writers = {*normed}, set[nn.Module](), list[LinearOperator]()
    for module, found in operators.items():
        sources = [made_by.get(_place(tensor)) for tensor in inputs[module]]
        source = sources[0] if sources and sources[0] in reads else None
        into = [o for o in found if o.shape[0] == size and (source is None or is_fused_experts(module))]
        if source is not None and len(sources) == 1:
            reads[source] += [operator for operator in found if operator not in into]
            reading.add(module)
        if source is not None or not is_fused_experts(module):
            writers += into if module in in_layers else []
            known |= {module} if source is not None or into else set()
    for module in [m for m, group in reads.items() if not group]:
        if made_by.get(_place(inputs[module][0])) not in reading:
            raise _unsupported(model, f"no linear operator is called on the output of {names[module]}")
        del reads[module]
    if head not in reading:
        raise _unsupported(model, "its head is not called on the output of a norm")
    outside = [module for module in decoder if isinstance(module, nn.Embedding) and module not in in_layers]
    embeddings = [module for module in outside if module.weight.shape[1] == size]
    _require_known(model, decoder, size, known | {*embeddings}, names)
    norms, centred = [], set[bool]()
    for module, group in reads.items():
        neutral, subtracts_mean = _kind_of_norm(model, names[module], module)
        norms.append(Norm(names[module], module, neutral, tuple(group)))
        centred.add(subtracts_mean)
        if getattr(module, "bias", None) is not None and float(norms[-1].gain.abs().min()) < 1e-6:
            raise _unsupported(model, f"{names[module]} has a bias, and a weight that is zero")
        if all(isinstance(reader, ExpertOperator) for reader in group):
            raise _unsupported(model, f"only experts are called on the output of {names[module]}")
    return ResidualStream(model, layers, tuple(embeddings), tuple(norms), tuple(writers), any(centred))


def _require_known(
    model: PreTrainedModel,
    modules: Sequence[nn.Module],
    size: int,
    known: set[nn.Module],
    names: Mapping[nn.Module, str],
) -> None:
    """Refuse parameters along the stream that nothing is known of."""
    for module in modules:
        for name, shape in _shapes(module).items():
            # vectors of this size also belong to norms of queries and keys, and to operators inside
            if module not in known and size in shape and len(shape) > 1:
                raise _unsupported(model, f"{names[module]}.{name} {list(shape)} is neither a norm nor an operator")


def _kind_of_norm(model: PreTrainedModel, name: str, module: nn.Module) -> tuple[float, bool]:
    """The weight with which a norm scales nothing, and whether it subtracts the mean.

    Raises:
        UnsupportedArchitectureError: If it is no RMSNorm or LayerNorm.
    """
    weight, bias = _parameter(module, "weight"), getattr(module, "bias", None)
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
    raise _unsupported(model, f"{name} ({type(module).__name__}) is neither an RMSNorm nor a LayerNorm")


def _unsupported(model: PreTrainedModel, why: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(
        f"the residual stream of {type(model).__name__} can't be rotated: {why}. Prune the model as it is."
    )


def _matrix(operator: LinearOperator) -> Tensor:
    """The weight [out, in] as it is stored, no copy."""
    weight = operator.parameter.detach()
    return weight.T if operator.transposed else weight


def _has_matrix(module: nn.Module) -> bool:
    return not isinstance(module, nn.Embedding) and len(_shapes(module).get("weight", ())) == 2


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}


def _parameter(module: nn.Module, name: str) -> Tensor:
    parameter = getattr(module, name)
    assert isinstance(parameter, Tensor)
    return parameter.detach()


def _place(tensor: Tensor) -> tuple[object, ...]:
    """What tensors and their views in another shape have in common."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.numel()

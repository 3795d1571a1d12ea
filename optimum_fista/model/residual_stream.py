"""The residual stream of a model: what reads it and what adds to it, and another basis for it.

If every operator that reads the stream undoes a rotation, and everything that adds to it does the rotation, the model
computes the same (arXiv 2401.15024, 2404.00456). Norms stand between: their gains are moved into the operators that
read them. RMSNorm then commutes with all rotations, and LayerNorm with those that leave the mean as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_fista.model.architecture import DecoderLayers, find_operators
from optimum_fista.model.experts import ExpertOperator, split_experts
from optimum_fista.model.gram import GramAccumulator
from optimum_fista.model.loss_gradients import DenseLoss, watch_gradients
from optimum_fista.model.operator import LinearOperator
from optimum_fista.model.sensitivity import SensitivitySums
from optimum_fista.solve.rotation import Readers, Writers
from optimum_fista.solve.statistics import ridge_against_noise

_LEAST_ENERGY = 1e-10
"""Mean square of an input, as a share of the average input's, below which it is rounding: it comes to 1e-14."""


@dataclass(frozen=True)
class Norm:
    """A norm of the residual stream.

    Attributes:
        module: It has a `weight` [hidden], and maybe a `bias` [hidden].
        neutral: The weight that leaves its input unscaled: 1, or 0 if it adds 1 to its weight.
        readers: The operators that are called on its output; the head may be one of them.
    """

    module: nn.Module
    neutral: float
    readers: tuple[LinearOperator, ...]

    @property
    def gain(self) -> Tensor:
        """What it multiplies by, [hidden], float64."""
        return self.module.get_parameter("weight").detach().double() + (1 - self.neutral)


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
        """Move the gains of the norms into the operators that read them; the model computes the same.

        A bias moves too if all of these operators have one; otherwise it stays, divided by the gain.

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
            norm.module.get_parameter("weight").fill_(norm.neutral)

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
        """Measure what a rotation is trained on, after `move_gains`: inputs, and what errors in the outputs cost.

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
                    f"the gradients of the loss by the outputs of {operator.name} hold NaN or Inf: check the "
                    "weights of the model, or pass compute_dtype='float32'."
                )
        measured: list[Readers | Writers] = []
        for first, group in zip(whole, groups, strict=True):
            if group:
                outputs = [reading[reader].sums.outputs for reader in group]
                inverse, live = grams[first].inverse()
                weights = [_matrix(reader) if bool(live.all()) else _matrix(reader) * live for reader in group]
                measured.append(Readers(weights, outputs, inverse))
        for key, group in together.items():
            inputs = [writing[writer].sums.inputs / max(1, writing[writer].sums.seen) for writer in group]
            measured.append(Writers([_matrix(writer) for writer in group], costs[key], inputs))
        return measured


class _GramSums(SensitivitySums):
    """Adds what is seen of an operator that reads the stream, and the Gram matrix of its inputs."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(operator)
        self._gram: GramAccumulator | None = GramAccumulator(operator.shape[1], operator.device)

    def see_input(self, inputs: Tensor, num_tokens: int) -> None:
        super().see_input(inputs, num_tokens)
        assert self._gram is not None
        self._gram.add(inputs)

    def inverse(self) -> tuple[Tensor, Tensor]:
        """`(G + r diag(G))^-1`, [hidden, hidden], with the ridge `r` of `obs_admm`, and which inputs live; frees `G`.

        The others are zero for all tokens: they get the mean energy. Without any, a weight that is rotated into one
        could be made up for at no cost, and the predicted error of all of them would be next to nothing.
        """
        assert self._gram is not None
        found, self._gram = self._gram.finish(), None
        gram, diagonal = found.gram.double(), found.diagonal.double()
        live = diagonal > _LEAST_ENERGY * diagonal.mean()
        diagonal = torch.where(live, diagonal, diagonal.mean())
        gram.diagonal().copy_(diagonal + diagonal * ridge_against_noise(found.num_tokens, len(gram)))
        return torch.cholesky_inverse(torch.linalg.cholesky(gram)).float(), live


class _WriterSums(SensitivitySums):
    """Adds what is seen of an operator that writes, and `sum_t e_t g_t g_t^T` to `costs`, [hidden, hidden]."""

    def __init__(self, operator: LinearOperator, costs: Tensor) -> None:
        super().__init__(operator)
        self._costs = costs

    def see_gradient(self, gradient: Tensor) -> None:
        super().see_gradient(gradient)
        self._costs.addmm_((gradient * self.energy[:, None]).T, gradient)


def _matrix(operator: LinearOperator) -> Tensor:
    """The weight [out, in] as it is stored, no copy."""
    weight = operator.parameter.detach()
    return weight.T if operator.transposed else weight

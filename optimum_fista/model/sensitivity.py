"""Sensitivity of the loss of a language model to errors in the outputs of its linear operators, by gradients.

One backward pass for each batch serves all operators. The second derivatives are a diagonal of the empirical Fisher
information for the outputs of an operator: this is cheap, and enough to compare operators.

Letters: an operator computes `y = W x` for each token t, with `w_ij` in `W` [out, in]; `g_i` is the gradient of the
loss by the output `y_i`, and `e` the energy of a token (`Sensitivity`).

`measure_sensitivities` is called once, on the dense model (`DenseLoss`). `prune.budgets` shares zeros by its results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers import PreTrainedConfig

from optimum_fista.bars import tqdm
from optimum_fista.model.activations import ActivationStore, Storage
from optimum_fista.model.calibration import CalibrationBatch, in_turns, sources_of
from optimum_fista.model.hooks import operator_input, replaced_forwards
from optimum_fista.model.layers import DecoderLayers
from optimum_fista.model.media import targets_of
from optimum_fista.model.offload import execution_device, onloaded
from optimum_fista.model.operators import LinearOperator
from optimum_fista.model.precision import in_few_sizes, quick_products
from optimum_fista.model.predictor import POSITIONS_ON_CPU, Predictor, positions_per_chunk

_TYPICAL = 2.0  # energies of tokens are limited to this many medians of their sequence
TOKENS_TOGETHER = 1024  # at most, of short sequences that run together


@dataclass(frozen=True)
class DenseLoss:
    """The loss of a dense model, in evaluation mode: the cross-entropy of the next token."""

    layers: DecoderLayers
    batches: Sequence[CalibrationBatch]
    num_tokens: int  # sequences are taken in order until they have this many real tokens
    progress: bool = False  # whether bars are shown
    # of hidden states between decoder layers; None: where each layer computes
    storage: Storage | None = None
    # Only so many tokens from the start of each sequence are used; None: all of them.
    longest: int | None = None

    def sequences(self) -> list[CalibrationBatch]:
        """Take sequences of `self.batches`, in order, until they have `self.num_tokens` real tokens.

        If the batches are of several texts, these take turns, and each text gives one sequence at least.

        Each is returned as a batch of its own, without padding. With `self.longest`, it is cut after so many tokens,
        unless it has images. Sequences of a single token have no loss, and are left out. Changes nothing.
        """
        num_sources = len(sources_of(self.batches))
        sequences: list[CalibrationBatch] = []
        num_tokens = 0
        all_sequences: Iterator[CalibrationBatch] = chain.from_iterable(
            batch.sequences_without_padding() for batch in self.batches
        )
        if num_sources > 1:
            all_sequences = iter(in_turns(all_sequences))
        for sequence in all_sequences:
            if sequence.num_tokens < 2:
                continue
            if self.longest is not None and not sequence.media:
                sequence = replace(sequence, input_ids=sequence.input_ids[:, : self.longest])
            sequences.append(sequence)
            num_tokens += sequence.num_tokens
            # One sequence of each text, if the texts take turns.
            has_all_sources = len(sequences) >= num_sources
            if num_tokens >= self.num_tokens and has_all_sources:
                break
        return sequences

    def joined_sequences(self) -> list[CalibrationBatch]:
        """Take the same sequences; short ones (`self.longest`) are joined into batches that run together.

        A batch has sequences that follow each other and have one length, and at most `TOKENS_TOGETHER` tokens. A
        sequence with images stays alone. Changes nothing.
        """
        sequences = self.sequences()
        if self.longest is None:
            return sequences
        groups: list[list[CalibrationBatch]] = []
        for sequence in sequences:
            if groups and _run_together([*groups[-1], sequence]):
                groups[-1].append(sequence)
            else:
                groups.append([sequence])
        return [
            replace(group[0], input_ids=torch.cat([sequence.input_ids for sequence in group]))
            for group in groups
        ]


def _run_together(sequences: Sequence[CalibrationBatch]) -> bool:
    """Tell whether sequences, each a batch of its own without padding, may run as one batch."""
    has_media = any(sequence.media for sequence in sequences)
    lengths = [sequence.num_tokens for sequence in sequences]
    has_one_length = len(set(lengths)) == 1
    return has_one_length and sum(lengths) <= TOKENS_TOGETHER and not has_media


@dataclass(frozen=True)
class Sensitivity:
    """Increase of the loss with an error in the outputs of one operator `y = W x`, to second order.

    The error of a pruned operator is about proportional to a token's energy `e = sum_j x_j^2 sum_i w_ij^2`, so the
    gradients `g` of the loss by the outputs are weighted by `e`. Otherwise a few tokens with huge gradients and small
    inputs (attention sinks) would decide.
    """

    # [out], nats per unit of squared error in each output: 1/2 E[e g_i^2] / E[e], float32
    outputs: Tensor
    inputs: Tensor  # [in], mean of x_j^2 over all tokens, float32
    num_tokens: int  # that reached the operator: not all for an expert of a mixture
    has_gradient: bool  # whether any gradient is not zero

    def saliency(self, weight: Tensor) -> Tensor:
        """Expected increase of the loss per token, in nats, if one element of `weight` [out, in] alone becomes zero.

        `1/2 w_ij^2 F_ij` with the Fisher information `F_ij = E[g_i^2 x_j^2]` taken as a product (optimal brain damage,
        LeCun et al. 1989; the diagonal of K-FAC, arXiv 1503.05671).
        """
        return weight.float().square() * self.outputs[:, None] * self.inputs


def measure_sensitivities(
    loss: DenseLoss,
    operators: Mapping[str, LinearOperator],
    batches: Sequence[CalibrationBatch] | None = None,
) -> tuple[dict[str, Sensitivity], int]:
    """Measure the sensitivities of `operators`, by their names, on the sequences of a loss.

    The model runs forwards and backwards on one batch after the other, and inputs and gradients are summed. `batches`
    are the sequences of the loss; `None`: those of `DenseLoss.joined_sequences`, where short ones run together, because
    each run brings all weights to their device, from files perhaps. An operator has zero gradients if the loss does not
    depend on it, if it is called more than once, or if it is not a plain product.

    Decoder layers are recomputed in the backward pass, so that memory is needed for the activations of one layer, and
    for the hidden states between layers, at the loss's storage. Logits are in memory for a few positions at a time
    (`Predictor`), unless the largest batch has few of them.

    Returns the sensitivities, and the bytes of logits that were in memory beyond the estimate: 0, unless the model
    can't be cut before its head and the largest batch had all its logits at once.

    While the model runs, operators have hooks, and offloaded weights are on their device while they are needed.
    `_recomputed_layers` replaces the forward passes of decoder layers, and moves `requires_grad` from the weights to
    the outputs of the embedding. All is as before at the end.
    """
    model = loss.layers.model
    if batches is None:
        batches = loss.joined_sequences()
    # The bar counts runs of single decoder layers, because a whole batch may take minutes. Each layer runs forwards,
    # and once more for the backward pass.
    num_runs = 2 * len(batches) * len(loss.layers)
    has_media = any(batch.media for batch in batches)
    outside = loss.layers.outside(with_media=has_media)  # embeddings, norms and encoders of images
    head = model.get_output_embeddings()
    most_tokens = max((batch.num_tokens for batch in batches), default=0)
    # `quick_products`: in the precision that the run has chosen
    with onloaded([*outside, head], read_only=True), quick_products():
        needs_no_cut = most_tokens <= positions_per_chunk(model)
        predictor = Predictor(model, whole=needs_no_cut)
        bytes_per_logit = 2 * model.dtype.itemsize  # of a logit and its gradient
        num_bytes_not_estimated = predictor.bytes_beyond_a_chunk(most_tokens, bytes_per_logit)
        with (
            tqdm(
                total=num_runs,
                desc="Gradients of the loss",
                unit="layer",
                disable=not loss.progress,
            ) as bar,
            # a store that is filled by the forward pass of each batch
            _recomputed_layers(loss, bar) as hidden_states,
            torch.enable_grad(),
        ):
            # their hooks are on the operators in the forward passes only
            watchers = {name: _Watcher(operator) for name, operator in operators.items()}
            for batch in batches:
                # A call of its own, so that the graph of a batch is freed before the next one runs.
                _run_both_ways(predictor, batch, watchers.values(), model.config)
                hidden_states.clear()

    num_tokens = sum(batch.num_tokens for batch in batches)
    num_tokens = max(1, num_tokens)  # a divisor
    device = execution_device(model.get_input_embeddings())
    return _sensitivities_of(watchers, num_tokens, device), num_bytes_not_estimated


def _run_both_ways(
    predictor: Predictor,
    batch: CalibrationBatch,
    watchers: Collection[_Watcher],
    config: PreTrainedConfig,
) -> None:
    """Run a model forwards and backwards on one batch; `watchers` add inputs and gradients to their sums.

    `predictor` runs the model, cut before its head so that only a few positions have logits at a time. `config` is that
    of the model, and says which tokens stand for images and have no loss.

    This is called inside `_recomputed_layers`. There weights do not require gradients, so no `.grad` is left, and
    hidden states between the layers may be added to the store of that context, which the caller clears.
    """
    entering_head = _watched_states(predictor, batch, watchers)  # with its graph
    targets = targets_of(batch.input_ids[:, 1:].flatten(), config)
    gradient = _gradient_of_loss(predictor, entering_head, targets)
    # Through all decoder layers. Hooks on the outputs of operators, set in the forward pass, call the watchers.
    entering_head.backward(gradient)


def _sensitivities_of(
    watchers: Mapping[str, _Watcher], num_tokens: int, device: torch.device
) -> dict[str, Sensitivity]:
    """Compute the sensitivities from the sums of watchers, by the name of the operator; ValueError for NaN and Inf.

    `num_tokens` is the number of tokens in all sequences. The sums of all watchers are read on `device`. Changes
    nothing.
    """
    sums = [
        watcher.gradient_squares.sum(dtype=torch.float64).to(device)
        for watcher in watchers.values()
    ]
    totals = torch.stack(sums).tolist()  # one transfer for all operators
    sensitivities = {}
    for (name, watcher), total in zip(watchers.items(), totals, strict=True):
        if not math.isfinite(total):
            raise ValueError(
                f"the gradients of the loss by the outputs of {name} hold NaN or Inf, so budgets can't be shared: pass "
                "allocation='uniform', or a model in float32 or bfloat16."
            )
        sensitivities[name] = watcher.sensitivity(num_tokens, has_gradient=total > 0)
    return sensitivities


def _watched_states(
    predictor: Predictor, batch: CalibrationBatch, watchers: Collection[_Watcher]
) -> Tensor:
    """Run the model of a predictor forwards on one batch; watchers add the inputs of their operators.

    Returns what enters the head at all positions but the last of each sequence, with its graph
    (`Predictor.hidden_states_of`). Counts of calls begin anew. The hooks of the watchers are there in the forward pass
    only: in the backward pass recomputed layers call their operators again.
    """
    with ExitStack() as hooks:
        for watcher in watchers:
            watcher.begin(batch)
            module = watcher.operator.module
            hooks.enter_context(module.register_forward_hook(watcher.see, with_kwargs=True))
        return predictor.hidden_states_of(batch.run)


def _gradient_of_loss(predictor: Predictor, entering_head: Tensor, targets: Tensor) -> Tensor:
    """The gradient of the loss by what enters the head [positions, hidden], one chunk of positions after the other.

    The loss is the sum of the cross-entropies of the `targets` [positions], of which -100 has none. It is a sum, not a
    mean: the gradient of a token must not depend on the length of its sequence. The result has the shape and dtype of
    `entering_head`, whose own graph is left alone.
    """
    gradient = torch.empty_like(entering_head)
    for chunk in predictor.chunks(len(entering_head)):
        # A function of its own, so that no logits of a chunk are held while the next one has its own.
        gradient[chunk] = _gradient_of_chunk(predictor, entering_head[chunk], targets[chunk])
    return gradient


def _gradient_of_chunk(predictor: Predictor, entering_head: Tensor, targets: Tensor) -> Tensor:
    """The gradient of the loss by what enters the head [positions, hidden], with the logits of all positions at once.

    `targets` [positions] are token ids, or -100 without a loss. `entering_head` and its own graph are left alone.
    """
    entering = entering_head.detach().requires_grad_()
    logits = predictor.logits(entering)
    slope = _slope_of_loss(logits.detach(), targets.to(logits.device))
    (gradient,) = torch.autograd.grad(logits, entering, slope)
    return gradient


def _slope_of_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The gradient of the loss by `logits` [positions, vocabulary], in their dtype; sums are float32.

    The loss is the sum of the cross-entropies of `targets` [positions], on the same device; -100 has none. On a CPU a
    few positions are computed at a time, because each takes four copies of its logits in float32.
    """
    slope = torch.empty_like(logits)
    size = POSITIONS_ON_CPU if logits.device.type == "cpu" else len(logits)
    for start in range(0, len(logits), size):
        rows = slice(start, start + size)
        logits_of_rows = logits[rows].float().requires_grad_()
        loss = nn.functional.cross_entropy(logits_of_rows, targets[rows], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, logits_of_rows)
        slope[rows] = gradient
    return slope


class _Watcher:
    """Sums inputs and gradients of one operator over the batches; `begin` is called before each batch."""

    def __init__(self, operator: LinearOperator) -> None:
        """Begin with sums of zero, on the operator's device. Its weight is read once; no hook is set yet."""
        self.operator = operator
        # sum_i w_ij^2 [in]: the energy e_t of a token is its product with x_t^2
        self.columns = operator.read().square().sum(0)
        device = self.columns.device
        out, columns = operator.shape
        self.gradient_squares = torch.zeros(out, device=device)  # sum_t e_t g_ti^2 [out], float32
        self.input_squares = torch.zeros(columns, device=device)  # sum_t x_tj^2 [in], float32
        self.energy = torch.zeros((), dtype=torch.float64, device=device)  # sum_t e_t
        self.num_tokens_seen = 0  # that reached the operator
        self.calls = 0  # of the operator in this batch
        self.num_sequences_of_batch = 0
        self.num_tokens_of_batch = 0

    def begin(self, batch: CalibrationBatch) -> None:
        """Count the calls of the operator anew, and note the size of the batch that the model is about to run on."""
        self.calls = 0
        self.num_sequences_of_batch = len(batch.input_ids)
        self.num_tokens_of_batch = batch.num_tokens

    def see(
        self, _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: object
    ) -> None:
        """Add the squares of the inputs, and request the gradient if the output is a product with one matrix.

        This is a forward hook of the operator's module, which has returned `output`. It changes `self.input_squares`,
        `self.energy` and the counts of this object, and puts a hook on the output, by which the backward pass calls
        `_add_gradient`. `self.columns` [in] are the squared norms of the columns of `W`.
        """
        inputs = operator_input(arguments, keywords).detach()
        # [batch, sequence, in] -> [tokens, in]
        squares = inputs.reshape(-1, inputs.shape[-1]).float().square()
        # e_t [tokens]; `in_few_sizes` may append rows, which are cut off again
        energies = (in_few_sizes(squares) @ self.columns)[: len(squares)]
        self.calls += 1
        if energies.numel():  # an expert may get no token
            by_sequence = energies.view(self._sequences_in(inputs), -1)
            # A few tokens with huge activations must not outweigh all others.
            by_sequence.clamp_(max=_TYPICAL * _medians(by_sequence))
            self.input_squares += squares.sum(0)
            self.energy += energies.double().sum()
            self.num_tokens_seen += squares.shape[0]
        if not isinstance(output, Tensor):
            return
        num_outputs = self.operator.shape[0]
        is_product = output.shape[-1] == num_outputs
        if is_product and output.requires_grad:
            output.register_hook(partial(self._add_gradient, energies))

    def _sequences_in(self, inputs: Tensor) -> int:
        """Return how many sequences the tokens of `inputs` [..., in] can be told to be of; 1 if that can't be told.

        The first dimension may be the batch, whatever others follow: tokens, or groups of channels of each token. Some
        models put the tokens of all sequences one after the other, [tokens, in]. So do the inputs of an expert, but
        these are tokens that chose it, of any sequence.
        """
        begins_with_batch = inputs.ndim > 2 and inputs.shape[0] == self.num_sequences_of_batch
        has_all_tokens = inputs.ndim == 2 and inputs.shape[0] == self.num_tokens_of_batch
        return self.num_sequences_of_batch if begins_with_batch or has_all_tokens else 1

    def _add_gradient(self, energies: Tensor, gradient: Tensor) -> None:
        """Add the squares of a gradient by the outputs to `self.gradient_squares`, weighted by the tokens' energies.

        A hook of the outputs of one call, for which `see` has computed the `energies` [tokens]. The `gradient`
        [..., out] itself stays as it is. `self.calls` counts the operator's calls in this batch.
        """
        # If an operator was called twice, it is unknown which gradient belongs to which inputs.
        if self.calls == 1:
            squares = gradient.detach().reshape(-1, gradient.shape[-1]).float().square()
            self.gradient_squares += in_few_sizes(energies) @ in_few_sizes(squares)

    def sensitivity(self, num_tokens: int, *, has_gradient: bool) -> Sensitivity:
        """Compute the sensitivity of the operator from the sums.

        `num_tokens` is the number of tokens in all sequences; those that reached the operator, fewer for an expert, are
        `self.num_tokens_seen`. `self.input_squares` [in] and `self.gradient_squares` [out] are the sums of squares, the
        latter weighted by energies. `has_gradient` says whether the latter are not all zero. Changes nothing.
        """
        # 1/2 (sum_t e_t g_ti^2) / (sum_t e_t): a weighted mean over tokens. No energy gives 0, not NaN.
        outputs = self.gradient_squares * (0.5 / self.energy.clamp_min(1e-30))
        return Sensitivity(
            outputs=outputs,
            inputs=self.input_squares / num_tokens,
            num_tokens=self.num_tokens_seen,
            has_gradient=has_gradient,
        )


def _medians(values: Tensor) -> Tensor:
    """Return the medians along the last dimension, which stays with length 1; the lower of two middle values."""
    # `torch.median` along a dimension has no deterministic implementation on CUDA.
    middle = (values.shape[-1] - 1) // 2
    return values.sort(-1).values[..., middle, None]


@contextmanager
def _recomputed_layers(loss: DenseLoss, bar: tqdm) -> Iterator[ActivationStore]:
    """Inside, gradients are those for activations, not for weights; decoder layers are recomputed in the backward pass.

    `bar` counts their runs. Yields the store of the hidden states that enter them, at the loss's storage: the caller
    clears it after each backward pass.

    Replaces the forward passes of the layers, hooks the embedding, and sets `requires_grad` of all parameters to False;
    all are set back at the end.
    """
    model = loss.layers.model
    layers = loss.layers.modules
    embedding = model.get_input_embeddings()
    device = execution_device(embedding)
    storage = loss.storage or device
    store = ActivationStore(storage, device)
    # On the device the graph itself keeps the hidden states, and the store stays empty.
    waiting_states = None if storage == device else _WaitingStates(store, device)

    forwards: list[Callable[..., Any]] = []
    for layer in layers:
        run = partial(_run_layer, bar, layer, layer.forward)
        forwards.append(partial(_run_recomputed, waiting_states, run))
    with (
        _weights_without_gradients(model),
        embedding.register_forward_hook(_begin_graph),
        replaced_forwards(layers, forwards),
    ):
        yield store


class _WaitingStates:
    """Hidden states that the graph needs for the backward pass, and that wait in a store until then."""

    def __init__(self, store: ActivationStore, device: torch.device) -> None:
        """`store` gets hidden states from `device`, on which the model computes, and gives them back to it."""
        self._store = store
        self._device = device

    def keep(self, tensor: Tensor) -> int | Tensor:
        """Replace a tensor that the graph saves: hidden states by their number in the store, which gets them.

        All other tensors are returned as they are.
        """
        # other tensors are masks and positions, the same in every layer
        is_hidden_states = tensor.requires_grad and tensor.device == self._device
        if not is_hidden_states:
            return tensor
        self._store.append(tensor)
        return len(self._store) - 1

    def hand_out(self, kept: int | Tensor) -> Tensor:
        """Return the tensor that `keep` got, from what it returned: a number in the store, or the tensor itself."""
        return kept if isinstance(kept, Tensor) else self._store[kept]


def _run_recomputed(
    waiting_states: _WaitingStates | None,
    run: Callable[..., Any],
    *arguments: Any,
    **keywords: Any,
) -> Any:
    """Run a decoder layer so that the backward pass computes it again; in place of its forward pass.

    `run` is `_run_layer` for this layer; the other arguments are those of the layer. `waiting_states` takes hidden
    states to where they wait, and back; `None`: they stay on the device.
    """
    with ExitStack() as contexts:
        if waiting_states is not None:
            # These hooks see only the arguments of the layer. `checkpoint` has hooks of its own for what the layer
            # saves while it runs, and drops that.
            contexts.enter_context(
                saved_tensors_hooks(waiting_states.keep, waiting_states.hand_out)
            )
        # a recomputed layer runs to its end: stopped early, it would keep weights that Accelerate loaded
        contexts.enter_context(set_checkpoint_early_stop(False))
        return checkpoint(run, *arguments, use_reentrant=False, **keywords)


def _run_layer(
    bar: tqdm, layer: nn.Module, forward: Callable[..., Any], *arguments: Any, **keywords: Any
) -> Any:
    """Run the forward pass of a decoder layer with its weights on the device, and count it on `bar`."""
    # Entered anew for each run: a layer that `backward` recomputes is outside of the contexts of the forward pass.
    with onloaded([*layer.modules()], read_only=True), quick_products():
        output = forward(*arguments, **keywords)
    bar.update()
    return output


def _begin_graph(_: nn.Module, __: object, output: Tensor) -> Tensor:
    """Make the embedding's output a tensor with a gradient, so that the graph begins there; a forward hook."""
    # a clone, because the model may change it in place, which PyTorch forbids for the tensor itself
    return output.requires_grad_(True).clone()


@contextmanager
def _weights_without_gradients(model: nn.Module) -> Iterator[None]:
    """Set `requires_grad` of all parameters of `model` to False inside, and back at the end."""
    # by name, because Accelerate makes new parameters whenever it moves a weight
    trained = [
        (module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    ]
    try:
        for module, name in trained:
            getattr(module, name).requires_grad_(False)
        yield
    finally:
        for module, name in trained:
            getattr(module, name).requires_grad_(True)

"""How many bytes a run holds at most: closed formulas of the sizes of the model and of the text.

A *moment* of a run is a step at which much memory is held; the peak is that of the largest moment. `moments` yields
them, and `peak_memory` takes the largest. Bytes are held in two *places*: on the device where the run computes, and on
the host (on a CPU both are one). They are counted by *part*, such as "decoder layer" or "Gram matrix".

Words: activations that *wait*, such as the hidden states between two decoder layers, are in the run's storage: on the
device, on the host or on disk. An *operator* is a linear operator of a decoder layer, a matrix [out, in]. A *group* of
operators has the same inputs, and so one Gram matrix. A *stream* is the hidden states of all calibration sequences in
one network, dense or pruned. *Held-out* sequences are not fitted to. Matrices are *widened* if they are copied to
float32 for each product, because the CPU is slow in their dtype.

In all functions, `run` is the planned run (`RunSizes`); no function changes it. `run.num_samples` sequences have
`run.length` tokens each; `run.sequence_bytes` are those of the hidden states of one sequence, `run.stream_bytes` of a
stream. The embedding is [`run.vocabulary`, `run.hidden`]. `run.value_bytes` are those of a weight, `run.weight_bytes`
of all weights. `run.layers` are the decoder layers, on the meta device, with their names; `run.operators` the shapes
[out, in] of operators by names such as "model.layers.3.mlp.up_proj". `run.widens`: whether matrices are widened.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from optimum_fista.estimate.run_sizes import RunSizes
from optimum_fista.model.held_out import LOGITS_TOGETHER
from optimum_fista.model.precision import WEIGHTS_WIDENED_TOGETHER
from optimum_fista.model.predictor import POSITIONS_ON_CPU, positions_per_chunk
from optimum_fista.solve.linalg import SCALE_ON_DEVICES, matrices_in_stack, rows_in_block
from optimum_fista.solve.method import PruningMethod
from optimum_fista.solve.methods import largest_memory_factors, method_class
from optimum_fista.text.self_sampling import num_batches, num_texts

# Bytes of Python, torch and Transformers on the host, once they are imported. Libraries of CUDA builds are larger.
LIBRARIES = (325 if torch.version.cuda is None else 455) * 2**20
_FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class Moment:
    """Bytes that a run holds at one moment, besides what it always holds."""

    computing: Mapping[str, float]  # where the run computes, by part, such as "decoder layer"
    waiting: float = 0.0  # of activations in the storage
    # Whether the model to prune is loaded, whose weights count if it is loaded whole.
    has_model: bool = True


def peak_memory(run: RunSizes, *, writes_own_text: bool) -> dict[str, dict[str, float]]:
    """Count the bytes by part when most is held, by place: `"device"` and `"host"`, or `"host"` alone on a CPU.

    Activations that wait are counted where the run stores them (`run.storage`), unless that is the disk.
    `writes_own_text`: whether the model writes the calibration text.
    """
    always = _always(run)  # what the host holds at every moment, by part
    all_weights = {"all weights": run.weight_bytes} if run.is_loaded_whole else {}
    # When the result is written, the host holds the masks of all operators, with one bit for each weight. The moments
    # of the run are compared with this one.
    masks = sum(run.weights.values()) // 8
    peaks: dict[str, dict[str, float]] = {"host": {**always, "masks": masks}}
    if run.on_cpu:
        peaks["host"] |= all_weights
    for moment in moments(run, writes_own_text=writes_own_text):
        held: dict[str, dict[str, float]] = {
            "device": {**moment.computing, **(all_weights if moment.has_model else {})},
            "host": dict(always),
            "disk": {},
        }
        held[run.storage]["activations that wait"] = moment.waiting
        if run.on_cpu:  # both places are one; no part of one has the name of a part of the other
            held["host"] |= held.pop("device")
        # For each place, the parts of the moment with the largest sum are kept, so that all parts are of one moment.
        for place in ("device", "host"):
            if place not in held:
                continue
            is_first = place not in peaks
            if is_first or _total(held[place]) > _total(peaks[place]):
                peaks[place] = held[place]
    return peaks


def _always(run: RunSizes) -> dict[str, float]:
    """Count the bytes that the host holds at every moment, by part.

    `run.operators` are those to prune, by names such as "model.layers.3.mlp.experts.0.up_proj". `run.allocates` tells
    whether gradients are computed, and `run.value_bytes` are those of a weight.
    """
    parts: dict[str, float] = {
        "Python and libraries": LIBRARIES,
        "calibration tokens": 8 * run.num_samples * run.length,  # int64
    }
    has_experts = any(".experts." in name for name in run.operators)
    is_half = run.value_bytes == 2
    if run.on_cpu and is_half and has_experts and not run.widens:
        # oneDNN keeps half a MiB for each shape of six products, and of as many for gradients. Experts get any
        # number of tokens, which is rounded up (`in_few_sizes`): to one of 8 sizes up to 128 tokens, and to one of 4
        # sizes for each power of two beyond.
        sizes = max(0.0, 8 + 4 * math.log2(run.batch_size * run.length / 128))
        products = 12 if run.allocates else 6
        parts["kept by oneDNN"] = 0.55 * 2**20 * products * sizes
    return parts


def moments(run: RunSizes, *, writes_own_text: bool) -> Iterator[Moment]:
    """Yield the moments at which a run may hold most, in their order: only the steps that this run has.

    `writes_own_text`: whether the model writes the calibration text.
    """
    if writes_own_text:
        # A model of its own, which is gone before the one to prune is loaded.
        yield Moment(whole_model_parts(run), has_model=False)
    if run.num_removed_layers:
        yield _choosing_layers(run)
    if run.allocates:
        yield _allocating(run)
    for (layer_name, layer), names in zip(run.layers, run.operators_of_layers, strict=True):
        yield from _pruning_layer(run, layer, names)
        if layer_name in run.kept_expert_bytes:
            yield _removing_experts(run, layer_name, layer)
    if run.num_held_out:
        yield from _measuring(run)


def whole_model_parts(run: RunSizes) -> dict[str, float]:
    """Count the bytes that are held while the model writes its own text, by part."""
    # Sequences that are written together; `num_batches` says in how many batches the model writes its text.
    sequences = math.ceil(run.num_samples / num_batches(run.num_samples))
    # A key, and a value, is taken to be as large as a hidden state. In models with fewer heads of keys and values they
    # are smaller.
    keys = 2 * sequences * len(run.layers) * run.sequence_bytes
    # Each sequence is several texts, which are written side by side. The newest token of every text has logits, with
    # float32 copies for softmax and sampling.
    num_logits = sequences * num_texts(run.length) * run.vocabulary
    logits = num_logits * (run.value_bytes + 3 * _FLOAT32)
    return {"whole model": run.weight_bytes, "keys and values": keys, "logits": logits}


def _embedding_and_head(run: RunSizes) -> float:
    """Count the bytes of the embedding and the head; 0 if they are pages of files, or of a model loaded whole.

    `run.reads_files` is False then. Each is a matrix of `run.vocabulary` * `run.hidden` weights.
    """
    if not run.reads_files:
        return 0
    num_matrices = 2
    return num_matrices * run.value_bytes * run.vocabulary * run.hidden


def _loss_bytes(run: RunSizes, tokens: int, *, copied: bool = False) -> float:
    """Count the bytes of logits [tokens, vocabulary] and of what their loss takes, without gradients.

    The loss takes a float32 copy (unless the logits are float32: `run.value_bytes` each) and the logarithms of
    the probabilities. `copied`: the logits are copied once more, because the last one of each of several sequences
    is cut off.
    """
    bytes_per_logit = run.value_bytes + _FLOAT32
    if run.value_bytes != _FLOAT32:
        bytes_per_logit += _FLOAT32
    if copied:
        bytes_per_logit += run.value_bytes
    return tokens * run.vocabulary * bytes_per_logit


def _choosing_layers(run: RunSizes) -> Moment:
    """Count the moment at which the run chooses layers to remove: it computes the loss without each of them.

    For that it takes the sequences that hold `allocation_tokens` tokens, of each text one at least.
    """
    sequences = math.ceil(run.sequences_of_loss)
    # A stream waits for each of these models, and one for the model as it is. So does the stream that enters the first
    # layer, from which further rounds start.
    streams = len(run.layers) + 2
    parts = {
        "embedding and head": _embedding_and_head(run),
        "logits": _loss_bytes(run, min(run.length, positions_per_chunk(run.model))),
        "float32 copies": _head_copy(run),
    }
    return Moment(parts, streams * sequences * run.sequence_bytes)


def _head_copy(run: RunSizes) -> float:
    """Count the bytes of the float32 copy of the head, or of a part of it, for a product; 0 if there is none."""
    if not run.widens:
        return 0
    return _FLOAT32 * min(WEIGHTS_WIDENED_TOGETHER, run.vocabulary * run.hidden)


def _allocating(run: RunSizes) -> Moment:
    """Count the moment at which the run computes gradients to share the zeros, of some tokens at a time.

    The head runs on few positions at a time (`Predictor`); the model is assumed to be one that can be cut before its
    head. `run.operators` has the shapes [out, in] of operators by name.
    """
    layer_sizes = [sum(p.numel() for p in layer.parameters()) for _, layer in run.layers]
    widest = max(max(shape) for shape in run.operators.values())
    tokens = run.tokens_of_loss_together
    positions = min(tokens, positions_per_chunk(run.model))
    positions_in_float32 = min(positions, POSITIONS_ON_CPU) if run.on_cpu else positions
    # Logits and their gradient, and four float32 copies of some.
    logits = positions * run.vocabulary * 2 * run.value_bytes
    logits += positions_in_float32 * run.vocabulary * 4 * _FLOAT32
    # Activations of one decoder layer, which the backward pass computes again. For each token it holds about 12 vectors
    # of the width of hidden states, and 6 of the width of the widest operator.
    activations = tokens * run.value_bytes * (12 * run.hidden + 6 * widest)
    # In float32, the inputs of an operator and their squares; later the gradients of its outputs and their squares.
    activations += tokens * 2 * _FLOAT32 * widest
    # Weights with float32 copies at the same time: all of a decoder layer, because its graph keeps the copies, or a
    # piece of the head, whose copies are not kept.
    piece_of_head = min(WEIGHTS_WIDENED_TOGETHER, run.vocabulary * run.hidden)
    widened = max(*layer_sizes, piece_of_head)
    parts = {
        "embedding and head": _embedding_and_head(run),
        "logits, gradients": logits,
        "tokens together": activations,
        "float32 copies": _FLOAT32 * widened if run.widens else 0,
    }
    # Hidden states in front of all layers wait for the backward pass.
    hidden_states = len(run.layers) * run.sequence_bytes * tokens / run.length
    return Moment(parts, waiting=hidden_states)


def _pruning_layer(run: RunSizes, layer: torch.nn.Module, names: list[str]) -> Iterator[Moment]:
    """Yield the moments of pruning one decoder layer: dequantizing it, then solving for each group of operators.

    `names` are those of the operators to prune in `layer`; `run.operators` has their shapes.
    """
    held_out = 2 * run.num_held_out * run.sequence_bytes
    layer_bytes = 0 if run.is_loaded_whole else sum(p.nbytes for p in layer.parameters())
    parts: dict[str, float] = {"decoder layer": layer_bytes}
    if run.quantized:
        # Experts are dequantized one by one and then put together, before the layer runs.
        largest = max(p.nbytes for p in layer.parameters())
        waiting = run.num_streams * run.stream_bytes + held_out
        yield Moment({**parts, "dequantizing": largest}, waiting)

    groups = _groups(run, names)
    # Groups that all tokens reach: those of experts are left out, because each expert sees a share of the tokens.
    groups_of_all_tokens = {
        (module, columns): outputs
        for (module, columns), outputs in groups.items()
        # With a dot at the end, the module "model.layers.3.mlp.experts" is found, too.
        if ".experts." not in f"{module}."
    }
    parts |= _running_layer(run, names, groups_of_all_tokens)
    carry = run.config.correction.carry
    all_groups_together = carry == "none"  # none needs the others' results
    if all_groups_together or run.config.held_out:
        # All groups of a decoder layer are summed in one pass over the tokens.
        parts["other Gram matrices"] = sum(_FLOAT32 * columns**2 for _, columns in groups)
    # With this correction the groups of the attention are summed in one pass, too. Its module is the first one.
    modules = [module for module, _ in groups]
    attention = None
    if carry == "after_attention" and len(set(modules)) > 1:
        attention = modules[0]
    grams_of_attention = sum(
        _FLOAT32 * columns**2 for module, columns in groups if module == attention
    )

    # Features of a token in the dense network that are kept, if operators are fitted to it: outputs of a group, or its
    # inputs if they are fewer.
    recorded = 0
    if run.config.correction.needs_dense:
        for (_, columns), outputs in groups_of_all_tokens.items():
            recorded += min(sum(outputs), columns)
    for (module, columns), outputs in groups.items():
        # Of each token wait the recorded features, the inputs of the group, and hidden states: those of each stream,
        # and at most two more.
        features = recorded + columns + (run.num_streams + 2) * run.hidden
        waiting = run.value_bytes * run.num_samples * run.length * features + held_out
        together = _groups_solved_together(run, groups, module, columns)
        moment = {**parts, **_solving(run, outputs, columns, together)}
        if module == attention:
            moment.setdefault("other Gram matrices", grams_of_attention)
        yield Moment(moment, waiting)


def _removing_experts(run: RunSizes, layer_name: str, layer: torch.nn.Module) -> Moment:
    """Count the moment at which a copy of a decoder layer, without its removed experts, runs beside the layer itself.

    `run.kept_expert_bytes` are those of the experts in the copy, and `run.refit_bytes` those of the refit of one.
    """
    layer_bytes = 0 if run.is_loaded_whole else sum(p.nbytes for p in layer.parameters())
    parts: dict[str, float] = {
        "decoder layer": layer_bytes,
        "experts that stay": run.kept_expert_bytes[layer_name],
        "refit of an expert": run.refit_bytes,
        **_running_layer(run, [], {}),
    }
    # Hidden states of each stream, what the mixture should return, and its inputs and errors.
    streams = run.num_streams + 3
    return Moment(parts, streams * run.stream_bytes)


def _running_layer(
    run: RunSizes, names: list[str], groups: Mapping[tuple[str, int], list[int]]
) -> dict[str, float]:
    """Count the bytes, by part, of running a decoder layer on one batch.

    `names` are those of the operators to prune in the layer. `groups` are those that all tokens reach, so without those
    of experts: for each module and number of inputs, the numbers of outputs of its operators (`_groups`).
    """
    parts: dict[str, float] = {}
    batch_tokens = run.batch_size * run.length
    if run.widens:
        # A weight, and its inputs and outputs: one operator runs at a time.
        values = [0]
        for name in names:
            rows, columns = run.operators[name]
            values.append(rows * columns + batch_tokens * (rows + columns))
        parts["float32 copies"] = _FLOAT32 * max(values)
    # While the layer runs, it holds for each token about 2 vectors of the width of hidden states, and 3 of the width of
    # the widest operator.
    widest = 0
    for (_, columns), outputs in groups.items():
        widest = max(widest, columns, *outputs)
    parts["one batch"] = run.value_bytes * batch_tokens * (2 * run.hidden + 3 * widest)
    return parts


def _groups(run: RunSizes, names: list[str]) -> dict[tuple[str, int], list[int]]:
    """Return the numbers of outputs of operators, by the module that contains them and their number of inputs.

    Operators of one module with as many inputs are counted as a group: they may share a Gram matrix. `names` are
    such as "model.layers.3.mlp.up_proj", whose module is "model.layers.3.mlp"; `run.operators` has their shapes.
    """
    groups: dict[tuple[str, int], list[int]] = {}
    for name in names:
        rows, columns = run.operators[name]
        module, _, _ = name.rpartition(".")
        groups.setdefault((module, columns), []).append(rows)
    return groups


def _groups_solved_together(
    run: RunSizes, groups: Mapping[tuple[str, int], list[int]], module: str, columns: int
) -> int:
    """Count the groups that are solved together with that of a `module` with `columns` inputs; 1 but for small experts.

    `groups` are those of the decoder layer (`_groups`). The modules of a mixture's experts are called such as
    "model.layers.3.mlp.experts.7".
    """
    mixture, is_expert, _ = module.rpartition(".experts.")
    if not is_expert:
        return 1
    num_alike = sum(
        other.rpartition(".experts.")[0] == mixture and other_columns == columns
        for other, other_columns in groups
    )
    largest_matrix = max(columns, sum(groups[module, columns])) * columns
    return min(num_alike, matrices_in_stack(largest_matrix, on_cpu=run.on_cpu))


def _solving(run: RunSizes, rows: list[int], columns: int, together: int = 1) -> dict[str, float]:
    """Count the bytes, by part, of solving for operators that share `columns` inputs.

    `rows` are their numbers of outputs, and so many such groups are solved `together`: all of them have their Gram
    matrices and weights in memory. A method's `memory_factors` say how many matrices it holds that are as large as the
    Gram matrix, as all weights, and as a block of rows for which it solves at a time.
    """
    gram = _FLOAT32 * columns**2
    matrix = _FLOAT32 * sum(rows) * columns
    scale = 1 if run.on_cpu else SCALE_ON_DEVICES  # a device other than the CPU takes larger blocks
    block = _FLOAT32 * columns * rows_in_block(max(rows), columns, scale)
    method = method_class(run.config.method)
    factors = method.memory_factors
    if factors is None:  # not measured
        factors = largest_memory_factors()
    solver = max(
        1.5 * gram,
        factors.gram_matrices * gram
        + factors.weight_matrices * matrix
        + factors.row_blocks * min(block, matrix),
    )

    makes_stacks = method.prune_groups is not PruningMethod.prune_groups
    if together > 1 and makes_stacks:
        # The solver holds the matrices of all groups, which it copies to stacks.
        copies = 2
        solver *= together
    else:
        copies = 1
    return {
        "Gram matrix": copies * gram * together,
        "weights and targets": copies * 2 * matrix * together,
        "solver": solver,
    }


def _measuring(run: RunSizes) -> Iterator[Moment]:
    """Yield the moments of measuring the perplexity after the last decoder layer: first the head, then the loss."""
    most = min(LOGITS_TOGETHER, positions_per_chunk(run.model))
    together = max(1, LOGITS_TOGETHER // run.length)  # sequences in a batch
    tokens = min(most, together * run.length)
    ends = {"embedding and head": _embedding_and_head(run)}
    waiting = 2 * run.num_held_out * run.sequence_bytes
    if run.widens:
        # The product is float32, and then rounded.
        logits = tokens * run.vocabulary * (_FLOAT32 + run.value_bytes)
        yield Moment({**ends, "logits": logits, "float32 copies": _head_copy(run)}, waiting)
    loss = _loss_bytes(run, tokens, copied=together > 1)
    yield Moment({**ends, "logits of held-out text": loss}, waiting)


def _total(parts: Mapping[str, float]) -> float:
    """Sum the bytes of parts."""
    return sum(parts.values())

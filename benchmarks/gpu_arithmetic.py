"""How long pruning a Llama should take on a GPU, by stage: arithmetic for `gpu.py`, in which nothing is measured.

`work_by_stage` counts what a run does, in the stages of `stages.py`: floating-point operations (FLOP) by kind, bytes,
and kernels. `expected_seconds` divides by `RATES`, which are assumptions about an H100: its data sheet has more for all
products. Stages are added up, as if nothing ran at the same time.

Of work element by element, only that of the solver is counted, by the tensors that its code reads and writes. The
counts of products are exact: a test compares them with those of a run. Another test counts the kernels of a selection.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from stages import REST, STAGES

from optimum_fista.folder.card import markdown_lines

# How much an H100 does in a second. Assumed, not measured.
RATES = {
    # products of matrices, FLOP
    "float32": 50e12,
    "tf32": 350e12,
    "bfloat16": 600e12,
    # Cholesky factors and inverses, FLOP
    "factorization": 15e12,
    # bytes that are read from the device's memory, or written to it
    "memory": 3.35e12,
    # kernels that the host launches one after the other
    "launches": 2e5,
    # bytes that the host copies to the device or back, and does not pin
    "copies": 10e9,
    # bytes of files, read for the first time or written
    "disk": 3.2e9,
    # bytes that one core hashes
    "hashes": 1.5e9,
}
METHODS = ("default", "sparsegpt")

_SUMS = "tf32"  # how a run multiplies Gram matrices on such a device (`model.precision.choose_products`)

_BYTES_OF_WEIGHT = 2  # in bfloat16
_LEAF = 256  # `add_upper_half`: a block of so many inputs is multiplied whole
_ADMM_ITERATIONS = 9  # of all stages of the default method
_ALLOCATION_TOKENS = 1024  # that gradients are computed on
_LONGEST = 128  # of these in a sequence
_REFIT_STEPS = 3
_BLOCK = 128  # columns that SparseGPT decides together

# Bytes for each weight, of tensors in float32 and of masks of one byte that are read or written.
_BYTES_OF_ITERATION = 120
_BYTES_OF_REFIT_STEP = 93
# SparseGPT: after each column, half of its block on average is read and written.
_BYTES_OF_COLUMN = 8 * _BLOCK / 2
_LAUNCHES_OF_COLUMN = 7

# A selection among all weights of a matrix halves an interval 32 times. Each time it computes magnitudes, compares them
# with a number, and counts. Then it tells ties apart.
_HALVINGS = 32
_BYTES_OF_SELECTION = 14 * _HALVINGS + 58
LAUNCHES_OF_SELECTION = 539
# A selection among four weights compares six pairs.
_BYTES_OF_SELECTION_IN_FOURS = 50
LAUNCHES_OF_SELECTION_IN_FOURS = 42


class Group(NamedTuple):
    """Operators with the same inputs: how many inputs, and the outputs of each operator."""

    inputs: int
    outputs: list[int]

    @property
    def weights(self) -> int:
        """Weights of all operators."""
        return self.inputs * sum(self.outputs)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The sizes of a Llama in bfloat16 whose head is a matrix of its own, and how it is pruned."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    num_samples: int  # sequences to fit to
    num_held_out: int  # further sequences, on which only the perplexity is measured
    sequence_length: int
    batch_size: int
    method: str  # one of METHODS
    pattern: str  # "2:4", or any fraction of zeros
    way: str  # "files" (from files to files), or "memory" (a model that is loaded whole)

    @property
    def is_default(self) -> bool:
        """Whether the method is the default; otherwise it is SparseGPT."""
        return self.method == "default"

    @property
    def allocates(self) -> bool:
        """Whether operators share zeros by gradients of the loss."""
        return self.is_default and self.pattern != "2:4"

    @property
    def corrected_groups(self) -> list[Group]:
        """The groups whose inputs differ from those of the dense network, and which are fitted to its outputs.

        The default leaves out the attention's output if at most half of the weights become zeros.
        """
        if not self.is_default:
            return []
        return self.groups[1:] if self.corrects_attention else self.groups[2:]

    @property
    def corrects_attention(self) -> bool:
        """Whether errors of queries, keys and values are corrected inside of the attention, which runs twice then."""
        has_many_zeros = self.pattern == "2:4" or float(self.pattern) > 0.5
        return self.is_default and has_many_zeros

    @property
    def num_tokens(self) -> int:
        """Tokens to fit to."""
        return self.num_samples * self.sequence_length

    @property
    def num_held_out_tokens(self) -> int:
        """Tokens that no weight is fitted to."""
        return self.num_held_out * self.sequence_length

    @property
    def groups(self) -> list[Group]:
        """The groups of a decoder layer: queries with keys and values, the attention's output, gate with up, down."""
        key_values = self.hidden // self.heads * self.key_value_heads
        return [
            Group(self.hidden, [self.hidden, key_values, key_values]),
            Group(self.hidden, [self.hidden]),
            Group(self.hidden, [self.ffn, self.ffn]),
            Group(self.ffn, [self.hidden]),
        ]

    @property
    def weights_of_layer(self) -> int:
        """Weights of the operators of a decoder layer."""
        return sum(group.weights for group in self.groups)

    @property
    def attention(self) -> int:
        """FLOP of the attention itself for each token in a decoder layer, as if no token were masked."""
        return 4 * self.sequence_length * self.hidden

    @property
    def head(self) -> int:
        """FLOP of the head for each token; it has as many weights as the embedding."""
        return 2 * self.hidden * self.vocabulary


def work_by_stage(run: Run) -> dict[str, Counter[str]]:
    """Count what a run does: for each stage of `STAGES` and for the rest, amounts by the keys of `RATES`.

    SparseGPT has its published error correction: its operators see the pruned network alone.
    """
    of_layer = {
        "Gram matrices": _gram_matrices(run),
        "cross-Gram matrices, records of the dense network": _cross_gram_matrices(run),
        "factorizations": _factorizations(run),
        "iterations (ADMM), columns (SparseGPT)": _iterations(run),
        "selection": _selections(run),
        "refit": _refit(run),
        "errors": _errors(run),
    }
    work = {stage: Counter[str]() for stage in [*STAGES, REST]}
    for stage, amounts in of_layer.items():
        for rate, amount in amounts.items():
            work[stage][rate] = run.layers * amount
    work["forward passes of decoder layers"].update(_forward_passes(run))
    work["allocation by gradients"].update(_allocation(run))
    # logits of the dense and of the pruned network
    work["held-out text"]["bfloat16"] = 2 * run.num_held_out_tokens * run.head
    work[REST].update(_rest(run))
    return work


def expected_seconds(run: Run) -> dict[str, float]:
    """Divide the work of a run by `RATES`; returns the seconds of each stage."""
    return {
        stage: sum(amount / RATES[rate] for rate, amount in amounts.items())
        for stage, amounts in work_by_stage(run).items()
    }


def _forward_passes(run: Run) -> Counter[str]:
    """Count the forward passes through all decoder layers.

    With the default, a layer runs in the dense network; then, if errors inside of the attention are corrected, up to
    the attention's output, with pruned queries, keys and values; then that operator; then the gate and up projections.
    With SparseGPT, each operator runs once, after it is pruned.
    """
    projections, output, gate_and_up, _ = (2 * group.weights for group in run.groups)
    # FLOP for each token in a decoder layer
    of_whole_layer = 2 * run.weights_of_layer + run.attention
    of_fitted_token = of_whole_layer
    if run.is_default:
        of_fitted_token += output + gate_and_up
    if run.corrects_attention:
        of_fitted_token += projections + run.attention

    # Tokens that run through whole layers besides, in all layers together. In each layer, one batch shows which
    # operators share their inputs, and held-out text runs in both networks.
    num_batch_tokens = run.batch_size * run.sequence_length
    num_other_tokens = run.layers * (num_batch_tokens + 2 * run.num_held_out_tokens)
    # The first layer shows the form of its output: for a batch, and for a held-out sequence in both networks.
    num_other_tokens += num_batch_tokens + 2 * run.sequence_length
    flops = run.layers * run.num_tokens * of_fitted_token + num_other_tokens * of_whole_layer
    return Counter({"bfloat16": flops})


def _gram_matrices(run: Run) -> Counter[str]:
    """Count the Gram matrices of one decoder layer."""
    return Counter({_SUMS: run.num_tokens * sum(_triangle(g.inputs) for g in run.groups)})


def _triangle(size: int) -> int:
    """Count the FLOP of a Gram matrix for one token, as `add_upper_half` multiplies: about half of a whole product."""
    if size <= _LEAF:
        return 2 * size * size
    half = (size // 2 + 31) // 32 * 32
    return _triangle(half) + 2 * half * (size - half) + _triangle(size - half)


def _cross_gram_matrices(run: Run) -> Counter[str]:
    """Count the products with the dense network's inputs, or its outputs if these are fewer, for one decoder layer.

    Groups that are not corrected have the inputs of the dense network, and SparseGPT needs none of them.
    """
    flops = 0
    for group in run.corrected_groups:
        flops += 2 * group.inputs * min(group.inputs, sum(group.outputs))
    return Counter({_SUMS: run.num_tokens * flops})


def _factorizations(run: Run) -> Counter[str]:
    """Count Cholesky factors (n^3 / 3) and inverses for one decoder layer.

    On a GPU, PyTorch inverts by solving for the identity, which takes 2 n^3 in place of 2/3 n^3. The default inverts
    for its coordinates and for its first stage. Its other stages make their inverses from that one, with one product.
    SparseGPT inverts for each operator, also if some share their inputs.
    """
    work = Counter[str]()
    for group in run.groups:
        times = 2 if run.is_default else len(group.outputs)
        work["factorization"] += times * group.inputs**3 * (1 / 3 + 2)
        if run.is_default:
            work["bfloat16"] += group.inputs * _triangle(group.inputs)
    return work


def _iterations(run: Run) -> Counter[str]:
    """Count the iterations of ADMM, and the product before them, or the columns of SparseGPT, for one decoder layer."""
    work = Counter[str]()
    for group in run.groups:
        if run.is_default:
            flops_of_product = 2 * group.weights * group.inputs
            work["float32"] += flops_of_product
            work["bfloat16"] += _ADMM_ITERATIONS * flops_of_product
            work["memory"] += _ADMM_ITERATIONS * _BYTES_OF_ITERATION * group.weights
        else:
            num_operators = len(group.outputs)
            work["factorization"] += num_operators * group.inputs**3 / 3  # of the inverse
            work["launches"] += num_operators * group.inputs * _LAUNCHES_OF_COLUMN
            # The errors of a block change all columns to its right, half of them on average: a product in float32 is
            # written and read, and so are the weights.
            num_blocks = group.inputs / _BLOCK
            work["float32"] += group.weights * max(0, group.inputs - _BLOCK)
            work["memory"] += group.weights * (_BYTES_OF_COLUMN + 16 * num_blocks / 2)
    return work


def _selections(run: Run) -> Counter[str]:
    """Count the selections of the largest weights for one decoder layer.

    The default selects in each iteration among all weights of a group. SparseGPT does it once, block by block.
    """
    in_fours = run.pattern == "2:4"
    bytes_of_weight = _BYTES_OF_SELECTION_IN_FOURS if in_fours else _BYTES_OF_SELECTION
    launches = LAUNCHES_OF_SELECTION_IN_FOURS if in_fours else LAUNCHES_OF_SELECTION
    work = Counter[str]()
    for group in run.groups:
        if run.is_default:
            times = _ADMM_ITERATIONS
            num_selections = _ADMM_ITERATIONS * (len(group.outputs) if in_fours else 1)
        else:
            times = 1
            columns = 4 if in_fours else _BLOCK
            num_selections = len(group.outputs) * math.ceil(group.inputs / columns)
        work["memory"] += times * bytes_of_weight * group.weights
        work["launches"] += num_selections * launches
    return work


def _refit(run: Run) -> Counter[str]:
    """Count the steps of conjugate gradients for one decoder layer, and one product before them."""
    work = Counter[str]()
    if run.is_default:
        for group in run.groups:
            flops_of_product = 2 * group.weights * group.inputs
            work["float32"] += flops_of_product
            work["bfloat16"] += _REFIT_STEPS * flops_of_product
            work["memory"] += _REFIT_STEPS * _BYTES_OF_REFIT_STEP * group.weights
    return work


def _errors(run: Run) -> Counter[str]:
    """Count the products that measure errors for one decoder layer, and those that make targets without a correction.

    One product measures the error of an operator's new weights. The target of an operator that corrects no error of
    others is the product of its weights and the Gram matrix.
    """
    of_errors = sum(2 * group.weights * group.inputs for group in run.groups)
    # `_rest` counts the targets of these groups
    of_other_targets = sum(2 * group.weights * group.inputs for group in run.corrected_groups)
    of_targets = of_errors - of_other_targets
    return Counter({"float32": of_errors + of_targets})


def _allocation(run: Run) -> Counter[str]:
    """Count the gradients of the loss on the beginnings of some sequences in one batch, for the whole model.

    Each decoder layer runs twice forwards. Its gradients are as many products as one pass, because weights have none,
    and two and a half times the attention, which computes its weights again.
    """
    work = Counter[str]()
    if run.allocates:
        length = min(_LONGEST, run.sequence_length)
        num_tokens = length * min(run.num_samples, math.ceil(_ALLOCATION_TOKENS / length))
        attention = 4 * length * run.hidden
        of_layer = 3 * 2 * run.weights_of_layer + 4.5 * attention
        # squares of the gradients by all outputs are summed, with a weight for each token
        of_layer += 2 * sum(sum(group.outputs) for group in run.groups)
        # the head forwards and backwards
        work["bfloat16"] = num_tokens * (run.layers * of_layer + 2 * run.head)
        if run.way == "files":
            # The weights of each layer come to the device for both directions.
            work["copies"] = 2 * _BYTES_OF_WEIGHT * run.layers * run.weights_of_layer
    return work


def _rest(run: Run) -> Counter[str]:
    """Count what no stage has, for the whole model: files, copies and hashes, and the products that make targets.

    A target is the product of an operator's weights and the cross-Gram matrix of its inputs. If the dense network's
    outputs were summed, that sum is the target.
    """
    work = Counter[str]()
    for group in run.corrected_groups:
        outputs_were_summed = sum(group.outputs) < group.inputs  # because they are fewer
        if not outputs_were_summed:
            work["float32"] += run.layers * 2 * group.weights * group.inputs

    num_weights = run.layers * run.weights_of_layer
    num_weights_around = 2 * run.hidden * run.vocabulary  # embedding and head
    bytes_of_layers = _BYTES_OF_WEIGHT * num_weights
    bytes_of_model = bytes_of_layers + _BYTES_OF_WEIGHT * num_weights_around
    bytes_of_masks = num_weights / 8
    if run.way == "files":
        # The masks wait in the journal first.
        work["disk"] = 2 * bytes_of_model + 2 * bytes_of_masks
        work["copies"] = 2 * bytes_of_layers  # to the device and back
        # the file that is read, each layer, and the files that are written
        work["hashes"] = bytes_of_model + bytes_of_layers + bytes_of_model
    else:
        work["disk"] = 2 * bytes_of_model + bytes_of_masks
        # Of each layer, the dense weights are copied to the host twice: they are hashed, and kept in case of an error.
        work["copies"] = 2 * bytes_of_model + 2 * bytes_of_layers
        work["hashes"] = bytes_of_layers
    return work


def arithmetic_table(runs: list[Run]) -> list[str]:
    """Make a table of the seconds that runs are expected to take, by stage; the first run's work stands beside them."""
    seconds = [expected_seconds(run) for run in runs]
    lines = []
    for stage, amounts in work_by_stage(runs[0]).items():
        if any(of_run[stage] for of_run in seconds):
            cells = [f"{of_run[stage]:.1f}" for of_run in seconds]
            lines.append([stage, _amounts_text(amounts), *cells])
    lines.append(["all", "", *(f"{sum(of_run.values()):.0f}" for of_run in seconds)])
    headings = [f"{run.method} {run.pattern}, {run.way}" for run in runs]
    return markdown_lines(["stage", f"work of {headings[0]}", *headings], lines)


def _amounts_text(amounts: Counter[str]) -> str:
    """Write amounts by the keys of `RATES`, such as "99 TFLOP bfloat16, 28 GB copies"."""
    words = []
    for rate, amount in amounts.items():
        if rate in ("float32", "tf32", "bfloat16", "factorization"):
            words.append(f"{amount / 1e12:,.0f} TFLOP {rate}")
        elif rate == "launches":
            words.append(f"{amount / 1e3:,.0f} thousand {rate}")
        else:
            words.append(f"{amount / 1e9:,.0f} GB {rate}")
    return ", ".join(words)

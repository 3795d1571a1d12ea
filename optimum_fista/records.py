"""What a report says of the parts of a run: operators, mixtures, decoder layers and texts.

The loop of a run makes them: an `OperatorReport` for each operator, a `MixtureReport` for each mixture, a `LayerReport`
for each decoder layer, and a `LayerRecord` that holds them until `RunRecord.add` puts them into the report of the run.
A `TextReport` is made after the run, for each text that the user named. In `fista/report.json` each is an object.

An *operator* is a pruned linear map; its *mask* says which weights are kept. A *mixture* is a layer of experts that
lost some of them. A run is *given* a model and makes a *result*; "dense" in names of fields means the given model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from optimum_fista.memory import MemoryPeak
from optimum_fista.solve.pattern import Scope


@dataclass(frozen=True)
class OperatorReport:
    """Numbers of one pruned linear operator. If the model was retrained, errors are those before the training."""

    # Of its weight in the model and the checkpoint.
    name: str
    # (out, in)
    shape: tuple[int, int]
    # Whether the checkpoint stores the weight as [in, out].
    stored_transposed: bool
    # Such as "unstructured" or "2:4".
    pattern: str
    # Share of zeros that was asked for.
    target_sparsity: float
    # What shares the zeros of an unstructured pattern: "matrix" or "row".
    scope: Scope
    # Number of weights that are not set to zero.
    num_kept: int
    # Share of zeros.
    sparsity: float
    method: str
    # || W* X* - Y || / || Y || on the calibration tokens; the error correction chooses Y.
    fit_error: float
    # Of the solution, if the method has one.
    l1_penalty: float | None
    # Over all trials.
    iterations: int
    # False if an iteration limit or a numerical failure ended the method.
    converged: bool
    # Advice or remark of the method.
    message: str
    # Calibration tokens that reached it.
    num_tokens: int
    # Shared evenly over the operators that were solved together.
    solve_seconds: float
    # || W* X* - W X || / || W X ||; None if the dense network did not run.
    output_error: float | None = None
    # On held-out tokens, to which no weight was fitted.
    held_out_fit_error: float | None = None
    held_out_output_error: float | None = None
    # Held-out tokens that reached it.
    held_out_tokens: int = 0
    # Whether it compensates for the error in the rest of its layer.
    residual_corrected: bool = False
    # Groups of columns that stay, if others were removed; `shape` is the smaller one.
    groups_kept: tuple[int, ...] | None = None
    # Numbers of the inputs in the dense model; None: the same order.
    input_order: tuple[int, ...] | None = None

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape of the weight in the checkpoint: `self.shape` is (out, in), and `self.stored_transposed` turns it."""
        out_features, in_features = self.shape
        if self.stored_transposed:
            return in_features, out_features
        return out_features, in_features


@dataclass(frozen=True)
class MixtureReport:
    """Experts of a mixture that stayed, and how close their output is to that of all experts."""

    name: str
    # Numbers of the kept experts in the dense model.
    groups_kept: tuple[int, ...]
    # Of each expert of the dense model (`score_experts`).
    saliency: tuple[float, ...]
    # How many calibration tokens the router sent to each of them.
    expert_tokens: tuple[int, ...]
    # || E* - Y || / || Y || of the summed output E* of the kept experts.
    fit_error: float
    # Before the down projections were refitted.
    fit_error_before: float
    # Experts with a new down projection.
    num_refitted: int
    solve_seconds: float
    message: str = ""
    held_out_fit_error: float | None = None
    residual_corrected: bool = False
    # Only if the router reads the experts of a token from a table: for each removed expert, in the order of their
    # numbers, the experts that replace it there, the best one first (`removal.routing_table`).
    substitutes: tuple[tuple[int, ...], ...] = ()
    # Of the refitted experts, those that were moved a half or a quarter of the way to their refit.
    num_shrunk: int = 0
    # `expert_tokens` of each text of the calibration, in the order of `calibration["sources"]`; () if there is one.
    tokens_of_sources: tuple[tuple[int, ...], ...] = ()
    # The same of each text in `texts`, which the user named to measure on: there the given model ran.
    tokens_of_texts: tuple[tuple[int, ...], ...] = ()

    @property
    def unreached(self) -> tuple[int, ...]:
        """The numbers of the experts of the dense model that no calibration token reached, rising."""
        return tuple(expert for expert, number in enumerate(self.expert_tokens) if number == 0)


@dataclass(frozen=True)
class LayerReport:
    """Numbers of one pruned decoder layer."""

    # In the model, such as "model.layers.3".
    name: str
    # || H* - H || / || H || after the layer; None if one of the two is not computed.
    hidden_state_error: float | None
    # Wall time.
    seconds: float
    # Peak while its operators were pruned; None if none was pruned.
    memory: MemoryPeak | None = None
    # If it lost experts.
    mixture: MixtureReport | None = None
    # Of its tensors before pruning (`model.digests.sha256_of`).
    dense_sha256: str | None = None


@dataclass(frozen=True)
class LayerRecord:
    """The report of one pruned decoder layer with its operators; a streamed run keeps it on disk."""

    report: LayerReport
    operators: list[OperatorReport] = field(default_factory=list)
    left_dense: dict[str, str] = field(default_factory=dict)
    # As in `PruningReport`.
    carried: list[OperatorReport] = field(default_factory=list)
    lost_masks: list[str] = field(default_factory=list)
    zeros_filled: int = 0
    zeros_uncovered: int = 0
    # Mixtures of layers that predict more tokens, which lost experts after this layer, the last one.
    prediction_mixtures: list[MixtureReport] = field(default_factory=list)


@dataclass(frozen=True)
class LoopCount:
    """How many greedy continuations of a text by one model end in a loop (`text.loops.ends_in_loop`)."""

    num_prompts: int
    # Tokens of a continuation, at most.
    num_new_tokens: int
    num_loops: int


@dataclass(frozen=True)
class TextReport:
    """Loss on a held-out text that the user named, of the given model and of the result, in bits per byte."""

    # Of a file only the last part of its path.
    name: str
    # Of the stretches of the text that were measured.
    sha256: str
    # Of these stretches, in UTF-8.
    num_bytes: int
    # Of these stretches, by the tokenizer of the given model.
    num_tokens: int
    # By that of the result, which may have lost tokens.
    num_tokens_pruned: int
    # Bits per byte of the given model.
    dense: float
    # Bits per byte of the result.
    pruned: float
    # Number of tokens that the given model knows.
    vocabulary: int
    # How many times the bits per byte of the first model those of the result may be; None: any number.
    at_most: float | None = None
    # Loops of the given model and of the result on prompts of this text; None if they were not counted.
    loops_dense: LoopCount | None = None
    loops_pruned: LoopCount | None = None

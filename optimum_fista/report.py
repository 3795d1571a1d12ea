"""The report of a pruning run, written to `fista/report.json`.

The model card, the page, `verify` and the summary in the terminal are made from the report. Shares and means are
computed from the operators when they are needed, so that no two numbers can disagree.

A run is *given* a model and makes a *result*. The given model may be the result of an earlier run; the *first* model is
the one that the user began with (`origin.py`). "dense" in names of fields means the given model. An *operator* is a
pruned linear map; its *mask* says which weights are kept. A *mixture* is a layer of experts that lost some of them.

A run begins its report before the first decoder layer (`PruningReport(...)`), adds a `LayerRecord` after each layer
(`add`), and completes `model` and `perplexity` at the end. The dictionary `model` describes both models: the given one
(`name`, `dtype`, `sha256`, `dense_num_parameters`), and the result (`class`, `num_parameters`; `vocabulary` if it lost
tokens). Everything else is a property: it is computed from the fields, changes nothing, and is the same each time.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from statistics import fmean
from typing import Any

from optimum_fista.memory import MemoryPeak
from optimum_fista.options import as_record
from optimum_fista.origin import MeasuredPerplexity, OriginReport, StepReport, patterns_of
from optimum_fista.plain_text import spell_out_controls, spell_out_controls_in_json
from optimum_fista.recovery_report import RecoveryReport
from optimum_fista.solve.pattern import Scope
from optimum_fista.solve.patterns import parse_pattern
from optimum_fista.verdict import OWN_TEXT, verdict
from optimum_fista.versions import library_versions

COST_OF_TOKENS_ELSEWHERE = (
    "text unlike the one that was counted, such as other languages, code and names, takes more tokens and "
    "loses more: evaluate on text of your own, and compare bits per byte"
)
"""What is to be said of every model that lost tokens."""

# Keys of report.json that are computed from the others, for people who read the file.
_COMPUTED = ("totals", "command")


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
        """Shape of the weight in the checkpoint."""
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
    num_refitted: int
    solve_seconds: float
    message: str = ""
    held_out_fit_error: float | None = None
    residual_corrected: bool = False


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


@dataclass(repr=False)
class PruningReport:
    """Record of a pruning run."""

    # The configuration as plain values.
    config: dict[str, Any]
    # `class`, `name`, `num_parameters` of the result, `dense_num_parameters` of the model that this run was given (if
    # it removed parts), `sha256` of that model's tensors, what is `copied` as it is, what the result `lacks`.
    model: dict[str, Any]
    # `sha256`, `num_sequences`, `num_tokens`, `source` if known; `held_out` has the same keys.
    calibration: dict[str, Any]
    # In pruning order.
    operators: list[OperatorReport] = field(default_factory=list)
    layers: list[LayerReport] = field(default_factory=list)
    # Operators that were not pruned, with the reason.
    left_dense: dict[str, str] = field(default_factory=dict)
    # What the user should know.
    warnings: list[str] = field(default_factory=list)
    # Wall time of the parts of the run.
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=library_versions)
    # Whether weights were trained after pruning.
    retrained: bool = False
    # `dense`: of the model that this run was given, `pruned`: of the result, `bits_per_byte` of both, `num_tokens`,
    # `text`, `vocabulary`, `sha256` of the token ids.
    perplexity: dict[str, Any] | None = None
    # Of a run that removed tokens: bits per byte `dense` and `pruned`, `num_bytes`, `num_tokens`, `num_tokens_pruned`
    # and `text`. Perplexities of different vocabularies can't be compared, so `perplexity` is None then.
    bits_per_byte: dict[str, Any] | None = None
    # Losses on held-out texts that the user named, in the user's order.
    texts: list[TextReport] = field(default_factory=list)
    # Names of such texts on which the loss could not be measured; a warning says why.
    texts_not_measured: list[str] = field(default_factory=list)
    # dtypes, device, ..., and batches [number, rows, tokens].
    environment: dict[str, Any] = field(default_factory=dict)
    # In order.
    recoveries: list[RecoveryReport] = field(default_factory=list)
    # Operators with zeros of an earlier run, of which this run kept the masks, because it left them dense or removed
    # parts. An operator may be in `operators`, too, if this run removed some of its columns. Errors are those of the
    # earlier run.
    carried: list[OperatorReport] = field(default_factory=list)
    # Weights of operators in which this run overwrote or moved zeros of an earlier one.
    lost_masks: list[str] = field(default_factory=list)
    # Where the model that this run was given comes from; None if it was never pruned.
    origin: OriginReport | None = None

    def add(self, record: LayerRecord) -> None:
        """Add what a run did in one decoder layer to the lists of this report; `record` stays as it is.

        These are the report of the layer, those of its pruned operators, the reasons for operators that were left
        dense (by name), reports of operators whose masks of an earlier run were carried over, and names of weights in
        which such masks were lost.
        """
        self.layers.append(record.report)
        self.operators += record.operators
        self.left_dense |= record.left_dense
        self.carried += record.carried
        self.lost_masks += record.lost_masks

    def warn(self, message: str) -> None:
        """Add a warning to `self.warnings`, and issue it as a Python warning (`warnings.warn`)."""
        message = spell_out_controls(message)
        self.warnings.append(message)
        warnings.warn(message, stacklevel=2)

    @property
    def pattern(self) -> str:
        """The pattern of this run in words, such as "50% unstructured", "2:4" or "channels:0.25".

        `self.config` has the fields of a `FistaPruningConfig`.
        """
        return words_of_pattern(
            self.config.get("pattern", "unstructured"), self.config.get("sparsity")
        )

    @property
    def masked(self) -> list[OperatorReport]:
        """Reports of all operators with a mask: those that this run pruned, and those whose masks it carried over.

        An operator may be in both lists, if this run removed some of its columns; then only the carried report is
        taken, because its mask is the one with zeros.
        """
        carried = {operator.name for operator in self.carried}
        pruned = [operator for operator in self.operators if operator.name not in carried]
        return [*pruned, *self.carried]

    @property
    def earlier_zeros(self) -> str:
        """Say what became of zeros of earlier runs in operators that this run did not prune; empty if there were none.

        Operators that lost columns are among them.
        """
        if not self.carried and not self.lost_masks:
            return ""
        zeros = sum(math.prod(operator.shape) - operator.num_kept for operator in self.carried)
        zeros_that_stay = (
            f"{zeros:,} weights of {len(self.carried)} operators stay zero, with their masks"
        )
        if not self.lost_masks:
            return zeros_that_stay
        return f"{zeros_that_stay}; in {len(self.lost_masks)} operators they were overwritten"

    @property
    def zeros_in_all(self) -> str:
        """Say how many weights are zero with those of earlier runs; empty if all zeros are of this run.

        For a run that sets zeros itself.
        """
        if not self.carried:
            return ""
        share = self.num_zeros / self.model["num_parameters"]
        num_carried = self.num_zeros - self.totals["num_zeros"]
        return (
            f"with {num_carried:,} zeros that earlier runs left in {len(self.carried)} other operators, "
            f"{self.num_zeros:,} weights are zero ({share:.2%} of all parameters)"
        )

    @property
    def num_zeros(self) -> int:
        """Count the zeros of all masks, those of earlier runs too."""
        return sum(math.prod(operator.shape) - operator.num_kept for operator in self.masked)

    @property
    def num_parameters_given(self) -> int:
        """Number of parameters of the model that this run was given: that of the result if no part was removed."""
        num_parameters = self.model.get("dense_num_parameters")
        if not num_parameters:
            num_parameters = self.model["num_parameters"]
        return int(num_parameters)

    @property
    def first_model(self) -> OriginReport:
        """The model that the user began with, with the runs before this one: the given model if there were none."""
        if self.origin is not None:
            return self.origin
        # What `model` says besides the result (`class`, ...) is of the given model.
        return OriginReport(
            name=self.model.get("name") or "",
            num_parameters=self.num_parameters_given,
            dtype=self.model.get("dtype"),
            sha256=self.model.get("sha256"),
            perplexity=self.measured("dense"),
            texts={text.sha256: text.dense for text in self.texts},
        )

    @property
    def step(self) -> StepReport:
        """This run, as the last step from the first model to its result."""
        totals = self.totals
        method = self.config.get("method", "")
        num_tokens_removed = 0
        vocabulary = self.model.get("vocabulary")
        if vocabulary:  # this run removed tokens
            method = "token counts"
            num_tokens_removed = vocabulary["before"] - vocabulary["kept"]
        return StepReport(
            pattern=self.pattern,
            method=method,
            num_removed=totals["num_removed"],
            num_tokens_removed=num_tokens_removed,
            num_zeros=totals["num_zeros"],
            num_parameters=self.model["num_parameters"],
            perplexity=self.measured("pruned"),
            retrained=self.retrained,
        )

    @property
    def steps(self) -> list[StepReport]:
        """All runs from the first model to the result of this one, in order."""
        return [*self.first_model.steps, self.step]

    @property
    def origin_of_result(self) -> OriginReport:
        """What the next run has to know, if it is given the result of this one.

        It is written into the configuration of the result. Whether weights were trained after this run stands there
        beside it, and `read_origin` adds it to the step again.
        """
        step = dataclasses.replace(self.step, retrained=False)
        return dataclasses.replace(self.first_model, steps=[*self.first_model.steps, step])

    def measured(self, network: str) -> MeasuredPerplexity | None:
        """Return one perplexity of this run with the text that it was measured on; `None` if it was not measured.

        Args:
            network: "dense": of the given model; "pruned": of the result.
        """
        measured = self.perplexity
        if measured is None or network not in measured:
            return None
        return MeasuredPerplexity(
            perplexity=measured[network],
            num_tokens=measured["num_tokens"],
            text=measured.get("text"),
            vocabulary=measured.get("vocabulary", 0),
            sha256=measured.get("sha256"),
            bits_per_byte=measured.get("bits_per_byte", {}).get(network),
        )

    @property
    def first_perplexity(self) -> MeasuredPerplexity | None:
        """The perplexity of the first model on the text of this run; `None` if it is not known on this text."""
        given = self.measured("dense")
        if self.origin is None or given is None:
            return given
        first = self.origin.perplexity
        if first is None or not first.has_tokens_of(given):
            return None
        return first

    @property
    def perplexities_of_steps(self) -> list[MeasuredPerplexity | None]:
        """The perplexity after each of `steps` on the text of this run, this run's own last.

        `None` if it is not known on this text: an earlier run measured it on other tokens, or not at all.
        """
        given = self.measured("dense")
        perplexities: list[MeasuredPerplexity | None] = []
        for step in self.first_model.steps:
            is_comparable = (
                given is not None
                and step.perplexity is not None
                and step.perplexity.has_tokens_of(given)
            )
            perplexities.append(step.perplexity if is_comparable else None)
        if perplexities:
            # This run measured the given model, as it was after the last of the earlier runs.
            perplexities[-1] = given
        return [*perplexities, self.measured("pruned")]

    @property
    def verdict(self) -> str:
        """How much worse the result is than the first model, in a few words such as "usable as it is".

        Empty if no perplexity was measured. The reason, if it was measured and still says nothing.
        """
        pruned = self.measured("pruned")
        if pruned is None:
            return ""
        first = self.first_perplexity
        return verdict(
            dense=None if first is None else first.perplexity,
            pruned=pruned.perplexity,
            num_tokens=pruned.num_tokens,
            text=pruned.text,
            vocabulary=pruned.vocabulary,
        )

    def first_bits_per_byte(self, text: TextReport) -> float | None:
        """Return the bits per byte of the first model on a text of `self.texts`; `None` if they are not known."""
        if self.origin is None:
            return text.dense
        return self.origin.texts.get(text.sha256)

    def times_of(self, text: TextReport) -> float | None:
        """How many times the bits per byte of the first model those of the result are, on a text of `self.texts`.

        `None` if those of the first model are not known.
        """
        first = self.first_bits_per_byte(text)
        return text.pruned / first if first else None

    def verdict_on(self, text: TextReport) -> str:
        """How much worse the result is than the first model on a text of `self.texts`, in the words of `verdict`."""
        first = self.first_bits_per_byte(text)
        # Perplexities that can be compared: of the text of one token of the given model, by both models.
        bytes_per_token = text.num_bytes / text.num_tokens
        return verdict(
            dense=None if first is None else _two_to(first * bytes_per_token),
            pruned=_two_to(text.pruned * bytes_per_token),
            num_tokens=text.num_tokens,
            text=text.name,
            vocabulary=text.vocabulary,
        )

    def words_on(self, text: TextReport) -> str:
        """Say in one line what a text of `self.texts` lost: bits per byte before and after, tokens, verdict, limit."""
        first = self.first_bits_per_byte(text)
        if self.origin is None:
            before = f"{text.dense:.3f} before"
        elif first is None:
            before = f"{text.dense:.3f} of the model that this run began with"
        else:
            before = f"{first:.3f} of the dense model, {text.dense:.3f} of the model that this run began with"
        times = self.times_of(text)
        ratio = "" if times is None else f", {times:.3f} times"

        tokens = f"; on {text.num_tokens:,} tokens"
        has_same_tokens = text.num_tokens == text.num_tokens_pruned
        if not has_same_tokens:
            tokens += f", which become {text.num_tokens_pruned:,}"
        elif "vocabulary" not in self.model:
            bytes_per_token = text.num_bytes / text.num_tokens
            tokens = (
                f"; perplexity {_two_to(text.dense * bytes_per_token):.2f} before and "
                f"{_two_to(text.pruned * bytes_per_token):.2f} after{tokens}"
            )
        limit = ""
        if text.at_most is not None:
            word = "kept" if text not in self.unprotected else "BROKEN"
            limit = f"; at most {text.at_most:g} times was asked for: {word}"
        return f"{before} and {text.pruned:.3f} bits per byte after{ratio} ({self.verdict_on(text)}){tokens}{limit}"

    @property
    def unprotected(self) -> list[TextReport]:
        """Texts of `self.texts` whose loss rose more than the user allowed, or of which that is not known."""
        broken = list[TextReport]()
        for text in self.texts:
            if text.at_most is None:
                continue
            times = self.times_of(text)
            if times is None or times > text.at_most:
                broken.append(text)
        return broken

    @property
    def verdict_of_texts(self) -> str:
        """The verdict on the text of `self.texts` that lost most, with its name; empty if no text was measured."""
        if self.texts_not_measured:
            return f"no verdict: the loss is not known on {', '.join(self.texts_not_measured)}"
        if not self.texts:
            return ""
        if self.unprotected:
            names = ", ".join(text.name for text in self.unprotected)
            return f"not good: {names} lost more than was allowed"
        worst = max(self.texts, key=lambda text: self.times_of(text) or math.inf)
        if len(self.texts) == 1:
            return f"{self.verdict_on(worst)} on {worst.name}"
        return (
            f"{self.verdict_on(worst)} on {worst.name}, which lost most of {len(self.texts)} texts"
        )

    @property
    def retraining(self) -> str:
        """Say how weights were trained after pruning; empty if they were not."""
        if not self.retrained:
            return ""
        if self.num_zeros:
            return "retrained under its masks"
        return "retrained"

    @property
    def measured_on(self) -> str:
        """Say in words on which text the perplexity was measured; only for a report that has one."""
        measured = self.perplexity
        assert measured is not None
        text = measured.get("text") or "text"  # a text without a name
        if text == OWN_TEXT:
            text = "text of its own"
        tokens = f"{measured['num_tokens']:,} tokens of {text}"
        was_trained_before = any(step.retrained for step in self.steps[:-1])
        if was_trained_before:
            return f"{tokens} that this run fitted no weight to (an earlier training may have seen them)"
        return f"{tokens} that no weight was fitted to"

    @property
    def cost_of_tokens(self) -> str:
        """Say what the removal of tokens cost on held-out text; empty if that was not measured."""
        bits = self.bits_per_byte
        if bits is None:
            return ""
        return (
            f"{bits['dense']:.3f} bits per byte before and {bits['pruned']:.3f} after, on {bits['num_bytes']:,} "
            f"bytes of {bits['text'] or 'text'} that no token was counted on; they take "
            f"{bits['num_tokens_pruned']:,} tokens instead of {bits['num_tokens']:,}"
        )

    @property
    def verdict_of_tokens(self) -> str:
        """How much worse the given model became when this run removed tokens, in the words of `verdict`.

        Empty if that was not measured, or if the run removed no tokens.
        """
        bits = self.bits_per_byte
        if bits is None:
            return ""
        # Perplexities that can be compared: of the text of one token of the larger vocabulary, by both models.
        bytes_per_token = bits["num_bytes"] / bits["num_tokens"]
        given = 2 ** (bits["dense"] * bytes_per_token)
        return verdict(
            # An earlier run was not measured on this text.
            dense=given if self.origin is None else None,
            pruned=2 ** (bits["pruned"] * bytes_per_token),
            num_tokens=bits["num_tokens"],
            text=bits["text"],
            vocabulary=self.model["vocabulary"]["before"],
        )

    @property
    def mixtures(self) -> list[MixtureReport]:
        """Mixtures that lost experts, in the order of their decoder layers."""
        return [layer.mixture for layer in self.layers if layer.mixture is not None]

    @property
    def removed(self) -> str:
        """Say how much smaller than the first model the result is; empty if this run removed no part of it."""
        removed_now = self.totals["num_removed"]
        if not removed_now:
            return ""
        vocabulary = self.model.get("vocabulary")
        tokens = ""
        if vocabulary:
            tokens = f", with {vocabulary['kept']:,} of {vocabulary['before']:,} tokens"
        return f"{self._removed_in_all}{tokens}"

    @property
    def removed_before(self) -> str:
        """Say what earlier runs removed of the first model, and how it grew between the runs; empty if neither."""
        if self.origin is None:
            return ""
        if self.origin.num_parameters is None:
            return (
                "earlier runs pruned the model, and the size that it had before them is not known"
            )
        first = self.origin.num_parameters
        removed = first + self._added_between_runs - self.num_parameters_given
        removals = []
        if removed:
            removals.append(
                f"earlier runs removed {removed:,} of {first:,} parameters ({removed / first:.2%})"
            )
        if self.growth:
            removals.append(self.growth)
        return "; ".join(removals)

    @property
    def num_removed_in_all(self) -> int | None:
        """How many parameters all runs have removed, this one too; `None` if the size of the first model is not known.

        Parameters that were added between the runs are not subtracted.
        """
        first = self.first_model.num_parameters
        if first is None:
            return None
        return first + self._added_between_runs - self.model["num_parameters"]

    @property
    def growth(self) -> str:
        """Say how much larger the model became between the runs, such as by new tokens; empty if it did not.

        It may also have become smaller by other means than a run, such as if only a part of it was loaded.
        """
        added = self._added_between_runs
        if added > 0:
            return f"between the runs the model grew by {added:,} parameters"
        if added < 0:
            return f"between the runs the model lost {-added:,} parameters by other means"
        return ""

    @property
    def _added_between_runs(self) -> int:
        """How many parameters the model has gained after one run and before the next; negative if it has lost some.

        What was given to a run is compared with what the run before it left, as far as both are known.
        """
        added = 0
        for earlier, later in pairwise(self.steps):
            if (
                earlier.num_parameters is None
                or later.num_parameters is None
                or later.num_removed is None
            ):
                continue
            given = later.num_parameters + later.num_removed
            added += given - earlier.num_parameters
        return added

    @property
    def _removed_in_all(self) -> str:
        """How many parameters the first model has lost in all runs, such as "3,000 of 9,000 parameters removed".

        If the size of the first model is not known, those that the given model has lost.
        """
        remaining = self.model["num_parameters"]
        removed_now = self.totals["num_removed"]
        first = self.first_model.num_parameters
        removed = self.num_removed_in_all
        if first is None or removed is None:
            return (
                f"{removed_now:,} of {self.num_parameters_given:,} parameters removed by this run "
                f"({self.totals['share_removed']:.2%}), {remaining:,} left"
            )
        by_this_run = ""
        if removed != removed_now:
            by_this_run = f", {removed_now:,} of them by this run"
        growth = f"; {self.growth}" if self.growth else ""
        return (
            f"{removed:,} of {first:,} parameters removed ({removed / first:.2%}{by_this_run}), "
            f"{remaining:,} left{growth}"
        )

    @property
    def experts_left(self) -> str:
        """Say how many experts stayed, and how large their fit error is; empty if none was removed."""
        if not self.mixtures:
            return ""
        # All mixtures lose as many. `saliency` has a number for each expert before the removal.
        first = self.mixtures[0]
        errors = [mixture.fit_error for mixture in self.mixtures]
        refits = ""
        if self.config["expert_refit"]:
            before = fmean(mixture.fit_error_before for mixture in self.mixtures)
            refits = f", {before:.4f} before refits"
        return (
            f"{len(first.groups_kept)} of {len(first.saliency)} experts left in each of {len(errors)} mixtures (REAP), "
            f"fit error of their outputs {fmean(errors):.4f} on average, {max(errors):.4f} at most{refits}"
        )

    @property
    def totals(self) -> dict[str, Any]:
        """Sums and means over the pruned operators, by the names that they have in `fista/report.json`.

        An error that no operator has measured is `None`.
        """
        num_parameters = self.model["num_parameters"]
        num_weights = sum(math.prod(o.shape) for o in self.operators)
        num_zeros = num_weights - sum(o.num_kept for o in self.operators)
        num_removed = self.num_parameters_given - num_parameters

        errors: dict[str, float | None] = {}
        for name in ("fit_error", "output_error", "held_out_fit_error", "held_out_output_error"):
            values = [getattr(operator, name) for operator in self.operators]
            measured = [value for value in values if value is not None]
            # Every operator has a fit error. So if none was measured, there are no operators.
            if_none = 0.0 if name == "fit_error" else None
            errors[f"mean_{name}"] = fmean(measured) if measured else if_none
            errors[f"max_{name}"] = max(measured, default=if_none)

        solve_seconds = sum(o.solve_seconds for o in self.operators)
        solve_seconds += sum(mixture.solve_seconds for mixture in self.mixtures)
        return {
            "num_operators": len(self.operators),
            "num_weights": num_weights,
            "num_zeros": num_zeros,
            "sparsity": num_zeros / num_weights if num_weights else 0.0,
            # of all parameters, embeddings too
            "model_sparsity": num_zeros / num_parameters,
            # parameters of whole parts that this run removed
            "num_removed": num_removed,
            # of the parameters of the model that this run was given
            "share_removed": num_removed / self.num_parameters_given,
            **errors,
            "held_out_ratio": self._held_out_ratio(),
            "solve_seconds": solve_seconds,
            "num_not_converged": sum(not o.converged for o in self.operators),
        }

    def _held_out_ratio(self) -> float | None:
        """Sum of the held-out fit errors over the sum of the fit errors of the same operators; 1: no overfitting.

        `None` if no operator has a held-out error.
        """
        fitted = 0.0
        held_out = 0.0
        for operator in self.operators:
            if operator.held_out_fit_error is not None:
                held_out += operator.held_out_fit_error
                fitted += operator.fit_error
        return held_out / fitted if fitted else None

    def command(self) -> str:
        """Return the command line that prunes the given model in the same way, quoted for a shell.

        A word in capitals stands for an unknown name. The command reads the configuration from this report.
        """
        num_tokens = self.calibration["num_tokens"]
        num_sequences = self.calibration["num_sequences"]
        words = ["optimum-fista", "prune", self.model.get("name") or "MODEL", "--output", "DIR"]
        words += ["--config", "fista/report.json"]
        # A run that removes tokens may have several sources.
        for source in (self.calibration.get("source") or "SOURCE").split(", "):
            words += ["--calibration", source]
        for text in self.texts:
            if text.at_most is None:
                words += ["--measure", text.name]
            else:
                words += ["--protect", f"{text.name}={text.at_most:g}"]
        words += ["--num-samples", str(num_sequences)]
        if num_sequences and num_tokens % num_sequences == 0:
            words += ["--sequence-length", str(num_tokens // num_sequences)]
        if self.environment:
            _, rows, _ = self.environment["batches"][0]  # number of batches, rows, tokens of a row
            words += ["--batch-size", str(rows), "--device", self.environment["device"]]
            dtype = self.environment["dtype"]
            # By default the dtypes of the files are kept, and "written" says so.
            keeps_dtypes_of_files = self.environment.get("written", dtype) != dtype
            if not keeps_dtypes_of_files:
                words += ["--dtype", dtype.removeprefix("torch.")]
        return shlex.join(words)

    def to_json(self) -> str:
        """Return the report as JSON text; `totals` and `command` in it are for readers, `from_dict` needs neither."""
        computed = {"totals": self.totals, "command": self.command()}
        return json.dumps(dataclasses.asdict(self) | computed, indent=1)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PruningReport:
        """Make a report of `values`, the parsed JSON of `to_json`.

        TypeError if a field is missing, unknown, or of another type. `values` stays as it is. Control characters in
        texts, which may come from other people, are spelled out.
        """
        fields = {
            key: spell_out_controls_in_json(values[key]) for key in values if key not in _COMPUTED
        }
        report = as_record(cls, fields)
        # The number is a divisor of shares.
        if not report.model["num_parameters"] > 0:
            raise TypeError(f"model has {report.model['num_parameters']} parameters")
        return report

    def __str__(self) -> str:
        """Describe the run in one line, as the terminal prints it: what was removed, errors of the operators, time."""
        totals = self.totals
        duration = f"{self.seconds.get('total', 0.0):.1f} s"
        if self.removed and not self.operators:
            parts = [self.removed, self.experts_left, duration]
            return "; ".join(part for part in parts if part)

        removal = self.removed
        if not removal:
            removal = (
                f"{totals['num_zeros']:,} of {totals['num_weights']:,} weights zero "
                f"({totals['sparsity']:.2%})"
            )
            if self.zeros_in_all:
                removal += f"; {self.zeros_in_all}"
            if self.removed_before:
                removal += f"; {self.removed_before}"
        experts = f"{self.experts_left}; " if self.mixtures else ""
        held_out = ""
        if totals["held_out_ratio"] is not None:
            held_out = (
                f" ({totals['held_out_ratio']:.2f} times that on "
                f"{self.calibration['held_out']['num_tokens']:,} held-out tokens, "
                f"{totals['mean_held_out_fit_error']:.4f} on average)"
            )
        output = "not known"
        if totals["mean_output_error"] is not None:
            output = (
                f"{totals['mean_output_error']:.4f} on average, "
                f"{totals['max_output_error']:.4f} at most"
            )
        retraining = ", before retraining" if self.retrained else ""
        return (
            f"{totals['num_operators']} operators pruned by {self.config['method']}, {removal}; {experts}"
            f"fit error {totals['mean_fit_error']:.4f} on average, {totals['max_fit_error']:.4f} at most{held_out}, "
            f"output error {output}{retraining}; {duration}, of which solving {totals['solve_seconds']:.1f} s"
        )

    def __repr__(self) -> str:
        """One line: in a notebook, all fields would fill many screens."""
        name = self.first_model.name or self.model.get("class") or "model"
        return (
            f"<PruningReport of {name!r}, {patterns_of(self.steps)}: {len(self.operators)} operators in "
            f"{len(self.layers)} decoder layers; print(report) has the numbers, report.to_json() everything>"
        )

    def _repr_html_(self) -> str:
        """The head of the report's page, for notebooks."""
        # It formats a report, so it imports this module.
        from optimum_fista.headlines import headlines, title

        rows = [
            f"<tr><th>{escape(one.name)}</th><td>{escape(one.value)}</td><td>{escape(one.remark)}</td></tr>"
            for one in headlines(self)
        ]
        return f"<h3>{escape(title(self))}</h3><table>{''.join(rows)}</table>"


def _two_to(bits: float) -> float:
    """Two to the power of `bits`, limited, because 2**1024 is no float."""
    return float(2 ** min(bits, 1000.0))


def words_of_pattern(text: str, sparsity: float | None) -> str:
    """Say a pattern with its share: "50% unstructured"; others, such as "2:4", have it in their names.

    Args:
        text: `pattern` of a configuration.
        sparsity: `sparsity` of the same configuration.
    """
    try:
        pattern = parse_pattern(text, sparsity)
    except ValueError:
        # one that sets no weight to zero, or that a user has registered elsewhere
        return text
    if pattern.fixed:
        return str(pattern)
    return f"{100 * pattern.sparsity:g}% {pattern}"


def lines_of_unplaced(copied: Mapping[str, int], lacks: Mapping[str, str]) -> list[str]:
    """Say in up to two lines which tensors of a model's files its class does not load, and what became of them.

    Args:
        copied: By module, such as "model.mtp", the number of its tensors that are copied to the result.
        lacks: By module, why the result lacks its tensors.
    """
    lines = []
    if copied:
        shown = ", ".join(f"{module} ({count})" for module, count in copied.items())
        lines.append(
            f"{sum(copied.values())} tensors that the model's class does not load are copied: {shown}"
        )
    if lacks:
        shown = ", ".join(f"{module} ({reason})" for module, reason in lacks.items())
        lines.append(f"not in the pruned model: {shown}")
    # Names of modules are those of tensors in files, which anybody may have written.
    return [spell_out_controls(line) for line in lines]

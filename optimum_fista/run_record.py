"""The record of a pruning run: the fields of `fista/report.json`, and the numbers that are computed from them.

`PruningReport` is a `RunRecord` with sentences. Shares and means are computed from the operators when they are needed,
so that no two numbers can disagree.

A run is *given* a model and makes a *result*. The given model may be the result of an earlier run; the *first* model is
the one that the user began with (`origin.py`). "dense" in names of fields means the given model. An *operator* is a
pruned linear map; its *mask* says which weights are kept. A *mixture* is a layer of experts that lost some of them.

A run begins its report before the first decoder layer (`PruningReport(...)`), adds a `LayerRecord` after each layer
(`add`), and completes `model` and `perplexity` at the end. The dictionary `model` describes both models: the given one
(`name`, `dtype`, `sha256`, `dense_num_parameters`), and the result (`class`, `num_parameters`; `vocabulary` if it lost
tokens). Everything else is computed from the fields when it is asked for, and changes nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import Any, Self

from optimum_fista.options import as_record
from optimum_fista.origin import MeasuredPerplexity, OriginReport, StepReport
from optimum_fista.plain_text import spell_out_controls, spell_out_controls_in_json
from optimum_fista.records import (
    LayerRecord,
    LayerReport,
    MixtureReport,
    OperatorReport,
    TextReport,
)
from optimum_fista.recovery_report import RecoveryReport
from optimum_fista.solve.patterns import parse_pattern
from optimum_fista.versions import library_versions

# Keys of report.json that are computed from the others, for people who read the file.
_COMPUTED = ("totals", "command")
# A list of numbers in JSON text with an entry in each line; "NaN" and "Infinity" are numbers, too. Nothing in quotes
# fits, because text in JSON has no line ends.
_LIST_OF_NUMBERS = re.compile(r"\[\n([-+.,\deENaInfity\s]+)\]")


@dataclass(repr=False)
class RunRecord:
    """What is known of a pruning run, and the numbers that follow from it; `PruningReport` says them in words."""

    # The configuration as plain values.
    config: dict[str, Any]
    # `class`, `name`, `num_parameters` of the result, `dense_num_parameters` of the model that this run was given (if
    # it removed parts), `sha256` of that model's tensors, what is `copied` as it is, what the result `lacks`. If
    # experts are removed and no decoder layer is: `active_parameters`, which a token uses, `before` and `after`.
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
    # Of a run from files to files: the size of the weight files of the model that it was given.
    weight_bytes_before: int | None = None
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
    # Weights of operators in which this run overwrote or moved zeros of an earlier one, or somebody did in between.
    lost_masks: list[str] = field(default_factory=list)
    # Numbers of weights in operators that this run pruned again, that an earlier run had set to zero, and that the new
    # mask keeps: those that have other values now, and those that are still zero.
    zeros_filled: int = 0
    zeros_uncovered: int = 0
    # Mixtures of layers that predict more tokens, which Transformers does not load (`model["copied"]`), and which lost
    # as many experts as those of the model. They have the names that they have in the files of the given model.
    prediction_mixtures: list[MixtureReport] = field(default_factory=list)
    # Where the model that this run was given comes from; None if it was never pruned.
    origin: OriginReport | None = None

    def add(self, record: LayerRecord) -> None:
        """Add what a run did in one decoder layer to the lists of this report; `record` stays as it is.

        `record` has the report of the layer, those of its pruned operators, the reasons for operators that were left
        dense (by name), reports of operators whose masks of an earlier run were carried over, and names of weights in
        which such masks were lost. It counts zeros of an earlier run that were filled or have no mask. That of the last
        layer has the mixtures of layers that predict more tokens.
        """
        self.layers.append(record.report)
        self.operators += record.operators
        self.left_dense |= record.left_dense
        self.carried += record.carried
        self.lost_masks += record.lost_masks
        self.zeros_filled += record.zeros_filled
        self.zeros_uncovered += record.zeros_uncovered
        self.prediction_mixtures += record.prediction_mixtures

    def warn(self, message: str) -> None:
        """Add a warning to `self.warnings`, and issue it as a Python warning (`warnings.warn`).

        Control characters in it, such as those of names that other people chose, are spelled out.
        """
        message = spell_out_controls(message)
        self.warnings.append(message)
        warnings.warn(message, stacklevel=2)  # names the line of the caller

    @property
    def pattern(self) -> str:
        """The pattern of this run in words, such as "50% unstructured", "2:4" or "channels:0.25".

        `self.config` has the fields of a `FistaPruningConfig` as plain values.
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
    def prediction_experts(self) -> dict[str, tuple[int, int]]:
        """For each mixture in `self.prediction_mixtures`, by name: how many experts stay, and of how many."""
        return {
            mixture.name: (len(mixture.groups_kept), len(mixture.saliency))
            for mixture in self.prediction_mixtures
        }

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
        # This run was given the first model. `name`, `dtype` and `sha256` in `self.model` are those of the given model,
        # and so is the perplexity "dense".
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
        """This run, as the last step from the first model to its result.

        `self.model` describes the result. If this run removed tokens, it has the numbers of tokens before and after
        (`vocabulary`).
        """
        totals = self.totals
        method = self.config.get("method", "")
        num_tokens_removed = 0
        vocabulary = self.model.get("vocabulary")
        if vocabulary:  # this run removed tokens, and used no method of the configuration
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
        beside it (`retrained`), and `read_origin` writes that into the step of this run again.
        """
        step = dataclasses.replace(self.step, retrained=False)
        return dataclasses.replace(self.first_model, steps=[*self.first_model.steps, step])

    def measured(self, network: str) -> MeasuredPerplexity | None:
        """Return one perplexity of this run with the text that it was measured on; `None` if it was not measured.

        It is taken from the dictionary `self.perplexity`, which is `None` if no perplexity was measured.

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
        given = self.measured("dense")  # of the model that this run was given
        if given is None:
            return None
        if self.origin is None:  # the given model is the first one
            return given
        first = self.origin.perplexity  # an earlier run has measured it, perhaps on other tokens
        if first is None or not first.is_comparable_with(given):
            return None
        return first

    @property
    def perplexities_of_steps(self) -> list[MeasuredPerplexity | None]:
        """The perplexity after each run (each of `self.steps`) on the text of this run; this run is the last one.

        An entry is `None` if it is not known on this text: an earlier run measured it on other tokens, or not at all.
        """
        given = self.measured("dense")
        perplexities: list[MeasuredPerplexity | None] = []
        for step in self.first_model.steps:
            is_comparable = (
                given is not None
                and step.perplexity is not None
                and step.perplexity.is_comparable_with(given)
            )
            perplexity_of_step = step.perplexity if is_comparable else None
            perplexities.append(perplexity_of_step)
        if perplexities:
            # This run measured the given model, as it was after the last of the earlier runs.
            perplexities[-1] = given
        return [*perplexities, self.measured("pruned")]

    def first_bits_per_byte(self, text: TextReport) -> float | None:
        """Return the bits per byte of the first model on a text of `self.texts`; `None` if they are not known."""
        if self.origin is None:
            return text.dense
        return self.origin.texts.get(text.sha256)

    def times_of(self, text: TextReport) -> float | None:
        """Divide the bits per byte of the result by those of the first model, on a text of `self.texts`.

        1.02 means that the loss rose by 2%. `None` if the bits of the first model are not known, or are 0.
        """
        first = self.first_bits_per_byte(text)
        return text.pruned / first if first else None

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
    def mixtures(self) -> list[MixtureReport]:
        """Mixtures that lost experts, in the order of their decoder layers."""
        return [layer.mixture for layer in self.layers if layer.mixture is not None]

    @property
    def num_removed_in_all(self) -> int | None:
        """How many parameters all runs have removed, this one too; `None` if the size of the first model is not known.

        Parameters that were added between the runs do not make the number smaller.
        """
        first = self.first_model.num_parameters
        if first is None:
            return None
        # All parameters that there ever were, without those of the result.
        return first + self._added_between_runs - self.model["num_parameters"]

    @property
    def _added_between_runs(self) -> int:
        """How many parameters the model has gained between runs, in all; negative if it has lost some.

        The size of the model that a run was given is compared with the size of the result of the run before it, as far
        as both are known.
        """
        added = 0
        for earlier, later in pairwise(self.steps):
            if (
                earlier.num_parameters is None
                or later.num_parameters is None
                or later.num_removed is None
            ):
                continue
            # `num_parameters` is the size of a run's result.
            given_to_later = later.num_parameters + later.num_removed
            added += given_to_later - earlier.num_parameters
        return added

    @property
    def totals(self) -> dict[str, Any]:
        """Sums and means over the pruned operators, by the names that they have in `fista/report.json`.

        Errors of a kind that no operator has are `None`. Every operator has a fit error; without operators it counts as
        0.0. `self.model` must have the number of parameters of the result, which is known at the end of a run.
        """
        num_parameters = self.model["num_parameters"]
        num_weights = sum(math.prod(o.shape) for o in self.operators)
        num_zeros = num_weights - sum(o.num_kept for o in self.operators)
        num_removed = self.num_parameters_given - num_parameters

        errors: dict[str, float | None] = {}
        for name in ("fit_error", "output_error", "held_out_fit_error", "held_out_output_error"):
            values = [getattr(operator, name) for operator in self.operators]
            measured = [value for value in values if value is not None]
            if measured:
                errors[f"mean_{name}"] = fmean(measured)
                errors[f"max_{name}"] = max(measured)
            else:
                without_operators = 0.0 if name == "fit_error" else None
                errors[f"mean_{name}"] = without_operators
                errors[f"max_{name}"] = without_operators

        solve_seconds = sum(o.solve_seconds for o in self.operators)
        solve_seconds += sum(mixture.solve_seconds for mixture in self.mixtures)  # of experts
        return {
            "num_operators": len(self.operators),
            "num_weights": num_weights,
            "num_zeros": num_zeros,
            "sparsity": num_zeros / num_weights if num_weights else 0.0,
            # the share of zeros in all parameters of the result, embeddings too
            "model_sparsity": num_zeros / num_parameters,
            # the parameters of whole parts that this run removed, and their share of the model that it was given
            "num_removed": num_removed,
            "share_removed": num_removed / self.num_parameters_given,
            **errors,
            # the sum of the held-out fit errors, divided by that of the fit errors; more than 1 is overfitting
            "held_out_ratio": self._held_out_ratio(),
            "solve_seconds": solve_seconds,
            "num_not_converged": sum(not o.converged for o in self.operators),
        }

    def _held_out_ratio(self) -> float | None:
        """Divide the sum of the held-out fit errors by the sum of the fit errors of the same operators.

        1 means no overfitting. `None` if no operator has a held-out error.
        """
        fitted = 0.0
        held_out = 0.0
        for operator in self.operators:
            if operator.held_out_fit_error is not None:
                held_out += operator.held_out_fit_error
                fitted += operator.fit_error
        return held_out / fitted if fitted else None  # nor if all errors are 0

    def command(self) -> str:
        """Return the command line that prunes the given model in the same way, quoted for a shell.

        A word in capitals stands for an unknown name. The command reads the configuration from this report, so it is
        run in the folder of the result.

        It is made of `self.calibration` (the text), `self.texts` (held-out texts, with the limits of `--protect`) and
        `self.environment` (device, batches, dtypes), which is empty if it is not known.
        """
        num_tokens = self.calibration["num_tokens"]
        num_sequences = self.calibration["num_sequences"]
        words = ["optimum-fista", "prune", self.model.get("name") or "MODEL", "--output", "DIR"]
        words += ["--config", "fista/report.json"]  # as seen from the folder of the result
        # Several sources are written as one name, such as "c4, code.txt".
        sources = self.calibration.get("source") or "SOURCE"
        for source in sources.split(", "):
            words += ["--calibration", source]
        for text in self.texts:
            if text.at_most is None:
                words += ["--measure", text.name]
            else:
                words += ["--protect", f"{text.name}={text.at_most:g}"]
        counts_whole_texts = "vocabulary" in self.model  # a run that removes tokens
        if not counts_whole_texts:
            words += ["--num-samples", str(num_sequences)]
            have_same_length = num_sequences > 0 and num_tokens % num_sequences == 0
            if have_same_length:
                words += ["--sequence-length", str(num_tokens // num_sequences)]
        if self.environment:
            _, rows, _ = self.environment["batches"][0]  # number of batches, rows, tokens of a row
            words += ["--batch-size", str(rows), "--device", self.environment["device"]]
            dtype = self.environment["dtype"]  # of the model in memory, such as "torch.bfloat16"
            # It is `dtype` again if all tensors were written in that one; "in the dtypes of the files" if each kept its
            # own. A report of an older version has no such entry.
            written = self.environment.get("written", dtype)
            # Only one dtype for all needs a flag: that each tensor keeps its own is the default.
            is_one_dtype = written == dtype
            if is_one_dtype:
                words += ["--dtype", dtype.removeprefix("torch.")]
        return shlex.join(words)

    def to_json(self) -> str:
        """Return the report as JSON text; `totals` and `command` in it are for readers, `from_dict` needs neither.

        Each value has a line of its own, but lists of numbers are in one line: mixtures have hundreds of experts.
        """
        computed = {"totals": self.totals, "command": self.command()}
        text = json.dumps(dataclasses.asdict(self) | computed, indent=1)
        return _LIST_OF_NUMBERS.sub(_in_one_line, text)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a report of `values`, the parsed JSON of `to_json`.

        TypeError if a field is missing, unknown, or of another type. `values` stays as it is. Control characters in
        texts, which may come from other people, are spelled out.
        """
        fields = {
            key: spell_out_controls_in_json(values[key]) for key in values if key not in _COMPUTED
        }
        report = as_record(cls, fields)
        # Shares are divided by this number.
        if not report.model["num_parameters"] > 0:
            raise TypeError(f"model has {report.model['num_parameters']} parameters")
        return report


def _in_one_line(numbers: re.Match[str]) -> str:
    """Write a list of numbers in one line, such as "[1, 2]"; `numbers` is a match of `_LIST_OF_NUMBERS`."""
    return f"[{' '.join(numbers[1].split())}]"


def words_of_pattern(text: str, sparsity: float | None) -> str:
    """Say a pattern with its share of zeros, such as "50% unstructured".

    Other patterns, such as "2:4" or "channels:0.25", have a share in their names. Changes nothing.

    Args:
        text: `pattern` of a configuration.
        sparsity: `sparsity` of the same configuration, from 0 to 1; `None`: that of the pattern.
    """
    try:
        pattern = parse_pattern(text, sparsity)
    except ValueError:
        # A pattern that removes tokens, or one that a user has registered in another process.
        return text
    if pattern.fixed:  # its name has the share
        return str(pattern)
    return f"{100 * pattern.sparsity:g}% {pattern}"

"""The report of a pruning run, written to `fista/report.json`: `PruningReport`.

The model card, the page, `verify` and the summary in the terminal are made from the report. Its fields and numbers are
those of `RunRecord`, which it extends by sentences: what was removed, what that cost, and a verdict. `records.py` has
the entries for operators, decoder layers and texts.

A run is *given* a model and makes a *result*. The given model may be the result of an earlier run; the *first* model is
the one that the user began with (`origin.py`). Everything here is computed from the fields, and changes nothing. A
sentence that does not apply is empty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from statistics import fmean

from optimum_fista.origin import patterns_of
from optimum_fista.plain_text import spell_out_controls
from optimum_fista.records import TextReport
from optimum_fista.run_record import RunRecord
from optimum_fista.verdict import OWN_TEXT, verdict

COST_OF_TOKENS_ELSEWHERE = (
    "text unlike the one that was counted, such as other languages, code and names, takes more tokens and "
    "loses more: evaluate on text of your own, and compare bits per byte"
)
"""What is to be said of every model that lost tokens."""


class PruningReport(RunRecord):
    """Record of a pruning run, with sentences for people.

    `RunRecord` has its fields and numbers.
    """

    @property
    def earlier_zeros(self) -> str:
        """Say what became of zeros of earlier runs; empty if there were none, or if the new masks cover all of them.

        `self.carried` are reports of operators whose masks were kept, `self.lost_masks` names of weights in which this
        run overwrote zeros. The zeros in operators that this run pruned again are counted: `self.zeros_filled` have
        other values now, and `self.zeros_uncovered` are zero, but the new mask keeps these weights.
        """
        sentences = []
        if self.carried or self.lost_masks:
            zeros = sum(math.prod(operator.shape) - operator.num_kept for operator in self.carried)
            sentences.append(
                f"{zeros:,} weights of {len(self.carried)} operators stay zero, with their masks"
            )
        if self.lost_masks:
            sentences.append(f"in {len(self.lost_masks)} operators they were overwritten")
        if self.zeros_filled or self.zeros_uncovered:
            sentences.append(
                f"in operators that were pruned again, {self.zeros_filled:,} were filled, and "
                f"{self.zeros_uncovered:,} stay zero without a mask"
            )
        return "; ".join(sentences)

    @property
    def zeros_in_all(self) -> str:
        """Say how many weights are zero with those of earlier runs; empty if all zeros are of this run.

        It is said of a run that sets zeros itself. `self.carried` are reports of operators whose masks of an earlier
        run were kept, `self.num_zeros` counts the zeros of all masks, and `self.totals` those of this run.
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
    def verdict(self) -> str:
        """How much worse the result is than the first model, in a few words such as "usable as it is".

        Both perplexities are of the text of this run. Empty if no perplexity was measured. If it was measured and still
        says nothing, this is the reason, such as "no verdict on fewer than ... tokens".
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

    def verdict_on(self, text: TextReport) -> str:
        """Say how much worse the result is than the first model on a text of `self.texts`, in the words of `verdict`.

        `text.pruned` are the bits per byte of the result, `text.num_bytes` and `text.num_tokens` say how much was
        measured, in tokens of the given model, and `text.vocabulary` is the number of tokens that this model knows: a
        first model that is hardly better than a guess among them gets no verdict.
        """
        first = self.first_bits_per_byte(text)
        # Perplexities of models with different tokens can't be compared. So both are computed for the same stretch of
        # text: that of an average token of the given model.
        bytes_per_token = text.num_bytes / text.num_tokens
        return verdict(
            dense=None if first is None else _two_to(first * bytes_per_token),
            pruned=_two_to(text.pruned * bytes_per_token),
            num_tokens=text.num_tokens,
            text=text.name,
            vocabulary=text.vocabulary,
        )

    def words_on(self, text: TextReport) -> str:
        """Say in one line what a text of `self.texts` lost: bits per byte, verdict, tokens, loops, and the limit.

        `self.origin` is `None` if the given model is the first one, so that one number "before" is enough.
        """
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
        has_same_number_of_tokens = text.num_tokens == text.num_tokens_pruned
        lost_tokens = "vocabulary" in self.model
        if not has_same_number_of_tokens:
            tokens += f", which become {text.num_tokens_pruned:,}"
        elif not lost_tokens:  # the same tokens, so that perplexities can be compared
            bytes_per_token = text.num_bytes / text.num_tokens
            tokens = (
                f"; perplexity {_two_to(text.dense * bytes_per_token):.2f} before and "
                f"{_two_to(text.pruned * bytes_per_token):.2f} after{tokens}"
            )
        loops = ""
        if text.loops_dense is not None and text.loops_pruned is not None:
            given = "before" if self.origin is None else "of the model that this run began with"
            loops = (
                f"; loops in {text.loops_dense.num_loops} of {text.loops_dense.num_prompts} greedy "
                f"continuations {given} and in {text.loops_pruned.num_loops} of {text.loops_pruned.num_prompts} after"
            )
        limit = ""
        if text.at_most is not None:  # the largest ratio that the user allows (`--protect`)
            word = "kept" if text not in self.unprotected else "BROKEN"
            limit = f"; at most {text.at_most:g} times was asked for: {word}"
        loss = (
            f"{before} and {text.pruned:.3f} bits per byte after{ratio} ({self.verdict_on(text)})"
        )
        return f"{loss}{tokens}{loops}{limit}"

    @property
    def verdict_of_texts(self) -> str:
        """The verdict on the text of `self.texts` that lost most, with its name; empty if the user named no text.

        Before that come two reasons: a text could not be measured (`self.texts_not_measured` has its name), or a text
        lost more than the user allowed (`self.unprotected`).
        """
        if self.texts_not_measured:
            return f"no verdict: the loss is not known on {', '.join(self.texts_not_measured)}"
        if not self.texts:
            return ""
        if self.unprotected:
            names = ", ".join(text.name for text in self.unprotected)
            return f"not good: {names} lost more than was allowed"
        # A text whose loss by the first model is not known counts as the worst one.
        worst = max(self.texts, key=lambda text: self.times_of(text) or math.inf)
        if len(self.texts) == 1:
            return f"{self.verdict_on(worst)} on {worst.name}"
        return (
            f"{self.verdict_on(worst)} on {worst.name}, which lost most of {len(self.texts)} texts"
        )

    @property
    def retraining(self) -> str:
        """Say how weights were trained after pruning; empty if they were not.

        Zeros of any run (`self.num_zeros`) had masks in the training.
        """
        if not self.retrained:
            return ""
        if self.num_zeros:
            return "retrained under its masks"
        return "retrained"

    @property
    def measured_on(self) -> str:
        """Say on which text the perplexity was measured, such as "4,096 tokens of c4 that no weight was fitted to".

        Only for a report with a perplexity. `self.steps` are all runs, this one is the last.
        """
        measured = self.perplexity
        assert measured is not None
        text = measured.get("text") or "text"  # for a text without a name
        if text == OWN_TEXT:  # the model wrote it
            text = "text of its own"
        tokens = f"{measured['num_tokens']:,} tokens of {text}"
        was_trained_before = any(step.retrained for step in self.steps[:-1])
        if was_trained_before:
            return f"{tokens} that this run fitted no weight to (an earlier training may have seen them)"
        return f"{tokens} that no weight was fitted to"

    @property
    def cost_of_tokens(self) -> str:
        """Say what the removal of tokens from the vocabulary cost on held-out text; empty if that was not measured.

        `self.bits_per_byte` has bits per byte of the given model ("dense") and of the result ("pruned"), and how many
        tokens the text is for the given model ("num_tokens") and for the result ("num_tokens_pruned").
        """
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

        Empty if that was not measured, or if the run removed no tokens. `self.bits_per_byte` has bits per byte of the
        given model ("dense") and of the result ("pruned").
        """
        bits = self.bits_per_byte
        if bits is None:
            return ""
        # Perplexities of models with different tokens can't be compared. So both are computed for the same stretch of
        # text: that of an average token of the larger vocabulary.
        bytes_per_token = bits["num_bytes"] / bits["num_tokens"]
        given = _two_to(bits["dense"] * bytes_per_token)
        return verdict(
            # A verdict is about the first model. If that is not the given one, it was not measured on this text.
            dense=given if self.origin is None else None,
            pruned=_two_to(bits["pruned"] * bytes_per_token),
            num_tokens=bits["num_tokens"],
            text=bits["text"],
            vocabulary=self.model["vocabulary"]["before"],
        )

    @property
    def removed(self) -> str:
        """Say how much smaller than the first model the result is; empty if this run removed no part of it.

        Such as "3,000 of 9,000 parameters removed (33.33%), 6,000 left".
        """
        removed_now = self.totals["num_removed"]
        if not removed_now:
            return ""
        vocabulary = self.model.get("vocabulary")  # numbers of tokens, if this run removed some
        tokens = ""
        if vocabulary:
            tokens = f", with {vocabulary['kept']:,} of {vocabulary['before']:,} tokens"
        return f"{self._removed_in_all}{tokens}"

    @property
    def removed_before(self) -> str:
        """Say what earlier runs removed of the first model, and how it grew between the runs; empty if neither.

        `self.origin` describes the first model. It is `None` if that is the given model, without earlier runs.
        """
        if self.origin is None:
            return ""
        if self.origin.num_parameters is None:
            return (
                "earlier runs pruned the model, and the size that it had before them is not known"
            )
        first = self.origin.num_parameters
        # All parameters that there were before this run, without those that it was given.
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
    def growth(self) -> str:
        """Say how much larger or smaller the model became between the runs; empty if it did not.

        It may have got new tokens, for instance, or only a part of it was loaded for the next run.
        """
        added = self._added_between_runs
        if added > 0:
            return f"between the runs the model grew by {added:,} parameters"
        if added < 0:
            return f"between the runs the model lost {-added:,} parameters by other means"
        return ""

    @property
    def _removed_in_all(self) -> str:
        """Say how many parameters the first model has lost in all runs, such as "3,000 of 9,000 parameters removed".

        If the size of the first model is not known, it says how many the given model has lost in this run.
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
        if removed != removed_now:  # earlier runs have removed some, too
            by_this_run = f", {removed_now:,} of them by this run"
        growth = f"; {self.growth}" if self.growth else ""
        return (
            f"{removed:,} of {first:,} parameters removed ({removed / first:.2%}{by_this_run}), "
            f"{remaining:,} left{growth}"
        )

    @property
    def experts_left(self) -> str:
        """Say how many experts stayed, and how large their fit error is; empty if none was removed.

        `self.mixtures` are reports of the mixtures that lost experts. REAP is the method that chooses the experts.
        """
        if not self.mixtures:
            return ""
        # All mixtures lose as many experts. `saliency` has a number for each expert before the removal.
        first = self.mixtures[0]
        errors = [mixture.fit_error for mixture in self.mixtures]
        refits = ""
        if self.config["expert_refit"]:
            before = fmean(mixture.fit_error_before for mixture in self.mixtures)
            num_refitted = sum(mixture.num_refitted for mixture in self.mixtures)
            num_kept = sum(len(mixture.groups_kept) for mixture in self.mixtures)
            num_shrunk = sum(mixture.num_shrunk for mixture in self.mixtures)
            shrunk = f", {num_shrunk:,} of them in part" if num_shrunk else ""
            if num_refitted:
                refits = f", {before:.4f} before {num_refitted:,} of {num_kept:,} experts were refitted{shrunk}"
        return (
            f"{len(first.groups_kept)} of {len(first.saliency)} experts left in each of {len(errors)} mixtures (REAP), "
            f"fit error of their outputs {fmean(errors):.4f} on average, {max(errors):.4f} at most{refits}"
        )

    def __str__(self) -> str:
        """Describe the run in one line, as the terminal prints it: what was removed, errors of the operators, time.

        The statements are separated by semicolons. `removed`, `zeros_in_all`, `removed_before` and `experts_left` are
        statements already, which are empty if there is nothing to say.
        """
        totals = self.totals  # numbers over all operators, by name
        duration = f"{self.seconds.get('total', 0.0):.1f} s"  # wall time of the run
        # only decoder layers, experts or tokens were removed
        pruned_no_operator = bool(self.removed) and not self.operators
        if pruned_no_operator:
            return _joined(self.removed, self.experts_left, duration)

        if self.removed:
            what_is_left = self.removed
        else:
            zeros = (
                f"{totals['num_zeros']:,} of {totals['num_weights']:,} weights zero "
                f"({totals['sparsity']:.2%})"
            )
            what_is_left = _joined(zeros, self.zeros_in_all, self.removed_before)
        pruned = f"{totals['num_operators']} operators pruned by {self.config['method']}"

        errors = (
            f"fit error {totals['mean_fit_error']:.4f} on average, "
            f"{totals['max_fit_error']:.4f} at most"
        )
        # Operators have a held-out ratio and a held-out error, or neither. The ratio is the fit error on held-out
        # tokens, divided by that on the calibration tokens.
        if totals["held_out_ratio"] is not None:
            errors += (
                f" ({totals['held_out_ratio']:.2f} times that on "
                f"{self.calibration['held_out']['num_tokens']:,} held-out tokens, "
                f"{totals['mean_held_out_fit_error']:.4f} on average)"
            )
        if totals["mean_output_error"] is None:
            errors += ", output error not known"
        else:
            errors += (
                f", output error {totals['mean_output_error']:.4f} on average, "
                f"{totals['max_output_error']:.4f} at most"
            )
        if self.retrained:
            errors += ", before retraining"
        times = f"{duration}, of which solving {totals['solve_seconds']:.1f} s"
        return _joined(f"{pruned}, {what_is_left}", self.experts_left, errors, times)

    def __repr__(self) -> str:
        """One line, because in a notebook all fields would fill many screens.

        It has the name of the first model, the patterns of all runs since (`steps`), and numbers of this run.
        """
        name = self.first_model.name or self.model.get("class") or "model"
        return (
            f"<PruningReport of {name!r}, {patterns_of(self.steps)}: {len(self.operators)} operators in "
            f"{len(self.layers)} decoder layers; print(report) has the numbers, report.to_json() everything>"
        )

    def _repr_html_(self) -> str:
        """Write the head of the report's page as HTML, for notebooks: title, and a row for each headline."""
        # Imported here, because `headlines` imports this module.
        from optimum_fista.headlines import headlines, title

        rows = [
            f"<tr><th>{escape(one.name)}</th><td>{escape(one.value)}</td><td>{escape(one.remark)}</td></tr>"
            for one in headlines(self)
        ]
        return f"<h3>{escape(title(self))}</h3><table>{''.join(rows)}</table>"


def _joined(*statements: str) -> str:
    """Join statements by semicolons; empty ones are left out."""
    return "; ".join(statement for statement in statements if statement)


def _two_to(bits: float) -> float:
    """Two to the power of `bits`, limited, because 2**1024 is no float."""
    return float(2 ** min(bits, 1000.0))


def lines_of_unplaced(
    copied: Mapping[str, int],
    lacks: Mapping[str, str],
    fewer_experts: Mapping[str, tuple[int, int]] | None = None,
) -> list[str]:
    """Say in up to three lines which tensors of a model's files its class does not load, and what became of them.

    Without such tensors there is no line. Changes nothing.

    Args:
        copied: By module, such as "model.mtp", the number of its tensors that are copied to the result.
        lacks: By module, why the result lacks its tensors.
        fewer_experts: By mixture of a module that is copied, such as "model.layers.61.mlp.experts": how many of its
            experts stay, and of how many. `None`: no module has lost experts.
    """
    lines = []
    if copied:
        shown = ", ".join(f"{module} ({count})" for module, count in copied.items())
        lines.append(
            f"{sum(copied.values())} tensors that the model's class does not load are copied: {shown}"
        )
    if fewer_experts:
        shown = ", ".join(
            f"{mixture} ({kept} of {total} left)"
            for mixture, (kept, total) in fewer_experts.items()
        )
        lines.append(f"layers that predict more tokens lose experts, too: {shown}")
    if lacks:
        shown = ", ".join(f"{module} ({reason})" for module, reason in lacks.items())
        lines.append(f"not in the pruned model: {shown}")
    # Names of modules are those of tensors in files, which anybody may have written.
    return [spell_out_controls(line) for line in lines]

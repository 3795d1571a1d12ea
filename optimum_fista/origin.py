"""Where a pruned model comes from: the model that the user began with, and the runs since.

A model may be pruned several times, such as by `layers:0.5` and then by `2:4`. What is said of the result is said about
the first model: how much of it is gone, and how much worse the result is. So every run writes into the configuration of
its result (`config.fista_pruning["origin"]`) what the next run has to know, and the report of the next run holds it as
its `origin`. The numbers are those of earlier reports; nothing is measured again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from optimum_fista.options import as_record
from optimum_fista.plain_text import spell_out_controls_in_json


@dataclass(frozen=True)
class MeasuredPerplexity:
    """Perplexity of one model, and the tokens that it was measured on."""

    perplexity: float
    # How many tokens it was measured on.
    num_tokens: int
    # Name of their text, such as "c4"; None if it has none.
    text: str | None
    # How many tokens the model knows: the rows of its embedding.
    vocabulary: int
    # Digest of the token ids; None if the report is of a time when none was written.
    sha256: str | None = None
    bits_per_byte: float | None = None

    def is_comparable_with(self, other: MeasuredPerplexity) -> bool:
        """Tell whether both were measured on the same ids of the same vocabulary, so that they can be compared.

        `self.sha256` is the digest of the token ids. Without one the ids are not known, and the answer is no.
        """
        return (
            self.sha256 is not None
            and self.sha256 == other.sha256
            and self.vocabulary == other.vocabulary
        )


@dataclass(frozen=True)
class StepReport:
    """One run on the way from the first model to a result. A number is `None` if it is not known."""

    # In words, such as "50% unstructured" or "layers:0.5".
    pattern: str
    # Such as "obs_admm"; empty if it is not known.
    method: str = ""
    # Parameters of the whole parts that the run removed.
    num_removed: int | None = None
    # Tokens that the run removed from the vocabulary.
    num_tokens_removed: int = 0
    # Weights that were zero after the run.
    num_zeros: int | None = None
    # Parameters of the result.
    num_parameters: int | None = None
    # Of the result, before weights were trained.
    perplexity: MeasuredPerplexity | None = None
    # Whether weights were trained after the run.
    retrained: bool = False

    @property
    def removal(self) -> str:
        """Say what the run removed, such as "14,155,776 parameters" or "53,084,160 weights became zero".

        It is made of the three numbers `num_tokens_removed`, `num_removed` and `num_zeros`, which may be 0 or `None`.
        """
        removals = []
        if self.num_tokens_removed:
            removals.append(f"{self.num_tokens_removed:,} tokens")
        if self.num_removed:
            removals.append(f"{self.num_removed:,} parameters")
        if self.num_zeros:
            removals.append(f"{self.num_zeros:,} weights became zero")
        if not removals:
            return "not known"
        return ", ".join(removals)


@dataclass(frozen=True)
class OriginReport:
    """The model that the user began with, and the runs between it and the model that the latest run was given."""

    # A Hub id, or the last part of a path; empty if it is not known.
    name: str = ""
    num_parameters: int | None = None
    # In which it was pruned, such as "bfloat16".
    dtype: str | None = None
    # Of the tensors of its decoder layers (`model["sha256"]` of the first report).
    sha256: str | None = None
    perplexity: MeasuredPerplexity | None = None
    # Bits per byte on held-out texts that the user named, by the digest of the text (`TextReport.sha256`).
    texts: dict[str, float] = field(default_factory=dict)
    # In order; empty if the latest run was given the first model itself.
    steps: list[StepReport] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse a size that no model has: shares are divided by it. TypeError, as for a field of a wrong type."""
        if self.num_parameters is not None and self.num_parameters < 1:
            raise TypeError(f"the first model has {self.num_parameters} parameters")


def read_origin(config: Any) -> OriginReport | None:
    """Read from a model's configuration where the model comes from; `None` if it was never pruned. Changes nothing.

    Args:
        config: Configuration of the model that a run is given. `config.fista_pruning` was written by the run that made
            the model, or came with the model from other people. If its origin can't be read, only the patterns of the
            runs are known.
    """
    # The summary of the latest run (`folder.writing.summary`). Every summary has a pattern.
    entry = getattr(config, "fista_pruning", None)
    if not isinstance(entry, dict) or "pattern" not in entry:
        return None

    # A copy in which control characters are written out, such as `\x1b`: other people may have written the entry, and
    # its texts are printed.
    entry = spell_out_controls_in_json(entry)
    try:
        origin = as_record(OriginReport, entry["origin"])
        *earlier, latest = origin.steps  # ValueError if there is none
    except (AttributeError, KeyError, TypeError, ValueError):
        # An entry of other people, or of an older version, which wrote no origin, but only patterns: those of earlier
        # runs in `pruned_before`.
        patterns = entry.get("pruned_before")
        if not isinstance(patterns, list):
            patterns = []
        origin = OriginReport()
        earlier = [StepReport(str(pattern)) for pattern in patterns]
        latest = StepReport(str(entry["pattern"]))
    # A training comes after the run that wrote the entry, and notes itself beside `origin`.
    if entry.get("retrained"):
        latest = replace(latest, retrained=True)
    return replace(origin, steps=[*earlier, latest])


def patterns_of(steps: Sequence[StepReport]) -> str:
    """Name the patterns of all runs, which are `steps` in order, such as "layers:0.5, then 2:4"."""
    return ", then ".join(step.pattern for step in steps)

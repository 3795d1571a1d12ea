"""What the candidates of `prune --target-size` cost on held-out texts, found before the output is written.

The *cost* on a text is the bits per byte of the smaller model, divided by those of the dense model: 1.02 is 2% more.
`measure_costs` finds what tokens cost in one pass over the decoder layers, without a run. What channels cost is found
by *trials*: ordinary runs on a few sequences of text, whose results are measured and deleted. The `Costs` that it
returns then say what a candidate costs (`Costs.of`), and up to which size limits are kept (`Costs.possible_size`).
"""

import math
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from optimum_fista.cli.calibration_batches import calibration_batches
from optimum_fista.cli.overview import estimate_of, require_disk
from optimum_fista.cli.prune_request import PruneRequest
from optimum_fista.cli.size_candidates import Candidate
from optimum_fista.folder.output import JOURNAL, locked_output
from optimum_fista.memory import size_text
from optimum_fista.pruner import FistaPruner
from optimum_fista.removal.token_loss import measure_plans
from optimum_fista.text.loss import MeasuredText, losses_of_folder

# Sequences of calibration text in a trial.
_MOST_SEQUENCES = 8
# Sizes that are tried between the dense model and the size that the user wants, if that one costs too much.
_NUM_SIZES = 100


@dataclass(frozen=True)
class Costs:
    """What was measured: costs on texts, by the number of parameters that were removed.

    Each mapping has an entry for 0 removed parameters, the dense model, whose costs are 1.
    """

    texts: Sequence[MeasuredText]
    of_tokens: Mapping[int, Sequence[float]]  # a cost for each text, if only tokens go
    of_channels: Mapping[int, Sequence[float]]  # a cost for each text, if only channels go

    def of(self, candidate: Candidate) -> list[float]:
        """Predict what a candidate costs on each text; without what was not measured of it."""
        return self._predicted(candidate.num_in_tokens, candidate.num_in_channels)

    def has_channels_of(self, candidate: Candidate) -> bool:
        """Tell whether it was measured what the channels of a candidate cost."""
        return candidate.num_in_channels in self.of_channels

    def keep_to_limits(self, costs: Sequence[float]) -> bool:
        """Tell whether a cost on each text is at most what `--protect` allows."""
        return all(
            text.at_most is None or cost <= text.at_most
            for text, cost in zip(self.texts, costs, strict=True)
        )

    def words_on(self, costs: Sequence[float]) -> str:
        """Write a cost on each text, such as "code.txt 1.034 times (1.02 allowed), german.txt 1.291 times"."""
        words = list[str]()
        for text, cost in zip(self.texts, costs, strict=True):
            allowed = "" if text.at_most is None else f" ({text.at_most:g} allowed)"
            words.append(f"{text.name} {cost:.3f} times{allowed}")
        return ", ".join(words)

    def possible_size(self, candidates: Sequence[Candidate]) -> float | None:
        """Estimate the smallest size that keeps to the limits, as a share of the dense model's parameters.

        It is looked for between the size of `candidates`, which cost too much, and the dense model: `_NUM_SIZES` sizes
        are tried from the smallest on. The share is rounded up to three digits. `None` if none of these sizes keeps to
        the limits. Changes nothing.
        """
        dense_parameters = candidates[0].dense_parameters
        most_removed = max(dense_parameters - other.num_parameters for other in candidates)
        most_in_tokens = max(other.num_in_tokens for other in candidates)
        # Of each candidate, which share of the tokens that may go does go: all, half of them, or none.
        shares_of_tokens = [
            other.num_in_tokens / most_in_tokens if most_in_tokens else 0.0 for other in candidates
        ]

        for number in range(_NUM_SIZES - 1, 0, -1):
            removed = most_removed * number / _NUM_SIZES
            for share in shares_of_tokens:
                # Of the tokens that could go, the same share goes as in the candidate, and channels for the rest.
                in_tokens = share * min(removed, most_in_tokens)
                costs = self._predicted(in_tokens, removed - in_tokens)
                if self.keep_to_limits(costs):
                    return math.ceil(1e3 * (1 - removed / dense_parameters)) / 1e3
        return None

    def _predicted(self, in_tokens: float, in_channels: float) -> list[float]:
        """Predict the cost on each text if tokens with `in_tokens` parameters go, and channels with `in_channels`.

        `self.of_tokens` and `self.of_channels` are the costs that were measured, by such numbers. Between two numbers
        of parameters that were measured, the cost is interpolated on a line.
        """
        predicted = list[float]()
        for index in range(len(self.texts)):
            cost_of_tokens = _interpolated(self.of_tokens, in_tokens, index)
            cost_of_channels = _interpolated(self.of_channels, in_channels, index)
            # An assumption: each factor was measured on the model with all parts of the other kind. Tokens and
            # channels are in different tensors. The real loss is measured after the run.
            predicted.append(cost_of_tokens * cost_of_channels)
        return predicted


def _interpolated(measured: Mapping[int, Sequence[float]], number: float, index: int) -> float:
    """Interpolate the cost on text `index` for a number of removed parameters, which may be no whole number.

    `measured` has the costs on all texts, by such numbers. For more than the largest of these, the cost is that of the
    largest.
    """
    numbers = sorted(measured)  # `interp` needs them in rising order
    costs = [measured[other][index] for other in numbers]
    return float(np.interp(number, numbers, costs))


def measure_costs(
    candidates: Sequence[Candidate],
    texts: Sequence[MeasuredText],
    *,
    with_trials: bool,
) -> Costs:
    """Measure what the tokens and, with trials, the channels of candidates cost on texts.

    Trials write into a temporary folder beside the output, and delete it. Standard error says how many there are and
    how much disk they need. A model of the Hub is downloaded into its cache.

    Args:
        candidates: Those among which to choose. They are for one model and one output.
        texts: Held-out texts, as `require_texts` returns them.
        with_trials: Whether channels are tried. If not, only what tokens cost is known.

    Raises:
        ValueError: If a loss is NaN or Inf, or a trial can't run.
        OSError: If the disk has too little room for a trial.
    """
    trials = dict[int, PruneRequest]()  # by the number of parameters that they remove
    if with_trials:
        trials = _trials(candidates)

    of_dense = [1.0] * len(texts)
    of_tokens: dict[int, Sequence[float]] = {0: of_dense}
    of_channels: dict[int, Sequence[float]] = {0: of_dense}
    dense_bits: list[float] | None = None  # bits per byte of the dense model, for each text
    # The plans of tokens, by the number of parameters that they remove.
    plans = {other.num_in_tokens: other.tokens for other in candidates if other.tokens is not None}
    if plans:
        device = candidates[0].request.device  # all have the same
        # For each plan, the bits per byte on each text: of the dense model, and with fewer tokens (`pruned`).
        losses = measure_plans([*plans.values()], texts, device=device, progress=True)
        dense_bits = [loss.dense for loss in losses[0]]
        for num_removed, of_plan in zip(plans, losses, strict=True):
            of_tokens[num_removed] = [loss.pruned / loss.dense for loss in of_plan]
    if trials:
        of_channels |= _costs_of_trials(trials, texts, dense_bits)
    return Costs(texts, of_tokens, of_channels)


def _costs_of_trials(
    trials: Mapping[int, PruneRequest],
    texts: Sequence[MeasuredText],
    dense_bits: Sequence[float] | None,
) -> dict[int, list[float]]:
    """Run the trials, and return what each costs on each text, by the number of parameters that it removes.

    `trials` are by this number, too. `dense_bits` are the bits per byte of the dense model on each text; `None`: they
    are measured here, first. Standard error says which trial runs.
    """
    if dense_bits is None:
        request = next(iter(trials.values()))  # any: all are for one model
        dense_bits = _bits_of(request.model, texts, request, "Measuring the dense model")

    costs: dict[int, list[float]] = {}
    for number, (num_removed, request) in enumerate(trials.items(), start=1):
        print(f"trial {number} of {len(trials)}: {request.config.pattern}", file=sys.stderr)
        trial_bits = _bits_of_trial(request, texts)
        costs[num_removed] = [
            bits / dense for bits, dense in zip(trial_bits, dense_bits, strict=True)
        ]
    return costs


def _trials(candidates: Sequence[Candidate]) -> dict[int, PruneRequest]:
    """Make the requests of the trials, one for each share of channels, and say on standard error what they need.

    Returns them by the number of parameters that they remove. They have the options of the user, but at most
    `_MOST_SEQUENCES` sequences. OSError if the disk has too little room.
    """
    trials = dict[int, PruneRequest]()
    disk_bytes = 0  # of the largest one
    for candidate in candidates:
        if candidate.channels is None:
            continue
        num_samples = min(candidate.request.num_samples, _MOST_SEQUENCES)
        num_samples = max(num_samples, len(candidate.request.sources))  # one of each text
        request = replace(candidate.request, num_samples=num_samples)
        estimate = estimate_of(request)
        needed = sum(estimate.disk_bytes.values())
        require_disk(needed, request.output)
        disk_bytes = max(disk_bytes, needed)
        trials[candidate.num_in_channels] = request.with_choices(
            batch_size=estimate.batch_size, source=estimate.calibration
        )
    if trials:
        # Any request: all have the same output and number of sequences.
        request = next(iter(trials.values()))
        patterns = ", ".join(other.config.pattern for other in trials.values())
        print(
            f"what channels cost is tried first ({patterns}; {request.num_samples} sequences each): each trial writes "
            f"up to {size_text(disk_bytes)} beside {request.output}, and deletes that before the next one",
            file=sys.stderr,
        )
    return trials


def _bits_of_trial(request: PruneRequest, texts: Sequence[MeasuredText]) -> list[float]:
    """Prune the model as a request says, but into a temporary folder, and measure the result: bits per byte of texts.

    The folder is in the unfinished folder of the output, in the part where a run keeps what it needs to resume
    (JOURNAL). There the next run deletes it if this process is killed. Otherwise it is deleted at the end. No other
    process can write to the output meanwhile.
    """
    with (
        locked_output(request.output) as unfinished,
        tempfile.TemporaryDirectory(prefix="offload-", dir=unfinished / JOURNAL) as folder,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # the real run gives its own
        result = Path(folder) / "model"
        batches = calibration_batches(request, request.device, Path(folder))
        # Held-out batches would measure a perplexity, which takes time and which nobody reads.
        to_calibrate_on = [
            batch for batch in batches if isinstance(batch, Tensor) or "held_out" not in batch
        ]
        pruner = FistaPruner(request.config, storage_device=request.storage_device)
        pruner.prune(
            request.model,
            to_calibrate_on,
            output_dir=result,
            device=request.device,
            dtype=request.dtype,
        )
        return _bits_of(str(result), texts, request, "Measuring the trial")


def _bits_of(
    model: str, texts: Sequence[MeasuredText], request: PruneRequest, label: str
) -> list[float]:
    """Measure the bits per byte of texts by a model in files, on the device and in the dtype of a request.

    `model` is a folder or a Hub id. `label` is for the progress bar.
    """
    losses = losses_of_folder(
        model,
        texts,
        device=request.device,
        compute_dtype=request.config.compute_dtype,
        progress=True,
        label=label,
    )
    return [loss.bits_per_byte for loss in losses]

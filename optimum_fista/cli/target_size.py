"""`prune --target-size`: how many tokens and how many channels are removed, chosen by what they cost on held-out texts.

`plan_size` finds the candidates (`size_candidates`: all tokens that may go, half of them or none, and channels for the
rest), finds what each costs (`size_costs`), prints that, and returns the cheapest that keeps to every `--protect`. If
both tokens and channels are removed, there are two runs: `remove_first` writes the model with fewer tokens into a
folder of its own, and an ordinary run removes channels from that.

A *channel* is a hidden unit of the MLPs: a column of the down projection with the rows that compute its input. A
`TokensPlan` is a model's files with fewer tokens, planned, but not yet written. The *cost* on a text is the bits per
byte of the smaller model, divided by those of the dense model.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from optimum_fista.atomic import read_record
from optimum_fista.cli.flags import given_options
from optimum_fista.cli.overview import cost_of_tokens
from optimum_fista.cli.prune_request import (
    measured_sources,
    protected_sources,
)
from optimum_fista.cli.size_candidates import Candidate, find_candidates
from optimum_fista.cli.size_costs import Costs, measure_costs
from optimum_fista.config import FistaPruningConfig
from optimum_fista.folder.checkpoint import REPORT_FILE, read_report
from optimum_fista.folder.output import RUN_FILE, require_output, unfinished_folder
from optimum_fista.options import PruningOptions
from optimum_fista.prune.measuring import require_texts
from optimum_fista.prune.ranks import launched_processes
from optimum_fista.public_names import public_name
from optimum_fista.removal.counted_model import CountedModel, count_model
from optimum_fista.removal.tokens import write_plan
from optimum_fista.removal.tokens_plan import TokensPlan, plan_counted
from optimum_fista.source import loading
from optimum_fista.source.stored_tensor import read_stored
from optimum_fista.text.loss import MeasuredText
from optimum_fista.text.one_text import require_different_texts, require_held_out
from optimum_fista.text.sources import text_of_model, usual_texts
from optimum_fista.text.text_source import TextSource

# Held-out pieces of the counted text that are measured if the user names no text: about 12,000 tokens.
_MOST_PIECES = 12


def plan_size(arguments: argparse.Namespace) -> Candidate:
    """Choose what is removed until `--target-size` of the parameters is left, and print the candidates.

    With `--dry-run` nothing is measured, and the candidate that removes most channels is returned. If an earlier start
    has begun the run of a candidate, which can resume, that candidate is returned. If no token can be removed, a line
    on standard error says why. `arguments` are those of `prune`, and stay as they are.

    Leaves no file on disk, except downloads in the cache (of a Hub id, of texts). Files that a killed process left
    beside the output are removed. ValueError if the size can't be reached, or every candidate costs more than
    `--protect` allows.
    """
    _require_flags(arguments)
    sources = arguments.calibration
    if not sources:
        sources = [usual_texts().to_calibrate_on]
    # Errors of the files are errors of the command; those below only mean that no token can be removed.
    counted_sources = [source for source in sources if source != "self"]
    counted_texts = [
        text_of_model(arguments.model, source, split="calibration") for source in counted_sources
    ]
    require_different_texts(counted_sources, counted_texts)
    measured = measured_sources(arguments)
    require_held_out(measured, sources)
    texts = require_texts(
        arguments.model,
        {
            source: text_of_model(arguments.model, source, split="test").joined
            for source in measured
        },
        protected_sources(arguments),
    )

    counted: CountedModel | None = None
    # The plan that removes all tokens that the text does not use and that may go.
    without_unused: TokensPlan | None = None
    try:
        counted, without_unused = _count(arguments, sources, counted_texts)
        dense = counted.model
    except ValueError as error:
        print(f"no token is removed: {error}", file=sys.stderr)
        dense = loading.model_without_weights(loading.read_config(arguments.model))
    candidates = find_candidates(arguments, dense, counted, without_unused)

    if arguments.dry_run:
        print(*map(str, candidates), sep="\n")
        if len(candidates) > 1:
            print("which of these is chosen is found by trials, which a dry run does not make")
        return candidates[-1]

    begun = _begun(candidates)
    if begun is not None:
        print(f"the run that was begun goes on: {begun}", file=sys.stderr)
        return begun
    for candidate in candidates:
        candidate.request.require_possible()
    if not texts and counted is not None and counted.held_out:
        # The user names no text: pieces of the counted text are measured that were left out of the counting.
        name = f"{counted.text_name} (held out)"
        texts = [MeasuredText(name, counted.held_out[:_MOST_PIECES], at_most=None)]
    return _chosen(candidates, texts)


def _begun(candidates: Sequence[Candidate]) -> Candidate | None:
    """Find the candidate whose run an earlier start of the command has begun; `None` if there is none.

    Such a run resumes: what it costs need not be found again.
    """
    for candidate in candidates:
        request = candidate.request
        # A run that removes tokens only is short, and does not resume. With --overwrite a run starts anew.
        if candidate.channels is None or request.overwrite:
            continue
        # What the unfinished run was asked to do; empty if there is none.
        fingerprint = read_record(unfinished_folder(request.output) / RUN_FILE) or {}
        if fingerprint.get("config", {}).get("pattern") == str(candidate.channels):
            return candidate
    return None


def _chosen(
    candidates: Sequence[Candidate],
    texts: Sequence[MeasuredText],
) -> Candidate:
    """Choose the cheapest candidate that keeps to `--protect`, and print all candidates on standard error.

    The cheapest one has the least mean of its costs on the texts (`Costs.of`). Trials write into a temporary folder
    beside the output, and delete it. Without texts, or if the memory is too small to measure them, it is the first one,
    and a line says why.

    Args:
        candidates: Those that are possible, the one with the fewest tokens left first.
        texts: Those to measure on, with the limits of `--protect`.

    Raises:
        ValueError: If no candidate keeps to `--protect`; it says what each costs, and what is possible.
    """
    has_limits = any(text.at_most is not None for text in texts)
    # With one candidate and no limit, nothing depends on what its channels cost.
    with_trials = len(candidates) > 1 or has_limits
    has_costs_before_the_run = with_trials or candidates[0].tokens is not None
    costs: Costs | None = None
    # Why nothing is measured; said only if that is so.
    reason = "the text is too short to hold some of it out: pass --measure FILE"
    if texts and has_costs_before_the_run:
        try:
            costs = measure_costs(candidates, texts, with_trials=with_trials)
        except (RuntimeError, MemoryError) as error:
            reason = f"{type(error).__name__}: {error}"

    chosen = candidates[0] if costs is None else _cheapest(candidates, costs)
    for candidate in candidates:
        mark = "->" if candidate is chosen else "  "
        print(f"{mark} {_line(candidate, costs)}", file=sys.stderr)
    if len(candidates) > 1 and costs is not None:
        among = " of those that keep to --protect" if has_limits else ""
        print(
            f"-> is chosen: it has the least mean{among} (a number is times the bits per byte of the dense model, by "
            "prediction; the texts of --measure and --protect are measured on the result, too)",
            file=sys.stderr,
        )
    elif costs is None and has_costs_before_the_run:
        print(
            f"what this costs is not measured ({reason}), so as many tokens go as may go",
            file=sys.stderr,
        )
    return chosen


def _cheapest(candidates: Sequence[Candidate], costs: Costs) -> Candidate:
    """Return the candidate with the least mean cost of those that keep to `--protect`; ValueError if none does."""
    within_limits = [other for other in candidates if costs.keep_to_limits(costs.of(other))]
    if not within_limits:
        raise ValueError(_refusal(candidates, costs))
    return min(within_limits, key=lambda other: fmean(costs.of(other)))


def _line(candidate: Candidate, costs: Costs | None) -> str:
    """Say what a candidate removes and costs, as far as `costs` knows that; `None`: nothing was measured."""
    line = str(candidate)
    knows_channels = False
    if costs is not None:
        line += f"; {costs.words_on(costs.of(candidate))}"
        knows_channels = costs.has_channels_of(candidate)
    if candidate.channels is not None and not knows_channels:
        line += "; what the channels cost is measured after the run"
    return line


def _refusal(candidates: Sequence[Candidate], costs: Costs) -> str:
    """Write the error that no candidate keeps to `--protect`, with what each costs and which size would keep to it."""
    each = "; ".join(_line(candidate, costs) for candidate in candidates)
    size = costs.possible_size(candidates)
    if size is None:
        advice = "Of the larger sizes, too, none is likely to keep to the limits"
    else:
        advice = (
            f"--target-size {size:g} may keep to the limits (an estimate, between these numbers)"
        )
    return (
        "--protect: each way to reach this size makes a text take more bits per byte than is allowed: "
        f"{each}. {advice}. Nothing is written."
    )


def remove_first(plan: TokensPlan, folder: Path, *, device: str | None, overwrite: bool) -> None:
    """Write the folder of the model with fewer tokens, and say what that costs on standard error.

    A folder of an earlier start of the same run is replaced. With `overwrite`, a folder of another run of the same
    pattern is replaced, too. Any other folder is refused. `device` computes the loss; `None`: the accelerator if there
    is one. Adds the loss and the seconds to the report of `plan`.
    """
    may_overwrite = overwrite
    if (folder / REPORT_FILE).exists():
        # Results of the measuring, such as `texts`, are not compared: they do not change the files of the model.
        earlier = read_report(folder)
        planned = plan.report
        is_same_run = (
            earlier.config == planned.config
            and earlier.calibration == planned.calibration
            # The digest of the dense model is noted when the result is written, so a plan has none.
            and earlier.model | {"sha256": None} == planned.model | {"sha256": None}
            and earlier.retrained == planned.retrained
            and _holds_tensors_of(folder, plan.source)
        )
        has_same_pattern = earlier.config["pattern"] == planned.config["pattern"]
        may_overwrite = is_same_run or (overwrite and has_same_pattern)
    report = write_plan(
        plan,
        folder,
        started=time.perf_counter(),
        device=device,
        dtype="auto",  # the second run converts all weights
        overwrite=may_overwrite,
        progress=True,
    )
    print(report, *cost_of_tokens(report), f"saved to {folder}", sep="\n", file=sys.stderr)


def _holds_tensors_of(folder: Path, source: Path) -> bool:
    """Tell whether `folder` can be made of `source`: every tensor that has the same shape in both has equal values.

    Names and sizes do not tell that, because two models may have the same. Only the embedding and the head have other
    shapes in a `folder` that was made of `source`, with fewer tokens. Reads both, changes nothing.
    """
    stored = read_stored(folder)
    originals = read_stored(source)
    same_shape = [n for n in stored if n in originals and stored[n].shape == originals[n].shape]
    if not same_shape:
        return False
    return all(stored[name].equals(originals[name]) for name in same_shape)


def _require_flags(arguments: argparse.Namespace) -> None:
    """Refuse flags that make no sense with `--target-size`, and an output that can't be written.

    Raises ValueError, or an error of `require_output`, such as FileExistsError. `arguments` are those of `prune`. If
    the output is refused, files that a killed process left beside it are removed; nothing else changes.
    """
    # the options of pruning that the user gives, by name
    passed = given_options(arguments, PruningOptions)
    for other in ("sparsity", "pattern"):
        if other in passed:
            raise ValueError(f"--target-size says what is removed: pass it without --{other}.")
    if not 0 < arguments.target_size < 1:
        raise ValueError(
            f"--target-size {arguments.target_size:g}: pass the share of the parameters that is to be left, in (0, 1)."
        )
    if launched_processes() > 1:
        raise ValueError(
            "--target-size makes two runs: pass vocab:unused and channels:SHARE to several processes."
        )
    if arguments.output is not None:  # before the tokens are counted
        require_output(arguments.output, arguments.overwrite, source=arguments.model)


def _count(
    arguments: argparse.Namespace, sources: list[str], texts: list[TextSource]
) -> tuple[CountedModel, TokensPlan]:
    """Count the tokens of texts, and plan to remove all tokens that may go; ValueError if none can go.

    Downloads the weights of a Hub id. `arguments` are those of `prune`; `arguments.keep_tokens` are tokens that have to
    stay. `sources` are the names of the texts, such as "c4"; "self" among them is refused.
    """
    if "self" in sources:
        raise ValueError("a model's own text is too short to tell which tokens are rare")
    documents = itertools.chain.from_iterable(text.documents for text in texts)
    text_name = ", ".join(map(public_name, sources))
    counted = count_model(arguments.model, documents, text_name=text_name)

    options = given_options(arguments, PruningOptions)
    config = FistaPruningConfig(
        pattern="vocab:unused",
        keep_tokens=tuple(arguments.keep_tokens or ()),
        compute_dtype=options.get("compute_dtype", "auto"),  # in which losses are measured
    )
    return counted, plan_counted(counted, config)

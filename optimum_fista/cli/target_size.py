"""`prune --target-size`: what to remove for a given size: tokens first, as far as texts allow, then channels.

What tokens cost on held-out texts is measured before anything is written (`--measure`, `--protect`; without them on
text that is held out of the counting): it takes one pass over the decoder layers and no solve. What channels cost is
known after their run only.

`plan_size` decides it before anything is written, and makes a `SizePlan`. If tokens are not enough, there are two runs:
`remove_first` writes the model with fewer tokens into a folder of its own, and an ordinary run removes channels from
that. A *channel* is a hidden unit of the MLPs: a column of the down projection with the rows that compute its input. A
`TokensPlan` is a model's files with fewer tokens, planned, but not yet written.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from optimum_fista.cli.flags import given_options
from optimum_fista.cli.overview import cost_of_tokens
from optimum_fista.cli.prune_request import (
    measured_sources,
    protected_sources,
    require_held_out,
)
from optimum_fista.config import FistaPruningConfig
from optimum_fista.folder.checkpoint import REPORT_FILE, read_report
from optimum_fista.folder.output import require_output
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.options import PruningOptions
from optimum_fista.prune.measuring import require_texts
from optimum_fista.prune.ranks import launched_processes
from optimum_fista.public_names import public_name
from optimum_fista.records import TextReport
from optimum_fista.removal.counted_model import CountedModel, count_model
from optimum_fista.removal.parts import ModelOutline
from optimum_fista.removal.token_loss import measure_plans
from optimum_fista.removal.tokens import write_plan
from optimum_fista.removal.tokens_plan import TokensPlan, plan_counted
from optimum_fista.solve.patterns import PartShare
from optimum_fista.source import loading
from optimum_fista.source.stored_tensor import read_stored
from optimum_fista.text.loss import MeasuredText
from optimum_fista.text.sources import TextSource, load_text, usual_texts
from optimum_fista.tokens_removal import TokensRemoval

# Held-out pieces of the counted text that are measured if the user names no text: about 12,000 tokens.
_MOST_PIECES = 12


@dataclass(frozen=True)
class SizePlan:
    """What is removed from a model until the size is reached: tokens, channels, or tokens and then channels."""

    dense_parameters: int  # of the model as it is
    tokens: TokensPlan | None  # removed first; None: no token is removed
    channels: PartShare | None  # removed in an ordinary run after that; None: tokens are enough
    num_parameters: int  # that the model has in the end
    # what the removal of the tokens costs on held-out texts, as far as measured
    losses: Sequence[TextReport] = ()

    def lines(self) -> Iterator[str]:
        """Yield one line for people for each step: what it removes, and how many parameters are left after it.

        `self.tokens` is the plan of the first step, and `self.channels` the share of the second; either may be `None`.
        """
        if self.tokens is not None:
            model = self.tokens.report.model
            before = model["vocabulary"]["before"]
            num_removed = before - model["vocabulary"]["kept"]
            pattern = self.tokens.report.config["pattern"]
            yield (
                f"{pattern}: {num_removed:,} of {before:,} tokens, which the text rarely or never has, go first; "
                f"{self._parameters(model['num_parameters'])}"
            )
        for loss in self.losses:
            yield (
                f"without these tokens, {loss.name} has {loss.pruned:.3f} bits per byte instead of {loss.dense:.3f} "
                f"({loss.pruned / loss.dense:.3f} times)"
            )
        if self.channels is not None:
            then = "" if self.tokens is None else "then "
            yield f"{then}{self.channels}: {self._parameters(self.num_parameters)}"
            yield "what the channels cost is measured after the run"

    def second_run(self, arguments: argparse.Namespace) -> argparse.Namespace:
        """Return a copy of the arguments of the whole command, for the ordinary run that removes the channels.

        It has the pattern of the channels, only the first source of text, and no tokens to keep.
        """
        sources = arguments.calibration
        if sources is None:
            sources = [usual_texts().to_calibrate_on]
        elif "self" not in sources:  # with others beside it, that is an error of the ordinary run
            sources = sources[:1]

        second = argparse.Namespace(**vars(arguments))
        second.pattern = str(self.channels)
        second.keep_tokens = None
        second.calibration = sources
        return second

    def _parameters(self, number: int) -> str:
        """Say how many parameters are left, and which share of all that is."""
        return f"{number:,} parameters are left ({number / self.dense_parameters:.2%})"


def plan_size(arguments: argparse.Namespace) -> SizePlan:
    """Choose what is removed until `--target-size` of the parameters is left, and count tokens for that.

    `arguments` are those of `prune`, and stay as they are. Writes no model, but downloads the files of a Hub id into
    the cache. Tokens that the text does not use are removed first. If no token can be removed, a line on standard error
    says why, and only channels are removed. ValueError if the size can't be reached.
    """
    target_share = arguments.target_size  # of the parameters, in (0, 1)
    _require_flags(arguments)
    sources = arguments.calibration
    if not sources:
        sources = [usual_texts().to_calibrate_on]
    # Errors of the files are errors of the command; those below only mean that no token can be removed.
    texts = [load_text(source, "calibration") for source in sources if source != "self"]
    measured = measured_sources(arguments)
    require_held_out(measured, sources)
    texts_to_measure = require_texts(
        arguments.model,
        {source: load_text(source, "test").joined for source in measured},
        protected_sources(arguments),
    )
    try:
        counted = _count(arguments.model, sources, texts)
        keep = tuple(arguments.keep_tokens or ())
        unused = FistaPruningConfig(pattern="vocab:unused", keep_tokens=keep)
        tokens = plan_counted(counted, unused)
    except ValueError as error:
        print(f"no token is removed: {error}", file=sys.stderr)
        model = loading.model_without_weights(loading.read_config(arguments.model))
        dense_parameters = model.num_parameters()
        share, num_parameters = _channels(model, target_share * dense_parameters, target_share)
        return SizePlan(
            dense_parameters=dense_parameters,
            tokens=None,
            channels=share,
            num_parameters=num_parameters,
        )

    dense_parameters = counted.model.num_parameters()
    most = target_share * dense_parameters
    if tokens.model.num_parameters() <= most:
        pattern = _fewer_tokens(tokens, most)
        enough = FistaPruningConfig(pattern=pattern, keep_tokens=keep)
        tokens = plan_counted(counted, enough)
        channels: PartShare | None = None
        num_parameters = tokens.model.num_parameters()
    else:
        # As many tokens as the text uses stay, but not only those: by the share, tokens that other text is likely to
        # use stay instead of some that this text has once.
        vocabulary = tokens.report.model["vocabulary"]
        request = TokensRemoval.keeping(vocabulary["kept"], vocabulary["before"])
        tokens = plan_counted(counted, FistaPruningConfig(pattern=str(request), keep_tokens=keep))
        channels, num_parameters = _channels(tokens.model, most, target_share)
    return SizePlan(
        dense_parameters=dense_parameters,
        tokens=tokens,
        channels=channels,
        num_parameters=num_parameters,
        losses=_measured(counted, tokens, texts_to_measure, arguments),
    )


def remove_first(plan: TokensPlan, folder: Path, *, device: str | None, overwrite: bool) -> None:
    """Write the folder of the model with fewer tokens, and say what that costs on standard error.

    A folder of an earlier start of the same run is replaced. With `overwrite`, a folder of another run of the same
    pattern is replaced, too. Any other folder is refused. `device` computes the loss; `None`: the accelerator if there
    is one. Adds the loss and the seconds to the report of `plan`.
    """
    if (folder / REPORT_FILE).exists():
        earlier = read_report(folder)
        planned = plan.report
        is_same_run = (
            earlier.config == planned.config
            and earlier.calibration == planned.calibration
            and earlier.model == planned.model
            and earlier.retrained == planned.retrained
            and _holds_tensors_of(folder, plan.source)
        )
        has_same_pattern = earlier.config["pattern"] == planned.config["pattern"]
        overwrite = is_same_run or (overwrite and has_same_pattern)
    report = write_plan(
        plan,
        folder,
        started=time.perf_counter(),
        device=device,
        dtype="auto",  # the second run converts all weights
        overwrite=overwrite,
        progress=True,
    )
    print(report, *cost_of_tokens(report), f"saved to {folder}", sep="\n", file=sys.stderr)


def _holds_tensors_of(folder: Path, source: Path) -> bool:
    """Tell whether all tensors of one shape in both folders are equal: two models may have one name and one size.

    The embedding and the head have other shapes in `folder`, if it was made of `source`. Reads both, changes nothing.
    """
    stored = read_stored(folder)
    originals = read_stored(source)
    shared = [n for n in stored if n in originals and stored[n].shape == originals[n].shape]
    return bool(shared) and all(stored[name].equals(originals[name]) for name in shared)


def _require_flags(arguments: argparse.Namespace) -> None:
    """Refuse flags that make no sense with `--target-size`, and an output that can't be written.

    Raises ValueError, or an error of `require_output`, such as FileExistsError. `arguments` are those of `prune`.
    """
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


def _count(model: str, sources: list[str], texts: list[TextSource]) -> CountedModel:
    """Count the tokens of texts; downloads the weights of a Hub id.

    `model` is a folder or a Hub id. `sources` are the names of the texts, such as "c4"; "self" among them is refused.
    """
    if "self" in sources:
        raise ValueError("a model's own text is too short to tell which tokens are rare")
    documents = itertools.chain.from_iterable(text.documents for text in texts)
    text_name = ", ".join(map(public_name, sources))
    return count_model(model, documents, text_name=text_name)


def _measured(
    counted: CountedModel,
    tokens: TokensPlan,
    texts: Sequence[MeasuredText],
    arguments: argparse.Namespace,
) -> list[TextReport]:
    """Measure what the removal of tokens costs on texts; refuse a plan that breaks `--protect`.

    Plans that remove a half, a quarter and an eighth of these tokens are measured in the same pass if a text is
    protected, so that the error says what is possible. Nothing is written. If the loss can't be computed, a line on
    standard error says why, and nothing is returned.

    Args:
        counted: The model with its counts; text that was held out of them is measured if `texts` is empty.
        tokens: The plan that leaves the size which the user wants, or removes all tokens that may go before channels.
        texts: Those of `--measure` and `--protect`, which have their limits. Without them a dry run measures nothing.
        arguments: Those of `prune`.
    """
    if not texts and counted.held_out and not arguments.dry_run:
        held_out = counted.held_out[:_MOST_PIECES]
        texts = [MeasuredText(counted.text_name or "held-out text", held_out, at_most=None)]
    if not texts:
        return []
    plans = [tokens]
    is_protected = any(text.at_most is not None for text in texts)
    if is_protected:
        plans += _smaller_removals(counted, tokens)
    try:
        losses = measure_plans(plans, texts, device=arguments.device, progress=True)
    except (RuntimeError, MemoryError) as error:  # also if memory runs out
        print(
            f"what the tokens cost is not measured ({type(error).__name__}: {error})",
            file=sys.stderr,
        )
        return []

    broken = _broken(losses[0])
    if not broken:
        return losses[0]
    dense_parameters = counted.model.num_parameters()
    left = tokens.model.num_parameters() / dense_parameters
    advice = "no number of tokens that was tried keeps to that"
    for plan, of_plan in zip(plans[1:], losses[1:], strict=True):
        if not _broken(of_plan):
            possible = math.ceil(1e4 * plan.model.num_parameters() / dense_parameters) / 1e4
            advice = f"--target-size {possible:g} keeps to that"
            break
    worst = max(broken, key=lambda loss: loss.pruned / loss.dense)
    raise ValueError(
        f"--protect: with {left:.2%} of the parameters, by fewer tokens alone, {worst.name} has "
        f"{worst.pruned / worst.dense:.3f} times its bits per byte, and {worst.at_most:g} times are allowed: {advice}. "
        "Nothing is written."
    )


def _broken(losses: Sequence[TextReport]) -> list[TextReport]:
    """The texts whose bits per byte become more than is allowed."""
    return [
        loss
        for loss in losses
        if loss.at_most is not None and loss.pruned > loss.at_most * loss.dense
    ]


def _smaller_removals(counted: CountedModel, tokens: TokensPlan) -> list[TokensPlan]:
    """Plans that remove a half, a quarter and an eighth of the tokens of a plan, as far as that is possible.

    `counted` is the model of `tokens`. Changes nothing.
    """
    vocabulary = tokens.report.model["vocabulary"]
    num_rows = vocabulary["before"]
    step = TokensRemoval(share=None).step(num_rows)
    plans = list[TokensPlan]()
    for divisor in (2, 4, 8):
        num_removed = (num_rows - vocabulary["kept"]) / divisor
        num_kept = math.ceil((num_rows - num_removed) / step) * step
        if num_kept >= num_rows:
            break
        pattern = str(TokensRemoval.keeping(num_kept, num_rows))
        keep = tuple(tokens.report.config["keep_tokens"])
        plans.append(plan_counted(counted, FistaPruningConfig(pattern=pattern, keep_tokens=keep)))
    return plans


def _fewer_tokens(tokens: TokensPlan, most: float) -> str:
    """The pattern, such as "vocab:0.35", that removes as few tokens as leave at most `most` parameters.

    `tokens` is a plan for the same model that removes enough tokens, or more.
    """
    model = tokens.report.model
    num_rows = model["vocabulary"]["before"]
    num_removed = num_rows - model["vocabulary"]["kept"]
    dense_parameters = model["dense_num_parameters"]
    per_token = (dense_parameters - model["num_parameters"]) / num_removed

    step = TokensRemoval(share=None).step(num_rows)
    most_kept = num_rows - (dense_parameters - most) / per_token
    num_kept = math.floor(most_kept / step) * step
    return str(TokensRemoval.keeping(num_kept, num_rows))


def _channels(model: PreTrainedModel, most: float, target_share: float) -> tuple[PartShare, int]:
    """The share of the channels to remove, so that at most `most` parameters are left, and how many are left then.

    `model` is without weights, and only read; its shared tensors count once. `target_share` is that of `--target-size`,
    for the ValueError that so few parameters can't be reached.
    """
    mlps = ModelOutline(find_decoder_layers(model)).parts("channels")
    num_channels = mlps.groups  # of each MLP
    tensors = dict(model.named_parameters())
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    num_in_channels = 0  # parameters that belong to a channel
    for mlp in mlps.parts:
        num_in_channels += sum(tensors[name].numel() for name in mlp.tensors if name in tensors)
    per_channel = num_in_channels / num_channels  # in all decoder layers together

    # the numbers of channels that may stay are multiples of `step`
    step = PartShare.usual_step("channels", num_channels)
    least = math.ceil(mlps.at_least / step) * step
    fitting = math.floor((num_channels - (num_parameters - most) / per_channel) / step) * step
    most_kept = (num_channels - 1) // step * step  # a run has to remove some
    num_kept = min(fitting, most_kept)
    if num_kept < least:
        smallest = num_parameters - (num_channels - least) * per_channel
        # of the dense model's parameters, which are `most / target_share`; rounded up to four digits
        possible_share = math.ceil(1e4 * smallest * target_share / most) / 1e4
        raise ValueError(
            f"--target-size {target_share:g}: {possible_share:g} of the parameters are left if {least} of "
            f"{num_channels} channels stay in every decoder layer: pass at least that."
        )
    remaining = num_parameters - (num_channels - num_kept) * per_channel
    return PartShare.keeping("channels", num_kept, num_channels), round(remaining)

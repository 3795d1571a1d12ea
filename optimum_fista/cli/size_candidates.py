"""What can be removed from a model for a given size: the candidates among which `prune --target-size` chooses.

`find_candidates` makes up to three: all tokens that may go, half of these tokens, or no token, and channels for the
rest. Each leaves at most the size that the user wants. Nothing is measured or written here.

A *channel* is a hidden unit of the MLPs: a column of the down projection with the rows that compute its input. A
`TokensPlan` is a model's files with fewer tokens, planned, but not yet written. A `PartShare` is the share of the
channels that a run removes, such as "channels:0.25". A model *without weights* is on the meta device, with the shapes
and the configuration only. `most` is the largest number of parameters that the user wants to be left.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from optimum_fista.cli.prune_request import PruneRequest
from optimum_fista.config import FistaPruningConfig
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.removal.counted_model import CountedModel
from optimum_fista.removal.model_outline import ModelOutline
from optimum_fista.removal.tokens_plan import TokensPlan, plan_counted
from optimum_fista.solve.patterns import PartShare
from optimum_fista.text.sources import usual_texts
from optimum_fista.tokens_removal import TokensRemoval


@dataclass(frozen=True)
class Candidate:
    """One way to reach a size: tokens, channels, or first tokens and then channels are removed."""

    tokens: TokensPlan | None  # None: all tokens stay
    # Removed by an ordinary run after the tokens; None: all channels stay.
    channels: PartShare | None
    dense_parameters: int  # of the model as it is
    num_parameters: int  # that the model has in the end
    # Of the run that writes the output: it removes the channels, or the tokens if no channels go.
    request: PruneRequest

    @property
    def num_in_tokens(self) -> int:
        """The number of parameters that go with the tokens."""
        if self.tokens is None:
            return 0
        return self.dense_parameters - self.tokens.model.num_parameters()

    @property
    def num_in_channels(self) -> int:
        """The number of parameters that go with the channels."""
        return self.dense_parameters - self.num_parameters - self.num_in_tokens

    def __str__(self) -> str:
        """Say what goes and what is left, such as "channels:0.25: 1,234,567 parameters are left (74.98%)".

        The percentage is the share of the parameters of the dense model, before anything is removed.
        """
        removed = list[str]()
        if self.tokens is not None:
            vocabulary = self.tokens.report.model["vocabulary"]
            num_rows = vocabulary["before"]
            num_removed = num_rows - vocabulary["kept"]
            pattern = self.tokens.report.config["pattern"]
            removed.append(f"{pattern} ({num_removed:,} of {num_rows:,} tokens)")
        if self.channels is not None:
            removed.append(str(self.channels))
        share = self.num_parameters / self.dense_parameters
        return (
            f"{', then '.join(removed)}: {self.num_parameters:,} parameters are left ({share:.2%})"
        )


def find_candidates(
    arguments: argparse.Namespace,
    dense: PreTrainedModel,
    counted: CountedModel | None,
    without_unused: TokensPlan | None,
) -> list[Candidate]:
    """Find the ways to reach `--target-size`, from the one with the fewest tokens left to the one with all tokens.

    If none of them has channels that go, a line on standard error says why.

    Args:
        arguments: Those of `prune`.
        dense: The model as it is, without weights.
        counted: The model with its counts; `None` if no token may go.
        without_unused: The plan that removes all tokens that may go; `None` if no token may go.

    Raises:
        ValueError: If the size can't be reached; it names the smallest one.
    """
    most = arguments.target_size * dense.num_parameters()
    token_plans: list[TokensPlan | None] = [None]
    if counted is not None and without_unused is not None:
        token_plans = [*_token_plans(counted, without_unused, most), None]

    candidates = list[Candidate]()
    errors = list[ValueError]()
    for tokens in token_plans:
        try:
            candidates.append(_candidate(arguments, dense, tokens, most))
        except ValueError as error:  # too few channels, or none that can go
            errors.append(error)
    if not candidates:
        raise errors[0]  # with the fewest tokens, so with the smallest size that is possible
    if all(candidate.channels is None for candidate in candidates):
        print(f"no channel is removed: {errors[0]}", file=sys.stderr)
    return _without_needless_tokens(candidates)


def _candidate(
    arguments: argparse.Namespace,
    dense: PreTrainedModel,
    tokens: TokensPlan | None,
    most: float,
) -> Candidate:
    """Make the candidate that removes the tokens of a plan, and channels until `most` parameters are left at most.

    ValueError if too few channels may go, or the method that the user has chosen removes none. `tokens` is the plan;
    `None`: all tokens stay. The other arguments are those of `find_candidates`. Changes nothing.
    """
    dense_parameters = dense.num_parameters()
    smaller = dense if tokens is None else tokens.model
    if smaller.num_parameters() <= most:
        assert tokens is not None  # the dense model is larger
        channels = None
        num_parameters = smaller.num_parameters()
        request = PruneRequest.of(arguments, FistaPruningConfig.from_dict(tokens.report.config))
    else:
        channels, num_parameters = _channels(smaller, most, arguments.target_size)
        request = _request_for_channels(arguments, channels)
    return Candidate(tokens, channels, dense_parameters, num_parameters, request)


def _request_for_channels(arguments: argparse.Namespace, channels: PartShare) -> PruneRequest:
    """Make the request of the run that removes channels: it has the same sources of text, and no tokens to keep.

    `arguments` are those of the whole command, and stay as they are. The configuration of a Hub id may be downloaded
    into the cache. ValueError if the options don't go with channels.
    """
    sources = arguments.calibration
    if sources is None:
        sources = [usual_texts().to_calibrate_on]

    for_channels = argparse.Namespace(**vars(arguments))
    for_channels.pattern = str(channels)
    for_channels.keep_tokens = None
    for_channels.calibration = sources
    return PruneRequest.of(for_channels)


def _without_needless_tokens(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Leave out candidates that remove the same channels as a later one, and more tokens.

    The first of `candidates` removes most tokens, the last one fewest. Channels go in steps, so a few tokens may not
    spare any channel.
    """
    needed = list[Candidate]()
    for index, candidate in enumerate(candidates):
        channels_of_later_ones = [later.channels for later in candidates[index + 1 :]]
        if candidate.channels not in channels_of_later_ones:
            needed.append(candidate)
    return needed


def _token_plans(
    counted: CountedModel, without_unused: TokensPlan, most: float
) -> list[TokensPlan]:
    """Plan to remove as many tokens as may go, and half of them, if that is possible; most tokens first.

    If a removal of fewer tokens already leaves `most` parameters, the first plan removes only so many. There is no plan
    if too few tokens may go for a share of them. `counted` and
    `without_unused` are those of `find_candidates`. Changes nothing.
    """
    vocabulary = without_unused.report.model["vocabulary"]
    num_rows = vocabulary["before"]

    if without_unused.model.num_parameters() <= most:
        request = _fewer_tokens(without_unused, most)
    else:
        # As many tokens as the text uses stay, but not only those: by the share, tokens that other text is likely to
        # use stay instead of some that this text has once.
        request = TokensRemoval.keeping(vocabulary["kept"], num_rows)
    try:
        request.num_kept(num_rows)
    except ValueError:
        # What stays is rounded to a multiple of a number of tokens, which is all of them here.
        print(
            f"no token is removed: the text uses {vocabulary['kept']} of the {num_rows}",
            file=sys.stderr,
        )
        return []
    plans = [_plan_with_options_of(without_unused, counted, request)]

    num_removed = num_rows - plans[0].report.model["vocabulary"]["kept"]
    step = request.step(num_rows)  # the number of tokens that stay is a multiple of it
    num_kept = math.ceil((num_rows - num_removed / 2) / step) * step
    if num_kept < num_rows:
        half = TokensRemoval.keeping(num_kept, num_rows)
        with warnings.catch_warnings():  # the first plan has warned of a short text
            warnings.simplefilter("ignore")
            plans.append(_plan_with_options_of(without_unused, counted, half))
    return plans


def _plan_with_options_of(
    other: TokensPlan, counted: CountedModel, removal: TokensRemoval
) -> TokensPlan:
    """Plan a removal of tokens, such as "vocab:0.5", with all other options as in another plan; changes nothing.

    `counted` is the dense model with the counts of its tokens in a text.
    """
    config = FistaPruningConfig(
        pattern=str(removal),
        keep_tokens=tuple(other.report.config["keep_tokens"]),
        compute_dtype=other.report.config["compute_dtype"],
    )
    return plan_counted(counted, config)


def _fewer_tokens(tokens: TokensPlan, most: float) -> TokensRemoval:
    """Make the request that removes as few tokens as leave at most `most` parameters.

    `tokens` is a plan for the same model that removes enough tokens, or more.
    """
    model = tokens.report.model
    num_rows = model["vocabulary"]["before"]
    num_removed = num_rows - model["vocabulary"]["kept"]
    dense_parameters = model["dense_num_parameters"]
    per_token = (dense_parameters - model["num_parameters"]) / num_removed

    step = TokensRemoval(share=None).step(num_rows)  # the number that stays is a multiple of it
    most_kept = num_rows - (dense_parameters - most) / per_token
    num_kept = math.floor(most_kept / step) * step
    return TokensRemoval.keeping(num_kept, num_rows)


def _channels(model: PreTrainedModel, most: float, target_share: float) -> tuple[PartShare, int]:
    """Return the share of the channels to remove, so that at most `most` parameters are left, and how many are left.

    `model` is without weights, and only read; its shared tensors count once. `target_share` is that of `--target-size`,
    for the ValueError that so few parameters can't be reached.
    """
    mlps = ModelOutline(find_decoder_layers(model)).parts("channels")
    num_channels = mlps.groups  # of each MLP
    tensors = dict(model.named_parameters())
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    # Of tensors that share their values, `tensors` has only one.
    names_in_channels = [name for mlp in mlps.parts for name in mlp.tensors if name in tensors]
    num_in_channels = sum(tensors[name].numel() for name in names_in_channels)
    per_channel = num_in_channels / num_channels  # in all decoder layers together

    # The number of channels that stay is a multiple of `step`, and `mlps.at_least` or more.
    multiples = PartShare.multiples_of_channels("channels", num_channels)
    step = multiples[-1] if multiples else 1
    least = math.ceil(mlps.at_least / step) * step
    most_kept = (num_channels - 1) // step * step  # a run has to remove some
    # So many channels stay if just enough go that `most` parameters are left.
    num_fitting = num_channels - (num_parameters - most) / per_channel
    num_kept = min(math.floor(num_fitting / step) * step, most_kept)
    if num_kept < least:
        smallest = num_parameters - (num_channels - least) * per_channel
        # Divided by the parameters of the dense model, which are `most / target_share`; rounded up to four digits.
        possible_share = math.ceil(1e4 * smallest * target_share / most) / 1e4
        raise ValueError(
            f"--target-size {target_share:g}: {possible_share:g} of the parameters are left if {least} of "
            f"{num_channels} channels stay in every decoder layer: pass at least that."
        )
    if multiples:
        num_kept = PartShare.fewer_channels(num_kept, num_channels)
    remaining = num_parameters - (num_channels - num_kept) * per_channel
    return PartShare.keeping("channels", num_kept, num_channels), round(remaining)

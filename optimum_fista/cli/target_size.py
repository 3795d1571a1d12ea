"""`prune --target-size`: what to remove for a given size, by docs/should-you-prune.md: tokens first, then channels.

`plan_size` decides it before anything is written. If tokens are not enough, there are two runs: `remove_first` writes
the model with fewer tokens into a folder of its own, and an ordinary run removes channels from that.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from optimum_fista.cli.flags import given
from optimum_fista.cli.overview import cost_of_tokens
from optimum_fista.config import FistaPruningConfig
from optimum_fista.folder.checkpoint import REPORT_FILE, read_report
from optimum_fista.folder.output import require_output
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.options import PruningOptions
from optimum_fista.prune.ranks import launched_processes
from optimum_fista.public_names import public_name
from optimum_fista.removal.parts import ModelOutline
from optimum_fista.removal.tokens import (
    CountedModel,
    TokensPlan,
    count_model,
    plan_counted,
    write_plan,
)
from optimum_fista.solve.patterns import PartShare
from optimum_fista.source import loading
from optimum_fista.text.sources import TextSource, load_text, usual_texts
from optimum_fista.tokens_removal import TokensRemoval


@dataclass(frozen=True)
class SizePlan:
    """What is removed from a model until the size is reached: tokens, channels, or tokens and then channels."""

    dense_parameters: int  # of the model as it is
    tokens: TokensPlan | None  # removed first; None: no token is removed
    channels: PartShare | None  # removed in an ordinary run after that; None: tokens are enough
    num_parameters: int  # that are left in the end

    def lines(self) -> Iterator[str]:
        """Say what is removed, and what is left after each step."""
        if self.tokens is not None:
            model = self.tokens.report.model
            kept, before = model["vocabulary"]["kept"], model["vocabulary"]["before"]
            pattern = self.tokens.report.config["pattern"]
            how_often = "never" if pattern == "vocab:unused" else "rarely or never"
            yield (
                f"{pattern}: {before - kept:,} of {before:,} tokens, which the text {how_often} has, go first; "
                f"{self._parameters(model['num_parameters'])}"
            )
        if self.channels is not None:
            then = "" if self.tokens is None else "then "
            yield f"{then}{self.channels}: {self._parameters(self.num_parameters)}"

    def second_run(self, arguments: argparse.Namespace) -> argparse.Namespace:
        """The arguments of the ordinary run that removes the channels, by those of the whole command.

        It keeps the first source of text only, and says nothing of tokens.
        """
        changed = {"pattern": str(self.channels), "keep_tokens": None}
        sources = arguments.calibration
        if sources is None:
            sources = [usual_texts()[1]]
        elif "self" not in sources:  # with others beside it, that is an error of the ordinary run
            sources = sources[:1]
        return argparse.Namespace(**{**vars(arguments), **changed, "calibration": sources})

    def _parameters(self, number: int) -> str:
        """Say how many parameters are left, and which share of all that is."""
        return f"{number:,} parameters are left ({number / self.dense_parameters:.2%})"


def plan_size(arguments: argparse.Namespace) -> SizePlan:
    """Choose what is removed until `--target-size` of the parameters is left, and count tokens for that.

    `arguments` are those of `prune`, and stay as they are. Tokens that the text does not use go first. If no token can
    be removed, a line on standard error says why, and channels alone go. ValueError if the size can't be reached.
    """
    wanted = arguments.target_size
    _require_flags(arguments)
    sources = arguments.calibration or [usual_texts()[1]]
    # Errors of the files are errors of the command; those below only mean that no token can be removed.
    texts = [load_text(source, "calibration") for source in sources if source != "self"]
    try:
        counted = _count(arguments.model, sources, texts)
        keep = tuple(arguments.keep_tokens or ())
        unused = FistaPruningConfig(pattern="vocab:unused", keep_tokens=keep)
        tokens = plan_counted(counted, unused)
    except ValueError as error:
        print(f"no token is removed: {error}", file=sys.stderr)
        model = loading.described(loading.read_config(arguments.model))
        dense_parameters = model.num_parameters()
        channels, num_parameters = _channels(model, wanted * dense_parameters, wanted)
        return SizePlan(dense_parameters, None, channels, num_parameters)

    dense_parameters = counted.model.num_parameters()
    most = wanted * dense_parameters
    if tokens.model.num_parameters() <= most:
        pattern = _fewer_tokens(tokens, most)
        enough = FistaPruningConfig(pattern=pattern, keep_tokens=keep)
        tokens = plan_counted(counted, enough)
        return SizePlan(dense_parameters, tokens, None, tokens.model.num_parameters())
    channels, num_parameters = _channels(tokens.model, most, wanted)
    return SizePlan(dense_parameters, tokens, channels, num_parameters)


def remove_first(plan: TokensPlan, folder: Path, *, device: str | None, overwrite: bool) -> None:
    """Write the folder of the model with fewer tokens, and say what that costs on standard error.

    A folder of an earlier start of the same run is replaced, with `overwrite` also one of other tokens of the same
    pattern; a folder of another run is refused. `device` computes the loss.
    """
    if (folder / REPORT_FILE).exists():
        there, planned = vars(read_report(folder)), vars(plan.report)
        is_same = all(
            there[name] == planned[name] for name in ("config", "calibration", "model", "retrained")
        )
        has_same_pattern = there["config"]["pattern"] == planned["config"]["pattern"]
        overwrite = is_same or (overwrite and has_same_pattern)
    report = write_plan(
        plan,
        folder,
        started=time.perf_counter(),
        device=device,
        overwrite=overwrite,
        progress=True,
    )
    print(report, *cost_of_tokens(report), f"saved to {folder}", sep="\n", file=sys.stderr)


def _require_flags(arguments: argparse.Namespace) -> None:
    """Refuse flags that make no sense with `--target-size`, and an output that can't be written."""
    for other in {"sparsity", "pattern"} & set(given(arguments, PruningOptions)):
        raise ValueError(f"--target-size says what goes: pass it without --{other}.")
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
    """Count the tokens of texts; `sources` are their names, among which "self" is refused."""
    if "self" in sources:
        raise ValueError("a model's own text is too short to tell which tokens are rare")
    documents = (document for text in texts for document in text.documents)
    return count_model(model, documents, text_name=", ".join(map(public_name, sources)))


def _fewer_tokens(tokens: TokensPlan, most: float) -> str:
    """The pattern that removes as few tokens as leave at most `most` parameters; `tokens` removes more than that."""
    model = tokens.report.model
    num_rows = model["vocabulary"]["before"]
    num_removed = num_rows - model["vocabulary"]["kept"]
    dense_parameters = model["dense_num_parameters"]
    per_token = (dense_parameters - model["num_parameters"]) / num_removed

    step = TokensRemoval(share=None).step(num_rows)
    num_kept = math.floor((num_rows - (dense_parameters - most) / per_token) / step) * step
    return str(TokensRemoval.keeping(num_kept, num_rows))


def _channels(model: PreTrainedModel, most: float, wanted: float) -> tuple[PartShare, int]:
    """The share of the channels to remove, so that at most `most` parameters are left, and how many are left then.

    `model` is without weights; its shared tensors count once. `wanted` is the share of `--target-size`, for the error.
    """
    parts = ModelOutline(find_decoder_layers(model)).parts("channels")
    tensors = dict(model.named_parameters())
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    in_channels = sum(
        tensors[name].numel() for part in parts.parts for name in part.tensors if name in tensors
    )
    per_channel = in_channels / parts.groups  # in all decoder layers together

    step = PartShare.usual_step("channels", parts.groups)
    least = math.ceil(parts.at_least / step) * step
    fitting = math.floor((parts.groups - (num_parameters - most) / per_channel) / step) * step
    num_kept = min(fitting, (parts.groups - 1) // step * step)
    if num_kept < least:
        smallest = num_parameters - (parts.groups - least) * per_channel
        possible = math.ceil(1e4 * smallest * wanted / most) / 1e4
        raise ValueError(
            f"--target-size {wanted:g}: {possible:g} of the parameters are left if {least} of {parts.groups} channels "
            "stay in every decoder layer: pass at least that."
        )
    remaining = num_parameters - (parts.groups - num_kept) * per_channel
    return PartShare.keeping("channels", num_kept, parts.groups), round(remaining)

"""`prune --target-size`: what to remove for a given size, by docs/should-you-prune.md: tokens first, then channels."""

import argparse
import math
import sys
import time
from pathlib import Path

from transformers import PreTrainedModel

from optimum_fista.cli.flags import given
from optimum_fista.config import FistaPruningConfig
from optimum_fista.folder.checkpoint import REPORT_FILE, read_report
from optimum_fista.folder.output import new_output, require_output
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.options import PruningOptions
from optimum_fista.prune.ranks import launched_processes
from optimum_fista.removal.parts import ModelOutline
from optimum_fista.removal.tokens import TokensPlan, plan_tokens
from optimum_fista.report import public_name
from optimum_fista.solve.patterns import PartShare
from optimum_fista.source import loading
from optimum_fista.text.sources import load_text, usual_texts
from optimum_fista.tokens_removal import TokensRemoval


def plan_size(arguments: argparse.Namespace) -> TokensPlan | None:
    """Choose what is removed until `--target-size` of the parameters is left, say it, and set the pattern of the run.

    Tokens that the text does not use go first. If more has to go, `remove_tokens` makes a run of its own of the plan
    that is returned, and `arguments` speak of the second run, in which channels of its result go.
    """
    wanted, name = arguments.target_size, arguments.model
    for other in {"sparsity", "pattern"} & set(given(arguments, PruningOptions)):
        raise ValueError(f"--target-size says what goes: pass it without --{other}.")
    if not 0 < wanted < 1:
        raise ValueError(
            f"--target-size {wanted:g}: pass the share of the parameters that is to be left, in (0, 1)."
        )
    if launched_processes() > 1:
        raise ValueError(
            "--target-size makes two runs: pass vocab:unused and channels:SHARE to several processes."
        )
    if arguments.output is not None:
        require_output(
            arguments.output, arguments.overwrite, source=name
        )  # before the tokens are counted
    arguments.calibration = sources = arguments.calibration or [usual_texts()[1]]
    keep, arguments.keep_tokens = (
        arguments.keep_tokens or (),
        None,
    )  # the second run removes no tokens
    texts = [
        load_text(source, "calibration") for source in sources if source != "self"
    ]  # or it is their error
    try:
        if "self" in sources:
            raise ValueError("a model's own text is too short to tell which tokens are rare")
        config = FistaPruningConfig(pattern="vocab:unused", keep_tokens=keep)
        documents = (document for text in texts for document in text.documents)
        tokens = plan_tokens(
            name, documents, config, text_name=", ".join(map(public_name, sources))
        )
    except ValueError as error:
        print(f"no token is removed: {error}", file=sys.stderr)
        arguments.calibration = sources if "self" in sources else sources[:1]
        model = loading.described(loading.read_config(name))
        arguments.pattern = str(_channels(model, wanted * model.num_parameters(), wanted))
        return None
    described, vocabulary = tokens.report.model, tokens.report.model["vocabulary"]
    before, after, size = (
        described["dense_num_parameters"],
        described["num_parameters"],
        vocabulary["before"],
    )
    gone, most = size - vocabulary["kept"], wanted * before
    why = f"{gone} of {size} tokens do not occur in the text, which loses nothing without them"
    if after <= most:
        step = 64
        kept = math.floor((size - (before - most) * gone / (before - after)) / step) * step
        arguments.pattern, arguments.keep_tokens = (
            str(TokensRemoval.keeping(kept, size)),
            keep or None,
        )
        print(f"{why}: {arguments.pattern} is enough", file=sys.stderr)
        return None
    share = _channels(tokens.model, most, wanted)
    print(f"{why}: they go first ({after / before:.4f} is left), and then {share}", file=sys.stderr)
    arguments.pattern, arguments.calibration = str(share), sources[:1]
    return tokens


def remove_tokens(plan: TokensPlan, folder: Path, overwrite: bool) -> None:
    """Write the folder of the model with fewer tokens, also over that of an earlier start, but no other pattern."""
    if (folder / REPORT_FILE).exists():
        found, planned = vars(read_report(folder)), vars(plan.report)
        same = all(
            found[name] == planned[name] for name in ("config", "calibration", "model", "retrained")
        )
        overwrite = same or (
            overwrite and found["config"]["pattern"] == planned["config"]["pattern"]
        )
    with new_output(folder, overwrite, plan.source) as written:
        plan.write(written, time.perf_counter(), progress=True)
    print(f"{plan.report}\nsaved to {folder}", file=sys.stderr)


def _channels(model: PreTrainedModel, most: float, wanted: float) -> PartShare:
    """The share of the channels to remove, so that at most `most` parameters are left; shared tensors count once."""
    parts = ModelOutline(find_decoder_layers(model)).parts("channels")
    tensors = dict(model.named_parameters())
    whole = sum(tensor.numel() for tensor in tensors.values())
    channel = (
        sum(tensors[n].numel() for part in parts.parts for n in part.tensors if n in tensors)
        / parts.groups
    )
    step = PartShare.usual_step("channels", parts.groups)
    least = -(-parts.at_least // step) * step
    kept = (
        min(
            math.floor((parts.groups - (whole - most) / channel) / step), (parts.groups - 1) // step
        )
        * step
    )
    if kept < least:
        left = math.ceil(1e4 * (whole - (parts.groups - least) * channel) * wanted / most) / 1e4
        stay = f"if {least} of {parts.groups} channels stay in every decoder layer"
        raise ValueError(
            f"--target-size {wanted:g}: {left:g} of the parameters are left {stay}: pass at least that."
        )
    return PartShare.keeping("channels", kept, parts.groups)

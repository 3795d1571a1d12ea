"""`optimum-fista prune`: its flags, and the order of a run.

`run` makes a frozen `PruneRequest` of the flags. A run refuses what can't work, estimates itself without weights, draws
its text, prints its plan, and prunes. `--dry-run` prints the estimate and stops. `--target-size` chooses first what is
removed. That may be two runs: one removes tokens (a `TokensPlan` says which ones, and has the report of its text), and
one prunes its result. Functions import what they need when they are called, because Transformers takes seconds.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_fista.cli.flags import DEVICE, DTYPE, add_options
from optimum_fista.options import PruningOptions

if TYPE_CHECKING:
    from torch import Tensor

    from optimum_fista.cli.prune_request import PruneRequest
    from optimum_fista.removal.tokens_plan import TokensPlan
    from optimum_fista.report import PruningReport
    from optimum_fista.text.loss import MeasuredText

DESCRIPTION = """\
Prune a model and save it as a folder that plain Transformers loads.

Half of the weights in the decoder layers become zeros. A --pattern such as channels:0.25 or layers:0.1 removes whole
parts instead, so the model becomes smaller.

MODEL is a Hub id, a model folder, or a folder with one GGUF file. Pass a text of the kind that the model will read
(--calibration): the run decides by it which weights matter, and fits the others to it. Without a text the model writes
its own (self). That takes time, and may give a far worse model. If the model does not fit into memory, it can't write,
and the text is c4, or pydoc if the package `datasets` is not installed.

The model is read, pruned and written one decoder layer at a time. It is loaded whole only if it is a GGUF file, or
writes its own text. If a run is interrupted, give the same command again: it resumes after the last finished decoder
layer. With --error-correction none, intra or after_attention (the default method has one of the last two for zeros),
several processes that accelerate launch or torchrun starts share the decoder layers (docs/ranks.md).

examples:
  optimum-fista prune meta-llama/Llama-3.2-1B --calibration texts.txt
  optimum-fista prune ./model --pattern 2:4 --calibration texts.jsonl --num-samples 64
  optimum-fista prune ./model --output smaller --pattern channels:0.25 --calibration texts.jsonl
  optimum-fista prune ./mixture --pattern experts:0.25 --calibration chat.jsonl --calibration code.txt
  optimum-fista prune ./model --output model-50 --method wanda --calibration texts.txt --device cpu --dtype float32
  accelerate launch --num_processes 8 -m optimum_fista prune ./model --calibration texts.txt
  optimum-fista prune meta-llama/Llama-3.1-70B --dry-run --calibration c4 --device cuda --storage-device cpu
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `prune` to its parser, and set its usage."""
    parser.usage = "%(prog)s MODEL [options]"  # argparse's own would fill a screen
    add = parser.add_argument
    add("model", metavar="MODEL", help="Hub id, model folder, or folder with one GGUF file")
    add(
        "--output",
        "-o",
        type=Path,
        metavar="DIR",
        help="new folder (default: MODEL's name with -50pct, -2of4, ...)",
    )
    groups = add_options(parser, PruningOptions)  # of rarely used flags
    add(
        "--target-size",
        type=float,
        metavar="SHARE",
        help="remove tokens and channels until this is left; trials choose how many of each",
    )
    add(
        "--recipe",
        metavar="NAME",
        help="default, fast, or paper (FISTAPruner as published); other flags override it",
    )
    add(
        "--calibration",
        action="append",
        metavar="SOURCE",
        help="text of the kind that the model will read: .txt, .jsonl (text, messages, images), wikitext2, c4, ptb, "
        "pydoc, OWNER/NAME of the Hub, or self (the model writes it; default if it fits); "
        "repeatable: each text gives an equal share (all of each for vocab:)",
    )
    add(
        "--num-samples",
        type=int,
        metavar="N",
        help="calibration sequences (default 128)",
    )
    add(
        "--sequence-length",
        type=int,
        metavar="N",
        help="tokens in a sequence (default: 2048, or the model's limit)",
    )
    add(
        "--measure",
        action="append",
        metavar="SOURCE",
        help="held-out text to measure before and after, as for --calibration; repeatable",
    )
    add(
        "--protect",
        action="append",
        metavar="SOURCE=1.02",
        help="measure this text, and fail if its bits per byte become more than 1.02 times those before; repeatable",
    )
    add("--device", **DEVICE)  # with the help that these two have in all commands
    add("--dtype", **DTYPE)
    add(
        "--dry-run",
        action="store_true",
        help="only print what a run would prune and need; MODEL may be a config.json",
    )
    add("--overwrite", action="store_true", help="replace a model that --output already holds")
    add(
        "--packed",
        action="store_true",
        help="store the pruned weights without their zeros (see pack --help)",
    )
    add(
        "--push-to-hub",
        metavar="REPO",
        help="upload the folder, with copies of small files beside MODEL's weights",
    )
    # None: the Hub decides, by the settings of an organisation.
    add("--private", action="store_true", default=None, help="make a new repository private")

    groups["method"].add_argument(
        "--config",
        metavar="FILE",
        help="JSON file, pruned folder or Hub id with a configuration; flags override it",
    )
    machine = groups["calibration and machine"]
    machine.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="sequences in a forward pass (default: 1 on a CPU; on others up to 8192 tokens, if memory allows)",
    )
    machine.add_argument(
        "--storage-device",
        metavar="PLACE",
        help="where activations wait: a device, disk, or a folder (default: --device; disk if that is the CPU)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Prune the model, write the result to the output folder, and upload it if asked; returns the exit code.

    With `--dry-run` nothing is written but the estimate. `arguments` are the parsed flags; they stay as they are.
    """
    from optimum_fista.source.model_folder import require_name

    require_name(arguments.model)  # before the imports below, which take seconds
    from optimum_fista.cli.prune_request import PruneRequest

    tokens_first = None
    if arguments.target_size is None:
        request = PruneRequest.of(arguments)
    else:
        from optimum_fista.cli.target_size import plan_size

        chosen = plan_size(arguments)
        tokens_first = chosen.tokens  # None if no token is removed
        request = chosen.request
        if chosen.channels is None:
            assert tokens_first is not None
            return _write_tokens(tokens_first, request, arguments.dry_run)
    if arguments.dry_run:
        _show_estimate(request, is_of_target_size=arguments.target_size is not None)
        return 0
    request.require_possible()
    return _prune(request, tokens_first)


def _write_tokens(plan: TokensPlan, request: PruneRequest, is_dry_run: bool) -> int:
    """Write a model without the tokens that `plan` removes, and print the result; returns the exit code.

    This is the whole run of a `--target-size` that removes tokens only. If `is_dry_run`, only the output is checked.
    `request` has the output folder, the model's name, and the held-out texts that the user named. The loss of both
    models on these is measured afterwards, and written into the report of the output. Texts of the Hub are downloaded
    into its cache.
    """
    from optimum_fista.folder.output import require_output
    from optimum_fista.removal.tokens import write_plan

    if is_dry_run:
        require_output(request.output, request.overwrite, source=request.model)
        return 0
    request.require_possible()
    texts = _texts_to_measure(request, plan.report)
    report = write_plan(
        plan,
        request.output,
        started=time.perf_counter(),
        device=request.device,
        dtype=request.dtype,
        overwrite=request.overwrite,
        progress=True,
    )
    _measure(request, request.output, report, texts)
    return _finish(request, report, first_model=request.model)


def _texts_to_measure(request: PruneRequest, report: PruningReport) -> list[MeasuredText]:
    """Check the held-out texts that the user named, and return them; until they are measured, `report` says so.

    Texts of the Hub are downloaded into its cache.
    """
    from optimum_fista.prune.measuring import require_texts

    texts = require_texts(request.model, request.measured_texts(), request.protect)
    report.texts_not_measured = [text.name for text in texts]
    return texts


def _measure(
    request: PruneRequest, folder: Path, report: PruningReport, texts: Sequence[MeasuredText]
) -> None:
    """Measure the model of `request`, and that in `folder` without some tokens, on texts; nothing without texts.

    The losses are written into `report`, which is that of the model in `folder`, and into the files of `folder`.
    """
    from optimum_fista.prune.measuring import measure_folder

    measure_folder(request.model, folder, texts, report, device=request.device, progress=True)


def _show_estimate(request: PruneRequest, *, is_of_target_size: bool) -> None:
    """Print what the run of a request would prune and need; raises the errors that it would raise before it prunes.

    There are three kinds of runs. One removes tokens (a pattern such as vocab:0.35): its texts are read and counted.
    One removes channels for `--target-size` (`is_of_target_size`), perhaps after tokens: the estimate is that of the
    model with all its tokens. All others are estimated with their time. For that, a small random model with a decoder
    layer of each kind is pruned in a temporary folder.

    No weight of the model is read. Files that a killed run left beside the output are removed. What is read from the
    Hub is downloaded into its cache.
    """
    from optimum_fista.cli.overview import details_of, estimate_of, measuring_of, overview_of
    from optimum_fista.folder.output import require_output
    from optimum_fista.removal.tokens_plan import plan_tokens

    request.require_sizes()
    request.require_sources()
    if request.config.tokens_removal is not None:
        documents, names = _documents(request)
        plan = plan_tokens(request.model, documents, request.config, text_name=names)
        print(plan.report.removed)  # a sentence
    elif is_of_target_size:
        print(*overview_of(estimate_of(request), request.sources), sep="\n")
        print("note: these numbers are of the model with all its tokens; time is not estimated")
    else:
        estimate = estimate_of(request)
        print("for the time, a decoder layer of each kind is pruned now", file=sys.stderr)
        lines = details_of(estimate, request.sources)  # prunes the small model
        print(*lines, *measuring_of(request), sep="\n")
    # Last, so that the estimate is printed even if the output has to be another one.
    require_output(request.output, request.overwrite, source=request.model)


def _prune(request: PruneRequest, tokens_first: TokensPlan | None) -> int:
    """Prune from files to the output folder, in one process or several, and print the result; returns the exit code.

    `request` is what the user asks for. If texts are to be measured, the model and the result are measured at the end.
    If Ctrl-C stops the pruning, a line on standard error says how to resume it. `tokens_first` is the plan of a run
    that removes tokens. Its result is written first, to a folder beside the output whose name ends with "-tokens", and
    is then what is pruned. Model and texts of the Hub are downloaded into its cache.
    """
    from optimum_fista.cli.messages import command_ranks
    from optimum_fista.cli.target_size import remove_first
    from optimum_fista.folder.output import JOURNAL, locked_output
    from optimum_fista.prune.measuring import MeasuringInterrupted
    from optimum_fista.pruner import FistaPruner

    first_model = request.model
    if tokens_first is not None:
        folder = request.output.with_name(f"{request.output.name}-tokens")
        texts = _texts_to_measure(request, tokens_first.report)
        remove_first(tokens_first, folder, device=request.device, overwrite=request.overwrite)
        _measure(request, folder, tokens_first.report, texts)
        request = request.reading(str(folder))

    with command_ranks(request.device) as ranks, ExitStack() as opened:
        # Locked to the end of the run: two runs must not write into one folder. Rank 0 does it for all processes.
        unfinished = ranks.first(lambda: opened.enter_context(locked_output(request.output)))
        batches: Any
        if request.config.tokens_removal is not None:
            # Whole texts, because such a run counts their tokens.
            batches, source_name = _documents(request)
        else:
            request_so_far = request
            # Rank 0 draws the text, and the other processes get the same batches. Text that the model writes is kept in
            # the run's journal, which has what a run needs to resume.
            request, batches = ranks.first(
                lambda: _prepare(request_so_far, ranks.device, unfinished / JOURNAL)
            )
            source_name = request.public_sources
        pruner = FistaPruner(request.config, storage_device=request.storage_device)
        try:
            report = pruner.prune(
                request.model,
                batches,
                calibration_source=source_name,
                output_dir=request.output,
                device=request.device,
                dtype=request.dtype,
                overwrite=request.overwrite,
                packed=request.packed,
                measure=request.measured_texts(),
                protect=request.protect,
            )
        except MeasuringInterrupted:
            raise  # with a message that is printed: the result is finished, so there is nothing to resume
        except KeyboardInterrupt:
            if request.config.tokens_removal is None:  # a run that removes tokens has no layers
                print(
                    "\nfinished decoder layers are kept: give the same command again to resume",
                    file=sys.stderr,
                )
            raise
    if ranks.index == 0:
        return _finish(request, report, first_model=first_model)
    return 0


def _prepare(
    request: PruneRequest, device: str | None, keep_in: Path
) -> tuple[PruneRequest, list[Tensor | dict[str, Any]]]:
    """Draw the text of a run and print its plan to the standard error.

    Returns the request with the batch size and the source of text that the estimate has chosen, and the batches as
    `calibration_batches` makes them.

    A text may be empty or too short. So it is drawn before the plan: in case of an error, nothing else is printed. But
    text of the source "self" takes long, because the model writes it. So this text is drawn after the plan. Text and
    tokenizer of the Hub are downloaded into its cache, and so is a model that writes its text.

    Args:
        request: What the user asks for.
        device: Where the model writes its text, such as "cuda:0"; `None`: the accelerator if there is one.
        keep_in: A folder of the run. Text that the model writes is kept there.
    """
    from optimum_fista.cli.calibration_batches import calibration_batches
    from optimum_fista.cli.overview import plan_of
    from optimum_fista.source.loading import require_tokenizer
    from optimum_fista.text.one_text import require_held_out

    chosen, lines = plan_of(request)
    # The plan may have chosen the text. `sources` are all sources of calibration text, and `source` is the first.
    require_held_out(chosen.measure, chosen.sources)
    model_writes_text = chosen.source == "self"
    if model_writes_text:
        require_tokenizer(chosen.model)
        print(*lines, sep="\n", file=sys.stderr)
        print(
            "the model writes this text first, and the bar shows how long that takes: a text of your own "
            "(--calibration FILE) saves the time, and may give a far better model. After Ctrl-C the same command "
            "goes on",
            file=sys.stderr,
        )
        batches = calibration_batches(chosen, device, keep_in)
    else:
        batches = calibration_batches(chosen, device, keep_in)
        print(*lines, sep="\n", file=sys.stderr)
    return chosen, batches


def _documents(request: PruneRequest) -> tuple[Any, str]:
    """Read the texts of all sources of the request, for a run that removes tokens.

    Returns an iterator of their documents (texts), and the names of the sources for a report, such as "c4, code.txt".
    All sources are read before the first document is taken, so that an error of one comes at once. ValueError if two
    have the same text. Texts of the Hub are downloaded into its cache.
    """
    from optimum_fista.text.one_text import require_different_texts
    from optimum_fista.text.sources import text_of_model

    texts = [
        text_of_model(request.model, source, split="calibration") for source in request.sources
    ]
    require_different_texts(request.sources, texts)
    documents = itertools.chain.from_iterable(text.documents for text in texts)
    return documents, request.public_sources


def _finish(request: PruneRequest, report: PruningReport, *, first_model: str) -> int:
    """Print the result of a run, then upload it if asked; otherwise print the commands to use it with.

    Returns the exit code: 1 if a text lost more than `--protect` allows, or that is not known. Then nothing is
    uploaded. `first_model` is MODEL as the user gave it: `request.model` may be a folder that a first run has written.
    """
    from optimum_fista.cli.overview import next_commands, path_of_first_model, verdicts
    from optimum_fista.folder.hub import push_folder
    from optimum_fista.folder.packed_folder import packing_of

    print(report, *verdicts(report), sep="\n")
    if request.packed:
        print(packing_of(request.output))
    print(f"saved to {request.output}")
    breaks_promise = bool(request.protect) and bool(report.unprotected or report.texts_not_measured)
    if breaks_promise:
        uploaded = ", and it is not uploaded" if request.push_to_hub else ""
        print(
            f"error: {report.verdict_of_texts} (--protect). The folder is kept{uploaded}: remove less, train it "
            "(optimum-fista recover), or allow more.",
            file=sys.stderr,
        )
        return 1
    if request.push_to_hub:
        print(push_folder(request.output, request.push_to_hub, private=request.private))
        return 0
    has_images = "media" in report.calibration
    sources = ("self",) if has_images else request.sources  # other commands take text only
    commands = next_commands(
        path_of_first_model(report, first_model),
        request.output,
        sources,
        has_zeros=report.num_zeros > 0,
        is_packed=request.packed,
    )
    print(commands)
    return 0

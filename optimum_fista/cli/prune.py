"""`optimum-fista prune`."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_fista.cli.flags import DEVICE, DTYPE, add_options, given
from optimum_fista.options import PruningOptions

if TYPE_CHECKING:
    from torch import Tensor

    from optimum_fista.config import FistaPruningConfig
    from optimum_fista.removal.tokens import TokensPlan

_MEASURED_IMAGES = (
    16  # sequences with images that the perplexity is measured on: they have 300 tokens or more
)

DESCRIPTION = """\
Prune a model and save it as a folder that plain Transformers loads.

Half of the weights in the decoder layers become zeros. A --pattern such as channels:0.25 or layers:0.1 removes whole
parts instead, so the model becomes smaller.

MODEL is a Hub id, a model folder, or a folder with one GGUF file. No other argument is needed: the model writes its own
calibration text (--calibration self) if all of it fits into memory, and the output folder is named after MODEL and the
pattern. For a model that does not fit, the text is c4, or pydoc if the package `datasets` is not installed.

The model is read, pruned and written one decoder layer at a time. It is loaded whole only if it is a GGUF file, or
writes its own text. If a run is interrupted, give the same command again: it resumes after the last finished decoder
layer. With --error-correction none or intra, several processes that accelerate launch or torchrun starts share the
decoder layers (docs/ranks.md).

examples:
  optimum-fista prune meta-llama/Llama-3.2-1B
  optimum-fista prune ./model --pattern 2:4 --calibration texts.jsonl --num-samples 64
  optimum-fista prune ./model --output smaller --pattern channels:0.25 --calibration texts.jsonl
  optimum-fista prune ./model --output model-50 --method wanda --device cpu --dtype float32
  accelerate launch --num_processes 8 -m optimum_fista prune ./model --error-correction intra
  optimum-fista prune meta-llama/Llama-3.1-70B --dry-run --calibration c4 --device cuda --storage-device cpu
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, parser.usage = (
        parser.add_argument,
        "%(prog)s MODEL [options]",
    )  # argparse's own would fill a screen
    add("model", metavar="MODEL", help="Hub id, model folder, or folder with one GGUF file")
    add(
        "--output",
        "-o",
        type=Path,
        metavar="DIR",
        help="new folder (default: MODEL's name with -50pct, -2of4, ...)",
    )
    advanced = add_options(parser, PruningOptions)
    add(
        "--target-size",
        type=float,
        metavar="SHARE",
        help="remove rare tokens, then channels, until this is left",
    )
    add(
        "--recipe",
        metavar="NAME",
        help="default, fast, or paper (FISTAPruner as published); other flags override it",
    )
    sources = "self (the model writes it; default if it fits), .txt, .jsonl (images too), wikitext2, c4, ptb or pydoc"
    sources += "; repeatable if tokens are removed (vocab:0.35)"
    add("--calibration", action="append", metavar="SOURCE", help=sources)
    add(
        "--num-samples",
        type=int,
        default=128,
        metavar="N",
        help="calibration sequences (default 128)",
    )
    add(
        "--sequence-length",
        type=int,
        metavar="N",
        help="tokens in a sequence (default: 2048, or the model's limit)",
    )
    add("--device", **DEVICE)
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
    add = advanced["method"].add_argument
    add(
        "--config",
        metavar="FILE",
        help="JSON file, pruned folder or Hub id with a configuration; flags override it",
    )
    add = advanced["calibration and machine"].add_argument
    pass_size = "sequences in a forward pass (default: 1 on a CPU; on others up to 8192 tokens, if memory allows)"
    add("--batch-size", type=int, metavar="N", help=pass_size)
    places = "where activations wait: a device, disk, or a folder (default: --device; disk if that is the CPU)"
    add("--storage-device", metavar="PLACE", help=places)


def run(arguments: argparse.Namespace) -> int:
    """Prune, save, and upload if asked."""
    from optimum_fista.folder.checkpoint import require_name

    require_name(arguments.model)  # before the imports below, which take seconds
    from optimum_fista.cli.messages import speaking_ranks
    from optimum_fista.cli.overview import (
        details_of,
        estimate_of,
        next_commands,
        overview_of,
        path_of_first_model,
        say_before,
        verdicts,
    )
    from optimum_fista.cli.target_size import plan_size, remove_first
    from optimum_fista.folder.hub import push_folder
    from optimum_fista.folder.output import FOLDER, locked_output, require_output
    from optimum_fista.folder.packed_folder import packing_of
    from optimum_fista.pruner import FistaPruner
    from optimum_fista.removal.tokens import plan_tokens

    model = arguments.model
    size = None if arguments.target_size is None else plan_size(arguments)
    if size is not None:
        print(*size.lines(), sep="\n", file=sys.stdout if arguments.dry_run else sys.stderr)
        if size.channels is None:
            assert size.tokens is not None
            return _run_tokens(size.tokens, arguments)
        arguments = size.second_run(arguments)
    config = _config(arguments)
    if arguments.output is None:
        arguments.output = default_output(model, config, pattern_of_run(model, config))
    names, documents = _documents(arguments, config)
    if arguments.dry_run:
        if documents is not None:
            print(plan_tokens(model, documents, config, text_name=names).report.removed)
        elif size is not None and size.tokens is not None:
            estimate = estimate_of(arguments, config, arguments.batch_size)
            print(*overview_of(estimate), sep="\n")
            print("note: these numbers are of the model with all its tokens; time is not estimated")
        else:
            estimate = estimate_of(arguments, config, arguments.batch_size)
            print("for the time, a decoder layer of each kind is pruned now", file=sys.stderr)
            print("\n".join(details_of(estimate)))
        require_output(arguments.output, arguments.overwrite, source=model)
        return 0
    _require_options(arguments, config)
    if size is not None and size.tokens is not None:
        first = arguments.output.with_name(f"{arguments.output.name}-tokens")
        remove_first(size.tokens, first, device=arguments.device, overwrite=arguments.overwrite)
        arguments.model = str(first)
    with (
        speaking_ranks(arguments.device, "optimum_fista.removal.parts") as ranks,
        ExitStack() as opened,
    ):
        try:
            # held to the end of the run: two runs must not write into one folder
            folder = ranks.first(lambda: opened.enter_context(locked_output(arguments.output)))
            batches: Any = documents
            if documents is None:
                arguments.batch_size, arguments.calibration = ranks.first(
                    lambda: say_before(arguments, config)
                )
                batches = ranks.first(
                    lambda: _batches(arguments, config, ranks.device, folder / FOLDER)
                )
            options = {
                name: getattr(arguments, name)
                for name in ("device", "dtype", "overwrite", "packed")
            }
            options |= {
                "calibration_source": names or arguments.calibration,
                "output_dir": arguments.output,
            }
            pruner = FistaPruner(config, storage_device=arguments.storage_device)
            report = pruner.prune(arguments.model, batches, **options)
        except KeyboardInterrupt:
            if not names:
                print(
                    "\nfinished decoder layers are kept: give the same command again to resume",
                    file=sys.stderr,
                )
            raise
    if ranks.index:
        return 0
    print(report, *verdicts(report), sep="\n")
    if arguments.packed:
        print(packing_of(arguments.output))
    print(f"saved to {arguments.output}")
    if arguments.push_to_hub:
        print(push_folder(arguments.output, arguments.push_to_hub, private=arguments.private))
    else:
        text = (
            "self" if "media" in report.calibration else arguments.calibration
        )  # other commands take text only
        dense = path_of_first_model(report, model)
        print(next_commands(dense, arguments.output, text, has_zeros=not report.removed))
    return 0


def _run_tokens(plan: TokensPlan, arguments: argparse.Namespace) -> int:
    """Write the model with fewer tokens of a plan, print what that costs and what is next; returns the exit status."""
    from optimum_fista.cli.overview import next_commands, verdicts
    from optimum_fista.config import FistaPruningConfig
    from optimum_fista.folder.hub import push_folder
    from optimum_fista.folder.output import require_output
    from optimum_fista.removal.tokens import write_plan

    config = FistaPruningConfig.from_dict(plan.report.config)
    output = arguments.output or default_output(arguments.model, config)
    if arguments.dry_run:
        require_output(output, arguments.overwrite, source=arguments.model)
        return 0
    sources = arguments.calibration or [None]
    options = {**vars(arguments), "output": output, "calibration": sources[0]}
    _require_options(argparse.Namespace(**options), config)
    report = write_plan(
        plan,
        output,
        started=time.perf_counter(),
        device=arguments.device,
        overwrite=arguments.overwrite,
        progress=True,
    )
    print(report, *verdicts(report), f"saved to {output}", sep="\n")
    if arguments.push_to_hub:
        print(push_folder(output, arguments.push_to_hub, private=arguments.private))
    else:
        print(next_commands(arguments.model, output, sources[0], has_zeros=False))
    return 0


def _require_options(arguments: argparse.Namespace, config: FistaPruningConfig) -> None:
    """Refuse options that can't work before anything is read or printed."""
    from optimum_fista.devices import storage_place, usable_device
    from optimum_fista.folder.hub import require_push
    from optimum_fista.folder.output import require_output, unfinished_folder
    from optimum_fista.prune.journal import require_same_run
    from optimum_fista.prune.ranks import launched_processes, require_independent_layers
    from optimum_fista.removal.parts_removal import require_zeros_to_pack
    from optimum_fista.text.sources import require_source

    require_independent_layers(config, launched_processes())
    require_zeros_to_pack(config, arguments.packed)
    require_output(arguments.output, arguments.overwrite, source=arguments.model)
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise ValueError(f"--batch-size {arguments.batch_size}: pass at least 1.")
    by_model = arguments.calibration in (None, "self")
    has_images = not by_model and require_source(arguments.calibration, with_images=True)
    usable_device(arguments.device)
    storage_place(arguments.storage_device)
    if arguments.push_to_hub:
        require_push(arguments.push_to_hub)
    elif arguments.private:
        raise ValueError("--private makes sense with --push-to-hub REPO only.")
    if (
        not arguments.overwrite
    ):  # refuse an unfinished run with other settings now; other text is noticed later
        wanted: dict[str, Any] = {
            "recovery": None,
            "sequences": arguments.num_samples + config.held_out,
        }
        wanted["config"] = json.loads(json.dumps(config.resolved().to_dict()))  # tuples to lists
        if (
            arguments.sequence_length is not None and not has_images
        ):  # otherwise sequences may be shorter
            wanted["length"] = arguments.sequence_length
        require_same_run(unfinished_folder(arguments.output), wanted)


def pattern_of_run(model: str, config: FistaPruningConfig) -> str:
    """The pattern with the shares of parts that a run removes: only whole numbers of parts can be removed.

    `model` is the name that the user gave. Its configuration is read, and refused if it can't lose these parts.
    """
    from optimum_fista.model.layers import find_decoder_layers
    from optimum_fista.removal.parts import ModelOutline, removed_parts
    from optimum_fista.source.loading import described, read_config

    if config.whole_parts is None:
        return config.pattern
    outline = ModelOutline(find_decoder_layers(described(read_config(model))))
    return "+".join(removed.pattern for removed in removed_parts(outline, config.whole_parts))


def default_output(model: str, config: FistaPruningConfig, pattern: str | None = None) -> Path:
    """The default output folder: the model's name and the pattern, as in `Llama-3.2-1B-50pct` or `model-2of4`.

    `pattern` is that of the run (`pattern_of_run`); `None`: that of the configuration.
    """
    percent = f"{100 * (config.sparsity or 0.0):.6g}pct"
    pattern = percent if config.pattern == "unstructured" else pattern or config.pattern
    pattern = re.sub(r"[:+/]", "-", re.sub(r"(\d+):(\d+)", r"\1of\2", pattern))
    name = Path(os.path.abspath(model)).name if Path(model).exists() else model.rpartition("/")[2]
    return Path(f"{name}-{pattern}")


def _documents(
    arguments: argparse.Namespace, config: FistaPruningConfig
) -> tuple[str, Iterator[str] | None]:
    """Names and documents of all sources, if tokens are removed; `arguments.calibration` becomes the first one."""
    from optimum_fista.public_names import public_name
    from optimum_fista.text.sources import load_text, usual_texts

    sources = arguments.calibration or [usual_texts()[1] if config.tokens_removal else None]
    arguments.calibration = sources[0]
    if config.tokens_removal is None and len(sources) > 1:
        raise ValueError(
            f"--calibration has {len(sources)} sources: pass one, or a pattern such as vocab:0.35."
        )
    if config.tokens_removal is None:
        return "", None
    if "self" in sources:
        raise ValueError(
            "--calibration self: a model's own text is too short for rare tokens, pass files or c4."
        )
    documents = (text for source in sources for text in load_text(source, "calibration").documents)
    return ", ".join(map(public_name, sources)), documents


def _batches(
    arguments: argparse.Namespace, config: FistaPruningConfig, device: str | None, keep_in: Path
) -> list[Tensor | dict[str, Any]]:
    """Return the calibration batches, with text to measure the perplexity on if there is some.

    A sequence with images is a batch of its own. Text that a model has written is too easy for it, so then the
    perplexity is measured on Python's documentation.
    """
    from optimum_fista.source.loading import read_config, require_processor, require_tokenizer
    from optimum_fista.text.calibration_tokens import calibration_tokens_by_name, usual_length
    from optimum_fista.text.images import image_sequences
    from optimum_fista.text.sources import load_text, require_source
    from optimum_fista.text.windows import calibration_windows
    from optimum_fista.verdict import LEAST_TOKENS

    source, wanted, measured = arguments.calibration, arguments.num_samples + config.held_out, None
    model_config = read_config(arguments.model)
    length = arguments.sequence_length or usual_length(model_config)
    parts = () if config.whole_parts is None else config.whole_parts.shares
    count = 0 if any(part.kind == "experts" for part in parts) else -(-LEAST_TOKENS // length)
    has_images = source != "self" and require_source(source, with_images=True)
    if has_images:
        processor, lines = (
            require_processor(arguments.model),
            load_text(source, "calibration", with_images=True),
        )

    def draw(number: int) -> Any:  # a tensor, or a list of batches
        if has_images:
            return image_sequences(processor, model_config, lines, number, length, config.seed)
        places = {"device": device, "dtype": arguments.dtype, "keep_in": keep_in}
        return calibration_tokens_by_name(
            arguments.model, source, number, length, config.seed, **places
        )

    if source == "self":
        tokens, source = draw(wanted), "pydoc"
        with suppress(ValueError):  # this text is too short for the length
            tokenizer = require_tokenizer(arguments.model)
            measured = calibration_windows(
                tokenizer, load_text(source, "test"), count, length, config.seed
            )
    else:
        counts = (_MEASURED_IMAGES, 1) if has_images else (count, 1)
        further = counts if count and not config.held_out and arguments.num_samples > 0 else ()
        for extra in (*further, 0):
            try:
                tokens = draw(wanted + extra)
                break
            except ValueError:  # the text may be long enough for fewer sequences
                if not extra:
                    raise
        measured = tokens[wanted:] if extra else None
    if has_images:
        return [*tokens[:wanted], *({**batch, "held_out": source} for batch in measured or ())]
    batches: list[Tensor | dict[str, Any]] = [*tokens[:wanted].split(arguments.batch_size)]
    if measured is not None:
        decoded = "".join(
            require_tokenizer(arguments.model).batch_decode(measured, skip_special_tokens=True)
        )
        per_token = len(decoded.encode()) / measured.numel()
        batches.append({"input_ids": measured, "held_out": source, "bytes_per_token": per_token})
    return batches


def _config(arguments: argparse.Namespace) -> FistaPruningConfig:
    """Make the configuration: that of `--config` or `--recipe`, overridden by the given flags."""
    from optimum_fista.config import FistaPruningConfig

    flags = given(arguments, PruningOptions)
    if arguments.recipe and arguments.config:
        raise ValueError(
            f"--recipe {arguments.recipe} and --config {arguments.config}: pass only one of them."
        )
    if arguments.recipe:
        return FistaPruningConfig.recipe(arguments.recipe, **flags)
    base = (
        FistaPruningConfig.from_pretrained(arguments.config).to_dict() if arguments.config else {}
    )
    if {"sparsity", "pattern"} & set(flags):  # each of them decides the other
        base = {key: value for key, value in base.items() if key not in ("sparsity", "pattern")}
    return FistaPruningConfig.from_dict(base | flags)

"""Lines that `optimum-fista prune` prints: memory and time before a run, errors after it, and what to do next."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_fista.bars import tqdm
from optimum_fista.memory import size_text

if TYPE_CHECKING:
    from optimum_fista.config import FistaPruningConfig
    from optimum_fista.estimate import Estimate
    from optimum_fista.report import PruningReport


def say_before(arguments: argparse.Namespace, config: FistaPruningConfig) -> tuple[int, str]:
    """Print what the run will do and need; returns its batch size and the source of its text."""
    import torch

    from optimum_fista.estimate import LIBRARIES
    from optimum_fista.folder.output import unfinished_folder
    from optimum_fista.memory import available_bytes
    from optimum_fista.prune.journal import begun_batch_size

    chosen: int | None = arguments.batch_size or begun_batch_size(
        unfinished_folder(arguments.output)
    )
    try:
        estimate = estimate_of(arguments, config, chosen)
        lines, parts = overview_of(estimate), estimate.memory["host"]
    except (ValueError, OSError):
        raise  # the run would fail, too: stop before a model writes text for hours
    except Exception as error:  # some families can't build a model without weights
        print(f"note: memory could not be estimated: {error}", file=sys.stderr)
        return chosen or 1, arguments.calibration or "self"
    # Measured after the libraries are loaded.
    needed, free = sum(parts.values()) - LIBRARIES, available_bytes(torch.device("cpu")) or 0
    lines += [f"{'':<13}{size_text(free)} of memory are free", f"{'output':<13}{arguments.output}"]
    if arguments.push_to_hub:
        beside = f"with copies of the small files beside the weights of {arguments.model}"
        lines.append(f"{'upload':<13}{arguments.push_to_hub}, {beside}")
    if needed > free:
        most = max(parts, key=lambda part: parts[part])
        lines.append(
            f"warning: this run is estimated to need {size_text(needed)} of memory, and {size_text(free)} are free: it "
            f"may be killed ({most}: {size_text(parts[most])}). Pass --storage-device disk, a smaller --batch-size, a "
            "shorter --sequence-length or fewer --num-samples; --dry-run shows what they need."
        )
    print("\n".join(lines), file=sys.stderr)
    return estimate.batch_size, estimate.calibration


def estimate_of(
    arguments: argparse.Namespace, config: FistaPruningConfig, batch_size: int | None
) -> Estimate:
    """Estimate memory and time of the run, with batches of this size; `None`: the best size for the device."""
    from optimum_fista.estimate import Estimate

    names = ("sequence_length", "calibration", "device", "dtype", "storage_device", "packed")
    options = {name: getattr(arguments, name) for name in names}
    number = arguments.num_samples + config.held_out
    return Estimate(arguments.model, config, num_samples=number, batch_size=batch_size, **options)


def overview_of(estimate: Estimate) -> list[str]:
    """Say in a few lines what a run will do and need."""
    from optimum_fista.report import lines_of_unplaced
    from optimum_fista.text.sources import require_source

    model, config, parameters = estimate.model, estimate.config, estimate.model.num_parameters()
    dtype, weights = str(model.dtype).removeprefix("torch."), sum(estimate.weights.values())
    zeros, removed = sum(estimate.zeros.values()), estimate.num_removed
    pruned = f"{len(estimate.operators)} operators with {weights:,} weights"
    if removed:
        pruned += f"; {removed:,} parameters are removed ({removed / parameters:.1%})"
    elif weights:
        pruned += f"; {zeros:,} become zero ({zeros / weights:.1%})"
    tokens, more = f"{estimate.num_samples} x {estimate.length} tokens", ""
    if estimate.calibration.endswith(".jsonl") and require_source(
        estimate.calibration, with_images=True
    ):
        tokens = (
            f"{estimate.num_samples} sequences with images of {estimate.length} tokens or fewer"
        )
        more = ", and what the encoders of images need"
    held_out = f" ({config.held_out} held out)" if config.held_out else ""
    text = (
        "that the model writes itself"
        if estimate.calibration == "self"
        else f"of {estimate.calibration}"
    )
    if estimate.too_large_to_write:
        text += " (to write its own text, the whole model would have to fit into memory)"
    memory = ", ".join(
        f"{size_text(sum(parts.values()))} of the {place}"
        for place, parts in estimate.memory.items()
    )
    model_size = f"{parameters:,} parameters in {dtype} ({size_text(estimate.weight_bytes)})"
    quantized = (
        f"; dequantized from {estimate.quantized['quant_method']}" if estimate.quantized else ""
    )
    quantized += ", written as it is stored" if estimate.as_stored else ""
    default = " (the default)" * (config.method == type(config).method)
    lines = {
        "model": f"{type(model).__name__}, {model_size}, {len(estimate.layers)} decoder layers{quantized}",
        "pruned": pruned,
        "pattern": str(
            config.sparsity
            if estimate.config.pattern == "unstructured"
            else estimate.config.pattern
        ),
        "removed": "; ".join(map(str, estimate.removed_parts)),
        "method": f"{config.method}{default}, error correction {config.error_correction}",
        "calibration": f"{tokens}{held_out} {text}, batches of {estimate.batch_size}",
        "memory": f"{memory}, at most, on {estimate.device}{more}",
        "disk": size_text(sum(estimate.disk_bytes.values())),
    }
    unplaced = lines_of_unplaced(estimate.source.copied, estimate.source.lost)
    return [f"{name:<13}{text}" for name, text in lines.items() if text] + [
        f"{'beside it':<13}{line}" for line in unplaced
    ]


def details_of(estimate: Estimate) -> list[str]:
    """What `--dry-run` prints: the overview, operators by name, memory and disk by part, time by stage, and notes."""
    from optimum_fista.removal.parts_removal import first_names
    from optimum_fista.solve.methods import method_class

    lines, kinds = overview_of(estimate), dict[str, list[str]]()
    for name in estimate.weights:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    lines += [
        "",
        f"{'operators':<24}{'number':>8}{'weights':>20}{'removed' if estimate.num_removed else 'zeros':>20}",
    ]
    for kind, names in kinds.items():
        weights, zeros = (
            sum(count[name] for name in names) for count in (estimate.weights, estimate.zeros)
        )
        lines.append(f"{kind:<24}{len(names):>8}{weights:>20,}{zeros:>20,}")
    reasons = dict[str, list[str]]()
    for name, why in estimate.left_dense.items():
        # one line for all layers: "loses the rows that model.layers.*.mlp.down_proj no longer reads"
        reasons.setdefault(re.sub(r"\.\d+\.", ".*.", why), []).append(name)
    lines += [f"left dense ({reason}): {first_names(names)}" for reason, names in reasons.items()]
    notes = list(estimate.config.idle_patterns([*estimate.operators, *estimate.left_dense]))
    if method_class(estimate.config.method).memory_factors is None:
        notes.append(
            f"the memory of method {estimate.config.method!r} is not measured (it has no memory_factors): the "
            "largest of all methods is counted."
        )
    tables: dict[str, Any] = {
        f"memory, {place}": (parts, size_text) for place, parts in estimate.memory.items()
    }
    tables["disk"] = estimate.disk_bytes, size_text
    try:
        tables["time"] = estimate.seconds, tqdm.format_interval
    except (ValueError, RuntimeError, OSError) as error:
        notes.append(f"time is not estimated: {error}")
    for title, (parts, text_of) in tables.items():
        lines += ["", f"{title:<44}{text_of(sum(parts.values())):>12}"]
        lines += [
            f"  {name:<42}{text_of(n):>12}"
            for name, n in sorted(parts.items(), key=lambda p: -p[1])
            if n
        ]
    if estimate.calibration == "self":
        notes.append(
            "--calibration self loads the whole model, which writes its text; no time is counted for that."
        )
    return [*lines, *(f"note: {note}" for note in notes)]


def verdicts(report: PruningReport) -> Iterator[str]:
    """Say how much worse the model became, and whether that is much; docs/report.md has the limits of the words.

    The last lines count the tensors that were copied or left out because the model's class does not load them.
    """
    from optimum_fista.headlines import perplexity_line
    from optimum_fista.report import lines_of_unplaced

    yield from cost_of_tokens(report)
    if report.measured("pruned") is not None:
        yield perplexity_line(report)
    if report.operators:
        worst = max(report.operators, key=lambda o: o.fit_error)
        # docs/report.md gives the reasons for these limits
        word = "low" if worst.fit_error < 0.2 else "usual" if worst.fit_error < 0.5 else "high"
        yield f"largest fit error {worst.fit_error:.2f} ({word}): {worst.name.removesuffix('.weight')}"
    yield from lines_of_unplaced(report.model.get("copied", {}), report.model.get("lacks", {}))


def cost_of_tokens(report: PruningReport) -> Iterator[str]:
    """Say what the removal of tokens cost on held-out text, with the verdict; nothing if no token was removed."""
    from optimum_fista.report import COST_OF_TOKENS_ELSEWHERE

    if "vocabulary" not in report.model:
        return
    if report.bits_per_byte is None:
        yield "what the removed tokens cost is not measured (a warning says why)"
    else:
        yield f"{report.cost_of_tokens} ({report.verdict_of_tokens})"
    yield COST_OF_TOKENS_ELSEWHERE


def path_of_first_model(report: PruningReport, model: str) -> str:
    """A name by which the model that the user began with can be loaded, if one is known; otherwise "MODEL".

    Args:
        report: Report of a run that was given `model`. It knows of the first model a Hub id or the last part of a path.
        model: Hub id or path.
    """
    from optimum_fista.public_names import public_name

    name = report.first_model.name
    if report.origin is None or public_name(model) == name:
        return model
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
    if is_hub_id:
        return name
    # Results are often written beside the models that they were made of.
    beside = Path(model).parent / name
    if name and (beside / "config.json").exists():
        return str(beside)
    return "MODEL"


def argument(path: str | Path) -> str:
    """Write a path as an argument of a command: quoted, and not taken for an option if it begins with a dash."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def next_commands(
    model: str, folder: Path, calibration: str | None, *, has_zeros: bool = True
) -> str:
    """List commands to use on a pruned model; `calibration` is `None` if the model was recovered already."""
    from optimum_fista.folder.checkpoint import VOCABULARY_FILE
    from optimum_fista.text.sources import usual_texts

    comparison = "perplexity; run it on the dense model too, to compare"
    if (folder / VOCABULARY_FILE).exists():
        # perplexities of different vocabularies say nothing of each other
        comparison = "bits per byte; run it on the dense model too, and compare these"

    name, dense = argument(folder), argument(model)
    measured, trained = usual_texts()
    text = (
        trained if calibration == "self" else argument(calibration or trained)
    )  # a model would write for hours
    commands = {
        f"chat {name} --beside {dense}": "talk to the pruned and to the dense model",
        f"evaluate {name} --text {measured}": comparison,
        f"recover {name} --teacher {dense} --calibration {text}": "train it to be more like the dense model",
        f"report {name}": "a page about the run",
    }
    if has_zeros:
        commands[f"pack {name} --output {name}-packed"] = "store it without its zeros"
        commands[f"verify {name}"] = "counts the zeros in the files again"
    shown = {c: why for c, why in commands.items() if calibration or not c.startswith("recover ")}
    lines = [f"optimum-fista {command}    # {why}" for command, why in shown.items()]
    repository = re.sub(r"[^\w.]+", "-", folder.name, flags=re.ASCII).strip(
        "-."
    )  # letters that the Hub takes
    lines.append(
        f"hf upload YOUR-NAME/{repository} {name}    # put it on the Hub, after hf auth login"
    )
    if model == "MODEL":
        lines.append("# MODEL is the model that was pruned first: its folder or Hub id")
    return "\n".join(["next:", *(f"  {line}" for line in lines)])

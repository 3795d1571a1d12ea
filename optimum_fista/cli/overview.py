"""Lines that `optimum-fista prune` prints: memory and time before a run, errors after it, and what to do next.

Before a run, an `Estimate` plans it on a model without weights, and says what it will prune and need: `plan_of` makes
the lines for a run, `details_of` those of `--dry-run`. After a run come the `verdicts` on its report and the
`next_commands`. *Host* is the memory of the machine, as against that of a GPU. "self" as a source of calibration text
means that the model writes it.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from optimum_fista.bars import tqdm
from optimum_fista.memory import size_text

if TYPE_CHECKING:
    from optimum_fista.cli.prune_request import PruneRequest
    from optimum_fista.estimate.estimate import Estimate
    from optimum_fista.report import PruningReport


def plan_of(request: PruneRequest) -> tuple[PruneRequest, list[str]]:
    """Estimate a run; returns the request with a batch size and a source of text, and the lines of the plan to print.

    The batch size and the source are the user's if given, otherwise the best ones. A run that resumes keeps its batch
    size. Raises the errors of options that the run would raise, and OSError if the disk has too little room. The
    configuration of a Hub id is downloaded into the cache; nothing else is written.
    """
    import torch

    from optimum_fista.estimate.peak_memory import LIBRARIES
    from optimum_fista.folder.output import unfinished_folder
    from optimum_fista.memory import available_bytes
    from optimum_fista.prune.identity import begun_batch_size

    batch_size = request.batch_size
    if batch_size is None:
        # That of the run that resumes; None if there is none.
        batch_size = begun_batch_size(unfinished_folder(request.output))
    try:
        estimate = estimate_of(replace(request, batch_size=batch_size))
        lines = overview_of(estimate, request.sources)
        host_parts = estimate.memory["host"]  # bytes, by part, such as "decoder layer"
    except (ValueError, OSError):
        raise  # the run would fail, too: stop before a model writes text for hours
    except Exception as error:  # some families can't build a model without weights
        note = f"note: memory could not be estimated: {error}"
        chosen = request.with_choices(batch_size=batch_size or 1, source=request.source or "self")
        return chosen, [note]
    require_disk(sum(estimate.disk_bytes.values()), request.output)

    free = available_bytes(torch.device("cpu")) or 0
    needed = sum(host_parts.values()) - LIBRARIES  # they are loaded already
    lines.append(f"{'':<13}{size_text(free)} of memory are free")
    lines += measuring_of(request)
    lines.append(f"{'output':<13}{request.output}")
    if request.push_to_hub:
        beside = f"with copies of the small files beside the weights of {request.model}"
        lines.append(f"{'upload':<13}{request.push_to_hub}, {beside}")
    if needed > free:
        largest = max(host_parts, key=lambda part: host_parts[part])
        lines.append(
            f"warning: this run is estimated to need {size_text(needed)} of memory, and {size_text(free)} are free: it "
            f"may be killed ({largest}: {size_text(host_parts[largest])}). Pass --storage-device disk, a smaller "
            "--batch-size, a shorter --sequence-length or fewer --num-samples; --dry-run shows what they need."
        )
    chosen = request.with_choices(batch_size=estimate.batch_size, source=estimate.calibration)
    return chosen, lines


def measuring_of(request: PruneRequest) -> list[str]:
    """Say in a line of the plan what a run measures on the texts that the user named, and what that costs.

    Returns a list of that line, or an empty one if the user named no text (`request.measure`).
    """
    if not request.measure:
        return []
    from optimum_fista.text.loops import NEW_TOKENS, NUM_PROMPTS  # loads Transformers

    texts = ", ".join(request.measure)
    return [
        f"{'measured':<13}{texts}: both models are read once more for the loss; if their weights fit into memory, each "
        f"writes {NUM_PROMPTS} x {NEW_TOKENS} tokens to look for loops"
    ]


def require_disk(needed: int, output: Path) -> None:
    """Refuse an output folder whose disk has less than `needed` bytes free; OSError.

    Bytes that an unfinished run has written already need not be free. `output` need not exist; no folder is made.
    """
    from optimum_fista.folder.output import unfinished_folder

    # A run writes into this folder beside the output, which gets its name at the end.
    unfinished = unfinished_folder(output)
    written = sum(path.stat().st_size for path in unfinished.rglob("*") if path.is_file())
    still_needed = needed - written

    existing_folder = unfinished
    while not existing_folder.exists():
        existing_folder = existing_folder.parent
    free = shutil.disk_usage(existing_folder).free
    if still_needed > free:
        raise OSError(
            f"output {str(output)!r}: the run needs up to {size_text(still_needed)} of disk, and {size_text(free)} "
            "are free there: make room, or pass --output on another disk. --dry-run shows what it needs."
        )


def estimate_of(request: PruneRequest) -> Estimate:
    """Estimate what the run of a request takes, from the model's configuration; no weights are read.

    If the request has no batch size, it is the best one for the device. If it has no source of text, it is the best one
    for the model. The configuration of a Hub id is downloaded into the cache.
    """
    from optimum_fista.estimate.estimate import Estimate

    return Estimate(
        request.model,
        request.config,
        num_samples=request.num_sequences,
        sequence_length=request.sequence_length,
        batch_size=request.batch_size,
        calibration=request.source,
        device=request.device,
        dtype=request.dtype,
        storage_device=request.storage_device,
        packed=request.packed,
        num_sources=max(1, len(request.sources)),
    )


def overview_of(estimate: Estimate, sources: Sequence[str] = ()) -> list[str]:
    """Say in a few lines what a run will do and need; `estimate` is that of the run. Changes nothing.

    `sources` are those of the calibration text that the user named, such as ("c4", "code.txt"); if there is one or
    none, `estimate` has the source. If the only calibration text is a `.jsonl` file, it is read to find out whether it
    has images.
    """
    from optimum_fista.report import lines_of_unplaced
    from optimum_fista.text.sources import require_source

    config = estimate.config
    has_images = False
    if len(sources) < 2 and estimate.calibration.endswith(".jsonl"):
        has_images = require_source(estimate.calibration, with_images=True)
    is_default = config.method == type(config).method  # the default of the dataclass
    default = " (the default)" if is_default else ""
    pattern = config.pattern
    if pattern == "unstructured":  # says nothing without the share of zeros
        pattern = str(config.sparsity)
    encoders = ", and what the encoders of images need" if has_images else ""
    memory = ", ".join(
        f"{size_text(sum(parts.values()))} of the {place}"
        for place, parts in estimate.memory.items()
    )
    texts_by_name = {
        "model": _model_line(estimate),
        "pruned": _pruned_line(estimate),
        "pattern": pattern,
        "removed": "; ".join(str(parts) for parts in estimate.removed_parts),
        "method": f"{config.method}{default}, error correction {config.error_correction}",
        "calibration": _calibration_line(estimate, has_images, sources),
        "memory": f"{memory}, at most, on {estimate.device}{encoders}",
        "disk": size_text(sum(estimate.disk_bytes.values())),
    }
    lines = [f"{name:<13}{text}" for name, text in texts_by_name.items() if text]
    # Tensors in the model's files that its class does not load: they are copied, or left out.
    for line in lines_of_unplaced(
        estimate.source.num_copied_by_module,
        estimate.source.not_copied,
        estimate.prediction_experts,
    ):
        lines.append(f"{'beside it':<13}{line}")
    return lines


def _model_line(estimate: Estimate) -> str:
    """Say what the model is, how large it is, and how its tensors are stored.

    `estimate.quantized` are the quantization settings of its configuration, None if it is not quantized.
    `estimate.as_stored`: tensors are written in their stored form, because the run only removes parts.
    """
    model = estimate.model
    dtype = str(model.dtype).removeprefix("torch.")
    size = f"{model.num_parameters():,} parameters in {dtype} ({size_text(estimate.weight_bytes)})"
    line = f"{type(model).__name__}, {size}, {len(estimate.layers)} decoder layers"
    if estimate.quantized:
        line += f"; dequantized from {estimate.quantized['quant_method']}"
    if estimate.as_stored:
        line += ", written as it is stored"
    return line


def _pruned_line(estimate: Estimate) -> str:
    """Say how many operators are pruned, and how many weights become zero or are removed.

    `estimate.weights` and `.zeros` are numbers by the name of an operator, such as "model.layers.3.mlp.down_proj".
    Operators without zeros are refitted to make up for what their decoder layer lost. Whether one can be is known only
    when the layer runs.
    """
    pruned = [name for name, zeros in estimate.zeros.items() if zeros]
    num_refitted = len(estimate.zeros) - len(pruned)
    weights = sum(estimate.weights[name] for name in pruned)
    parts = list[str]()
    if pruned or not estimate.num_removed:
        parts.append(f"{len(pruned)} operators with {weights:,} weights")
    if estimate.num_removed:
        share = estimate.num_removed / estimate.model.num_parameters()
        parts.append(f"{estimate.num_removed:,} parameters are removed ({share:.1%})")
    elif weights:
        zeros = sum(estimate.zeros.values())
        parts.append(f"{zeros:,} become zero ({zeros / weights:.1%})")
    if num_refitted:
        parts.append(f"others are refitted to make up for it ({num_refitted} at most)")
    return "; ".join(parts)


def _calibration_line(estimate: Estimate, has_images: bool, sources: Sequence[str]) -> str:
    """Say how many tokens of which text a run is calibrated on; `has_images`: whether the text has images.

    `sources` are those of the text that the user named, such as ("c4", "code.txt").
    `estimate.num_samples` are sequences, and `estimate.length` the tokens in each. Of these sequences,
    `estimate.config.held_out` are not calibrated on. `estimate.too_large_to_write`: the model would have written the
    text itself if it fitted into memory.
    """
    tokens = f"{estimate.num_samples} x {estimate.length} tokens"
    if has_images:
        tokens = (
            f"{estimate.num_samples} sequences with images of {estimate.length} tokens or fewer"
        )
    held_out = f" ({estimate.config.held_out} held out)" if estimate.config.held_out else ""
    text = f"of {estimate.calibration}"
    if len(sources) > 1:
        text = f"of {', '.join(sources)} in equal shares"
    elif estimate.calibration == "self":
        text = "that the model writes itself"
    elif estimate.too_large_to_write:
        text += " (to write its own text, the whole model would have to fit into memory)"
    return f"{tokens}{held_out} {text}, batches of {estimate.batch_size}"


def details_of(estimate: Estimate, sources: Sequence[str] = ()) -> list[str]:
    """Return what `--dry-run` prints: the overview, operators by name, memory and disk by part, time by stage, notes.

    `estimate` is that of the run, and `sources` are those of the calibration text that the user named (`overview_of`).
    To find out the time, a small random model is pruned in a temporary folder. If that can't be done, a note says why.
    """
    from optimum_fista.solve.methods import method_class

    lines = [*overview_of(estimate, sources), "", *_operator_lines(estimate)]
    # Messages on options with patterns of names, such as --exclude, that match no operator.
    all_operators = [*estimate.operators, *estimate.left_dense]
    notes = list(estimate.config.idle_patterns(all_operators))
    if method_class(estimate.config.method).memory_factors is None:
        notes.append(
            f"the memory of method {estimate.config.method!r} is not measured (it has no memory_factors): the "
            "largest of all methods is counted."
        )
    for place, parts in estimate.memory.items():
        lines += _table(f"memory, {place}", parts, size_text)
    lines += _table("disk", estimate.disk_bytes, size_text)
    try:
        seconds = estimate.seconds  # this prunes the small model
    except (ValueError, RuntimeError, OSError) as error:
        notes.append(f"time is not estimated: {error}")
    else:
        lines += _table("time", seconds, tqdm.format_interval)
    if estimate.calibration == "self":
        notes.append(
            "--calibration self loads the whole model, which writes its text; no time is counted for that."
        )
    return [*lines, *(f"note: {note}" for note in notes)]


def _operator_lines(estimate: Estimate) -> list[str]:
    """Make a table of the operators by the last part of their names, and lines with the reasons why others stay dense.

    `estimate.weights` and `.zeros` are numbers, and `.left_dense` reasons, all by the name of an operator, such as
    "model.layers.3.mlp.down_proj".
    """
    from optimum_fista.removal.removal import first_names

    names_of_kinds = dict[str, list[str]]()  # by the last part of the name, such as "down_proj"
    for name in estimate.weights:
        _, _, kind = name.rpartition(".")
        names_of_kinds.setdefault(kind, []).append(name)
    heading = "removed" if estimate.num_removed else "zeros"
    lines = [f"{'operators':<24}{'number':>8}{'weights':>20}{heading:>20}"]
    for kind, names in names_of_kinds.items():
        weights = sum(estimate.weights[name] for name in names)
        zeros = sum(estimate.zeros[name] for name in names)
        lines.append(f"{kind:<24}{len(names):>8}{weights:>20,}{zeros:>20,}")

    names_left_dense = dict[str, list[str]]()  # by reason
    for name, reason in estimate.left_dense.items():
        # One line for all layers: "loses the rows that model.layers.*.mlp.down_proj no longer reads".
        of_any_layer = re.sub(r"\.\d+\.", ".*.", reason)
        names_left_dense.setdefault(of_any_layer, []).append(name)
    for reason, names in names_left_dense.items():
        lines.append(f"left dense ({reason}): {first_names(names)}")
    return lines


def _table(
    title: str, parts: Mapping[str, float], text_of: Callable[[float], str]
) -> Iterator[str]:
    """Yield the lines of a table: the title with the sum, then the parts from the largest to the smallest.

    `parts` are numbers, such as bytes or seconds, by name. `text_of` writes one of them. Parts of 0 are left out.
    """
    yield ""
    yield f"{title:<44}{text_of(sum(parts.values())):>12}"
    for name, number in sorted(parts.items(), key=lambda part: -part[1]):
        if number:
            yield f"  {name:<42}{text_of(number):>12}"


def verdicts(report: PruningReport) -> Iterator[str]:
    """Say how much worse the model became, and whether that is much; docs/report.md has the limits of the words.

    First comes what removed tokens cost, then the perplexity and the largest error of an operator. Then lines count the
    tensors that were copied or left out because the model's class does not load them (`report.model["copied"]` and
    `["lacks"]`), and those that lost experts. The last lines are on texts that the user named.
    """
    from optimum_fista.headlines import perplexity_line
    from optimum_fista.report import lines_of_unplaced

    yield from cost_of_tokens(report)
    if report.measured("pruned") is not None:
        yield perplexity_line(report)
    if report.operators:
        # The error of an operator's outputs on the calibration tokens, relative to the outputs.
        worst = max(report.operators, key=lambda operator: operator.fit_error)
        # docs/report.md gives the reasons for these limits.
        if worst.fit_error < 0.2:
            word = "low"
        elif worst.fit_error < 0.5:
            word = "usual"
        else:
            word = "high"
        yield f"largest fit error {worst.fit_error:.2f} ({word}): {worst.name.removesuffix('.weight')}"
    yield from lines_of_unplaced(
        report.model.get("copied", {}), report.model.get("lacks", {}), report.prediction_experts
    )
    yield from losses_on_texts(report)


def losses_on_texts(report: PruningReport) -> Iterator[str]:
    """Say what each held-out text that the user named lost, and the verdict; no line if none was named."""
    for text in report.texts:
        yield f"{text.name}: {report.words_on(text)}"
    if report.verdict_of_texts:
        yield f"verdict: {report.verdict_of_texts}"


def cost_of_tokens(report: PruningReport) -> Iterator[str]:
    """Say what the removal of tokens cost on held-out text, with the verdict; no line if no token was removed.

    `report.bits_per_byte` has the bits per byte before and after; `None` if they were not measured.
    """
    from optimum_fista.report import COST_OF_TOKENS_ELSEWHERE

    has_lost_tokens = "vocabulary" in report.model
    if not has_lost_tokens:
        return
    if report.bits_per_byte is None:
        yield "what the removed tokens cost is not measured (a warning says why)"
    else:
        yield f"{report.cost_of_tokens} ({report.verdict_of_tokens})"
    yield COST_OF_TOKENS_ELSEWHERE  # that unlike text, such as other languages and code, loses more


def path_of_first_model(report: PruningReport, model: str) -> str:
    """Return a name by which the model that the user began with can be loaded; "MODEL" if none is known.

    Args:
        report: Report of a run that was given `model`. Of the first model it has the name: a Hub id, the last part of a
            path, or an empty text if the name is not known.
        model: Hub id or path.
    """
    from optimum_fista.public_names import public_name

    name = report.first_model.name
    is_first_model = report.origin is None  # the model given was never pruned
    has_its_name = public_name(model) == name  # of a path the last part
    if is_first_model or has_its_name:
        return model
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
    if is_hub_id:
        return name
    # Results are often written beside the models that they were made of.
    if name:
        beside = Path(model).parent / name
        if (beside / "config.json").exists():
            return str(beside)
    return "MODEL"


def argument(path: str | Path) -> str:
    """Write a path as an argument of a command: quoted for a shell, and "-model" as "./-model", so not as an option."""
    text = str(path)
    if text.startswith("-"):
        text = f"./{text}"
    return shlex.quote(text)


def next_commands(
    model: str,
    folder: Path,
    calibration: Sequence[str] | None,
    *,
    has_zeros: bool = True,
    is_packed: bool = False,
) -> str:
    """Return lines with commands to use on a pruned model, each with a few words on what it is for. Runs none of them.

    Args:
        model: The dense model: Hub id, path, or "MODEL" if its name is not known.
        folder: The pruned model.
        calibration: Sources of its calibration text; `None` if the model was recovered already.
        has_zeros: Whether some of its weights are zero.
        is_packed: Whether it is stored without its zeros.
    """
    from optimum_fista.folder.checkpoint import VOCABULARY_FILE
    from optimum_fista.text.sources import usual_texts
    from optimum_fista.train.recovery_options import RecoveryOptions

    comparison = "perplexity; run it on the dense model too, to compare"
    has_lost_tokens = (folder / VOCABULARY_FILE).exists()
    if has_lost_tokens:
        # Perplexities of different vocabularies say nothing of each other.
        comparison = "bits per byte; run it on the dense model too, and compare these"

    # Quoted for a shell.
    name = argument(folder)
    dense = argument(model)
    texts = usual_texts()
    commands = {
        f"chat {name} --beside {dense}": "talk to the pruned and to the dense model",
        f"evaluate {name} --text {texts.to_measure_on}": comparison,
    }
    if calibration is not None:
        recover = f"recover {name} --teacher {dense}"
        for source in calibration:
            # A model would write its own text for hours.
            text = texts.to_calibrate_on if source == "self" else argument(source)
            recover += f" --calibration {text}"
        if len(calibration) > RecoveryOptions.held_out:  # at least one sequence of each text
            recover += f" --held-out {len(calibration)}"
        commands[recover] = "train it to be more like the dense model"
    commands[f"report {name}"] = "a page about the run"
    if has_zeros:
        if not is_packed:
            commands[f"pack {name} --output {name}-packed"] = "store it without its zeros"
        commands[f"verify {name}"] = "counts the zeros in the files again"

    lines = [f"optimum-fista {command}    # {purpose}" for command, purpose in commands.items()]
    # A repository's name has letters, digits, dots and dashes.
    repository = re.sub(r"[^\w.]+", "-", folder.name, flags=re.ASCII).strip("-.")
    lines.append(
        f"hf upload YOUR-NAME/{repository} {name}    # put it on the Hub, after hf auth login"
    )
    if model == "MODEL":
        lines.append("# MODEL is the model that was pruned first: its folder or Hub id")
    return "\n".join(["next:", *(f"  {line}" for line in lines)])

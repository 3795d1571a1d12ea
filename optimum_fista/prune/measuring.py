"""Measure what a run costs on held-out texts that the user named: `--measure FILE` and `--protect FILE=1.02`.

`require_texts` checks the texts before the run starts. After a run in files, `measure_folder` measures the dense model
and the result, and writes the losses into the report, the model card and `config.json` of the result. For a model in
memory, `FistaPruner` measures before and after the run, and `note_losses` adds both to the report.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from accelerate.utils import get_int_from_env

from optimum_fista.folder.card import PACKED_NOTE, model_card
from optimum_fista.folder.checkpoint import CARD_FILE, CONFIG_KEY, REPORT_FILE
from optimum_fista.folder.output import rewrite
from optimum_fista.folder.writing import summary
from optimum_fista.records import LayerReport
from optimum_fista.report import PruningReport
from optimum_fista.run_record import words_of_pattern
from optimum_fista.solve.patterns import PartShare, WholeParts, parse_pattern
from optimum_fista.source.loading import require_tokenizer
from optimum_fista.source.model_folder import CONFIG_FILE, read_json
from optimum_fista.text.loss import (
    MEASURING_ERRORS,
    MeasuredText,
    TextLoss,
    compared,
    losses_of_folder,
    require_measurable,
)

# Environment variables with the rank of a process, its number among those that were launched together. Accelerate reads
# the same ones.
_VARIABLES_OF_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


class MeasuringInterrupted(KeyboardInterrupt):
    """Ctrl-C while texts were measured: the result is finished, and its report says that they were not measured.

    Its message says the same to the user; `optimum-fista` prints it.
    """


def require_texts(
    model: str, measure: Mapping[str, str] | None, protect: Mapping[str, float] | None
) -> list[MeasuredText]:
    """Check the texts that a run is to measure, and return what is measured of them; ValueError if that can't work.

    `model` is a folder or a Hub id, whose tokenizer counts the tokens of the texts. `measure` and `protect` are as the
    user of `FistaPruner.prune` passes them. The tokenizer of a Hub id is downloaded into the cache; nothing else
    changes.
    """
    if not measure and not protect:
        return []
    return require_measurable(measure or {}, protect or {}, require_tokenizer(model))


def measure_folder(
    dense: str,
    folder: Path,
    texts: Sequence[MeasuredText],
    report: PruningReport,
    *,
    device: str | None,
    progress: bool,
) -> None:
    """Measure the model before a run and its result on texts, and add the losses to the report and to the folder.

    Changes `report`, which is that of the result with the names in its files, and in `folder` the report, the model
    card and the summary in `config.json`. Without texts, and in a process of rank 1 and higher, nothing is done. The
    run has written the report with the names of the texts in `texts_not_measured`. They stay there if the texts can't
    be measured, if Ctrl-C stops it (MeasuringInterrupted), or if the process is killed.

    Both models are loaded and run, layer by layer; a process of rank 0 does it alone.

    Args:
        dense: The model before the run: a folder or a Hub id.
        folder: The finished folder of the result.
        texts: As `require_texts` returns them.
        report: The report of the run.
        device: Where to compute, such as "cuda:0"; `None`: the accelerator if there is one.
        progress: Show progress bars.
    """
    rank = int(get_int_from_env(_VARIABLES_OF_RANK, 0))
    if not texts or rank > 0:
        return

    def losses_of_model(name: str, label: str, counts_experts: bool = False) -> list[TextLoss]:
        """Measure the model with this name, a folder or a Hub id, on `texts`; `label` is for the progress bar.

        It runs on `device`, and multiplies matrices as the run of `report` did. If `counts_experts`, the tokens that
        each expert gets are counted, too.
        """
        return losses_of_folder(
            name,
            texts,
            device=device,
            compute_dtype=report.config["compute_dtype"],
            progress=progress,
            label=label,
            counts_experts=counts_experts,
            counts_loops=True,
        )

    interrupt: KeyboardInterrupt | None = None
    try:
        before = losses_of_model(dense, "Measuring before", counts_experts=bool(report.mixtures))
        after = losses_of_model(str(folder), "Measuring after")
    except KeyboardInterrupt as error:
        note_failure(report, texts, error)
        interrupt = error
    except MEASURING_ERRORS as error:  # the run is finished, and its result is kept
        note_failure(report, texts, error)
    else:
        note_losses(report, texts, dense=before, pruned=after)

    _rewrite(folder, report, dense)
    if interrupt is not None:
        raise MeasuringInterrupted(
            f"the model in {folder} is finished, and its texts were not measured to the end"
        ) from interrupt


def note_losses(
    report: PruningReport,
    texts: Sequence[MeasuredText],
    *,
    dense: Sequence[TextLoss],
    pruned: Sequence[TextLoss],
) -> None:
    """Add the losses of the model before a run (`dense`) and of its result (`pruned`) to `report`, which changes.

    Mixtures that lost experts get the numbers of tokens that reached each expert of the model before the run, too.
    """
    report.texts = compared(texts, dense, pruned)
    report.texts_not_measured = []
    report.layers = _with_expert_tokens(report, dense)
    for text in report.unprotected:
        report.warn(f"{text.name} lost more than was allowed: {report.words_on(text)}")
    smaller_pattern = pattern_within_limits(report)
    if smaller_pattern is not None:
        report.warn(
            f"{smaller_pattern} instead of {report.pattern} keeps to what was allowed if the loss grows evenly with "
            "what is removed. It often grows faster than that, so more may be possible."
        )


def pattern_within_limits(report: PruningReport) -> str | None:
    """Name the pattern, with a smaller share, that is likely to keep to all limits of the texts that broke them.

    The loss of each text is taken to grow in proportion to the share. In the measured tables (docs/results.md, experts;
    docs/should-you-prune.md) twice the share costs about twice the loss or more, so this is careful. Returns words such
    as "experts:0.11", with a share that removes a whole number of parts, or "30% unstructured", in whole percent;
    `None` if no text broke its limit, if even one part or 1% is too much, or if the pattern has no share of its own
    ("2:4"), several ("heads:0.3+channels:0.1"), or removes tokens. Changes nothing.
    """
    # How much of the share each text allows, from 0 to 1.
    fractions = list[float]()
    for text in report.unprotected:
        first = report.first_bits_per_byte(text)
        allowed_rise = 0.0
        if text.at_most is not None and first is not None:
            # An earlier run may have taken a part of what is allowed, or all of it.
            allowed_rise = max(0.0, text.at_most * first - text.dense)
        rise = text.pruned - text.dense
        fractions.append(allowed_rise / rise if rise > 0 else 0.0)
    if not fractions:
        return None

    try:
        pattern = parse_pattern(
            report.config.get("pattern", "unstructured"), report.config.get("sparsity")
        )
    except ValueError:  # a pattern that removes tokens
        return None
    if isinstance(pattern, WholeParts):
        if len(pattern.shares) > 1:
            return None
        (part,) = pattern.shares
        counted = report.model["parts_counted"][part.kind]
        return _fewer_parts(part, counted, min(fractions), report.config.get("keep_divisible"))
    if pattern.fixed:
        return None
    # Rounded down to whole percent. The small number is for products such as 28.999999999999996.
    share = math.floor(100 * min(fractions) * pattern.sparsity + 1e-9) / 100
    if share == 0:
        return None
    return words_of_pattern(str(pattern), share)


def _fewer_parts(
    share: PartShare, counted: Mapping[str, int], fraction: float, divisible_by: int | None
) -> str | None:
    """Name the pattern that removes this fraction, from 0 to 1, of the parts that a run has removed, or fewer.

    `share` is what the run was asked to remove. `counted` has the numbers of the parts "before" and "after" the run,
    and "router_groups", of which each keeps equally many. Of the numbers that a run takes, with the user's
    `divisible_by` for experts, the largest one goes. `None` if there is none.
    """
    number = counted["before"]
    # The small number is for fractions that are rounded, such as 0.49999999999999994.
    num_removed = math.floor(fraction * (number - counted["after"]) + 1e-9)
    for kept in range(number - num_removed, number):
        smaller = PartShare.keeping(share.kind, kept, number, share.multiple_of)
        try:
            num_left = replace(smaller, divisible_by=divisible_by).num_kept(
                number, counted["router_groups"]
            )
        except ValueError:  # the share is too far from the numbers that may stay
            continue
        if num_left == kept:
            return str(smaller)
    return None


def _with_expert_tokens(report: PruningReport, dense: Sequence[TextLoss]) -> list[LayerReport]:
    """Copy the reports of decoder layers in `report`; mixtures get the tokens that reached each of their experts.

    `dense` are the losses of the model before the run on each text, with these numbers (`TextLoss.expert_tokens`). The
    run may have removed decoder layers: then the numbers of those that stayed are in `report.model["layers_kept"]`.
    """
    numbers_before = report.model.get("layers_kept", range(len(report.layers)))
    layers = list[LayerReport]()
    for layer, number_before in zip(report.layers, numbers_before, strict=True):
        mixture = layer.mixture
        if mixture is not None and all(number_before in loss.expert_tokens for loss in dense):
            tokens_of_texts = tuple(loss.expert_tokens[number_before] for loss in dense)
            mixture = replace(mixture, tokens_of_texts=tokens_of_texts)
        layers.append(replace(layer, mixture=mixture))
    return layers


def note_failure(
    report: PruningReport, texts: Sequence[MeasuredText], error: BaseException
) -> None:
    """Note in `report`, which changes, that the texts could not be measured, and warn of it.

    `error` is what stopped the measuring. For Ctrl-C it is a KeyboardInterrupt, which has no message.
    """
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, KeyboardInterrupt):
        reason = "stopped by Ctrl-C"
    report.texts_not_measured = [text.name for text in texts]
    report.warn(
        f"the loss on {', '.join(report.texts_not_measured)} is not known ({reason}). The files do not depend on it."
    )


def _rewrite(folder: Path, report: PruningReport, dense: str) -> None:
    """Write the report, the model card and the summary in `config.json` of a finished folder again.

    `dense` is the model that the run was given, whose own card is read for its license. The folder's list of its own
    files is updated, too (`rewrite`), so that a later run may replace the folder.
    """
    # The card of a packed folder ends with a note on how to unpack it: the new card needs it, too.
    is_packed = (folder / CARD_FILE).read_text("utf-8").endswith(PACKED_NOTE)
    card = model_card(report, dense)
    if is_packed:
        card += PACKED_NOTE
    content = read_json(folder / CONFIG_FILE)
    content[CONFIG_KEY] = summary(report)  # `fista_pruning`, by which other runs see what was done
    texts = {
        REPORT_FILE: report.to_json(),
        CARD_FILE: card,
        CONFIG_FILE: json.dumps(content, indent=2) + "\n",
    }
    rewrite(folder, texts)

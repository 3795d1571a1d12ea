"""Making a pruned model again as its folder says, and how near the second result comes to the first."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimum_fista.model.architecture import find_decoder_layers, input_embedding
from optimum_fista.model.calibration import CalibrationBatch, hold_out, read_batches, tokens_sha256
from optimum_fista.model.digest import combined_sha256, layer_sha256, rest_sha256
from optimum_fista.model.parts import Part, find_parts
from optimum_fista.run.checkpoints.checkpoint import (
    REPORT_FILE,
    REPRODUCE_FILE,
    checkpoint_files,
    checkpoint_sha256,
    read_json,
    read_report,
    require_files,
)
from optimum_fista.run.checkpoints.loading import load_lazily
from optimum_fista.run.checkpoints.output_folder import MODEL_FILES, require_output
from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.environment import arithmetic_of, processor, settings_of
from optimum_fista.run.evaluation.verification import read_operators
from optimum_fista.run.packed_folders.packed_folder import pack_folder, unpack_folder
from optimum_fista.run.packed_folders.unpacking import is_packed
from optimum_fista.run.pruner import FistaPruner
from optimum_fista.run.pruning.run_report import describe_calibration, first_names
from optimum_fista.run.reports.report import MixtureReport, OperatorReport, PruningReport, library_versions
from optimum_fista.run.streamed.journal import differences
from optimum_fista.run.texts.calibration_source import calibration_tokens_by_name, num_unseen
from optimum_fista.solve.bitmask import unpack_mask

SAME_MASK = 0.95
"""Share of the weights of all operators that both runs have to keep or remove; docs/howto/reproduce.md says why."""
SAME_ERROR = 0.1
"""By how much the errors of an operator may differ, as a share of the first."""
SAME_WEIGHTS = 0.3
"""By how much the weights of an operator that both runs keep may differ, as a share of their norm in the first."""

_ORIGIN: dict[str, type] = {"batches": list, "packed": bool, "result_sha256": str}
_ORIGIN |= dict.fromkeys(("arithmetic", "calibration", "model", "model_config", "processor", "versions"), dict)
"""What `fista/reproduce.json` holds."""


@dataclass(frozen=True)
class Reproduction:
    """What came out of a second run.

    Attributes:
        bit_equal: Whether all tensors are.
        mask_agreement: Share of the weights of all operators that both runs keep or both remove; a weight in a group of
            columns that stayed in one smaller model alone counts as another.
        error_changes: By how much the error of each operator or mixture differs, as a share of the first; `inf` if it
            has another size. Empty if all is bit-equal.
        weight_changes: `|| W - V ||_F / || W ||_F` of each operator, over the weights that both runs keep.
    """

    bit_equal: bool
    mask_agreement: float = 1.0
    error_changes: dict[str, float] = field(default_factory=dict)
    weight_changes: dict[str, float] = field(default_factory=dict)

    @property
    def nearly_equal(self) -> bool:
        """Whether it is bit-equal, or differs by no more than results of different processors do."""
        changes = ((self.error_changes, SAME_ERROR), (self.weight_changes, SAME_WEIGHTS))
        near = all(value <= limit for found, limit in changes for value in found.values())  # NaN is not near
        return self.bit_equal or (self.mask_agreement >= SAME_MASK and near)

    def __str__(self) -> str:
        """A line for people."""
        if self.bit_equal:
            return "bit-equal: every tensor was made again"
        found = (
            f"masks agree in {self.mask_agreement:.2%} of the weights, errors differ most in "
            f"{_largest(self.error_changes)}, weights that both keep in {_largest(self.weight_changes)}"
        )
        if self.nearly_equal:
            return f"equal within what processors differ by: {found}"
        limits = f"at least {SAME_MASK:.0%}, at most {SAME_ERROR:.0%} and at most {SAME_WEIGHTS:.0%}"
        return f"NOT equal: {found}; {limits} are what processors differ by"


def _largest(changes: dict[str, float]) -> str:
    """The largest changes, in words."""
    worst = sorted(changes.items(), key=lambda item: -item[1])[:4]
    return ", ".join(f"{name} ({change:.1%})" for name, change in worst if change) or "none"


def reproduce(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    model: str | Path | None = None,
    calibration: str | None = None,
    calib_dataloader: Iterable[Any] | None = None,
    device: str | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Reproduction:
    """Prune a model again as `fista/reproduce.json` of its folder says, and compare the result with it.

    What differs in versions, processor, arithmetic and the model's configuration is said first. Then the model and the
    calibration tokens are compared by their digests, before anything is pruned. The run takes as many threads as the
    first one.

    Args:
        folder: The pruned model's folder, packed or not.
        output: Where to keep the second result; `None`: nowhere.
        model: Where the dense model is; `None`: the Hub id that was pruned, or a folder of that name here.
        calibration: The calibration source; `None`: that of the first run. A text file is found by its name here.
        calib_dataloader: The calibration batches, if they came from no source that has a name.
        device: Where to compute; `None`: on the kind of device that the first run used.
        progress: Whether to show a progress bar.
        say: Called with each line on what differs.

    Raises:
        FileNotFoundError: If the folder does not say how it was made, or the model or the text is not here.
        FileExistsError: If `output` holds a model already, or other files that would be replaced.
        ValueError: If the model, the tokens, or the weights in the folder are others than those of the first run;
            or if the results differ and so do the configurations of the models.
    """
    folder = Path(folder)
    require_files(folder, REPORT_FILE)
    if read_report(folder).retrained:
        raise ValueError(f"{str(folder)!r} was trained after pruning, which pruning alone does not make again.")
    require_files(folder, REPRODUCE_FILE)
    made, report = _read_origin(folder), read_report(folder)
    config, arithmetic = FistaPruningConfig.from_dict(report.config), made["arithmetic"]
    # the products of the first run, whatever is quick here; older folders don't say, and had float32
    arithmetic.setdefault("products", "torch.float32")
    config = replace(config, compute_dtype=arithmetic["products"].removeprefix("torch."))
    if report.model.get("size_choice") is not None:  # what was chosen by measured times would be chosen anew
        config = config.with_parts(report.explicit_pattern)
    where: dict[str, Any] = {
        "device": device or arithmetic["device"],
        "dtype": arithmetic["dtype"].removeprefix("torch."),
    }
    name = _model_name(made["model"]) if model is None else str(model)
    if output is not None:
        for source in (name, folder):
            require_output(Path(output), False, source=source, names=MODEL_FILES)
    with _threads(made["processor"]["threads"]), tempfile.TemporaryDirectory(prefix="optimum-fista-") as scratch:
        dense, _ = load_lazily(name, Path(scratch) / "offload", **where)
        now: dict[str, dict[str, Any]] = {
            "versions": library_versions(),
            "arithmetic": arithmetic_of(dense, config.compute_dtype),
        }
        now |= {"processor": dict(processor()), "model_config": settings_of(dense)}
        for line in differences({key: made[key] for key in now}, now):
            say(line)
        _require_same_weights(folder, made, Path(scratch))
        digests = [layer_sha256(layer) for _, layer in find_decoder_layers(dense)]
        if combined_sha256([*digests, rest_sha256(dense)]) != made["model"]["sha256"]:
            others = [layer.name for layer in report.layers if layer.dense_sha256 not in digests]
            shown = first_names(others) or "what is in no decoder layer"
            raise ValueError(
                f"model={name!r} is not the one that was pruned: {shown} differs. Pass the model as it was (--model)."
            )
        vocabulary = input_embedding(dense).shape[0]
        channels = find_parts(dense, "channels").parts if config.reorder_channels else ()
        del dense
        batches = calib_dataloader
        if batches is None:
            drawn = made["calibration"]["num_sequences"]
            further = num_unseen(config, drawn) if report.perplexity is None else report.perplexity["num_sequences"]
            options = {**where, "progress": progress}
            batches = _named_batches(name, calibration, made, config.seed, options, 0 if config.held_out else further)
        batches = hold_out(read_batches(batches, vocabulary), config.held_out)
        _require_same_tokens(batches, made)
        again = Path(scratch) / "again" if output is None else Path(output)
        FistaPruner(config, progress=progress).prune(
            name,
            [_as_passed(batch) for batch in batches],
            calibration_source=made["calibration"]["source"],
            output_dir=again,
            packed=made["packed"],
            **where,
        )
        if read_json(again / REPRODUCE_FILE)["result_sha256"] == made["result_sha256"]:
            return Reproduction(bit_equal=True)
        if config_changes := "; ".join(differences(made["model_config"], now["model_config"])):
            raise ValueError(
                f"the result is another one, and the configuration of model={name!r} is not that of the model that was "
                f"pruned ({config_changes}). Pass the model as it was (--model)."
            )
        return _compare(folder, report, again, read_report(again), channels)


def _read_origin(folder: Path) -> dict[str, Any]:
    """What `fista/reproduce.json` says.

    Raises:
        ValueError: If it is damaged, or of a later version.
    """
    made = read_json(folder / REPRODUCE_FILE)
    wrong = [name for name, kind in _ORIGIN.items() if not isinstance(made.get(name), kind)]
    if made.get("format") != 1 or wrong:
        what = f"its format is {made.get('format')!r}, this version reads 1" if not wrong else f"it lacks {wrong[0]}"
        raise ValueError(f"{str(folder / REPRODUCE_FILE)!r} can't be used: {what}.")
    return made


def _model_name(model: dict[str, Any]) -> str:
    """The name that a run can be given again."""
    name = str(model["name"])
    if not name or (model["is_local"] and not Path(name).exists()):
        raise FileNotFoundError(f"model: there is no {name or 'name, and no folder'} here: pass where it is (--model).")
    return name


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute in so many threads, and afterwards in as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _require_same_weights(folder: Path, made: dict[str, Any], scratch: Path) -> None:
    """Refuse a folder whose weights are not those that the run wrote, as the run stored them."""
    packed, stored = made["packed"], folder
    if is_packed(folder) != packed:  # later packed, or unpacked
        stored = scratch / "stored"
        (pack_folder if packed else unpack_folder)(folder, stored)
    if checkpoint_sha256(checkpoint_files(stored, "packed" if packed else "model")) != made["result_sha256"]:
        raise ValueError(f"the weights in {str(folder)!r} were changed after the run: there is nothing to compare.")


def _named_batches(
    name: str, calibration: str | None, made: dict[str, Any], seed: int, options: dict[str, Any], further: int
) -> Iterable[Any]:
    """The calibration batches of a source that has a name, of which `further` sequences may have been drawn with them.

    The command line draws those to measure the perplexity on together with the others. A text may be too short for
    them; a model writes for long, so the likelier number comes first.
    """
    found, source = made["calibration"], calibration or made["calibration"]["source"]
    length, left = divmod(found["num_tokens"], found["num_sequences"])
    if source is None or left:
        raise ValueError(
            "calibration: the tokens came from Python and have no name: pass the text that they were sampled from "
            "(--calibration), or the batches themselves, reproduce(folder, calib_dataloader=...)."
        )
    count = found["num_sequences"] + found.get("held_out", {}).get("num_sequences", 0)
    for number in dict.fromkeys((further, 0) if source == "self" else (0, further)):
        tokens = calibration_tokens_by_name(name, source, count + number, length, seed, **options)[:count]
        if tokens_sha256([CalibrationBatch(tokens[: found["num_sequences"]])]) == found["sha256"]:
            break
    return tokens.split([rows for number, rows, _ in made["batches"] for _ in range(number)])


def _require_same_tokens(batches: list[CalibrationBatch], made: dict[str, Any]) -> None:
    found = describe_calibration(batches, made["calibration"]["source"])
    if found != made["calibration"]:
        others = "; ".join(differences(made["calibration"], found))
        raise ValueError(
            f"the calibration tokens are not those of the first run ({others}). Pass the text that it had "
            "(--calibration), or its batches, reproduce(folder, calib_dataloader=...)."
        )


def _as_passed(batch: CalibrationBatch) -> dict[str, Any]:
    mask = batch.attention_mask
    return {"input_ids": batch.input_ids} | ({} if mask is None else {"attention_mask": mask})


def _compare(
    folder: Path, report: PruningReport, again: Path, second: PruningReport, channels: Sequence[Part]
) -> Reproduction:
    """How near two results come that are not bit-equal, one operator in memory at a time.

    `channels` are those that may have changed places: masks are compared in the order of the dense model.
    """
    parts = {name: part for part in channels for name in part.tensors}
    orders = [{o.name: o.input_order for o in one.operators if o.input_order is not None} for one in (report, second)]
    first, others = _records(report), _records(second)
    changes = {name: _error_change(first.get(name), others.get(name)) for name in {**first, **others}}
    if any(change == float("inf") for change in changes.values()):
        return Reproduction(False, 0.0, changes)
    same, total, weights = 0, 0, dict[str, float]()
    for pair in zip(read_operators(folder, report), read_operators(again, second), strict=True):
        part = parts.get(pair[0][0].name)
        moved = part is not None and all(f"{part.name}.weight" in found for found in orders)
        groups = [one.groups_kept for one, _, _ in pair]
        seen: list[list[Tensor]] = []
        for (one, weight, packed), order, other_groups in zip(pair, orders, reversed(groups), strict=True):
            tensors = [unpack_mask(packed, tuple(weight.shape)), weight.float()]
            if part is not None and moved:
                places = torch.tensor(order[f"{part.name}.weight"]).argsort().tolist()
                tensors = [part.shrink(one.name, tensor, places) for tensor in tensors]
            if one.groups_kept is not None and other_groups is not None:  # the columns of other groups are others
                common = torch.isin(torch.tensor(one.groups_kept), torch.tensor(other_groups))
                axis = int(not one.stored_transposed)
                columns = common.repeat_interleave(weight.shape[axis] // len(common)).nonzero().flatten()
                tensors = [tensor.index_select(axis, columns) for tensor in tensors]
            seen.append(tensors)
        (mask, first_weight), (mask_again, second_weight) = seen
        same, total = same + int((mask == mask_again).sum()), total + weight.numel()
        kept, kept_again = (found[mask & mask_again] for found in (first_weight, second_weight))
        norm = float(kept.norm())
        weights[one.name] = float((kept - kept_again).norm()) / norm if norm else float(kept_again.any())
    return Reproduction(False, same / total if total else 1.0, changes, weights)


def _records(report: PruningReport) -> dict[str, OperatorReport | MixtureReport]:
    records: list[OperatorReport | MixtureReport] = [*report.operators, *report.mixtures]
    return {record.name: record for record in records}


def _error_change(one: OperatorReport | MixtureReport | None, other: OperatorReport | MixtureReport | None) -> float:
    """By how much the error of an operator or a mixture differs, as a share of the first."""
    if one is None or other is None or _size(one) != _size(other):
        return float("inf")
    pairs = [(getattr(one, name, None), getattr(other, name, None)) for name in ("fit_error", "output_error")]
    return max(abs(a - b) / a if a else float(a != b) for a, b in pairs if a is not None and b is not None)


def _size(one: OperatorReport | MixtureReport) -> tuple[int, ...]:
    return one.shape if isinstance(one, OperatorReport) else (len(one.groups_kept),)

"""Saving a pruned model as a folder that plain Transformers loads, with masks, report and model card."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_fista.model.architecture import find_decoder_layers, find_operators
from optimum_fista.model.offload import stored_tensor
from optimum_fista.model.operator import LinearOperator
from optimum_fista.run.checkpoints.atomic import errors_of_writing, write_bytes, write_tensors, write_text
from optimum_fista.run.checkpoints.loading import forget_gguf
from optimum_fista.run.checkpoints.output_folder import require_output
from optimum_fista.run.checkpoints.output_lock import new_output
from optimum_fista.run.checkpoints.stored_names import as_stored, stored_names
from optimum_fista.run.reports.card import PACKED_NOTE, PICTURE_FILE, error_picture, model_card
from optimum_fista.run.reports.report import PruningReport
from optimum_fista.solve.bitmask import unpack_mask

CONFIG_FILE, CARD_FILE = "config.json", "README.md"
CONFIG_KEY, PACKED_KEY = "fista_pruning", "quantization_config"
MASKS_FILE = "fista/masks.safetensors"
REPORT_FILE = "fista/report.json"
_CONFIG_KEYS = {"method", "pattern", "error_correction"}
_CALIBRATION_KEYS = {"num_sequences", "num_tokens"}
MASKS_FORMAT = "bitmask-1"
MASKS_METADATA = {"format": MASKS_FORMAT}  # one key only: safetensors writes several in any order


def summary(report: PruningReport) -> dict[str, Any]:
    """What `config.json` says under `fista_pruning`."""
    totals = report.totals
    return {
        "format": MASKS_FORMAT,
        "method": report.config["method"],
        "pattern": report.config["pattern"],
        "sparsity": report.config["sparsity"],
        "error_correction": report.config["error_correction"],
        "num_operators": totals["num_operators"],
        "num_zeros": totals["num_zeros"],
        "mean_fit_error": totals["mean_fit_error"],
        "mean_output_error": totals["mean_output_error"],
        "masks": MASKS_FILE,
        "report": REPORT_FILE,
        "version": report.versions["optimum-fista"],
    } | ({"retrained": True} if report.retrained else {})


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        OSError: If the file can't be read.
        ValueError: If it holds something else.
    """
    try:
        values = json.loads(file.read_text())
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"{str(file)!r} is damaged: it is not JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"{str(file)!r} is damaged: it holds a JSON {type(values).__name__}, not an object.")
    return values


def require_files(folder: Path, *names: str) -> None:
    """Refuse a folder that lacks a file of a pruned model.

    Raises:
        FileNotFoundError: If so.
    """
    for name in names:
        if not (folder / name).exists():
            raise FileNotFoundError(f"{str(folder)!r} holds no {name}: pass a folder saved by optimum-fista.")


def read_report(folder: Path) -> PruningReport:
    """The report in a pruned model's folder.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is none of optimum-fista.
    """
    file = folder / REPORT_FILE
    require_files(folder, REPORT_FILE)
    try:
        report = PruningReport.from_dict(read_json(file))
        for record, keys in ((report.config, _CONFIG_KEYS), (report.calibration, _CALIBRATION_KEYS)):
            if missing := sorted(keys - set(record)):
                raise KeyError(*missing)
        return report
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(file)!r} is no report of optimum-fista ({error}).") from error


def operators_by_weight(model: PreTrainedModel, report: PruningReport) -> dict[str, LinearOperator]:
    """The linear operators of a pruned model, by the names of their weights in the model."""
    found = (find_operators(name, layer, report.config["exclude"]) for name, layer in find_decoder_layers(model))
    return {f"{name}.weight": operator for operators in found for name, operator in operators.items()}


def is_retrained(model: PreTrainedModel) -> bool:
    """Whether the model's configuration says that its weights were trained after pruning."""
    return bool((getattr(model.config, CONFIG_KEY, None) or {}).get("retrained"))


def mark_retrained(model: PreTrainedModel) -> None:
    """Note in the configuration of a pruned model that its weights were trained after pruning."""
    entry = getattr(model.config, CONFIG_KEY, None)
    if entry is not None and not entry.get("retrained"):
        setattr(model.config, CONFIG_KEY, entry | {"retrained": True})


def save_checkpoint(
    model: PreTrainedModel,
    folder: Path,
    report: PruningReport,
    masks: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write the model folder; see `installation.install` for how it replaces one that is there.

    Raises:
        BlockingIOError: If another run is writing the folder.
        FileExistsError: If the folder holds a model, or an unfinished run, and `overwrite` is False; or files of
            something else that have the names of a model's.
        OSError: If the disk is full, or can't be written to.
        ValueError: If a weight outside its mask is no longer zero, or the checkpoint has no name for a weight.
    """
    require_output(folder, overwrite)
    if is_retrained(model) and not report.retrained:
        report = dataclasses.replace(report, retrained=True)
    found = operators_by_weight(model, report)
    operators = [found[o.name] for o in report.operators]
    _require_zeros(operators, masks)
    stored, masks = as_stored(report.operators, masks, stored_names(model, operators))
    report = dataclasses.replace(report, operators=stored)
    forget_gguf(model)
    with new_output(folder, overwrite) as unfinished:
        with errors_of_writing(unfinished):
            _save_model(model, unfinished)
        write_all_but_weights(unfinished, model, tokenizer, report, masks)


def write_all_but_weights(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    report: PruningReport,
    masks: Mapping[str, Tensor],
    packed: Mapping[str, Any] | None = None,
) -> None:
    """Write a pruned model's folder but for its weights.

    Args:
        folder: The folder.
        model: The model; its configuration gets the summary of the report.
        tokenizer: Its tokenizer; `None`: none is written.
        report: The report, under the names of the checkpoint.
        masks: Packed masks, under the same names.
        packed: What `config.json` says of weights that are stored packed; `None`: they are dense.
    """
    (folder / "fista").mkdir(exist_ok=True)
    write_text(folder / REPORT_FILE, report.to_json())
    picture = error_picture(report)
    if picture is not None:
        write_bytes(folder / PICTURE_FILE, picture)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    model.config.fista_pruning = summary(report)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    card = model_card(report, None if picture is None else PICTURE_FILE)
    write_form(folder, json.loads(model.config.to_json_string()), card, masks, packed)


def write_form(
    folder: Path,
    config: Mapping[str, Any],
    card: str | None,
    masks: Mapping[str, Tensor],
    packed: Mapping[str, Any] | None,
) -> None:
    """Write the files that say whether the weights are dense or packed.

    Args:
        folder: The folder.
        config: What `config.json` holds. It comes last: without it nothing loads.
        card: The model card; `None`: there is none.
        masks: Packed masks; packed weights bring theirs with them.
        packed: What `config.json` says of weights that are stored packed; `None`: they are dense.
    """
    if packed is None:
        write_tensors(folder / MASKS_FILE, dict(masks), MASKS_METADATA)
    if card is not None:
        write_text(folder / CARD_FILE, card.replace(PACKED_NOTE, "") + ("" if packed is None else PACKED_NOTE))
    config = {key: value for key, value in config.items() if key != PACKED_KEY}
    config |= {} if packed is None else {PACKED_KEY: dict(packed)}
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def write_index(folder: Path, stem: str, weight_map: Mapping[str, str], metadata: Mapping[str, Any]) -> str:
    """Write which of a folder's weight files holds which tensor, and the bytes of all tensors; returns its name."""
    total = 0
    for shard in {*weight_map.values()}:
        with (folder / shard).open("rb") as file:  # a safetensors file: the header's length, the header, the tensors
            total += (folder / shard).stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    index = {"metadata": {**metadata, "total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    name = f"{stem}.safetensors.index.json"
    write_text(folder / name, json.dumps(index, indent=2) + "\n")
    return name


def _save_model(model: PreTrainedModel, folder: Path) -> None:
    """`save_pretrained`, also of a model that was offloaded after it was loaded, which Transformers does not notice."""
    if hasattr(model, "hf_device_map") or not any(parameter.is_meta for parameter in model.parameters()):
        model.save_pretrained(folder)
        return
    tied = model.all_tied_weights_keys  # two parameters once they are offloaded, but the same memory
    model.hf_device_map = {"": "cpu"}  # type: ignore[assignment]
    try:
        model.save_pretrained(folder, state_dict={k: v for k, v in model.state_dict().items() if k not in tied})
    finally:
        del model.hf_device_map


def checkpoint_files(folder: Path, stem: str = "model") -> dict[str, Path]:
    """The safetensors file of every tensor of a model folder; `stem` is the first part of the files' names.

    Raises:
        FileNotFoundError: If the folder holds no safetensors checkpoint.
        ValueError: If its index is damaged.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if index.exists() and not single.exists():  # Transformers prefers the single file as well
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{str(index)!r} is damaged: it has no weight_map.")
        return {name: folder / file for name, file in weight_map.items()}
    if not single.exists():
        raise FileNotFoundError(f"{str(folder)!r} holds no {stem}.safetensors: pass a pruned model folder.")
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single)


def read_tensors(files: dict[str, Path], names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Read tensors one at a time, in the order of `names`."""
    for name in names:
        with safe_open(files[name], "pt") as file:
            yield name, file.get_tensor(name)


def _require_zeros(operators: Iterable[LinearOperator], masks: Mapping[str, Tensor]) -> None:
    for operator in operators:
        weight = operator.select(stored_tensor(operator.owner, operator.tensor))
        mask = unpack_mask(masks[f"{operator.name}.weight"], tuple(weight.shape)).to(weight.device)
        if bool(torch.any(weight.masked_select(~mask) != 0)):
            raise ValueError(
                f"{operator.name}.weight is no longer zero outside its mask: the model was changed after pruning. "
                "Save it right after prune(), or keep the mask while training."
            )

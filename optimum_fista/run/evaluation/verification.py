"""Proving from the files that a saved model keeps its pattern and sizes, and that all else is the dense model's."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from optimum_fista.model.offload import stored_tensor
from optimum_fista.model.parts import find_parts
from optimum_fista.model.shrinking import Shrinking, plan_shrinking
from optimum_fista.packed.format import unpack
from optimum_fista.packed.format import unpack_mask as unpack_packed_mask
from optimum_fista.packed.validation import PackedFormatError
from optimum_fista.run.checkpoints.checkpoint import (
    CONFIG_FILE,
    CONFIG_KEY,
    MASKS_FILE,
    REPORT_FILE,
    checkpoint_files,
    operators_by_weight,
    read_json,
    read_report,
    read_tensors,
    require_files,
    summary,
)
from optimum_fista.run.checkpoints.loading import load_lazily
from optimum_fista.run.checkpoints.stored_names import find_names, split_index
from optimum_fista.run.packed_folders.unpacking import PackedFiles, is_packed
from optimum_fista.run.reports.report import OperatorReport, PruningReport
from optimum_fista.solve.bitmask import pack_mask, unpack_mask
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.patterns import Columns, WholeParts, parse_pattern

logger = logging.getLogger(__name__)


class VerificationError(ValueError):
    """A saved model breaks what its masks and report promise; the message names the first operator."""


@dataclass(frozen=True)
class Verification:
    """What was proven.

    Attributes:
        num_operators: Operators checked.
        num_weights: Their weights.
        num_zeros: Weights that are zero by their masks and in the files.
        num_parameters: Parameters of the model; `None` if they could not be counted.
        removed: How much smaller than the dense model it is, in words; empty if no part of it was removed.
        num_equal: Tensors that are equal to those of the dense model, less the rows that were removed; `None` if they
            were not compared.
    """

    num_operators: int
    num_weights: int
    num_zeros: int
    num_parameters: int | None = None
    removed: str = ""
    num_equal: int | None = None


def verify_checkpoint(
    folder: Path, progress: Callable[[str], None] = lambda _: None, *, dense: str | Path | None = None
) -> Verification:
    """Read a pruned model's files again and check every operator, one tensor in memory at a time.

    Checks: the mask keeps exactly the number of weights the pattern asks for, in every row or group if the
    pattern says so; every weight outside the mask is zero and every weight finite; shapes, counts and totals
    agree between masks, report, config and checkpoint; the report's number of parameters is that of the model. Of a
    model that became smaller, all tensors have the shapes that its configuration describes.

    With the dense model at hand, every tensor that holds no pruned operator is compared with the dense model's: it must
    be equal, or equal to what is left of it without the channels and heads that the report says went. Of pruned
    operators, and of all tensors of a model that was trained after pruning, the shapes are compared.

    Args:
        folder: The model folder.
        progress: Called with each operator's name once it is checked, then with that of each tensor compared.
        dense: The model before it was pruned, a Hub id or a model folder. It is read in the dtype of the pruned one.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If `dense` can't be read, or if the folder is packed and `dense` is given.
        VerificationError: If something does not hold.
    """
    try:
        require_files(folder, CONFIG_FILE, *(() if is_packed(folder) else (MASKS_FILE,)), REPORT_FILE)
        config = read_json(folder / CONFIG_FILE).get(CONFIG_KEY)
        report = read_report(folder)
    except ValueError as error:
        raise VerificationError(str(error)) from error
    if not isinstance(config, dict):
        raise VerificationError(f"config.json has no {CONFIG_KEY!r}.")
    try:
        zeros = weights = 0
        for operator, weight, mask in (_read_packed if is_packed(folder) else _read_dense)(folder, report):
            zeros += _verify_operator(operator, weight, mask)
            weights += weight.numel()
            progress(operator.name)
        parameters = _verify_totals(folder, report, read_json(folder / REPORT_FILE)["totals"], zeros, weights)
    except (AttributeError, KeyError, TypeError) as error:
        raise VerificationError(f"{REPORT_FILE} lacks a field, or has one too many: {error}.") from error
    except PackedFormatError as error:
        raise VerificationError(str(error)) from error
    except SafetensorError as error:
        raise VerificationError(f"a safetensors file is damaged or incomplete: {error}.") from error
    if zeros != config.get("num_zeros"):
        raise VerificationError(f"config.json promises {config.get('num_zeros')} zeros, the masks make {zeros}.")
    for name, value in summary(report).items():
        if config.get(name, value) != value:  # older versions had fewer
            raise VerificationError(f"config.json promises {name} {config[name]!r}, {REPORT_FILE} says {value!r}.")
    equal = None if dense is None else _compare_with_dense(folder, report, str(dense), progress)
    return Verification(len(report.operators), weights, zeros, parameters, report.removed, equal)


def _verify_totals(
    folder: Path, report: PruningReport, promised: Mapping[str, Any], zeros: int, weights: int
) -> int | None:
    """Check what the report says of all operators together; returns the number of parameters if it is known."""
    claimed = report.model["num_parameters"]
    model = _described_model(folder, report.model["class"])
    parameters = None if model is None else int(model.num_parameters())
    if parameters is not None and parameters != claimed:
        raise VerificationError(f"{REPORT_FILE} promises {claimed} parameters, the model has {parameters}.")
    if model is not None and report.removed:
        _verify_shapes(folder, model)
    counted = {"num_zeros": zeros, "num_weights": weights, "sparsity": zeros / weights if weights else 0.0}
    counted |= {"model_sparsity": zeros / claimed}
    for name, value in (report.totals | counted).items():
        found = promised[name] if name in counted else promised.get(name, value)  # older versions had fewer
        if not _agree(found, value):
            raise VerificationError(f"{REPORT_FILE}: totals promise {name} {found}, the operators make {value}.")
    return parameters


def _agree(promised: float | None, value: float | None) -> bool:
    """Whether two totals are equal but for rounding; `None` stands for what was not measured."""
    if promised is None or value is None:
        return promised is value
    return math.isclose(promised, value, rel_tol=1e-9)


def _read_dense(folder: Path, report: PruningReport) -> Iterator[tuple[OperatorReport, Tensor, Tensor]]:
    """Every operator with its weight and its mask, packed to bits."""
    files = checkpoint_files(folder)
    names = [operator.name for operator in report.operators]
    tensors = [split_index(name)[0] for name in names]
    missing = [name for name in tensors if name not in files]
    if missing:
        raise VerificationError(f"{missing[0]} is in the report but not in the checkpoint.")
    with safe_open(folder / MASKS_FILE, "pt") as masks:
        if sorted(masks.keys()) != sorted(names):
            raise VerificationError("the masks and the report name different operators.")
        for operator, (_, tensor) in zip(report.operators, read_tensors(files, tensors), strict=True):
            yield operator, tensor[split_index(operator.name)[1]], masks.get_tensor(operator.name)


def _read_packed(folder: Path, report: PruningReport) -> Iterator[tuple[OperatorReport, Tensor, Tensor]]:
    """The same from a packed folder, whose weights bring their masks."""
    reader = PackedFiles.of_folder(folder)
    name, dense, mask = "", torch.empty(0), torch.empty(0)
    for operator in report.operators:
        tensor, index = split_index(operator.name)
        if tensor not in reader.names:
            raise VerificationError(f"{tensor} is in the report but not packed in the checkpoint.")
        if tensor != name:
            packed = reader.read(tensor)
            name, dense, mask = tensor, unpack(packed), unpack_packed_mask(packed)
        yield operator, dense[index], pack_mask(mask[index])


def _verify_operator(operator: OperatorReport, weight: Tensor, packed: Tensor) -> int:
    """Check one operator; returns its number of zeros by the mask."""
    name = operator.name
    shape = tuple(weight.T.shape) if operator.stored_transposed else tuple(weight.shape)
    if shape != operator.shape:
        raise VerificationError(f"{name} has shape {shape}, the report says {operator.shape}.")
    try:
        mask = unpack_mask(packed, tuple(weight.shape))
    except ValueError as error:
        raise VerificationError(f"{name}: {error}") from error
    if not bool(torch.isfinite(weight).all()):
        raise VerificationError(f"{name} holds NaN or Inf.")
    stray = int(torch.count_nonzero(weight.masked_select(~mask)))
    if stray:
        raise VerificationError(f"{name} has {stray} weights outside its mask that are not zero.")
    whole = operator.target_sparsity == 1  # operators with the same inputs share their zeros: one may get them all
    try:
        pattern = parse_pattern(operator.pattern, None if whole else operator.target_sparsity, operator.scope)
    except ValueError as error:
        raise VerificationError(f"{name}: {error}") from error
    checked = mask.T if operator.stored_transposed else mask
    if operator.groups_kept is not None:
        checked = _mask_before_removal(operator, pattern, checked)
    broken = pattern.at(operator.target_sparsity).violation(checked)
    if broken:
        raise VerificationError(f"{name}: its mask {broken}.")
    kept = int(mask.sum())
    if kept != operator.num_kept:
        raise VerificationError(f"{name}: its mask keeps {kept} weights, the report says {operator.num_kept}.")
    if not math.isclose(operator.sparsity, 1 - kept / mask.numel(), rel_tol=1e-9, abs_tol=1e-12):
        raise VerificationError(
            f"{name}: its mask has {1 - kept / mask.numel():.6%} zeros, the report says {operator.sparsity:.6%}."
        )
    return mask.numel() - kept


def _mask_before_removal(operator: OperatorReport, pattern: SparsityPattern, mask: Tensor) -> Tensor:
    """The mask of an operator before its columns were removed, from the groups that its report names.

    Raises:
        VerificationError: If the groups are not those of the pattern, or the mask has zeros besides.
    """
    name, kept = operator.name, operator.groups_kept or ()
    if not isinstance(pattern, Columns) or pattern.groups is None:
        raise VerificationError(f"{name}: the report says that columns were removed, but its pattern is {pattern}.")
    if list(kept) != sorted(set(kept) & set(range(pattern.groups))):
        raise VerificationError(f"{name}: groups_kept are not numbers from 0 to {pattern.groups - 1} in rising order.")
    if mask.shape[1] != len(kept) * pattern.width or not bool(mask.all()):
        raise VerificationError(
            f"{name}: the report names {len(kept)} groups of {pattern.width} columns that stayed, the mask keeps "
            f"{int(mask.sum())} weights of {mask.shape[1]} columns."
        )
    groups = torch.zeros(pattern.groups, dtype=torch.bool)
    groups[list(kept)] = True
    return groups.repeat_interleave(pattern.width).expand(mask.shape[0], -1)


def _compare_with_dense(folder: Path, report: PruningReport, dense: str, progress: Callable[[str], None]) -> int:
    """Compare a pruned model with the dense one, tensor by tensor; returns how many were found equal.

    Raises:
        VerificationError: If a tensor differs.
    """
    if is_packed(folder):
        raise ValueError(f"dense={dense!r}: {str(folder)!r} is packed. Unpack it, and verify the unpacked folder.")
    with tempfile.TemporaryDirectory(prefix="optimum-fista-") as offload:
        ours, _ = load_lazily(str(folder), Path(offload) / "pruned", device="cpu")
        theirs, _ = load_lazily(dense, Path(offload) / "dense", device="cpu", dtype=ours.dtype)
        if type(theirs) is not type(ours):
            raise VerificationError(f"the model is a {type(ours).__name__}, and {dense!r} a {type(theirs).__name__}.")
        reports, written = _pruned_tensors(ours, report)
        plan, kept, left, equal = None, {}, _tensor_names(ours), 0
        if report.removed:
            plan = _plan_of(report, theirs, dense)
            named = {part: reports.get(f"{plan.new_name(part)}.weight") for part in plan.parts}
            kept = {part: operator.groups_kept or () for part, operator in named.items() if operator is not None}
        for name in _tensor_names(theirs):
            new = name if plan is None else plan.new_name(name)
            if new is None:
                continue
            if new not in left:
                raise VerificationError(f"{new} is in {dense!r} and not in the pruned model.")
            found, expected = _tensor(ours, left.pop(left.index(new))), _tensor(theirs, name)
            try:
                expected = expected if plan is None else plan.shrink_tensor(name, expected, kept)
            except ValueError as error:
                raise VerificationError(f"{new}: {error}") from error
            if found.shape != expected.shape:
                raise VerificationError(
                    f"{new} has shape {tuple(found.shape)}, from {dense!r} it would have {tuple(expected.shape)}."
                )
            if new not in written and not report.retrained:
                differing = int((found != expected).sum())
                if differing:
                    raise VerificationError(
                        f"{new} differs from {dense!r} in {differing:,} of {found.numel():,} values that the run did "
                        "not prune."
                    )
                equal += 1
            progress(new)
        if left:
            raise VerificationError(f"{left[0]} is in the pruned model and not in {dense!r}.")
    return equal


def _pruned_tensors(model: PreTrainedModel, report: PruningReport) -> tuple[dict[str, OperatorReport], set[str]]:
    """Reports of the pruned operators by the names of their weights in the model, and the tensors that hold them."""
    operators, owners = operators_by_weight(model, report), {id(m): name for name, m in model.named_modules()}
    in_model = {stored.name: name for name, stored in find_names(model, list(operators.values())).items()}
    reports = {in_model[operator.name]: operator for operator in report.operators}
    return reports, {f"{owners[id(o.owner)]}.{o.tensor}" for name, o in operators.items() if name in reports}


def _plan_of(report: PruningReport, model: PreTrainedModel, dense: str) -> Shrinking:
    """The plan by which a dense model became the smaller one of a report.

    Raises:
        VerificationError: If there is none.
    """
    pattern = parse_pattern(report.config["pattern"], report.config["sparsity"])
    try:
        shares = pattern.shares if isinstance(pattern, WholeParts) else ()
        counts = {p.kind: p.num_kept(find_parts(model, p.kind).groups) for p in shares if p.kind != "layers"}
        layers = report.model.get("layers_kept")
        return plan_shrinking(model, channels=counts.get("channels"), heads=counts.get("heads"), layers=layers)
    except ValueError as error:
        raise VerificationError(f"{dense!r} can't become this model: {error}") from error


def _tensor_names(model: PreTrainedModel) -> list[str]:
    """Names of what a model stores, tied tensors once."""
    return [name for name in model.state_dict() if name not in model.all_tied_weights_keys]


def _tensor(model: PreTrainedModel, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return stored_tensor(model.get_submodule(owner), leaf)


def _verify_shapes(folder: Path, model: PreTrainedModel) -> None:
    """Check that the files hold a smaller model's tensors, also those that are no pruned operators but lost rows.

    If a checkpoint calls tensors otherwise than the model does, only those with the same name are compared.
    """
    files = checkpoint_files(folder)
    left_out = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
    described = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}
    missing = [name for name in described if name not in files]
    if missing and files.keys() <= described.keys():
        raise VerificationError(f"{missing[0]} is not in the checkpoint.")
    for name in described.keys() & files.keys():
        with safe_open(files[name], "pt") as file:
            found, shape = tuple(file.get_slice(name).get_shape()), tuple(described[name].shape)
        if found != shape:
            raise VerificationError(f"{name} has shape {found}, config.json describes {shape}.")


def _described_model(folder: Path, model_class: str) -> PreTrainedModel | None:
    """The model without weights that `config.json` describes.

    `None` if Transformers has no class of this name, or if it can't be made without weights.
    """
    found = getattr(transformers, model_class, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)) or found.config_class is None:
        return None
    try:
        config = found.config_class.from_pretrained(folder)
        with torch.device("meta"):
            return found(config)
    except Exception as error:  # anything the code of a family may raise on the meta device
        logger.info("%s could not be made without weights: %s", model_class, error)
        return None

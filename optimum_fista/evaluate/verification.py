"""Prove from the files that a saved model keeps its pattern and sizes.

The run that wrote the folder is not trusted: weights, masks and report are read again, one tensor at a time, and every
number is counted again. Only errors can't be checked, because the calibration text is not in the folder.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from optimum_fista.evaluate.comparison import VerificationError, compare_with_dense
from optimum_fista.folder.checkpoint import (
    CONFIG_FILE,
    CONFIG_KEY,
    MASKS_FILE,
    REPORT_FILE,
    VOCABULARY_FILE,
    checkpoint_files,
    kept_tokens,
    read_json,
    read_report,
    read_tensors,
    require_files,
)
from optimum_fista.folder.packed_folder import is_packed, packed_operators
from optimum_fista.folder.writing import summary
from optimum_fista.model.layers import token_limits
from optimum_fista.packed.format import PackedFormatError
from optimum_fista.removal.experts import experts_to_keep
from optimum_fista.removal.parts import runs_of_experts
from optimum_fista.report import OperatorReport, PruningReport
from optimum_fista.solve.pattern import SparsityPattern, unpack_mask
from optimum_fista.solve.patterns import Columns, parse_pattern
from optimum_fista.source.names import split_index
from optimum_fista.source.source_tensors import source_tensors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verification:
    """Numbers that were proven."""

    num_operators: int  # that were checked
    num_weights: int  # in these operators
    num_zeros: int  # of these weights, by the masks and in the files
    num_parameters: int | None = None  # of the model; `None` if they could not be counted
    removed: str = (
        ""  # how much smaller than the dense model it is, in words; empty if no part was removed
    )
    num_equal: int | None = (
        None  # tensors equal to the dense model's; `None` if they were not compared
    )
    num_mixtures: int = 0  # that lost experts


def verify_checkpoint(
    folder: Path,
    progress: Callable[[str], None] = lambda _: None,
    *,
    dense: str | Path | None = None,
) -> Verification:
    """Read a pruned model's files again and check every operator, one tensor in memory at a time.

    Checks: the mask keeps exactly the number of weights the pattern asks for, in every row or group if the
    pattern says so; every weight outside the mask is zero and every weight finite; shapes, counts and totals
    agree between masks, report, config and checkpoint; the report's number of parameters is that of the model. Of a
    model that became smaller, all tensors have the shapes that its configuration describes. If a check fails, this is a
    `VerificationError`.

    If `dense` is given, the model before it was pruned (a Hub id or a model folder), every tensor that the run did not
    change must equal its own, without the removed parts. For pruned operators, refitted experts, and MLPs whose
    channels were reordered, only shapes are compared. Packed and trained folders can't be compared (`ValueError`).

    `progress` is called with each operator's name once it is checked, then with that of each tensor compared.
    """
    try:
        require_files(
            folder, CONFIG_FILE, *(() if is_packed(folder) else (MASKS_FILE,)), REPORT_FILE
        )
        config = read_json(folder / CONFIG_FILE).get(CONFIG_KEY)
        report = read_report(folder)
    except ValueError as error:
        raise VerificationError(str(error)) from error
    if not isinstance(config, dict):
        raise VerificationError(f"config.json has no {CONFIG_KEY!r}.")
    try:
        zeros = weights = 0
        for operator, weight, mask in (packed_operators if is_packed(folder) else _read_dense)(
            folder, report
        ):
            zeros += _verify_operator(operator, weight, mask)
            weights += weight.numel()
            progress(operator.name)
        parameters = _verify_totals(
            folder, report, read_json(folder / REPORT_FILE)["totals"], zeros, weights
        )
    except (
        AttributeError,
        KeyError,
        TypeError,
    ) as error:  # of the report, which is only plain JSON
        raise VerificationError(
            f"{REPORT_FILE} lacks a field, or has one too many: {error}."
        ) from error
    except PackedFormatError as error:
        raise VerificationError(str(error)) from error
    except SafetensorError as error:
        raise VerificationError(f"a safetensors file is damaged or incomplete: {error}.") from error
    for name, value in summary(report).items():  # the totals are proven, so equal numbers are, too
        if config.get(name) != value:
            raise VerificationError(
                f"config.json promises {name} {config.get(name)!r}, {REPORT_FILE} says {value!r}."
            )
    equal = None if dense is None else compare_with_dense(folder, report, str(dense), progress)
    return Verification(
        len(report.operators),
        weights,
        zeros,
        parameters,
        report.removed,
        equal,
        len(report.mixtures),
    )


def _verify_totals(
    folder: Path, report: PruningReport, promised: Mapping[str, Any], zeros: int, weights: int
) -> int | None:
    """Check what the report says of all operators together; returns the number of parameters if it is known."""
    claimed, parameters = report.model["num_parameters"], None
    if (model := _described_model(folder, report.model["class"])) is not None:
        parameters = int(model.num_parameters())
        if parameters != claimed:
            raise VerificationError(
                f"{REPORT_FILE} promises {claimed} parameters, the model has {parameters}."
            )
        kept, size = kept_tokens(folder), token_limits(model)[0]
        if kept is not None and len(kept) != size:
            raise VerificationError(
                f"{VOCABULARY_FILE} names {len(kept)} tokens, the embedding has {size} rows."
            )
        if report.removed:
            _verify_shapes(folder, model)
            _verify_mixtures(model, report)
    counted = {
        "num_zeros": zeros,
        "num_weights": weights,
        "sparsity": zeros / weights if weights else 0.0,
    }
    counted |= {"model_sparsity": zeros / claimed}
    for name, value in (
        report.totals | counted
    ).items():  # errors are averaged anew, zeros were counted in the files
        found = promised[name]
        if found != value and (
            None in (found, value) or not math.isclose(found, value, rel_tol=1e-9)
        ):
            raise VerificationError(
                f"{REPORT_FILE}: totals promise {name} {found}, the operators make {value}."
            )
    return parameters


def _verify_mixtures(model: PreTrainedModel, report: PruningReport) -> None:
    """Check that mixtures have as many experts as the report names, and that these are the most salient ones."""
    runs = runs_of_experts(model.config.get_text_config(decoder=True))
    for mixture in report.mixtures:
        kept, saliency = mixture.groups_kept, torch.tensor(mixture.saliency, dtype=torch.float64)
        fused = model.get_submodule(mixture.name).parameters(recurse=False)
        found = {
            len(p) for p in fused if p.ndim == 3
        }  # [experts, out, in]; biases are [experts, out]
        if found != {len(kept)}:
            raise VerificationError(
                f"{mixture.name} has {found.pop()} experts, and the report says {len(kept)}."
            )
        if len(saliency) % runs or kept != experts_to_keep(saliency, len(kept), runs):
            raise VerificationError(
                f"{mixture.name}: groups_kept are not the experts with the largest saliency."
            )


def _read_dense(
    folder: Path, report: PruningReport
) -> Iterator[tuple[OperatorReport, Tensor, Tensor]]:
    """Every operator of a folder that is not packed, with its weight and its mask, packed to bits."""
    files = checkpoint_files(folder)
    names = [operator.name for operator in report.operators]
    tensors = [
        split_index(name)[0] for name in names
    ]  # experts share one: "gate_up_proj[2, :, 1::2]"
    missing = [name for name in tensors if name not in files]
    if missing:
        raise VerificationError(f"{missing[0]} is in the report but not in the checkpoint.")
    with safe_open(folder / MASKS_FILE, "pt") as masks:
        if sorted(masks.keys()) != sorted(names):
            raise VerificationError("the masks and the report name different operators.")
        for operator, (_, tensor) in zip(
            report.operators, read_tensors(files, tensors), strict=True
        ):
            yield operator, tensor[split_index(operator.name)[1]], masks.get_tensor(operator.name)


def _verify_operator(operator: OperatorReport, weight: Tensor, packed: Tensor) -> int:
    """Check one operator; returns its number of zeros by the mask."""
    name = operator.name
    shape = (
        tuple(weight.T.shape) if operator.stored_transposed else tuple(weight.shape)
    )  # (out, in)
    if shape != operator.shape:
        raise VerificationError(f"{name} has shape {shape}, the report says {operator.shape}.")
    whole = (
        operator.target_sparsity == 1
    )  # operators with the same inputs share their zeros: one may get them all
    try:
        mask = unpack_mask(packed, tuple(weight.shape))
        pattern = parse_pattern(
            operator.pattern, None if whole else operator.target_sparsity, operator.scope
        )
    except ValueError as error:
        raise VerificationError(f"{name}: {error}") from error
    weight = (
        weight.float() if weight.dtype.itemsize == 1 else weight
    )  # of quantized weights, few operations exist
    if not bool(torch.isfinite(weight).all()):
        raise VerificationError(f"{name} holds NaN or Inf.")
    if stray := int(torch.count_nonzero(weight.masked_select(~mask))):
        raise VerificationError(f"{name} has {stray} weights outside its mask that are not zero.")
    checked = (
        mask.T if operator.stored_transposed else mask
    )  # [out, in]: patterns count along the inputs
    if operator.groups_kept is not None:
        checked = _mask_of_pattern(operator, pattern, checked)
    if whole and not pattern.fixed:
        pattern = replace(pattern, sparsity=1.0)
    if broken := pattern.violation(checked):
        raise VerificationError(f"{name}: its mask {broken}.")
    kept, promised = int(mask.sum()), f"{operator.num_kept}, and {operator.sparsity:.6%} zeros"
    same = math.isclose(operator.sparsity, 1 - kept / mask.numel(), rel_tol=1e-9, abs_tol=1e-12)
    if kept != operator.num_kept or not same:
        raise VerificationError(
            f"{name}: its mask keeps {kept} weights, the report says {promised}."
        )
    return mask.numel() - kept


def _mask_of_pattern(operator: OperatorReport, pattern: SparsityPattern, mask: Tensor) -> Tensor:
    """The mask before groups of columns were removed, of which the report names those that stayed."""
    name, kept = operator.name, operator.groups_kept or ()
    if not isinstance(pattern, Columns) or pattern.groups is None:
        raise VerificationError(
            f"{name}: the report says that columns were removed, but its pattern is {pattern}."
        )
    if not kept or list(kept) != sorted(set(kept) & set(range(pattern.groups))):
        raise VerificationError(
            f"{name}: groups_kept are not numbers from 0 to {pattern.groups - 1} in rising order."
        )
    if mask.shape[1] != len(kept) * pattern.width or not bool(mask.all()):
        named = f"the report names {len(kept)} groups of {pattern.width} columns that stayed"
        raise VerificationError(
            f"{name}: {named}, the mask keeps {int(mask.sum())} of {mask.numel()} weights."
        )
    groups = torch.zeros(pattern.groups, dtype=torch.bool)
    groups[list(kept)] = True
    return groups.repeat_interleave(pattern.width).expand(
        mask.shape[0], -1
    )  # [groups] -> [out, columns before]


def _verify_shapes(folder: Path, model: PreTrainedModel) -> None:
    """Check that the files hold a smaller model's tensors, also those that are no pruned operators but lost rows."""
    source = source_tensors(model, folder)
    left_out = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
    described = {
        name: tensor for name, tensor in model.state_dict().items() if name not in left_out
    }
    missing = [name for name in described if name not in source.stored]
    if (
        missing and source.places.keys() <= described.keys()
    ):  # otherwise files and class name tensors in two ways
        raise VerificationError(f"{missing[0]} is not in the checkpoint.")
    for name in described.keys() & source.stored.keys():
        found, shape = source.stored[name].shape, tuple(described[name].shape)
        if found != shape:
            raise VerificationError(f"{name} has shape {found}, config.json describes {shape}.")


def _described_model(folder: Path, model_class: str) -> PreTrainedModel | None:
    """The model without weights that `config.json` describes; `None` if Transformers can't make one of this class."""
    found = getattr(transformers, model_class, None)
    if (
        not (isinstance(found, type) and issubclass(found, PreTrainedModel))
        or found.config_class is None
    ):
        return None
    try:
        config = found.config_class.from_pretrained(folder)
        with torch.device("meta"):  # parameters without memory
            return found(config)
    except Exception as error:  # anything the code of a family may raise on the meta device
        logger.info("%s could not be made without weights: %s", model_class, error)
        return None

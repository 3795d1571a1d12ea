"""Prove from the files that a saved model keeps its pattern and sizes.

The run that wrote the folder is not trusted: weights, masks and report are read again, one tensor at a time, and every
number is counted again. Only errors can't be checked, because the calibration text is not in the folder.

`verify_checkpoint` checks in this order: each operator against its mask and pattern, the model that `config.json`
describes (`model_verification.py`), the totals of the report, the summary in `config.json`, and, if it is asked to, the
dense model (`comparison.py`). The *report* is `fista/report.json`. A *mask* has a bit for each weight, 1 = kept; it is
packed, eight bits in a byte, and in the layout of the weight in the file. A weight may be stored transposed, as
[in, out].

An *operator* is a pruned linear map; the report names it as the files name its weight. `report.operators` are those
that the run pruned, `report.carried` those whose masks it carried over from an earlier run. Every check raises a
`VerificationError` if it fails, and changes nothing; a dense model of the Hub is downloaded into its cache.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from optimum_fista.evaluate.comparison import VerificationError, compare_with_dense
from optimum_fista.evaluate.model_verification import verify_model
from optimum_fista.folder.checkpoint import (
    CONFIG_KEY,
    MASKS_FILE,
    REPORT_FILE,
    read_report,
    require_files,
)
from optimum_fista.folder.packed_folder import is_packed, packed_operators
from optimum_fista.folder.writing import summary
from optimum_fista.records import OperatorReport
from optimum_fista.report import PruningReport
from optimum_fista.solve.pattern import SparsityPattern, pack_mask, unpack_mask
from optimum_fista.solve.patterns import Columns, parse_pattern
from optimum_fista.source.model_folder import CONFIG_FILE, checkpoint_files, read_json, read_tensors
from optimum_fista.source.names import split_index


@dataclass(frozen=True)
class Verification:
    """Numbers that were proven."""

    # That were checked: pruned by the latest run, or with masks of an earlier run that it carried over.
    num_operators: int
    # In these operators.
    num_weights: int
    # Of these weights, by the masks and in the files.
    num_zeros: int
    # Of the model; None if they could not be counted.
    num_parameters: int | None = None
    # How much smaller than the dense model it is, in words; empty if no part was removed.
    removed: str = ""
    # Tensors equal to the dense model's; None if they were not compared.
    num_equal: int | None = None
    # That lost experts.
    num_mixtures: int = 0


def verify_checkpoint(
    folder: str | Path,
    progress: Callable[[str], None] = lambda _: None,
    *,
    dense: str | Path | None = None,
) -> Verification:
    """Read a pruned model's files again and check every operator, one tensor in memory at a time.

    Neither model is changed; a dense model of the Hub is downloaded into its cache.

    Checks: the mask keeps exactly the number of weights the pattern asks for, in every row or group if the
    pattern says so; every weight outside the mask is zero and every weight finite; shapes, counts and totals
    agree between masks, report, config and checkpoint; the report's number of parameters is that of the model. Of a
    model that became smaller, all tensors have the shapes that its configuration describes.

    Args:
        folder: Folder that optimum-fista saved, packed or not.
        progress: Called with each operator's name once it is checked, then with that of each tensor compared.
        dense: The model before it was pruned, a Hub id or a model folder. Every tensor that the run did not change must
            equal its own, without the removed parts. For pruned operators, refitted experts, and MLPs whose channels
            were reordered, only shapes are compared.

    Raises:
        VerificationError: If a check fails.
        FileNotFoundError: If a file is missing.
        ValueError: If `dense` is given, and the folder is packed or was trained, so that it can't be compared.
    """
    folder = Path(folder)
    report, config_entry = _read_promises(folder)
    with _errors_of_damaged_files():
        of_this_run, in_all = _verify_operators(folder, report, progress)
        num_parameters = verify_model(folder, report)
        # As they stand in the file: `report.totals` are computed anew from the operators.
        promised = read_json(folder / REPORT_FILE)["totals"]
        _verify_totals(
            report,
            promised,
            num_weights=of_this_run.num_weights,
            num_zeros=of_this_run.num_zeros,
        )
    _verify_summary(report, config_entry)

    num_equal = None
    if dense is not None:
        num_equal = compare_with_dense(folder, report, str(dense), progress)
    return Verification(
        num_operators=len(report.masked),  # pruned by this run or carried, each once
        num_weights=in_all.num_weights,
        num_zeros=in_all.num_zeros,
        num_parameters=num_parameters,
        removed=report.removed,
        num_equal=num_equal,
        num_mixtures=len(report.mixtures),
    )


def _read_promises(folder: Path) -> tuple[PruningReport, Mapping[str, Any]]:
    """Read what the folder says of itself: its report, and `fista_pruning` of its `config.json`.

    FileNotFoundError if a file is missing, VerificationError if one is damaged.
    """
    names = [CONFIG_FILE, REPORT_FILE]
    if not is_packed(folder):
        names.append(MASKS_FILE)
    try:
        require_files(folder, *names)
        report = read_report(folder)
        config_entry = read_json(folder / CONFIG_FILE).get(CONFIG_KEY)
    except ValueError as error:
        raise VerificationError(str(error)) from error
    if not isinstance(config_entry, dict):
        raise VerificationError(f"config.json has no {CONFIG_KEY!r}.")
    return report, config_entry


@contextmanager
def _errors_of_damaged_files() -> Iterator[None]:
    """Turn errors of reading inside the context into a `VerificationError`; other errors pass."""
    try:
        yield
    except (AttributeError, KeyError, TypeError) as error:
        # The report is plain JSON, whose values may have any type.
        raise VerificationError(
            f"{REPORT_FILE} lacks a field, or has one too many: {error}."
        ) from error
    except VerificationError:
        raise
    except ValueError as error:  # a damaged file, or a packed tensor of another form
        raise VerificationError(str(error)) from error
    except SafetensorError as error:
        raise VerificationError(f"a safetensors file is damaged or incomplete: {error}.") from error


@dataclass
class _Counts:
    """Weights of several operators, and the zeros among them by their masks."""

    num_weights: int = 0
    num_zeros: int = 0

    def add(self, num_weights: int, num_zeros: int) -> None:
        """Add the numbers of one operator to these."""
        self.num_weights += num_weights
        self.num_zeros += num_zeros


def _verify_operators(
    folder: Path, report: PruningReport, progress: Callable[[str], None]
) -> tuple[_Counts, _Counts]:
    """Check every operator of the run and those that it carried over.

    Args:
        folder: The folder that is verified, packed or not.
        report: The report in it.
        progress: Called with the name of each operator once it is checked.

    Returns:
        What was counted in the operators that this run pruned, and in all with a mask (`report.masked`).
    """
    # An operator that lost columns in this run and has zeros of an earlier one has two reports with one name: one in
    # `report.operators` and one in `report.carried`. Only the report in `report.carried` is in `report.masked`, too. So
    # reports are told apart by their identity: `read_operators` yields the objects of these lists, not copies.
    masked = {id(operator) for operator in report.masked}
    pruned = {id(operator) for operator in report.operators}
    of_this_run = _Counts()
    in_all = _Counts()
    read_operators = packed_operators if is_packed(folder) else _stored_operators
    # `weight` is in the layout of the file, and `packed_mask` is uint8, with eight weights in a byte
    for operator, weight, packed_mask in read_operators(folder, report):
        zeros_of_operator = _verify_operator(operator, weight, packed_mask)
        if id(operator) in pruned:
            of_this_run.add(weight.numel(), zeros_of_operator)
        if id(operator) in masked:
            in_all.add(weight.numel(), zeros_of_operator)
        progress(operator.name)
    return of_this_run, in_all


def _stored_operators(
    folder: Path, report: PruningReport
) -> Iterator[tuple[OperatorReport, Tensor, Tensor]]:
    """Yield every operator of a folder that is not packed, with its weight and its packed mask as they are stored.

    First come those that this run pruned, then those that it carried over. The yielded reports are the objects in
    `report`.

    Args:
        folder: The folder that is verified.
        report: The report in it.
    """
    files = checkpoint_files(folder)
    operators = [*report.operators, *report.carried]
    names = [operator.name for operator in operators]
    carried = {operator.name for operator in report.carried}
    # Experts share a tensor: "gate_up_proj[2, :, 1::2]" is a part of "gate_up_proj".
    tensor_names = [split_index(name)[0] for name in names]
    for tensor_name in tensor_names:
        if tensor_name not in files:
            raise VerificationError(f"{tensor_name} is in the report but not in the checkpoint.")

    with safe_open(folder / MASKS_FILE, "pt") as masks:
        if sorted(masks.keys()) != sorted(set(names)):
            raise VerificationError("the masks and the report name different operators.")
        tensors = read_tensors(files, tensor_names)
        # `tensors` are in the order of `tensor_names`, so in that of the operators.
        for number, (operator, (_, tensor)) in enumerate(zip(operators, tensors, strict=True)):
            _, index = split_index(operator.name)
            weight = tensor[index]
            mask = masks.get_tensor(operator.name)
            is_of_this_run = number < len(report.operators)
            if is_of_this_run and operator.name in carried:
                # This run removed columns and set no zeros. Those of an earlier run come at the end.
                mask = pack_mask(torch.ones(weight.shape, dtype=torch.bool))
            yield operator, weight, mask


def _verify_operator(operator: OperatorReport, weight: Tensor, packed_mask: Tensor) -> int:
    """Check one operator; returns its number of zeros by the mask.

    Args:
        operator: What the report says of it.
        weight: As it is stored: [out, in], or [in, out] if `operator.stored_transposed`.
        packed_mask: uint8, in the layout of `weight`.
    """
    name = operator.name
    stored_shape = tuple(weight.shape)
    shape = tuple(weight.T.shape) if operator.stored_transposed else stored_shape  # [out, in]
    if shape != operator.shape:
        raise VerificationError(f"{name} has shape {shape}, the report says {operator.shape}.")
    try:
        mask = unpack_mask(packed_mask, stored_shape)  # refuses a mask of another size
        pattern = _pattern_of(operator)  # refuses a pattern that there is not
    except ValueError as error:
        raise VerificationError(f"{name}: {error}") from error

    _verify_zeros(name, weight, mask)

    # Patterns count along the inputs, so they need [out, in].
    mask_by_rows = mask.T if operator.stored_transposed else mask
    if operator.groups_kept is not None:
        # Groups of columns were removed. The pattern says how many of all columns go, so they are put back as zeros.
        mask_by_rows = _mask_before_removal(operator, pattern, mask_by_rows)
    violation = pattern.violation(mask_by_rows)  # in words; None if the mask keeps the pattern
    if violation:
        raise VerificationError(f"{name}: its mask {violation}.")

    num_kept = int(mask.sum())
    sparsity = 1 - num_kept / mask.numel()
    is_sparsity_right = math.isclose(operator.sparsity, sparsity, rel_tol=1e-9, abs_tol=1e-12)
    if num_kept != operator.num_kept or not is_sparsity_right:
        raise VerificationError(
            f"{name}: its mask keeps {num_kept} weights, the report says {operator.num_kept}, "
            f"and {operator.sparsity:.6%} zeros."
        )
    return mask.numel() - num_kept


def _pattern_of(operator: OperatorReport) -> SparsityPattern:
    """Make the pattern that an operator was pruned to, with its share of zeros, from the report of the operator.

    ValueError if the report names a pattern that there is not. `operator.scope` says what shares the zeros: "matrix" or
    "row".
    """
    # Operators with the same inputs share their zeros, and one may get them all. `parse_pattern` refuses a share of 1,
    # because it makes no sense as an option.
    is_all_zeros = operator.target_sparsity == 1
    if not is_all_zeros:
        return parse_pattern(operator.pattern, operator.target_sparsity, operator.scope)
    pattern = parse_pattern(operator.pattern, None, operator.scope)
    if pattern.fixed:  # its name says the share of zeros, such as "2:4"
        return pattern
    return replace(pattern, sparsity=1.0)


def _verify_zeros(name: str, weight: Tensor, mask: Tensor) -> None:
    """Check that a weight is finite, and zero outside its mask; both are in the layout of the file.

    `name` is for the messages; `mask` has booleans, True = kept.
    """
    if weight.dtype.itemsize == 1:
        # Few operations exist for quantized weights.
        weight = weight.float()
    if not bool(torch.isfinite(weight).all()):
        raise VerificationError(f"{name} holds NaN or Inf.")
    num_outside = int(torch.count_nonzero(weight.masked_select(~mask)))
    if num_outside:
        raise VerificationError(
            f"{name} has {num_outside} weights outside its mask that are not zero."
        )


def _mask_before_removal(
    operator: OperatorReport, pattern: SparsityPattern, mask: Tensor
) -> Tensor:
    """Make the mask of an operator before groups of columns were removed, of which the report names those that stayed.

    Args:
        operator: What the report says of it, `groups_kept` too.
        pattern: `Columns` with a number of groups; others are refused.
        mask: bool [out, columns left], which must be True everywhere.

    Returns:
        bool [out, columns before].
    """
    name = operator.name
    kept = operator.groups_kept or ()
    if not isinstance(pattern, Columns) or pattern.groups is None:
        raise VerificationError(
            f"{name}: the report says that columns were removed, but its pattern is {pattern}."
        )
    in_rising_order = sorted(set(kept))
    are_groups = bool(kept) and in_rising_order[0] >= 0 and in_rising_order[-1] < pattern.groups
    if not are_groups or list(kept) != in_rising_order:
        raise VerificationError(
            f"{name}: groups_kept are not numbers from 0 to {pattern.groups - 1} in rising order."
        )
    if mask.shape[1] != len(kept) * pattern.width or not bool(mask.all()):
        raise VerificationError(
            f"{name}: the report names {len(kept)} groups of {pattern.width} columns that stayed, "
            f"the mask keeps {int(mask.sum())} of {mask.numel()} weights."
        )
    is_kept = torch.zeros(pattern.groups, dtype=torch.bool)
    is_kept[list(kept)] = True
    # [groups] -> [columns before] -> [out, columns before]
    return is_kept.repeat_interleave(pattern.width).expand(mask.shape[0], -1)


def _verify_totals(
    report: PruningReport, promised: Mapping[str, Any], *, num_weights: int, num_zeros: int
) -> None:
    """Check what the report says of all operators together.

    Args:
        report: Its operators are checked, so means of their errors are computed from them.
        promised: `totals` as they stand in `fista/report.json`.
        num_weights: As counted in the files.
        num_zeros: As counted in the files.
    """
    counted = {
        "num_zeros": num_zeros,
        "num_weights": num_weights,
        "sparsity": num_zeros / num_weights if num_weights else 0.0,
        "model_sparsity": num_zeros / report.model["num_parameters"],
    }
    for name, value in (report.totals | counted).items():
        if not _is_close(promised[name], value):
            raise VerificationError(
                f"{REPORT_FILE}: totals promise {name} {promised[name]}, the operators make {value}."
            )


def _is_close(promised: float | None, value: float | None) -> bool:
    """Tell whether two numbers are equal but for rounding, or both `None`."""
    if promised is None or value is None:
        return promised is value
    return math.isclose(promised, value, rel_tol=1e-9)


def _verify_summary(report: PruningReport, config_entry: Mapping[str, Any]) -> None:
    """Check that `fista_pruning` of `config.json` has the numbers of the report, whose totals are proven.

    `config_entry` is the value of that key. It may have further keys.
    """
    expected = summary(report)
    if "origin" not in config_entry:
        # Earlier versions did not write it, so it promises nothing.
        del expected["origin"]
    for name, value in expected.items():
        if config_entry.get(name) != value:
            raise VerificationError(
                f"config.json promises {name} {config_entry.get(name)!r}, {REPORT_FILE} says {value!r}."
            )

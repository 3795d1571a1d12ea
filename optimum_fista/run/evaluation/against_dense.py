"""A saved model beside the dense one: what a run did not prune is equal, less the parts that went."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from optimum_fista.model.digest import tensor_of
from optimum_fista.model.parts import Part, find_parts, numbers_kept
from optimum_fista.model.shrinking import Shrinking, plan_shrinking
from optimum_fista.run.checkpoints.checkpoint import operators_by_weight
from optimum_fista.run.checkpoints.loading import load_lazily
from optimum_fista.run.checkpoints.stored_names import find_names
from optimum_fista.run.packed_folders.unpacking import is_packed
from optimum_fista.run.reports.report import OperatorReport, PruningReport
from optimum_fista.solve.patterns import WholeParts, parse_pattern


class VerificationError(ValueError):
    """A saved model breaks what its masks and report promise; the message names the first operator."""


def compare_with_dense(folder: Path, report: PruningReport, dense: str, progress: Callable[[str], None]) -> int:
    """Compare a pruned model, whose report is verified, with the dense one; returns how many tensors were found equal.

    `dense` is a Hub id or a model folder. It is read in the dtype of the pruned model. `progress` is called with the
    name of each tensor that was compared.

    Raises:
        ValueError: If the folder is packed, or the dense model can't be read.
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
            mixtures = {mixture.name: mixture for mixture in report.mixtures}
            losing = {part: mixtures.get(str(plan.new_name(part))) for part in plan.parts}
            kept |= {part: mixture.groups_kept for part, mixture in losing.items() if mixture is not None}
            written |= {f"{mixture.name}.down_proj" for mixture in report.mixtures if mixture.num_refitted}
        moved = dict[str, tuple[Part, tuple[int, ...]]]()  # tensors whose channels changed places, with their order
        for part in find_parts(theirs, "channels").parts if report.config.get("reorder_channels") else ():
            operator = reports.get(f"{part.name}.weight")
            if operator is not None and operator.input_order is not None:
                moved |= dict.fromkeys(part.tensors, (part, operator.input_order))
        for name in _tensor_names(theirs):
            new = name if plan is None else plan.new_name(name)
            if new is None:
                continue
            if new not in left:
                raise VerificationError(f"{new} is in {dense!r} and not in the pruned model.")
            found, expected = tensor_of(ours, left.pop(left.index(new))), tensor_of(theirs, name)
            try:
                expected = expected if plan is None else plan.shrink_tensor(name, expected, kept)
                if name in moved:
                    part, order = moved[name]
                    part.require_kept(sorted(order), part.groups)
                    expected = part.shrink(name, expected, order)
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
    pattern = parse_pattern(report.explicit_pattern)
    try:
        counts = numbers_kept(model, pattern) if isinstance(pattern, WholeParts) else {}
        return plan_shrinking(model, layers=report.model.get("layers_kept"), **counts)
    except ValueError as error:
        raise VerificationError(f"{dense!r} can't become this model: {error}") from error


def _tensor_names(model: PreTrainedModel) -> list[str]:
    """Names of what a model stores, tied tensors once."""
    return [name for name in model.state_dict() if name not in model.all_tied_weights_keys]

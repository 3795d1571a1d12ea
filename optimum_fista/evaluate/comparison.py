"""Compare a pruned model folder with its dense model, tensor by tensor.

Verification needs only the pruned folder. With the dense model, the rest of the folder is proven too: tensors that the
run did not change equal those of the dense model, without the removed parts.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from optimum_fista.folder.checkpoint import kept_tokens
from optimum_fista.folder.packed_folder import is_packed
from optimum_fista.folder.writing import operators_by_weight
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.model.offload import stored_tensor
from optimum_fista.removal.parts import ModelOutline, numbers_kept
from optimum_fista.removal.shrinking import plan_shrinking
from optimum_fista.report import OperatorReport, PruningReport
from optimum_fista.solve.patterns import WholeParts, parse_pattern
from optimum_fista.source.formats.dequantization import dequantizer_of
from optimum_fista.source.loading import load_lazily
from optimum_fista.source.names import stored_names
from optimum_fista.source.source_tensors import read_stored, source_tensors


class VerificationError(ValueError):
    """A saved model does not match its masks or its report."""


def compare_with_dense(
    folder: Path, report: PruningReport, dense: str, progress: Callable[[str], None]
) -> int:
    """Compare a pruned model, whose report is verified, with the dense one; returns how many tensors are equal."""
    if is_packed(folder) or report.retrained:
        why = "was trained" if report.retrained else "is packed: unpack it first"
        raise ValueError(f"dense={dense!r}: {str(folder)!r} {why}, so it can't be compared.")
    with tempfile.TemporaryDirectory(prefix="optimum-fista-") as offload:
        ours, *_ = load_lazily(str(folder), Path(offload) / "pruned", device="cpu")
        theirs, _, read_from = load_lazily(
            dense, Path(offload) / "dense", device="cpu", dtype=ours.dtype
        )
        operators, modules = (
            operators_by_weight(ours, report),
            {id(m): name for name, m in ours.named_modules()},
        )
        names = stored_names(ours, operators.values(), all_of_them=False)
        in_model = {
            stored.name: name for name, stored in names.items()
        }  # the report names weights as files do
        pruned = {in_model[operator.name]: operator for operator in report.operators}
        changed = {
            f"{modules[id(o.owner)]}.{o.tensor}" for name, o in operators.items() if name in pruned
        }
        changed |= {
            f"{mixture.name}.down_proj" for mixture in report.mixtures if mixture.num_refitted
        }
        if report.config["reorder_channels"]:
            changed |= {
                name
                for part in ModelOutline(find_decoder_layers(ours)).parts("channels").parts
                for name in part.tensors
            }
        left, equal, kept = _tensor_names(ours), 0, kept_tokens(folder, read_from)
        all_of_it = ((name, stored_tensor(theirs, name)) for name in _tensor_names(theirs))
        for name, expected in _what_stays(theirs, report, pruned) if report.removed else all_of_it:
            if name not in left:
                raise VerificationError(f"{name} is in {dense!r} and not in the pruned model.")
            found = stored_tensor(ours, left.pop(left.index(name)))
            if (
                kept is not None
                and found.shape == (len(kept), *expected.shape[1:]) != expected.shape
            ):
                expected = expected[kept[kept < len(expected)]]
            if found.shape != expected.shape:
                raise VerificationError(
                    f"{name} has shape {(*found.shape,)}, from {dense!r} {(*expected.shape,)}."
                )
            if name not in changed and (differing := int((found != expected).sum())):
                raise VerificationError(
                    f"{name} differs from {dense!r} in {differing:,} of {found.numel():,} values."
                )
            equal += name not in changed
            progress(name)
        if left:
            raise VerificationError(f"{left[0]} is in the pruned model and not in {dense!r}.")
        quantized = dequantizer_of(folder) is not None
        source, total = (
            source_tensors(theirs, read_from, quantized=quantized),
            len(find_decoder_layers(theirs)),
        )
        source = replace(source, lost=report.model.get("lacks", {}))
        here = read_stored(folder)
        for name, tensor in source.renamed(
            report.model.get("layers_kept", range(total)), total
        ).unplaced.items():
            if (
                kept is not None
                and name in here
                and here[name].shape == (len(kept), *tensor.shape[1:]) != tensor.shape
            ):
                tensor = tensor.selected(0, kept[kept < tensor.shape[0]])
            if name not in here or not tensor.equals(here[name]):
                raise VerificationError(
                    f"{name} of {dense!r} was not copied as it is, and its report does not say so."
                )
            equal += 1
            progress(name)
    return equal


def _what_stays(
    model: PreTrainedModel, report: PruningReport, pruned: dict[str, OperatorReport]
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a dense model without the parts that the report calls removed, by their names in the smaller model."""
    pattern = parse_pattern(report.config["pattern"])
    outline = ModelOutline(find_decoder_layers(model))
    counts = numbers_kept(outline, pattern) if isinstance(pattern, WholeParts) else {}
    plan = plan_shrinking(outline, counts, layers=report.model.get("layers_kept"))
    groups = {
        name.removesuffix(".weight"): operator.groups_kept or ()
        for name, operator in pruned.items()
    }
    groups |= {mixture.name: mixture.groups_kept for mixture in report.mixtures}
    kept = {part: groups.get(str(plan.new_name(part)), ()) for part in plan.parts}
    for name in _tensor_names(model):
        if new := plan.new_name(name):  # none in a decoder layer that was removed
            yield new, plan.shrink_tensor(name, stored_tensor(model, name), kept)


def _tensor_names(model: PreTrainedModel) -> list[str]:
    return [
        name for name in model.state_dict() if name not in model.all_tied_weights_keys
    ]  # tied tensors once

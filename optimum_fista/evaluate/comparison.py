"""Compare a pruned model folder with its dense model, tensor by tensor.

Verification needs only the pruned folder. With the dense model, the rest of the folder is proven too: tensors that the
run did not change equal those of the dense model, without the removed parts.

Both models are loaded lazily: a tensor is read from its file when it is compared. Tensors that the model's class does
not load, such as layers that predict more tokens, were copied from file to file, and are compared afterwards. The
*operators* of a report are the linear maps that were pruned; `groups_kept` of an operator are the groups of its columns
that stay. A model that lost tokens has fewer rows in its embedding and its head (`kept_tokens`).

The *dense* model is the one that the run was given, the *pruned* one its result. A `StoredTensor` describes a tensor in
a file, which is read only when its values are needed. Both folders are only read.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from optimum_fista.config import FistaPruningConfig
from optimum_fista.folder.checkpoint import kept_tokens
from optimum_fista.folder.naming import operators_by_weight
from optimum_fista.folder.packed_folder import is_packed
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.model.offload import stored_tensor
from optimum_fista.model.operators import LinearOperator
from optimum_fista.public_names import public_name
from optimum_fista.records import OperatorReport
from optimum_fista.removal.model_outline import ModelOutline
from optimum_fista.removal.parts import Kind, Part
from optimum_fista.removal.removal import kept_experts
from optimum_fista.removal.removed_parts import kept_by_kind, removed_parts
from optimum_fista.removal.shrinking import plan_shrinking
from optimum_fista.report import PruningReport
from optimum_fista.source.formats.dequantizer import dequantizer_of
from optimum_fista.source.inventory import source_tensors
from optimum_fista.source.loading import load_lazily
from optimum_fista.source.names import stored_names
from optimum_fista.source.prediction_layers import with_fewer_experts
from optimum_fista.source.stored_tensor import StoredTensor, read_stored


class VerificationError(ValueError):
    """A saved model does not match its masks or its report."""


def compare_with_dense(
    folder: Path, report: PruningReport, dense: str, progress: Callable[[str], None]
) -> int:
    """Compare a pruned model, whose report is verified, with the dense one; returns how many tensors are equal.

    Tensors that do not fit in memory wait in a temporary folder, which is deleted at the end.

    Args:
        folder: Folder of the pruned model, not packed.
        report: The report in that folder.
        dense: Hub id or folder of the model that the run was given.
        progress: Called with the name of each tensor that was compared.
    """
    if report.retrained:
        raise ValueError(
            f"dense={dense!r}: {str(folder)!r} was trained, so it can't be compared: leave dense out."
        )
    if is_packed(folder):
        raise ValueError(
            f"dense={dense!r}: {str(folder)!r} is packed, so it can't be compared: unpack it first."
        )
    try:
        return _compare(folder, report, dense, progress)
    except VerificationError as error:
        # Earlier runs that only removed tokens are compared, too.
        first = report.first_model.name
        given = report.model["name"]
        is_first_model = public_name(dense) == first
        if is_first_model and first != given:
            raise VerificationError(
                f"{error} {dense!r} is the model that was pruned first: pass the model that the last run began with, "
                f"{given!r}."
            ) from error
        raise


def _compare(
    folder: Path, report: PruningReport, dense: str, progress: Callable[[str], None]
) -> int:
    """Load both models lazily and compare them; returns how many tensors are equal. Both folders are only read.

    Args:
        folder: Folder of the pruned model, not packed.
        report: The verified report in that folder.
        dense: Hub id or folder of the model that the run was given. From the Hub it may be downloaded to the cache.
        progress: Called with the name of each tensor that was compared.
    """
    with tempfile.TemporaryDirectory(prefix="optimum-fista-") as offload:
        # The tokenizer and the folder, which it returns as well, are not needed.
        pruned_model = load_lazily(str(folder), Path(offload) / "pruned", device="cpu").model
        dense_model, _, dense_folder = load_lazily(
            dense, Path(offload) / "dense", device="cpu", dtype=pruned_model.dtype
        )
        # For each token of the pruned model its row in the dense one.
        tokens = kept_tokens(folder, dense_folder)
        num_equal = _compare_loaded(
            pruned_model, dense_model, report, tokens=tokens, dense=dense, progress=progress
        )
        # Tensors that the class does not load were copied from file to file.
        expected = _copied_tensors(dense_model, dense_folder, folder, report)
        num_equal += _compare_copied(
            read_stored(folder), expected, tokens=tokens, dense=dense, progress=progress
        )
    return num_equal


def _compare_loaded(
    pruned_model: PreTrainedModel,
    dense_model: PreTrainedModel,
    report: PruningReport,
    *,
    tokens: Tensor | None,
    dense: str,
    progress: Callable[[str], None],
) -> int:
    """Compare the tensors that the models load; returns how many are equal. Nothing is changed.

    Of tensors that the run changed, only shapes are compared. VerificationError if any other tensor differs.

    Args:
        pruned_model: From the pruned folder.
        dense_model: From the folder that the run was given, in the same dtype.
        report: The report in the pruned folder.
        tokens: Row of the dense model for each token of the pruned one (`kept_tokens`); `None` if all stayed.
        dense: Name of the dense model, for errors.
        progress: Called with the name of each tensor.
    """
    records, pruned_operators = _pruned_operators(pruned_model, report)
    changed = _changed_tensors(pruned_model, report, pruned_operators)

    # A dictionary as a set of names, because it keeps their order.
    not_compared = dict.fromkeys(_tensor_names(pruned_model))
    num_equal = 0
    for name, expected in _expected_tensors(dense_model, report, records):
        if name not in not_compared:
            raise VerificationError(f"{name} is in {dense!r} and not in the pruned model.")
        del not_compared[name]

        pruned = stored_tensor(pruned_model, name)
        if _lost_tokens(pruned.shape, expected.shape, tokens):
            assert tokens is not None
            # If the dense model lacks a token, it has no row for it. Then there are too few rows: an error below.
            rows_in_dense = tokens[tokens < len(expected)]
            expected = expected[rows_in_dense]
        if pruned.shape != expected.shape:
            raise VerificationError(
                f"{name} has shape {tuple(pruned.shape)}, from {dense!r} {tuple(expected.shape)}."
            )

        if name not in changed:
            _require_equal(name, pruned, expected, dense)
            num_equal += 1
        progress(name)

    if not_compared:
        first_name = next(iter(not_compared))
        raise VerificationError(f"{first_name} is in the pruned model and not in {dense!r}.")
    return num_equal


def _pruned_operators(
    pruned_model: PreTrainedModel, report: PruningReport
) -> tuple[dict[str, OperatorReport], dict[str, LinearOperator]]:
    """Return the reports of the pruned operators, and the operators, both by the names of their weights in the model.

    The report calls an operator as its weight is called in the files, where it may have another name.
    """
    operators = operators_by_weight(pruned_model, report)
    # names in the files, by the names in the model
    stored = stored_names(pruned_model, operators.values(), all_of_them=False)
    names_in_model = {stored_name.name: name for name, stored_name in stored.items()}
    records = {names_in_model[record.name]: record for record in report.operators}
    return records, {name: operators[name] for name in records}


def _expected_tensors(
    dense_model: PreTrainedModel, report: PruningReport, records: dict[str, OperatorReport]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the dense model that the pruned one should have, each with its name in the pruned model.

    Each is read from its file when it is yielded. `records` are the reports of the pruned operators, by the names of
    their weights in the pruned model; they say which parts were removed.
    """
    if report.removed:
        yield from _remaining_tensors(dense_model, report, records)
    else:
        for name in _tensor_names(dense_model):
            yield name, stored_tensor(dense_model, name)


def _require_equal(name: str, pruned: Tensor, expected: Tensor, dense: str) -> None:
    """Refuse a tensor that the run did not change and that differs from the dense model's; VerificationError.

    `name` is that of the tensor, and `dense` that of the dense model. Both tensors have the same shape.
    """
    num_different = int((pruned != expected).sum())
    if num_different:
        raise VerificationError(
            f"{name} differs from {dense!r} in {num_different:,} of {pruned.numel():,} values, and the run did "
            "not change it: the pruned folder was changed afterwards, or another model was pruned."
        )


def _changed_tensors(
    pruned_model: PreTrainedModel,
    report: PruningReport,
    pruned_operators: dict[str, LinearOperator],
) -> set[str]:
    """Return the names of the model's tensors whose values a run changed.

    These are the weights of pruned operators, down projections of mixtures that were refitted, and the tensors of MLPs
    whose channels were reordered.

    Args:
        pruned_model: From the pruned folder.
        report: The report in that folder.
        pruned_operators: The operators of the model that the report names, by the names of their weights.
    """
    module_names = {id(module): name for name, module in pruned_model.named_modules()}
    changed = set()
    for operator in pruned_operators.values():
        # Experts may be parts of one tensor of their module.
        changed.add(f"{module_names[id(operator.owner)]}.{operator.tensor}")
    for mixture in report.mixtures:
        if mixture.num_refitted:
            changed.add(f"{mixture.name}.down_proj")
    if report.config["reorder_channels"]:
        # `parts("channels")` are the MLPs; each names the tensors whose rows or columns are channels.
        outline = ModelOutline(find_decoder_layers(pruned_model))
        for part in outline.parts("channels").parts:
            changed.update(part.tensors)
    return changed


def _remaining_tensors(
    dense_model: PreTrainedModel, report: PruningReport, operators: dict[str, OperatorReport]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a dense model without the removed parts, each with its name in the smaller model.

    The plan of the smaller model (`plan_shrinking`) is made again, as the run made it. Tensors of removed decoder
    layers are left out. Weights may be in files until they are yielded.

    Args:
        dense_model: The model that the run was given. It is not changed.
        report: The report of the smaller model. `report.model["layers_kept"]` has the numbers of the decoder layers
            that stay; without this key all stay.
        operators: Those of the report, by the names of their weights in the smaller model.
    """
    # A configuration of a run reads all patterns, such as "vocab:0.35". `None`: no whole part was removed.
    pattern = FistaPruningConfig(
        pattern=report.config["pattern"],
        keep_divisible=report.config.get("keep_divisible"),  # reports of older versions lack it
    ).whole_parts
    outline = ModelOutline(find_decoder_layers(dense_model))
    # How many groups (columns or experts) of a part stay, by the kind of part.
    counts = dict[Kind, int]()
    if pattern is not None:
        removed = removed_parts(outline, pattern)  # how many parts of each kind there are, and stay
        counts = kept_by_kind(removed)  # empty if only decoder layers were removed
    plan = plan_shrinking(outline, counts, layers=report.model.get("layers_kept"))

    # Numbers of the groups that stay, by the name of the operator or mixture in the smaller model. Operators that are
    # no part have none.
    kept_by_new_name: dict[str, tuple[int, ...]] = {
        mixture.name: kept_experts(mixture) for mixture in report.mixtures
    }
    for weight_name, operator in operators.items():
        if operator.groups_kept is not None:
            kept_by_new_name[weight_name.removesuffix(".weight")] = operator.groups_kept
    # The same by the name of the part in the dense model, for `shrink_tensor`. The plan has no parts of removed decoder
    # layers.
    kept = dict[str, tuple[int, ...]]()
    for part_name in plan.parts:
        new_name = plan.new_name(part_name)
        if new_name is None:
            continue
        if new_name not in kept_by_new_name:
            raise VerificationError(f"the report does not say which groups of {new_name} stay.")
        kept[part_name] = kept_by_new_name[new_name]

    for name in _tensor_names(dense_model):
        new_name = plan.new_name(name)
        # A tensor of a removed decoder layer has no new name.
        if new_name:
            dense = stored_tensor(dense_model, name)
            yield new_name, plan.shrink_tensor(name, dense, kept)


def _copied_tensors(
    dense_model: PreTrainedModel, dense_folder: Path, folder: Path, report: PruningReport
) -> dict[str, StoredTensor]:
    """Find the tensors in the dense model's files that its class does not load, by their names in the pruned folder.

    Those that the pruned folder lacks by its own report are left out. Values are read later, when they are compared.

    Args:
        dense_model: Loaded from `dense_folder`.
        dense_folder: Folder of the model that the run was given.
        folder: The pruned folder.
        report: The report in it.
    """
    # Tensors that are still quantized are copied only if the result is quantized, too.
    is_quantized = dequantizer_of(folder) is not None
    source = source_tensors(
        dense_model, dense_folder, _mixture_of(dense_model, report), quantized=is_quantized
    )
    # Experts that stay in layers that predict more tokens, by the names of their mixtures in the dense model's files.
    kept = {mixture.name: mixture.groups_kept for mixture in report.prediction_mixtures}
    source = replace(
        source,
        prediction_layers=[layer for layer in source.prediction_layers if layer.mixture in kept],
    )
    source = with_fewer_experts(source, dense_model, kept)
    # modules of these tensors, such as "mtp", that the run did not copy, each with the reason
    lacks: dict[str, str] = report.model.get("lacks", {})
    source = replace(source, not_copied=lacks)
    num_layers = len(find_decoder_layers(dense_model))
    # Tensors of a decoder layer have the new number of the layer in their names.
    layers_kept = report.model.get("layers_kept", range(num_layers))
    return source.renamed(layers_kept, num_layers).tensors_to_copy


def _mixture_of(
    dense_model: PreTrainedModel, report: PruningReport
) -> Callable[[str], Part | None]:
    """Return a function that returns the mixture to which a parameter of the dense model belongs, by its name.

    It returns `None` for all parameters if the run removed no experts from layers that predict more tokens
    (`report.prediction_mixtures`). The model is only read.
    """
    mixtures: Sequence[Part] = ()
    if report.prediction_mixtures:
        mixtures = ModelOutline(find_decoder_layers(dense_model)).parts("experts").parts
    by_tensor = {tensor: mixture for mixture in mixtures for tensor in mixture.tensors}
    return by_tensor.get


def _compare_copied(
    stored: dict[str, StoredTensor],
    expected: dict[str, StoredTensor],
    *,
    tokens: Tensor | None,
    dense: str,
    progress: Callable[[str], None],
) -> int:
    """Compare the tensors that were copied from file to file; returns how many are equal, which is all of them.

    VerificationError if one differs or is missing. Nothing is changed.

    Args:
        stored: All tensors in the pruned folder's files.
        expected: Those of the dense model to compare with (`_copied_tensors`).
        tokens: Row of the dense model for each token of the pruned one (`kept_tokens`); `None` if all stayed.
        dense: Name of the dense model, for errors.
        progress: Called with the name of each tensor.
    """
    for name, tensor in expected.items():
        copied = stored.get(name)
        if copied is not None and _lost_tokens(copied.shape, tensor.shape, tokens):
            assert tokens is not None
            # If the dense model lacks a token, it has no row for it. Then there are too few rows: an error below.
            rows_in_dense = tokens[tokens < tensor.shape[0]]
            tensor = tensor.selected(0, rows_in_dense)
        if copied is None or not tensor.equals(copied):
            raise VerificationError(
                f"{name} of {dense!r} was not copied as it is, and its report does not say so."
            )
        progress(name)
    return len(expected)


def _lost_tokens(
    pruned_shape: tuple[int, ...], dense_shape: tuple[int, ...], tokens: Tensor | None
) -> bool:
    """Tell whether a tensor has a row for each token, and lost those of removed tokens.

    Args:
        pruned_shape: Of the tensor in the pruned model.
        dense_shape: Of the same tensor in the dense model.
        tokens: Row of the dense model for each token of the pruned one; `None` if all stayed.
    """
    if tokens is None:
        return False
    shape_without_tokens = (len(tokens), *dense_shape[1:])
    has_lost_rows = shape_without_tokens != tuple(dense_shape)
    return has_lost_rows and tuple(pruned_shape) == shape_without_tokens


def _tensor_names(model: PreTrainedModel) -> list[str]:
    """Return the names of a model's parameters and buffers; those that are tied to each other count once."""
    return [name for name in model.state_dict() if name not in model.all_tied_weights_keys]

"""What the report of a run says of it besides its operators and decoder layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.calibration import CalibrationBatch, tokens_sha256
from optimum_fista.model.operator import LinearOperator
from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.environment import arithmetic_of, processor
from optimum_fista.run.pruning.budgets import Budgets
from optimum_fista.run.pruning.group_solving import UNDER_CALIBRATED_TOKENS
from optimum_fista.run.pruning.operators import idle_patterns
from optimum_fista.run.reports.report import PruningReport, public_name
from optimum_fista.solve.methods.magnitude import Magnitude


def begin_report(
    model: PreTrainedModel,
    batches: list[CalibrationBatch],
    source: str | None,
    config: FistaPruningConfig,
    operators: Mapping[str, Mapping[str, LinearOperator]],
    left_dense: dict[str, str],
) -> PruningReport:
    """The report of a run that has pruned nothing yet.

    Warns when an operator has more inputs than there are calibration tokens, and of name patterns that match nothing.
    """
    report = PruningReport(
        config=config.to_dict(),
        model=_describe(model),
        calibration=_describe_calibration(batches, source),
        left_dense=left_dense,
        environment=_describe_environment(model, batches, config.compute_dtype),
    )
    before = getattr(model.config, "fista_pruning", None)
    if isinstance(before, dict):
        report.warn(
            f"the model was pruned before ({before.get('method')}, {before.get('pattern')}, {before.get('num_zeros')} "
            "zeros): errors are measured against it as it is, and zeros outside of the new pattern may be filled."
        )
    names = [name for group in operators.values() for name in group]
    tokens = report.calibration["num_tokens"]
    widest = max((o for group in operators.values() for o in group.values()), key=lambda o: o.shape[1], default=None)
    if widest is not None and tokens < widest.shape[1]:
        report.warn(
            f"{tokens} calibration tokens for the {widest.shape[1]} inputs of {widest.name}: its Gram matrix is "
            "rank-deficient and the result will fit these tokens only. Pass more calibration tokens."
        )
    for message in idle_patterns(config, names, list(left_dense)):
        report.warn(message)
    return report


def complete_report(
    report: PruningReport, config: FistaPruningConfig, decoder_layers: str, budgets: Budgets | None
) -> None:
    """Add what the user should know once all operators of the model's `decoder_layers` are pruned."""
    if budgets is not None and budgets.unseen:
        report.warnings.append(
            f"the loss does not feel {len(budgets.unseen)} operators on the first {config.allocation_tokens} "
            f"calibration tokens, so they keep the average sparsity: {', '.join(budgets.unseen[:4])}"
        )
    chosen = ("router", "exclude")
    reasons = {name: reason for name, reason in report.left_dense.items() if reason not in chosen}
    left = {name: reason for name, reason in reasons.items() if config.reason_left_dense(name) is None}
    if not report.operators and not report.mixtures and not (budgets is not None and budgets.removed_layers):
        name = next(iter(left))
        raise UnsupportedArchitectureError(
            f"no linear operator of {decoder_layers} can be pruned; {name}, for one: {left[name]}."
        )
    if left:
        shown = first_names([f"{name} ({reason})" for name, reason in left.items()])
        report.warn(f"{len(left)} operators were left dense: {shown}")
    operators = report.operators
    errors = {o.name: (o.fit_error, o.output_error) for o in operators}
    overflown = [name for name, found in errors.items() if not all(math.isfinite(error or 0.0) for error in found)]
    if overflown:
        report.warn(
            f"the errors of {len(overflown)} operators are NaN or Inf ({', '.join(overflown[:4])}): their outputs "
            "overflow float32 when squared, so nothing is known of how well they were pruned."
        )
    report.warnings.extend(_rounded(report, config))
    if config.correction.residual_share:
        report.warnings.extend(_without_residual_correction(report))
    report.warnings.extend(f"{o.name}: {o.message}" for o in operators if o.message and not o.converged)
    report.warnings.extend(f"{mixture.name}: {mixture.message}" for mixture in report.mixtures if mixture.message)
    under_calibrated = [o for o in operators if config.method != o.method == Magnitude.name]
    if under_calibrated:
        least = min(under_calibrated, key=lambda o: o.num_tokens)
        report.warn(
            f"{len(under_calibrated)} of {len(operators)} operators belong to experts that fewer than "
            f"{UNDER_CALIBRATED_TOKENS} calibration tokens reached, and were pruned by magnitude "
            f"({least.name}: {least.num_tokens}). Pass more calibration tokens."
        )


def _rounded(report: PruningReport, config: FistaPruningConfig) -> Iterator[str]:
    """What to say if rows of whole numbers of zeros miss the sparsity that was asked for."""
    found = report.totals["sparsity"]
    uniform = not config.overrides and all(operator.scope == "row" for operator in report.operators)
    if uniform and report.operators and abs(found - (config.sparsity or 0.0)) > 1e-4:
        yield (
            f"every row has a whole number of zeros, so that {found:.2%} of the weights are zero instead of "
            f"{config.sparsity:.2%}: pass scope='matrix' for the exact share."
        )


def _without_residual_correction(report: PruningReport) -> Iterator[str]:
    """What to say of decoder layers with pruned operators, none of which was residual-corrected."""
    corrected = {layer.name: layer.mixture.residual_corrected for layer in report.layers if layer.mixture is not None}
    for layer in report.layers:
        for operator in report.operators:
            if operator.name.startswith(f"{layer.name}."):
                corrected[layer.name] = corrected.get(layer.name, False) or operator.residual_corrected
    without = [name for name, done in corrected.items() if not done]
    if without:
        yield (
            f"no residual correction in {len(without)} of {len(corrected)} decoder layers ({first_names(without)}): "
            "the output of one pruned operator, the last, is not added to the layer's output there (a norm or a scale "
            "comes between, or it is a mixture of experts)"
        )


def first_names(names: Sequence[str]) -> str:
    """The first four of many names, for a message."""
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _describe(model: PreTrainedModel) -> dict[str, Any]:
    return {
        "class": type(model).__name__,
        "model_type": model.config.model_type,
        "name": public_name(getattr(model.config, "_name_or_path", "") or ""),
        "num_parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _describe_calibration(batches: list[CalibrationBatch], source: str | None) -> dict[str, Any]:
    """What a report says of calibration batches, `PruningReport.calibration`."""
    found = {"source": source and public_name(source)} | _describe_tokens(
        [batch for batch in batches if not batch.held_out]
    )
    held_out = [batch for batch in batches if batch.held_out]
    return found | ({"held_out": _describe_tokens(held_out)} if held_out else {})


def _describe_environment(
    model: PreTrainedModel, batches: list[CalibrationBatch], compute_dtype: str
) -> dict[str, Any]:
    """What the bytes of a result depend on, besides the model, the configuration, the tokens and the versions."""
    shapes = itertools.groupby(list(batch.input_ids.shape) for batch in batches)
    found = [[len(list(same)), *shape] for shape, same in shapes]
    return {**arithmetic_of(model, compute_dtype), "processor": processor(), "batches": found}


def _describe_tokens(batches: list[CalibrationBatch]) -> dict[str, Any]:
    return {
        "sha256": tokens_sha256(batches),
        "num_sequences": sum(batch.input_ids.shape[0] for batch in batches),
        "num_tokens": sum(batch.num_tokens for batch in batches),
    }

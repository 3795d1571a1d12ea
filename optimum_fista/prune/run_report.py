"""What the report of a run says of it besides its operators and decoder layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_fista.config import FistaPruningConfig
from optimum_fista.environment import processor_name
from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.architecture import matches
from optimum_fista.model.calibration import CalibrationBatch, tokens_sha256
from optimum_fista.model.offload import execution_device
from optimum_fista.model.operator import LinearOperator
from optimum_fista.prune.budgets import Budgets
from optimum_fista.prune.group import UNDER_CALIBRATED_TOKENS
from optimum_fista.report import PruningReport, public_name
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
    held_out = [batch for batch in batches if batch.held_out]
    calibration = {"source": source and public_name(source)}
    calibration |= _describe_tokens([batch for batch in batches if not batch.held_out])
    shapes = itertools.groupby(list(batch.input_ids.shape) for batch in batches)
    report = PruningReport(
        config=config.to_dict(),
        model={
            "class": type(model).__name__,
            "model_type": model.config.model_type,
            "name": public_name(getattr(model.config, "_name_or_path", "") or ""),
            "num_parameters": model.num_parameters(),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        calibration=calibration | ({"held_out": _describe_tokens(held_out)} if held_out else {}),
        left_dense=left_dense,
        # what the bytes of a result depend on, besides the model, the configuration, the tokens and the versions
        environment={
            "dtype": str(model.dtype),
            "device": execution_device(model.get_input_embeddings()).type,
            "attention": model.config._attn_implementation,
            "experts": getattr(model.config, "_experts_implementation", None),
            "processor": {
                "name": processor_name(),
                "instructions": torch.backends.cpu.get_cpu_capability(),
                "threads": torch.get_num_threads(),
            },
            "batches": [[len(list(same)), *shape] for shape, same in shapes],
        },
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


def _describe_tokens(batches: list[CalibrationBatch]) -> dict[str, Any]:
    return {
        "sha256": tokens_sha256(batches),
        "num_sequences": sum(batch.input_ids.shape[0] for batch in batches),
        "num_tokens": sum(batch.num_tokens for batch in batches),
    }


def idle_patterns(config: FistaPruningConfig, pruned: Sequence[str], left_dense: Sequence[str]) -> Iterator[str]:
    """What to say of name patterns of a configuration that match no operator, such as those that end with ".weight"."""
    names = [*pruned, *left_dense]
    for option in ("include", "exclude", "overrides"):
        idle = [p for p in getattr(config, option) if not any(matches(name, (p,)) for name in names)]
        if idle:
            shown = ", ".join(map(repr, idle))
            yield f"{option}: {shown} matches no linear operator of the decoder layers: {names[0]!r} is one."


def complete_report(
    report: PruningReport, config: FistaPruningConfig, decoder_layers: str, budgets: Budgets | None
) -> None:
    """Add what the user should know once all operators of the model's `decoder_layers` are pruned."""
    operators = report.operators
    if budgets is not None and budgets.unseen:
        report.warnings.append(
            f"the loss does not feel {len(budgets.unseen)} operators on the first {config.allocation_tokens} "
            f"calibration tokens, so they keep the average sparsity: {first_names(budgets.unseen)}"
        )
    reasons = {name: why for name, why in report.left_dense.items() if why not in ("router", "exclude")}
    left = {name: why for name, why in reasons.items() if config.reason_left_dense(name) is None}
    if not operators and not report.mixtures and not (budgets is not None and budgets.removed_layers):
        name = next(iter(left))
        raise UnsupportedArchitectureError(
            f"no linear operator of {decoder_layers} can be pruned; {name}, for one: {left[name]}."
        )
    if left:
        shown = first_names([f"{name} ({reason})" for name, reason in left.items()])
        report.warn(f"{len(left)} operators were left dense: {shown}")
    overflown = [o.name for o in operators if not all(map(math.isfinite, (o.fit_error, o.output_error or 0.0)))]
    if overflown:
        report.warn(
            f"the errors of {len(overflown)} operators are NaN or Inf ({first_names(overflown)}): their outputs "
            "overflow float32 when squared, so nothing is known of how well they were pruned."
        )
    found, by_rows = report.totals["sparsity"], operators and all(operator.scope == "row" for operator in operators)
    if by_rows and not config.overrides and abs(found - (config.sparsity or 0.0)) > 1e-4:
        report.warnings.append(
            f"every row has a whole number of zeros, so that {found:.2%} of the weights are zero instead of "
            f"{config.sparsity:.2%}: pass scope='matrix' for the exact share."
        )
    if config.correction.residual_share:
        corrected = {part.name: part.mixture.residual_corrected for part in report.layers if part.mixture is not None}
        for layer in report.layers:
            done = [o.residual_corrected for o in operators if o.name.startswith(f"{layer.name}.")]
            if done:
                corrected[layer.name] = corrected.get(layer.name, False) or any(done)
        without = [name for name, was in corrected.items() if not was]
        if without:
            report.warnings.append(
                f"no residual correction in {len(without)} of {len(corrected)} decoder layers "
                f"({first_names(without)}): the output of one pruned operator, the last, is not added to the layer's "
                "output there (a norm or a scale comes between, or it is a mixture of experts)"
            )
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


def first_names(names: Sequence[str]) -> str:
    """The first four of many names, for a message."""
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")

"""Notes for the report of a run: what it says before the first decoder layer, and after the last one.

`begin_report` makes the `PruningReport` from the `Plan` of the run: what is pruned and how, with the model
(`plan.layers.model`) and what is known of its files (`plan.source`). `report.warn` adds a message and shows it, and
`report.warnings` gets messages that are only written. The loop adds a record for each decoder layer, and
`complete_report` adds the warnings and totals that need all of them.
"""

import math
from collections.abc import Sequence

import torch

from optimum_fista import internals
from optimum_fista.environment import processor_name
from optimum_fista.folder.checkpoint import summary_of_latest_run
from optimum_fista.memory import size_text
from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.held_out import HeldOut
from optimum_fista.model.offload import execution_device
from optimum_fista.operator_grid import layer_and_kind
from optimum_fista.origin import read_origin
from optimum_fista.prune.plan import UNDER_CALIBRATED_TOKENS, Plan
from optimum_fista.public_names import public_name
from optimum_fista.records import MixtureReport, OperatorReport
from optimum_fista.removal.removal import first_names
from optimum_fista.report import PruningReport, lines_of_unplaced
from optimum_fista.solve.methods.magnitude import Magnitude
from optimum_fista.source.quantization import quantized_source

_MOST_RUNS = 6  # of numbers in a message


def begin_report(plan: Plan) -> PruningReport:
    """Begin the report of a run; warn of an earlier run, of name patterns without a match, and of lost tensors.

    Changes nothing: the model and its configuration are only read.
    """
    model = plan.layers.model
    names_of_operators = [*plan.operators, *plan.removal.left_dense]
    messages = [
        *_earlier_run(plan),
        *_quantized_source(plan),
        # patterns of names that match no operator
        *plan.config.idle_patterns(names_of_operators),
        # Tensors of the files that the model's class does not load, and that the result will lack. Those that will be
        # copied ({}) are noted at the end.
        *lines_of_unplaced({}, plan.source.not_copied),
    ]
    report = PruningReport(
        config=plan.config.to_dict(),
        model={
            "class": type(model).__name__,
            "model_type": model.config.model_type,
            "name": public_name(internals.loaded_from(model.config)),
            "num_parameters": model.num_parameters(),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        calibration={},
        origin=read_origin(model.config),
        left_dense=dict(plan.removal.left_dense),
        # The bytes of a result depend on these, too, besides the model, configuration, tokens and versions.
        environment={
            "dtype": str(model.dtype),
            "device": execution_device(model.get_input_embeddings()).type,
            "attention": internals.attention_implementation(model.config),
            "experts": internals.experts_implementation(model.config),
            "processor": {
                "name": processor_name(),
                "threads": torch.get_num_threads(),
                "instructions": torch.backends.cpu.get_cpu_capability(),
            },
            "written": "in the dtypes of the files" if plan.files_dtypes else str(model.dtype),
            "products": plan.products,
        },
    )
    for message in messages:
        report.warn(message)
    return report


def _earlier_run(plan: Plan) -> list[str]:
    """Return a message that an earlier run has pruned the model, if one has; not if that only removed tokens.

    An earlier run has left its summary in the model's configuration (`config.fista_pruning`).
    """
    earlier = summary_of_latest_run(plan.layers.model.config)
    if not earlier:
        return []
    removed_tokens = str(earlier.get("pattern")).startswith("vocab:")
    if removed_tokens and not earlier.get("num_zeros"):
        return []
    num_zeros = earlier.get("num_zeros")  # None: not known
    leaves_zeros = num_zeros != 0
    zeros = f", {num_zeros} zeros" if leaves_zeros else ""
    overwritten = ""
    # The report of a run that removes parts says at the end which zeros were overwritten.
    if leaves_zeros and not plan.removal.removed_parts:
        overwritten = ", and zeros outside of the new pattern may be overwritten"
    return [
        f"the model was pruned before ({earlier.get('method')}, {earlier.get('pattern')}{zeros}): "
        f"errors are measured against it as it is{overwritten}."
    ]


def _quantized_source(plan: Plan) -> list[str]:
    """If weights were dequantized when the model was read, return a message: in which form the result has them."""
    model = plan.layers.model
    quantization = quantized_source(model)
    if not quantization:
        return []

    written = "as they are stored"
    if not plan.as_stored:
        num_bytes = sum(
            parameter.numel() * parameter.element_size() for parameter in model.parameters()
        )
        written = f"in {str(model.dtype).removeprefix('torch.')} ({size_text(num_bytes)})"
    return [
        f"weights quantized by {quantization['quant_method']!r} are dequantized to prune, and written {written}."
    ]


def complete_report(plan: Plan, report: PruningReport, held_out: HeldOut | None) -> None:
    """Describe the pruned model after all its decoder layers, and add what the user should know.

    Changes `report`, which has a record of every decoder layer by the names in the dense model: names become those of
    the pruned model. If parts are removed, the configuration of `plan.layers.model` becomes that of the smaller model.
    `held_out` is `None` if no perplexity was measured.
    """
    _warn_of_unreached_experts(report)  # by the names of the given model, which the user knows
    dense_digests = [layer.dense_sha256 for layer in report.layers]  # removed layers too
    report.model["sha256"] = plan.layers.dense_digest(dense_digests)
    # Renames, and counts parameters; if parts are removed, the model gets the configuration of the smaller one.
    plan.removal.describe(report)
    if plan.source.num_copied_by_module:
        report.model["copied"] = plan.source.num_copied_by_module
    if plan.source.not_copied:
        report.model["lacks"] = dict(plan.source.not_copied)

    _warn_of_whole_logits(plan, report)
    _warn_of_operators_without_gradient(plan, report)
    _warn_of_operators_left_dense(plan, report)
    _warn_of_overflown_errors(report)
    _warn_of_rounded_rows(plan, report)
    _warn_of_missing_correction(plan, report)
    report.warnings.extend(
        f"{operator.name}: {operator.message}"
        for operator in report.operators
        if operator.message and not operator.converged
    )
    report.warnings.extend(
        f"{mixture.name}: {mixture.message}" for mixture in report.mixtures if mixture.message
    )
    _warn_of_under_calibrated_experts(plan, report)
    if held_out is not None:
        _note_perplexity(plan, report, held_out)


def _warn_of_whole_logits(plan: Plan, report: PruningReport) -> None:
    """Add a warning to the report if the gradients of the loss took more memory than was estimated.

    That is so if the model can't be run without its head. `plan.budgets` has the bytes, also in a run that resumes.
    """
    num_bytes = plan.budgets.num_bytes_not_estimated
    if num_bytes:
        report.warn(
            f"{type(plan.layers.model).__name__} can't be run without its head, so the logits of a whole sequence are "
            f"in memory for the gradients of the loss: about {size_text(num_bytes)} more than the estimate counts. "
            "Shorter sequences (--sequence-length) or allocation='uniform' (--allocation uniform) need less."
        )


def _warn_of_operators_without_gradient(plan: Plan, report: PruningReport) -> None:
    """Add to the report's warnings the operators that got the average sparsity: the loss does not depend on them."""
    without_gradient = plan.budgets.without_gradient
    if without_gradient:
        report.warnings.append(
            f"the loss has no gradient for {len(without_gradient)} operators on "
            f"{plan.config.allocation_tokens} calibration tokens, so they keep the average sparsity: "
            f"{first_names(without_gradient)}"
        )


def _warn_of_operators_left_dense(plan: Plan, report: PruningReport) -> None:
    """Add a warning of operators that stay dense for a reason that the user did not give, to the report.

    Refuses a run that prunes nothing (UnsupportedArchitectureError). `report.left_dense` has the reason of each
    operator, by its name, such as "model.layers.3.mlp.down_proj".
    """
    # without those that nobody wants to prune, and those that the user has left out
    reasons = {
        name: reason
        for name, reason in report.left_dense.items()
        if reason not in ("router", "exclude") and not plan.removal.is_asked_dense(name)
    }
    is_smaller = bool(report.mixtures) or bool(plan.budgets.removed_layers)
    if not report.operators and not is_smaller:
        name, *_ = reasons  # one for the message
        raise UnsupportedArchitectureError(
            f"no linear operator of {plan.layers.name} can be pruned; {name}, for one: {reasons[name]}."
        )
    if reasons:
        names = first_names([f"{name} ({reason})" for name, reason in reasons.items()])
        report.warn(f"{len(reasons)} operators were left dense: {names}")


def _warn_of_overflown_errors(report: PruningReport) -> None:
    """Add a warning of operators whose errors are NaN or Inf to the report."""
    overflown: list[str] = []
    for operator in report.operators:
        errors = [operator.fit_error]
        if operator.output_error is not None:
            errors.append(operator.output_error)
        if not all(math.isfinite(error) for error in errors):
            overflown.append(operator.name)
    if overflown:
        report.warn(
            f"the errors of {len(overflown)} operators are NaN or Inf ({first_names(overflown)}) and so not known: "
            "squares of their outputs overflow float32."
        )


def _warn_of_rounded_rows(plan: Plan, report: PruningReport) -> None:
    """Add to the report's warnings that rows have whole numbers of zeros, if this changes the model's sparsity."""
    config = plan.config
    if not report.operators or config.overrides:
        return
    by_rows = all(operator.scope == "row" for operator in report.operators)
    asked = config.sparsity or 0.0  # a share of 0 to 1
    sparsity = report.totals["sparsity"]
    is_rounded = abs(sparsity - asked) > 1e-4
    if by_rows and is_rounded:
        report.warnings.append(
            f"rows have whole numbers of zeros, so {sparsity:.2%} of the weights are zero instead of "
            f"{asked:.2%}: pass scope='matrix' for an exact one."
        )


def _warn_of_missing_correction(plan: Plan, report: PruningReport) -> None:
    """Add to the report's warnings the decoder layers whose outputs were not corrected, although it was asked for."""
    if not plan.config.correction.residual_share:
        return

    pruned: dict[str, None] = {}  # names of decoder layers in execution order
    corrected: set[str] = set()
    parts: list[OperatorReport | MixtureReport] = [*report.operators, *report.mixtures]
    for part in parts:
        layer_name, _ = layer_and_kind(part.name)  # such as "model.layers.3" and "mlp.down_proj"
        pruned[layer_name] = None
        if part.residual_corrected:
            corrected.add(layer_name)
    uncorrected = [name for name in pruned if name not in corrected]
    if uncorrected:
        report.warnings.append(
            f"no residual correction in {len(uncorrected)} of {len(pruned)} decoder layers "
            f"({first_names(uncorrected)}): the output of one pruned operator, the last, is not added to the layer's "
            "output there (a norm or a scale comes between, or it is a mixture of experts)"
        )


def _warn_of_under_calibrated_experts(plan: Plan, report: PruningReport) -> None:
    """Add a warning to the report of operators that were pruned by magnitude: few tokens reached their experts."""
    if plan.config.method == Magnitude.name:
        return
    by_magnitude = [operator for operator in report.operators if operator.method == Magnitude.name]
    if by_magnitude:
        fewest = min(by_magnitude, key=lambda operator: operator.num_tokens)
        report.warn(
            f"{len(by_magnitude)} of {len(report.operators)} operators were pruned by magnitude: fewer than "
            f"{UNDER_CALIBRATED_TOKENS} tokens reached their experts ({fewest.name}: {fewest.num_tokens}). Pass more."
        )


def _warn_of_unreached_experts(report: PruningReport) -> None:
    """Add a warning to the report of experts that no calibration token reached, if other experts were removed.

    It names their mixtures and numbers; `expert_tokens` of each mixture in the report has them all. Such an expert
    stays only if more have to stay than were reached.
    """
    mixtures = [*report.mixtures, *report.prediction_mixtures]
    with_unreached = [mixture for mixture in mixtures if mixture.unreached]
    if not with_unreached:
        return
    num_unreached = sum(len(mixture.unreached) for mixture in with_unreached)
    num_experts = sum(len(mixture.expert_tokens) for mixture in mixtures)
    names = [f"{mixture.name} ({_short_list(mixture.unreached)})" for mixture in with_unreached]
    num_kept = sum(len({*mixture.unreached} & {*mixture.groups_kept}) for mixture in with_unreached)
    went_first = "they were removed before all others"
    if num_kept:
        went_first = (
            f"nothing is known of them, and {num_kept:,} of them stay, because more experts have to stay than were "
            "reached"
        )
    report.warn(
        f"no calibration token reached {num_unreached:,} of {num_experts:,} experts, in {len(with_unreached)} of "
        f"{len(mixtures)} mixtures: {first_names(names)}; {went_first}. Pass more sequences (--num-samples), or "
        "text of the kind that uses them."
    )


def _short_list(numbers: Sequence[int]) -> str:
    """Write rising numbers with their runs joined, such as "0, 4-9, 12"; of many runs only the first six."""
    runs = list[list[int]]()
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    more = ", ..." if len(words) > _MOST_RUNS else ""
    return ", ".join(words[:_MOST_RUNS]) + more


def _note_perplexity(plan: Plan, report: PruningReport, held_out: HeldOut) -> None:
    """Add the perplexities on the held-out text to the report, if they are known.

    `held_out` has measured both networks, the dense and the pruned one, on their way through the decoder layers.
    """
    perplexity = held_out.perplexity()
    if perplexity is None:
        return

    # The matrix of the input embeddings, with a row for each token.
    embedding = next(plan.layers.model.get_input_embeddings().parameters())
    # The name of the text, such as "c4", or the path of a file; None: not known.
    text = held_out.text
    if text:
        text = public_name(text)  # without the folders of the user
    report.perplexity = perplexity | {"text": text, "vocabulary": len(embedding)}

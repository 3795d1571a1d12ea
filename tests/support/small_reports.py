"""Reports of runs that never were, with numbers that are easy to add."""

from optimum_fista.memory import MemoryPeak
from optimum_fista.records import LayerReport, MixtureReport, OperatorReport, TextReport
from optimum_fista.report import PruningReport


def operator(name: str, **changes) -> OperatorReport:
    """The report of an operator of 32 weights, half of them zero."""
    values = {
        "name": name,
        "shape": (4, 8),
        "stored_transposed": False,
        "pattern": "unstructured",
        "scope": "matrix",
        "target_sparsity": 0.5,
        "num_kept": 16,
        "sparsity": 0.5,
        "method": "fista",
        "fit_error": 0.2,
        "l1_penalty": 0.03,
        "iterations": 40,
        "converged": True,
        "message": "",
        "num_tokens": 128,
        "solve_seconds": 0.25,
    }
    return OperatorReport(**values | changes)


def report(*operators: OperatorReport) -> PruningReport:
    """The report of a model of 400 parameters with these operators."""
    return PruningReport(
        config={"method": "fista"},
        model={"num_parameters": 400},
        calibration={"sha256": "ab", "num_tokens": 128, "num_sequences": 8},
        operators=list(operators),
        layers=[
            LayerReport("layers.0", 0.25, 1.0, MemoryPeak(5, 3)),
            LayerReport("layers.1", None, 0.5),
        ],
        left_dense={"layers.0.gate": "exclude"},
        warnings=["few tokens"],
        seconds={"total": 1.5},
    )


def mixture(
    name: str,
    kept: tuple[int, ...],
    expert_tokens: tuple[int, ...],
    *,
    of_sources: tuple[tuple[int, ...], ...] = (),
    of_texts: tuple[tuple[int, ...], ...] = (),
) -> MixtureReport:
    """The report of a mixture that kept these experts; the others are of tokens by text and expert."""
    return MixtureReport(
        name=name,
        groups_kept=kept,
        saliency=tuple(float(number) for number in expert_tokens),
        expert_tokens=expert_tokens,
        fit_error=0.25,
        fit_error_before=0.5,
        num_refitted=len(kept),
        solve_seconds=0.5,
        tokens_of_sources=of_sources,
        tokens_of_texts=of_texts,
    )


def mixture_report(*mixtures: MixtureReport) -> PruningReport:
    """The report of a run that removed experts from these mixtures, a decoder layer each, and 100 of 500 parameters."""
    return PruningReport(
        config={"method": "obs_admm", "pattern": "experts:0.25", "expert_refit": True},
        model={
            "class": "MixtralForCausalLM",
            "dtype": "bfloat16",
            "name": "made/mixture",
            "num_parameters": 400,
            "dense_num_parameters": 500,
            "parts_removed": ["1 of 4 experts of every decoder layer (25.00%)"],
            "parts_counted": {"experts": {"before": 4, "after": 3, "router_groups": 1}},
        },
        calibration={"sha256": "ab", "num_tokens": 128, "num_sequences": 8, "source": "sea.txt"},
        layers=[
            LayerReport(f"model.layers.{number}", 0.25, 1.0, mixture=mixture)
            for number, mixture in enumerate(mixtures)
        ],
        seconds={"total": 1.5},
    )


def measured_text(
    name: str, dense: float, pruned: float, at_most: float | None = None
) -> TextReport:
    """The report of a text with these bits per byte before and after."""
    return TextReport(
        name=name,
        sha256=name,
        num_bytes=20_000,
        num_tokens=5_000,
        num_tokens_pruned=5_000,
        dense=dense,
        pruned=pruned,
        vocabulary=64,
        at_most=at_most,
    )

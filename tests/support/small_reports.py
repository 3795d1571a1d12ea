"""Reports of runs that never were, with numbers that are easy to add."""

from optimum_fista.memory import MemoryPeak
from optimum_fista.records import LayerReport, OperatorReport
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

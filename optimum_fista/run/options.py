"""The options of a pruning run, each declared once: its type, choices, limits, default and help.

`FistaPruningConfig` checks values by these declarations, the flags of `optimum-fista prune` are made from them, and the
documentation lists them. A `Literal` gives the choices. This module loads neither torch nor transformers, so that
`--help` is quick.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ErrorCorrection = Literal["none", "intra", "full"] | float
Allocation = Literal["uniform", "fisher"]
SEEDS = (0, 2**64 - 1)

_WHICH, _METHOD, _MACHINE = "which operators", "method", "calibration and machine"


def option(
    default: Any,
    text: str,
    *,
    limits: tuple[float, float | None] | None = None,
    advanced: str | None = None,
) -> Any:
    """Declare an option as a field of a dataclass.

    Args:
        default: Its default, or what makes it.
        text: Its help.
        limits: The least and the largest number it takes; `None`: there is no largest one.
        advanced: The group of rarely used options that it belongs to.
    """
    kind = "default_factory" if callable(default) else "default"
    return field(**{kind: default}, metadata={"help": text, "limits": limits, "advanced": advanced})


def require_seed(seed: int) -> None:
    """Refuse a seed that PyTorch can't take."""
    if not SEEDS[0] <= seed <= SEEDS[1]:
        raise ValueError(f"seed={seed}: pass a whole number from {SEEDS[0]} to {SEEDS[1]}.")


@dataclass(frozen=True)
class PruningOptions:
    """The fields of `FistaPruningConfig`. What is `None` is the method's choice (`MethodDefaults`)."""

    sparsity: float | None = option(None, "fraction of zeros in [0, 1) (default 0.5, or as the pattern says)")
    pattern: str = option(
        "unstructured",
        "2:4 keeps 2 of every 4 consecutive inputs of a row, 4:8-pairs two whole pairs of every four; channels:0.25, "
        "heads:0.5, experts:0.25 or layers:0.1, or several joined by +, removes whole parts (docs/smaller.md)",
    )
    scope: Literal["matrix", "row"] | None = option(
        None, "share zeros over a whole operator or give each row its own (default: the method's)", advanced=_WHICH
    )
    method: str | Any = option(
        "obs_admm",
        "obs_admm, fista, magnitude, wanda, dsnot, sparsegpt, admm, alps, flap or greedy_obs (in Python also "
        "an instance of one)",
    )
    error_correction: ErrorCorrection | None = option(
        None,
        "the inputs X* that an operator is pruned on, and the outputs that it aims at: none (the dense network's "
        "inputs X, and W X), intra (inputs from the pruned operators before it in the decoder layer, and W X), full "
        "(inputs from all pruned operators before it, and W X), or a number a in [0, 1] (as full, but "
        "W (a X + (1 - a) X*)). Default: the method's, obs_admm has 0.5. See docs/method.md",
        limits=(0, 1),
        advanced=_METHOD,
    )
    residual_correction: float | None = option(
        None,
        "share of the error in a decoder layer's output that its last operator compensates for (default: obs_admm 1, "
        "others 0)",
        limits=(0, 1),
        advanced=_METHOD,
    )
    allocation: Allocation | None = option(
        None,
        "uniform: the same sparsity everywhere; fisher: operators share the zeros so that the loss, as its gradients "
        "predict it, grows least (default: obs_admm fisher, others uniform)",
        advanced=_WHICH,
    )
    allocation_tokens: int = option(
        2048, "calibration tokens on which the loss and its gradients are computed", limits=(2, None), advanced=_MACHINE
    )
    held_out: int = option(
        0,
        "further sequences that no weight is fitted to: the report has every operator's error on them as well",
        limits=(0, None),
        advanced=_MACHINE,
    )
    warm_start: str | None = option(
        None, "where FISTA starts: auto, dense, magnitude, wanda, sparsegpt", advanced=_METHOD
    )
    max_iterations: int | None = option(None, "iteration limit of the method", advanced=_METHOD)
    tolerance: float | None = option(None, "relative change at which the method stops", advanced=_METHOD)
    method_options: Mapping[str, Any] = option(dict, "further options of the method, by name")
    include: tuple[str, ...] = option((), "prune only operators whose name matches; repeatable", advanced=_WHICH)
    exclude: tuple[str, ...] = option((), "leave dense the operators whose name matches; repeatable", advanced=_WHICH)
    overrides: Mapping[str, float | str] = option(
        dict, "sparsity or pattern by pattern of names; the first match counts, and 0 leaves an operator dense"
    )
    expert_refit: bool = option(True, "refit the experts that stay if others go", advanced=_METHOD)
    reorder_channels: bool = option(
        False,
        "n:m: order the channels of MLPs so that larger weights are kept; the dense model's adapters don't fit then",
        advanced=_METHOD,
    )
    compute_dtype: Literal["float32", "bfloat16", "auto"] = option(
        "float32",
        "how float32 matrices are multiplied in forward passes, gradients and sums over tokens; bfloat16 is "
        "TensorFloat-32 on CUDA; auto: bfloat16 where the device is fast in it; layer problems are solved in float32",
        advanced=_MACHINE,
    )
    seed: int = option(0, "seed of everything random", limits=SEEDS, advanced=_MACHINE)

"""Decide by the loss of the dense model how many zeros each operator gets and which decoder layers are removed."""

import math
import time
from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from optimum_fista.memory import is_out_of_memory, release_memory
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.experts import ExpertOperator, split_experts
from optimum_fista.model.precision import products_as
from optimum_fista.model.sensitivity import DenseLoss, measure_sensitivities
from optimum_fista.prune.plan import Budgets, Plan
from optimum_fista.removal.layers import choose_layers
from optimum_fista.report import PruningReport
from optimum_fista.solve.allocation import allocate, removal_cost

_LEAST_TOKENS = (
    64  # gradients weight the outputs of an operator only if at least this many reached it
)


def share_budgets(
    plan: Plan, batches: Sequence[CalibrationBatch], report: PruningReport
) -> Budgets:
    """Choose the decoder layers to remove, and allocate the zeros to the operators of the others.

    Few tokens reach each expert of a mixture, so all of a kind in a decoder layer get the same sparsity.
    """
    config, started, removed = plan.config, time.perf_counter(), list[tuple[int, float]]()
    average = config.sparsity or 0.0
    fitted = [batch for batch in batches if not batch.held_out]
    loss = DenseLoss(plan.layers, fitted, config.allocation_tokens, plan.progress, plan.storage)
    if plan.removal.num_removed_layers:
        with products_as(plan.products):
            removed = choose_layers(loss, plan.removal.num_removed_layers)
    gone = tuple(f"{plan.layers.name}.{index}." for index, _ in removed)
    # removed layers get no zeros: the others would miss them
    left = {
        name: operator for name, operator in plan.all_operators.items() if not name.startswith(gone)
    }
    sharing = {
        name: operator for name, operator in left.items() if average and config.shares_budget(name)
    }
    instead = "allocation='uniform' (--allocation uniform)"
    try:
        with split_experts(plan.all_operators.values()), products_as(plan.products):
            found = (
                measure_sensitivities(loss, sharing) if sharing else {}
            )  # uniform: the model does not run
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise ValueError(
                f"allocation='fisher' takes gradients of the loss, and they can't be computed: {error}. If the model "
                f"runs but can't be differentiated, pass {instead}."
            ) from error
        # smaller batches don't help: it was one sequence
        raise torch.OutOfMemoryError(
            f"the device ran out of memory in the gradients of the loss on one sequence: pass {instead} or shorter "
            f"sequences (--sequence-length) [{error}]"
        ) from error
    pools: dict[str, list[str]] = {}
    for name, operator in sharing.items():
        key = (
            f"{operator.experts.name} {operator.kind}"
            if isinstance(operator, ExpertOperator)
            else name
        )
        pools.setdefault(key, []).append(name)
    felt = {
        key: names for key, names in pools.items() if any(found[name].is_felt for name in names)
    }
    unfelt = [name for key, names in pools.items() if key not in felt for name in names]
    costs, sizes, output_weights = {}, dict[str, int](), dict[str, torch.Tensor]()
    # reads the weights of the whole model again
    for key, names in tqdm(
        felt.items(), desc="Sharing zeros", unit="operator", disable=not plan.progress, leave=False
    ):
        # each is [out, in]; made one after the other, because together they are as large as the model
        saliencies = (found[n].saliency(sharing[n].read()) for n in names)
        costs[key] = sum(removal_cost(saliency, average) for saliency in saliencies)
        sizes[key] = sum(math.prod(sharing[n].shape) for n in names)
        if config.scope == "matrix":
            # with this scope, rows of a matrix share their zeros
            output_weights |= {n: found[n].outputs for n in names if found[n].seen >= _LEAST_TOKENS}
    sparsities = dict[str, float]()
    for key, sparsity in (allocate(costs, sizes, average) if costs else {}).items():
        names = felt[key]
        # numbers of zeros are whole: if the division has a rest, the first experts get one more
        fewest, more = divmod(round(sparsity * sizes[key]), len(names))
        size = sizes[key] // len(names)
        sparsities |= {n: (fewest + (i < more)) / size for i, n in enumerate(names)}
    release_memory(
        plan.layers.model
    )  # of activations recorded for gradients and for the choice of layers
    report.seconds["allocation"] = time.perf_counter() - started
    return Budgets(sparsities, output_weights, unfelt, removed)

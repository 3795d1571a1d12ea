"""Decide by the loss of the dense model how many zeros each operator gets and which decoder layers are removed.

A `Plan` says what is pruned and how; an operator is a linear module of a decoder layer, or one matrix of one expert.
`share_budgets` is called once, before any operator is pruned, and returns the `Budgets` of the plan. Its steps:

1. choose the decoder layers to remove (`removal.layers`),
2. measure how much the loss grows with errors in each operator (`model.sensitivity`),
3. pool the operators that get the same sparsity (the experts of a mixture),
4. share the zeros among the pools, so that the loss grows least (`solve.allocation`).
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from optimum_fista.bars import tqdm
from optimum_fista.config import FistaPruningConfig
from optimum_fista.memory import is_out_of_memory, release_memory
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.experts import ExpertOperator, split_experts
from optimum_fista.model.offload import execution_device
from optimum_fista.model.operators import LinearOperator
from optimum_fista.model.precision import products_as
from optimum_fista.model.sensitivity import DenseLoss, Sensitivity, measure_sensitivities
from optimum_fista.prune.batches import Calibration, retried
from optimum_fista.prune.plan import Budgets, Plan
from optimum_fista.report import PruningReport
from optimum_fista.solve.allocation import allocate, removal_cost

# Gradients are computed on so many tokens from the start of each sequence: many short stretches of text say more than
# a few long ones with as many tokens (docs/solver.md). If there are too few sequences for that, on more of each.
_LONGEST = 128
# Gradients weight the outputs of an operator only if at least so many tokens reached it.
_LEAST_TOKENS = 64


def share_budgets(
    plan: Plan, batches: Sequence[CalibrationBatch], report: PruningReport
) -> Budgets:
    """Choose the decoder layers to remove, and allocate the zeros to the operators of the others.

    `plan` has no budgets yet. `batches` are those of the calibration; held-out ones are not used. The model runs, and
    is not changed; `report` gets the seconds. If the zeros are not shared by the loss and no decoder layer is removed,
    the model does not run and the budgets are empty.
    """
    started = time.perf_counter()
    config = plan.config
    fitted = [batch for batch in batches if not batch.held_out]
    assert config.allocation_tokens is not None  # the configuration of a plan is resolved
    # The loss of as many sequences as hold `allocation_tokens` tokens.
    loss = DenseLoss(
        plan.layers,
        fitted,
        num_tokens=config.allocation_tokens,
        progress=plan.progress,
        storage=plan.storage,
        longest=longest_of_loss(config, sum(len(batch.input_ids) for batch in fitted)),
    )

    # Number of each layer, and the loss after its removal, in nats per token.
    removed_layers = list[tuple[int, float]]()
    if plan.removal.num_removed_layers:
        with products_as(plan.products):
            removed_layers = plan.removal.choose_layers(loss)

    sharing = _operators_that_share(plan, [index for index, _ in removed_layers])
    sensitivities: dict[str, Sensitivity] = {}
    num_bytes_not_estimated = 0
    if sharing:
        sensitivities, num_bytes_not_estimated = _measured(plan, loss, sharing, report)

    # Operators of a pool without any gradient keep the average sparsity: nothing is known of them.
    sharing_pools: dict[str, list[str]] = {}
    without_gradient: list[str] = []
    for key, names in _pools(sharing).items():
        if any(sensitivities[name].has_gradient for name in names):
            sharing_pools[key] = names
        else:
            without_gradient += names
    shares = _shares_of_zeros(plan, sharing_pools, sharing, sensitivities)

    # Activations were recorded for gradients and for the choice of layers.
    release_memory(plan.layers.model)
    report.seconds["allocation"] = time.perf_counter() - started
    return Budgets(
        sparsities=shares.sparsities,
        output_weights=shares.output_weights,
        without_gradient=without_gradient,
        removed_layers=removed_layers,
        num_bytes_not_estimated=num_bytes_not_estimated,
    )


def _operators_that_share(plan: Plan, removed_layers: Sequence[int]) -> dict[str, LinearOperator]:
    """Find the operators that share the zeros of the model, by name; none if there are no zeros to share.

    Those of removed layers are none of them: zeros that a removed layer got would be missing in the others.
    `removed_layers` are the numbers of these.
    """
    if not plan.config.sparsity:
        return {}
    prefixes = tuple(f"{plan.layers.name}.{index}." for index in removed_layers)
    sharing: dict[str, LinearOperator] = {}
    for name, operator in plan.operators.items():
        # `startswith` is true if the name begins with any of the prefixes.
        is_removed = name.startswith(prefixes)
        # An operator whose sparsity is fixed by the pattern ("2:4") or by an override of the user does not share.
        if not is_removed and plan.config.shares_budget(name):
            sharing[name] = operator
    return sharing


def longest_of_loss(config: FistaPruningConfig, num_sequences: int) -> int | None:
    """How many tokens of each sequence the gradients are computed on, at most; `None`: all of them.

    The calibration has `num_sequences` sequences, and `config` is resolved. If they are few, more tokens of each are
    taken, so that they have `allocation_tokens` together. Decoder layers to remove are chosen by the loss of whole
    sequences: nothing else was measured.
    """
    if config.whole_parts is not None:
        return None
    assert config.allocation_tokens is not None
    share_of_sequence = math.ceil(config.allocation_tokens / max(1, num_sequences))
    return max(_LONGEST, share_of_sequence)


def _measured(
    plan: Plan, loss: DenseLoss, operators: Mapping[str, LinearOperator], report: PruningReport
) -> tuple[dict[str, Sensitivity], int]:
    """Measure how much the loss grows with errors in `operators`, by the operator's name.

    Returns also how many bytes of memory this took beyond the estimate of a dry run. `loss` is that of the dense model
    on some calibration tokens. The model of `plan` runs forward and backward, and is as before afterwards. If memory
    runs out, smaller batches are tried, and `report` gets a warning. If gradients can't be computed, the error says
    what to pass instead.
    """

    def measure(calibration: Calibration) -> tuple[dict[str, Sensitivity], int]:
        return measure_sensitivities(loss, operators, calibration.batches)

    try:
        with split_experts(plan.operators.values()), products_as(plan.products):
            return retried(
                measure,
                Calibration(loss.joined_sequences()),
                where="the gradients of the loss",
                plan=plan,
                report=report,
            )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise ValueError(
                f"allocation='fisher' takes gradients of the loss, and they can't be computed: {error}. If the model "
                "runs but can't be differentiated, pass allocation='uniform' (--allocation uniform)."
            ) from error
        # The error of `retried`, when batches were of one sequence already. It advises shorter sequences, too.
        raise torch.OutOfMemoryError(
            "the device ran out of memory in the gradients of the loss on one sequence: pass allocation='uniform' "
            f"(--allocation uniform) [{error}]"
        ) from error


def _pools(operators: Mapping[str, LinearOperator]) -> dict[str, list[str]]:
    """Pool the names of operators that get the same sparsity; the keys only tell pools apart.

    A pool is an operator, or all experts' matrices of a kind in a decoder layer, because few tokens reach each expert.
    """
    pools: dict[str, list[str]] = {}
    for name, operator in operators.items():
        key = name
        if isinstance(operator, ExpertOperator):
            key = f"{operator.experts.name} {operator.kind}"
        pools.setdefault(key, []).append(name)
    return pools


@dataclass(frozen=True)
class _Shares:
    """Two fields of `Budgets`, as they are there."""

    sparsities: dict[str, float]
    output_weights: dict[str, torch.Tensor]


def _shares_of_zeros(
    plan: Plan,
    pools: Mapping[str, Sequence[str]],
    operators: Mapping[str, LinearOperator],
    sensitivities: Mapping[str, Sensitivity],
) -> _Shares:
    """Share the zeros of the model among pools of operators. Changes nothing, but reads the weights of all of them.

    `pools` are names of operators by a key, as `_pools` makes them; `operators` and `sensitivities` are by these names,
    such as "model.layers.3.mlp.down_proj". Returns the share of zeros of each operator and, if rows of a matrix share
    their zeros, what an error in each output of an operator costs.
    """
    config = plan.config
    average = config.sparsity or 0.0
    costs_on_device: dict[str, torch.Tensor] = {}  # by pool
    sizes: dict[str, int] = {}  # numbers of weights, by pool
    output_weights: dict[str, torch.Tensor] = {}
    device = execution_device(plan.layers.model.get_input_embeddings())
    bar = tqdm(
        pools.items(),
        desc="Sharing zeros",
        unit="operator",
        disable=not plan.progress,
        leave=False,
    )
    for key, names in bar:
        cost = torch.zeros((), dtype=torch.float64, device=device)
        for name in names:
            # One by one, because together they are as large as the model.
            saliency = sensitivities[name].saliency(operators[name].read())  # [out, in]
            cost = cost + removal_cost(saliency, average).to(device)
        costs_on_device[key] = cost
        sizes[key] = sum(math.prod(operators[name].shape) for name in names)
        if config.scope == "matrix":  # rows of a matrix share their zeros
            for name in names:
                # The mean over few tokens says little.
                if sensitivities[name].num_tokens >= _LEAST_TOKENS:
                    output_weights[name] = sensitivities[name].outputs

    costs: dict[str, float] = {}
    if costs_on_device:  # one transfer for all pools
        values = torch.stack(list(costs_on_device.values())).tolist()
        costs = dict(zip(costs_on_device, values, strict=True))
    sparsities: dict[str, float] = {}
    sparsities_of_pools = allocate(costs, sizes, average) if costs else {}
    for key, sparsity in sparsities_of_pools.items():
        sparsities |= _divided(pools[key], num_weights=sizes[key], sparsity=sparsity)
    return _Shares(sparsities, output_weights)


def _divided(names: Sequence[str], *, num_weights: int, sparsity: float) -> dict[str, float]:
    """Divide the zeros of a pool equally among its operators; returns the share of zeros of each, by its name.

    The pool has `num_weights` weights, of which the share `sparsity` becomes zero. All its operators have one size.
    """
    weights_of_each = num_weights // len(names)
    # Numbers of zeros are whole: if the division has a rest, the first experts get one more.
    fewest, rest = divmod(round(sparsity * num_weights), len(names))
    sparsities = {}
    for position, name in enumerate(names):
        num_zeros = fewest + 1 if position < rest else fewest
        sparsities[name] = num_zeros / weights_of_each
    return sparsities

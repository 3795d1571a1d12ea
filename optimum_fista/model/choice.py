"""Which linear operators a decoder layer has, and which of them are pruned.

`operators_to_prune` is called once for a run, and `find_operators` for a single decoder layer. Names are full ones,
such as "model.layers.3.mlp.down_proj". An operator that is not pruned stays *dense*, and the report has the reason.
"""

from collections.abc import Callable, Sequence

from torch import nn

from optimum_fista import internals
from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.experts import FusedExperts, can_be_split, is_fused_experts
from optimum_fista.model.layers import DecoderLayers
from optimum_fista.model.offload import offload_hook
from optimum_fista.model.operators import LINEAR, LinearOperator, require_finite
from optimum_fista.wildcards import matches


def find_operators(
    layer_name: str, layer: nn.Module, dense_experts: Sequence[str] = ()
) -> dict[str, LinearOperator]:
    """Find the linear operators of a decoder layer, by their full names; every matrix of every expert is one.

    `layer_name` is the layer's name in the model, such as "model.layers.3". Fused experts whose names match one of the
    shell-style patterns `dense_experts` are skipped, and so are routers. The patterns are the option `exclude` of a
    run, or "*" if a caller wants no experts. The layer is not changed.
    """
    operators: dict[str, LinearOperator] = {}
    skipped = skipped_modules(layer_name, layer, dense_experts)
    for name, module in layer.named_modules(prefix=layer_name):
        if name in skipped:
            continue
        if isinstance(module, LINEAR):
            operators[name] = LinearOperator(name, module)
        elif is_fused_experts(module):
            if not can_be_split(module):
                raise UnsupportedArchitectureError(
                    f"{name} ({type(module).__name__}) keeps the weights of its experts in a form that can't be "
                    "pruned: looked for 3-D parameters gate_up_proj (or up_proj) and down_proj. To prune the rest of "
                    f"the model and leave the experts dense, pass exclude=['*.{name.rsplit('.', 1)[-1]}']."
                )
            for operator in FusedExperts(name, module).operators:
                operators[operator.name] = operator
    return operators


def operators_to_prune(
    layers: DecoderLayers, exclude: Sequence[str], reason_left_dense: Callable[[str], str | None]
) -> tuple[dict[str, dict[str, LinearOperator]], dict[str, str]]:
    """Find the operators to prune, by the names of the decoder layers, and those that stay dense, with the reason.

    `exclude` are the user's patterns, by which whole mixtures are skipped. `reason_left_dense` takes the name of an
    operator, and returns why the configuration leaves it dense; `None` if it is to be pruned. Weights in memory must be
    finite. Changes nothing.

    Returns the operators by the name of their layer and then by their own name, and the reasons by operator or mixture.
    """
    chosen: dict[str, dict[str, LinearOperator]] = {}
    left_dense: dict[str, str] = {}
    for layer_name, layer in layers:
        chosen[layer_name] = {}
        left_dense |= skipped_modules(layer_name, layer, exclude)
        for name, operator in find_operators(layer_name, layer, exclude).items():
            reason = reason_left_dense(name)
            if reason is None:
                reason = layers.shared.get(name)  # another module has the same weight
            if reason is not None:
                left_dense[name] = reason
                continue
            is_parameter = internals.is_own_parameter(operator.owner, operator.tensor)
            if not is_parameter:  # the module would compute it anew, and overwrite the zeros
                raise UnsupportedArchitectureError(
                    f"the weight of {operator.name} is computed from other tensors (weight_norm, spectral_norm, "
                    "torch.nn.utils.prune or a parametrization): make it a parameter again (remove_weight_norm, "
                    "remove_spectral_norm, prune.remove, remove_parametrizations), or leave it dense by exclude."
                )
            chosen[layer_name][name] = operator

    # The pruning loop checks offloaded weights when it loads them. An estimate has no weights (meta device).
    in_memory = [
        operator
        for operators in chosen.values()
        for operator in operators.values()
        if not (offload_hook(operator.owner) or operator.parameter.is_meta)
    ]
    require_finite(in_memory)
    return chosen, left_dense


def skipped_modules(
    layer_name: str, layer: nn.Module, dense_experts: Sequence[str] = ()
) -> dict[str, str]:
    """Find the modules of a decoder layer that `find_operators` skips: their full names, each with the reason.

    They are fused experts that the user excludes ("exclude"), and routers ("router"). Routers decide by small
    differences and have few weights, so they stay dense. A router is a linear module beside fused experts that has one
    output for each expert, or a single output. Changes nothing.

    `layer_name` is the layer's name in the model, such as "model.layers.3". `dense_experts` are shell-style patterns,
    the user's `exclude`: fused experts whose names match one of them stay dense.
    """
    reasons: dict[str, str] = {}
    for name, module in layer.named_modules(prefix=layer_name):
        if is_fused_experts(module) and matches(name, dense_experts):
            reasons[name] = "exclude"
        fused_experts = [
            child for child in module.children() if is_fused_experts(child) and can_be_split(child)
        ]
        if not fused_experts:
            continue
        # Numbers of outputs that routers have: one for each expert, or one, as the gate of a shared expert.
        router_sizes = {1}
        for experts in fused_experts:
            for parameter in experts.parameters(recurse=False):
                num_experts = parameter.shape[0]  # weights and biases are [experts, ...]
                router_sizes.add(num_experts)
        for child_name, child in module.named_children():
            is_router = isinstance(child, LINEAR) and child.weight.shape[0] in router_sizes
            if is_router:
                reasons[f"{name}.{child_name}"] = "router"
    return reasons

"""Mixtures of experts made of a dense Llama, as they are before any training (`mixtures.py` trains them).

`split` divides the channels of each MLP among experts; `copied` makes copies of some MLPs. Both first run the dense
model on some text, and look at what enters each MLP: the *inputs* [tokens, hidden]. From these they fit the *router*,
a matrix [experts, hidden] whose products with an input, the router's logits, say which experts a token gets.

The classes are those of Transformers in which the attention of a Llama fits, so that servers know them:

- `split` is a `Glm4MoeForCausalLM`: sigmoid router with a bias that only selects, shared experts, no dense layers, and
  grouped-query attention without norms of queries and keys (DeepSeek-V3 has latent attention, which a Llama's is not).
- `copied` is an `Ernie4_5_MoeForCausalLM`: softmax router whose chosen weights sum to 1, no shared experts, dense
  layers first, and the same attention. Qwen3-MoE and OLMoE normalise queries and keys, PhiMoE's norms subtract the
  mean, Qwen2-MoE has a shared expert that the gate of each token scales, and Mixtral has no dense layers. The mixtures
  are the last layers and not every second one, because llama.cpp reads dense layers only before all mixtures.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize, one_hot
from transformers import (
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

CLUSTER_ROUNDS = 10
RIDGE = 0.01  # added to the diagonal of the Gram matrix, as a share of its mean
# Standard deviation of a router's logits. Small for a sigmoid: experts are chosen by the fit, and all weights are about
# 1, as in the dense MLP. Larger for a softmax, whose weights have no effect while all experts are equal.
SIGMOID_SPREAD = 0.2
SOFTMAX_SPREAD = 1.0


def split(
    dense: LlamaForCausalLM,
    ids: Tensor,
    *,
    experts: int,
    expert_channels: int,
    active: int,
    seed: int,
) -> Glm4MoeForCausalLM:
    """Make a mixture whose experts are parts of the dense MLPs.

    In each layer, the channels with the largest mean contribution to the MLP's output become the shared expert, and the
    others are clustered into experts of equal size, by the tokens to which they contribute. The router's logits are a
    ridge regression of the norms of the experts' outputs. With all experts active and the router's weights zero, the
    mixture computes the same function as `dense`, which is not changed.

    Args:
        dense: The model, in float32.
        ids: Token ids [sequences, length] of the text to cluster by.
        experts: Experts of a layer that are routed to.
        expert_channels: Channels of each of them.
        active: Experts that a token gets.
        seed: Of the start of the clustering.

    Raises:
        SystemExit: If no channels are left for the shared expert, or they are no multiple of `expert_channels`.
    """
    channels_of_mlp = dense.config.intermediate_size
    num_shared = channels_of_mlp - experts * expert_channels
    if num_shared < expert_channels or num_shared % expert_channels:
        raise SystemExit(
            f"--experts {experts} of --expert-channels {expert_channels} leave {num_shared} of {channels_of_mlp} "
            "channels for the shared expert: pass numbers that leave a multiple of the expert's channels."
        )

    config = Glm4MoeConfig(
        **_shared_settings(dense.config),
        intermediate_size=channels_of_mlp,
        moe_intermediate_size=expert_channels,
        n_routed_experts=experts,
        n_shared_experts=num_shared // expert_channels,
        num_experts_per_tok=active,
        norm_topk_prob=True,
        # The weights of the active experts sum to their number: each is 1 on average, as in the dense MLP.
        routed_scaling_factor=float(active),
        first_k_dense_replace=0,
        head_dim=dense.config.head_dim,
        num_mtp_layers=0,
    )
    config.rope_parameters = dense.config.rope_parameters | {"partial_rotary_factor": 1.0}
    weights = dict(dense.state_dict())

    _look_at_mlps(
        dense,
        ids,
        partial(_split_layer, weights, num_shared=num_shared, experts=experts, seed=seed),
    )
    return _filled(Glm4MoeForCausalLM(config), weights)


def _split_layer(
    weights: dict[str, Tensor],
    layer: int,
    mlp: Any,
    inputs: Tensor,
    *,
    num_shared: int,
    experts: int,
    seed: int,
) -> None:
    """Replace the weights of one MLP in `weights` by those of experts and router.

    `inputs` [tokens, hidden] enter the MLP. The shared expert gets `num_shared` channels, and `experts` experts the
    others, equally many each. `seed` is of the start of the clustering.
    """
    channels = mlp.act_fn(mlp.gate_proj(inputs)) * mlp.up_proj(inputs)  # [tokens, channels]
    contributions = channels.abs() * mlp.down_proj.weight.norm(dim=0)
    by_contribution = contributions.mean(0).argsort(descending=True)
    shared = by_contribution[:num_shared]
    routed = by_contribution[num_shared:]

    centred = contributions[:, routed] - contributions[:, routed].mean(0)
    clusters = balanced_clusters(centred.T, experts, seed)
    members = routed[clusters.argsort(stable=True)].view(experts, -1)

    down = mlp.down_proj.weight  # [hidden, channels]
    norms = []  # of the output of each expert, [tokens]
    for channels_of_expert in members:
        outputs = linear(channels[:, channels_of_expert], down[:, channels_of_expert])
        norms.append(outputs.norm(dim=-1))
    ones = torch.ones(len(inputs), 1)
    inputs_and_ones = torch.cat([inputs, ones], dim=1)
    fit = ridge(inputs_and_ones, torch.stack(norms, dim=1))
    # What all experts have in common does not choose among them.
    fit = fit - fit.mean(0)
    fit = fit * SIGMOID_SPREAD / linear(inputs, fit[:, :-1]).std()

    name = f"model.layers.{layer}.mlp"
    for operator in ("gate_proj", "up_proj", "down_proj"):
        del weights[f"{name}.{operator}.weight"]
    gate = mlp.gate_proj.weight  # [channels, hidden]
    up = mlp.up_proj.weight
    # [experts, channels, hidden] each, one after the other
    weights[f"{name}.experts.gate_up_proj"] = torch.cat([gate[members], up[members]], dim=1)
    # [hidden, experts, channels] -> [experts, hidden, channels]
    weights[f"{name}.experts.down_proj"] = down[:, members].transpose(0, 1)
    weights[f"{name}.shared_experts.gate_proj.weight"] = gate[shared]
    weights[f"{name}.shared_experts.up_proj.weight"] = up[shared]
    weights[f"{name}.shared_experts.down_proj.weight"] = down[:, shared]
    weights[f"{name}.gate.weight"] = fit[:, :-1]
    # The bias is added after the sigmoid, whose slope at 0 is 1/4.
    weights[f"{name}.gate.e_score_correction_bias"] = fit[:, -1] / 4


def copied(
    dense: LlamaForCausalLM, ids: Tensor, *, experts: int, active: int, dense_layers: int, seed: int
) -> Ernie4_5_MoeForCausalLM:
    """Make a mixture whose experts are equal copies of the dense MLPs (sparse upcycling, arXiv 2212.05055).

    Since the weights of a token's experts sum to 1, the mixture computes the same function as `dense`, which is not
    changed. The router's logits are a ridge regression of clusters of the MLP's inputs: tokens that are alike get the
    same experts, which so are trained on different text.

    Args:
        dense: The model, in float32.
        ids: Token ids [sequences, length] of the text to cluster by.
        experts: Copies in a layer.
        active: Experts that a token gets.
        dense_layers: Layers before the first mixture, which stay as they are.
        seed: Of the start of the clustering.
    """
    config = Ernie4_5_MoeConfig(
        **_shared_settings(dense.config),
        intermediate_size=dense.config.intermediate_size,
        moe_intermediate_size=dense.config.intermediate_size,
        moe_num_experts=experts,
        moe_num_shared_experts=0,
        moe_k=active,
        moe_layer_start_index=dense_layers,
    )
    config.rope_parameters = dict(dense.config.rope_parameters)
    weights = dict(dense.state_dict())

    def copy_layer(layer: int, mlp: Any, inputs: Tensor) -> None:
        """Replace the weights of one MLP in `weights` by those of experts and router; those of a dense layer stay."""
        if layer < dense_layers:
            return
        clusters = balanced_clusters(inputs, experts, seed)
        # without a constant, since this router has none
        fit = ridge(inputs, one_hot(clusters, experts).float() - 1 / experts)
        fit = fit - fit.mean(0)

        name = f"model.layers.{layer}.mlp"
        for operator in ("gate_proj", "up_proj", "down_proj"):
            del weights[f"{name}.{operator}.weight"]
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        weights[f"{name}.experts.gate_up_proj"] = gate_up.expand(experts, -1, -1)
        weights[f"{name}.experts.down_proj"] = mlp.down_proj.weight.expand(experts, -1, -1)
        weights[f"{name}.gate.weight"] = fit * SOFTMAX_SPREAD / linear(inputs, fit).std()
        weights[f"{name}.gate.moe_statics.e_score_correction_bias"] = torch.zeros(1, experts)

    _look_at_mlps(dense, ids, copy_layer)
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # This class rotates neighbours, a Llama the halves of a head.
            halves = weight.unflatten(0, (-1, 2, dense.config.head_dim // 2))
            weights[name] = halves.transpose(1, 2).flatten(0, 2)
    return _filled(Ernie4_5_MoeForCausalLM(config), weights)


def _shared_settings(config: LlamaConfig) -> dict[str, Any]:
    """The settings of a Llama that both classes of mixtures have under the same names."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps")
    names += ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(config, name) for name in names}


def _look_at_mlps(
    dense: LlamaForCausalLM, ids: Tensor, look: Callable[[int, Any, Tensor], None]
) -> None:
    """Run a model on `ids` [sequences, length], and call `look(layer, mlp, inputs)` when the MLP of a layer is reached.

    `inputs` are [tokens, hidden]. During the run, the MLPs have hooks.
    """
    hooks = []
    for index, layer in enumerate(dense.model.layers):

        def hook(mlp: nn.Module, arguments: tuple[Tensor], index: int = index) -> None:
            """Hook of an MLP: look at what enters it."""
            look(index, mlp, arguments[0].flatten(0, 1))

        hooks.append(layer.mlp.register_forward_pre_hook(hook))
    try:
        with torch.no_grad():
            dense.model(input_ids=ids, use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()


def balanced_clusters(points: Tensor, clusters: int, seed: int) -> Tensor:
    """Cluster points [points, features] by the angle between them (k-means), all clusters of equal size.

    Returns the cluster of each point, int64 [points]. If the number of points is no multiple of `clusters`, some of
    these have one point less.
    """
    points = normalize(points)
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randperm(len(points), generator=generator)[:clusters]]
    for _ in range(CLUSTER_ROUNDS):
        assigned = _filled_clusters(points @ centres.T)
        centres = normalize(one_hot(assigned, clusters).to(points.dtype).T @ points)
    return assigned


def _filled_clusters(similarities: Tensor) -> Tensor:
    """Assign points to clusters by `similarities` [points, clusters]: the closest pairs first, until a cluster is full.

    Returns the cluster of each point, int64 [points].
    """
    num_points, num_clusters = similarities.shape
    room = [num_points // num_clusters] * num_clusters
    for cluster in range(num_points % num_clusters):
        room[cluster] += 1

    cluster_of = [-1] * num_points
    for pair in similarities.flatten().argsort(descending=True, stable=True).tolist():
        point, cluster = divmod(pair, num_clusters)
        if cluster_of[point] < 0 and room[cluster]:
            cluster_of[point] = cluster
            room[cluster] -= 1
    return torch.tensor(cluster_of)


def ridge(inputs: Tensor, targets: Tensor) -> Tensor:
    """The weights W [targets, inputs] that minimise ||inputs W^T - targets||^2 + r ||W||^2, by the normal equations.

    `inputs` are [tokens, inputs] and `targets` [tokens, targets]; r is `RIDGE` times the mean diagonal entry of the
    Gram matrix.
    """
    inputs = inputs.double()
    gram = inputs.T @ inputs
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, inputs.T @ targets.double()).T.float()


def _filled(mixture: Any, weights: dict[str, Tensor]) -> Any:
    """Copy the weights, by their names in memory, into a new mixture, which is returned in evaluation mode."""
    mixture.load_state_dict(weights)
    return mixture.eval()

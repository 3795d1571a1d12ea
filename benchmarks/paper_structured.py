"""Structured competitors for `paper.py`: LLM-Pruner's choice of parts, and training by adapters for a given time.

LLM-Pruner (arXiv 2305.11627) removes *coupled groups*: weights that are useful only together. In a model of the Llama
family these are

- a channel of an MLP: a row of gate_proj, a row of up_proj and a column of down_proj;
- a group of attention heads: the query heads that share a key head, with the key and value heads and their columns of
  o_proj.

The importance of a group is that of its weights `w` by the first order of a Taylor series, from the gradients `g` of
the loss on calibration text: the sum of `|w g|` (equation 5 of the paper). The least important groups of each decoder
layer go. Then LLM-Pruner trains low-rank adapters (LoRA) on text, and merges them. `remove_parts` and `train_adapters`
are this project's versions of the two steps, not the authors' code. PERP (arXiv 2312.15230) trains adapters of zeros
under the masks, `W + mask * (B A)`, so that merging keeps the zeros; `train_masked_adapters` does this.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import LlamaForCausalLM, PreTrainedModel

RANK = 8
"""Of the adapters, as in LLM-Pruner. They are scaled by 2 (alpha 16)."""


# --- LLM-Pruner's choice ---------------------------------------------------------------------------------------------


def remove_parts(
    model: LlamaForCausalLM, batches: Sequence[Tensor], parts: dict[str, float]
) -> None:
    """Remove the least important channels or heads from each decoder layer; the model has fewer weights then.

    Args:
        model: Changed in place, with its configuration.
        batches: Token ids [windows, length], for the gradients.
        parts: The share to remove, of "channels" and of "heads".
    """
    gradients_of_loss(model, batches)
    config = model.config
    with torch.no_grad():
        for layer in model.model.layers:
            mlp = layer.mlp
            attention = layer.self_attn
            if "channels" in parts:
                importance = (
                    by_rows(mlp.gate_proj) + by_rows(mlp.up_proj) + by_columns(mlp.down_proj)
                )
                kept = most_important(importance, parts["channels"])
                keep_rows(mlp.gate_proj, kept)
                keep_rows(mlp.up_proj, kept)
                keep_columns(mlp.down_proj, kept)
            if "heads" in parts:
                num_groups = config.num_key_value_heads
                sums = (
                    by_rows(attention.q_proj),
                    by_rows(attention.k_proj),
                    by_rows(attention.v_proj),
                    by_columns(attention.o_proj),
                )
                importance = torch.stack([one.view(num_groups, -1).sum(1) for one in sums]).sum(0)
                kept = most_important(importance, parts["heads"])
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                    keep_rows(projection, of_groups(kept, num_groups, projection.out_features))
                output = attention.o_proj
                keep_columns(output, of_groups(kept, num_groups, output.in_features))

    # All decoder layers have lost equally many.
    if "channels" in parts:
        config.intermediate_size = mlp.gate_proj.out_features
    if "heads" in parts:
        config.num_key_value_heads = len(kept)
        config.num_attention_heads = len(kept) * attention.num_key_value_groups
    model.zero_grad(set_to_none=True)


def gradients_of_loss(model: PreTrainedModel, batches: Sequence[Tensor]) -> None:
    """Give each parameter the gradient of the mean loss over the batches."""
    model.zero_grad(set_to_none=True)
    for batch in batches:
        (model(input_ids=batch, labels=batch).loss / len(batches)).backward()


def by_rows(linear: nn.Linear) -> Tensor:
    """Return the importance of each output [out]."""
    return (linear.weight * linear.weight.grad).abs().sum(1)


def by_columns(linear: nn.Linear) -> Tensor:
    """Return the importance of each input [in]."""
    return (linear.weight * linear.weight.grad).abs().sum(0)


def most_important(importance: Tensor, share_removed: float) -> Tensor:
    """Return the indices that are kept, in ascending order."""
    num_kept = len(importance) - int(share_removed * len(importance))
    return importance.topk(num_kept).indices.sort().values


def of_groups(groups: Tensor, num_groups: int, size: int) -> Tensor:
    """Return the indices of all rows, or columns, of some groups, where all groups together have `size`."""
    return torch.arange(size).view(num_groups, -1)[groups].flatten()


def keep_rows(linear: nn.Linear, kept: Tensor) -> None:
    """Remove all other outputs of an operator without a bias."""
    linear.weight = nn.Parameter(linear.weight[kept])
    linear.out_features = len(kept)


def keep_columns(linear: nn.Linear, kept: Tensor) -> None:
    """Remove all other inputs of an operator."""
    linear.weight = nn.Parameter(linear.weight[:, kept])
    linear.in_features = len(kept)


# --- adapters --------------------------------------------------------------------------------------------------------


class MaskedAdapter(nn.Module):
    """The weight of a linear operator with a low-rank change of those weights that are not zero (PERP)."""

    def __init__(self, weight: Tensor) -> None:
        """Begin with no change: one of the two factors is zero."""
        super().__init__()
        num_outputs, num_inputs = weight.shape
        self.register_buffer("mask", (weight != 0).to(weight.dtype))
        self.down = nn.Parameter(torch.empty(RANK, num_inputs))
        self.up = nn.Parameter(torch.zeros(num_outputs, RANK))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the changed weight."""
        return weight + 2 * self.mask * (self.up @ self.down)


def train_masked_adapters(
    model: PreTrainedModel, windows: Tensor, *, seconds: float, rate: float, seed: int
) -> tuple[PreTrainedModel, int]:
    """Train adapters under the masks of all linear operators in the decoder layers, and merge them.

    The other arguments and the values returned are those of `train_adapters`.
    """
    torch.manual_seed(seed)
    model.requires_grad_(False)
    linears = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    ]
    for linear in linears:
        adapter = MaskedAdapter(linear.weight)
        parametrize.register_parametrization(linear, "weight", adapter)
    num_tokens = train_for(model, windows, seconds=seconds, rate=rate, seed=seed)
    for linear in linears:
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
    return model, num_tokens


def train_adapters(
    model: PreTrainedModel, windows: Tensor, *, seconds: float, rate: float, seed: int
) -> tuple[PreTrainedModel, int]:
    """Train LoRA adapters of all linear operators in the decoder layers by peft, and merge them.

    The arguments are those of `train_for`.

    Returns:
        The model with merged adapters.
        The number of tokens that it was trained on.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets)
    adapted = get_peft_model(model, config)
    num_tokens = train_for(adapted, windows, seconds=seconds, rate=rate, seed=seed)
    return adapted.merge_and_unload(), num_tokens


def train_for(model: nn.Module, windows: Tensor, *, seconds: float, rate: float, seed: int) -> int:
    """Train all parameters that want gradients to predict the next token, by AdamW, for some time.

    Args:
        model: Changed in place.
        windows: Token ids [windows, length], of which a step takes two at random.
        seconds: Processor time.
        rate: The learning rate of the first step; it falls to zero in proportion to the time that is left.
        seed: Draws the order of the windows.

    Returns:
        The number of tokens.
    """
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    num_tokens = 0
    began = time.process_time()
    while (gone := time.process_time() - began) < seconds:
        batch = windows[torch.randint(len(windows), (2,), generator=generator)]
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - gone / seconds)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        num_tokens += batch.numel()
    return num_tokens

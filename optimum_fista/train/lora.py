"""LoRA adapters of PEFT that keep the zeros of a pruned model: W + M * (s B A), in training as after merging."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_fista.installing import install_command

try:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora.layer import Linear
    from peft.utils.other import transpose
except ImportError as error:
    raise ImportError(f"train='lora' needs PEFT: run {install_command('peft')}.") from error


class MaskedLora(Linear):
    """A LoRA layer whose update is zero where its operator is pruned: MaskLoRA of PERP (arXiv 2312.15230)."""

    pruned: Tensor

    def get_delta_weight(self, adapter: str) -> Tensor:
        """`M * (s B A)`, laid out as the weight, in the precision of merging even under autocast."""
        with torch.autocast(self.pruned.device.type, enabled=False):
            return super().get_delta_weight(adapter).masked_fill(self.pruned, 0)

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Outputs [..., out] of inputs [..., in]."""
        base: Any = self.get_base_layer()
        weight = base.weight if self.merged else base.weight + self.get_delta_weight("default")
        return nn.functional.linear(x, transpose(weight, self.fan_in_fan_out), base.bias)


def add_adapters(model: PreTrainedModel, targets: Iterable[str], masks: Mapping[str, Tensor], rank: int) -> None:
    """Put adapters on the linear modules `targets`, those of pruned weights masked; they alone need gradients."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), task_type="CAUSAL_LM")
    # By the type PEFT takes names of shared experts for those that fused experts had in Transformers 4.
    vars(model.config)["model_type"] = ""
    try:
        inject_adapter_in_model(config, model)
    finally:
        del vars(model.config)["model_type"]
    for name, mask in masks.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, Linear):
            layer.__class__ = MaskedLora
            layer.register_buffer("pruned", ~mask, persistent=False)


def merge_adapters(model: PreTrainedModel) -> None:
    """Add the updates of all adapters to the weights."""
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.merge(safe_merge=True)

"""LoRA adapters of PEFT that keep the zeros of a pruned model: W + M * (B A), in training as after merging."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_fista.installing import install_command
from optimum_fista.run.checkpoints.checkpoint import mark_retrained
from optimum_fista.run.retraining.masks import MaskSource, find_masks

try:
    from peft import PeftModel
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import transpose
except ImportError as error:
    raise ImportError(f"masked LoRA adapters need PEFT: run {install_command('peft')}.") from error


class MaskedLoraLinear(LoraLinear):
    """A LoRA layer whose update is zero where its operator is pruned.

    It computes `(W + M * (s B A)) x + b` as one product with the weights that merging will write, so that merging
    changes no output. PERP calls this MaskLoRA (arXiv 2312.15230).
    """

    pruned: Tensor

    def get_delta_weight(self, adapter: str) -> Tensor:
        """`M * (s B A)`, laid out as the weight, in the precision of merging even under autocast."""
        with torch.autocast(self.pruned.device.type, enabled=False):
            return super().get_delta_weight(adapter).masked_fill(self.pruned, 0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Outputs [..., out] of inputs [..., in].

        Raises:
            ValueError: If every sequence is to have an adapter of its own.
        """
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names: masked adapters can't be mixed within a batch.")
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        base: Any = self.get_base_layer()
        weight, dropped = base.weight, x.new_zeros(())
        for name in adapters:
            delta = self.get_delta_weight(name).to(weight.dtype)
            if self.training and not isinstance(self.lora_dropout[name], nn.Identity):
                inputs = self.lora_dropout[name](x)
                dropped = dropped + nn.functional.linear(inputs, transpose(delta, self.fan_in_fan_out))
            else:
                weight = weight + delta
        return nn.functional.linear(x, transpose(weight, self.fan_in_fan_out), base.bias) + dropped


def mask_adapters(model: PeftModel, masks: MaskSource = None) -> PeftModel:
    """Make the LoRA adapters of a pruned model keep its zeros, while they are trained and when they are merged.

    Call it after `get_peft_model` or `PeftModel.from_pretrained`, on every load: the adapter's files hold A and B
    only. Adapters on weights that are not pruned stay as they are.

    Args:
        model: A pruned model with LoRA adapters.
        masks: Where the masks come from, as in `masked_training`.

    Returns:
        The same model.

    Raises:
        ValueError: If an adapter on a pruned weight is no plain LoRA on a linear module, if adapters are merged
            already, and as `masked_training`.
        FileNotFoundError: If the folder or repository holds no masks.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(f"model is a {type(model).__name__}: pass a peft.PeftModel, as get_peft_model makes it.")
    base: Any = model.get_base_model()
    layers: dict[str, Any] = {name: m for name, m in base.named_modules() if isinstance(m, BaseTunerLayer)}
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name} has merged adapters already: call unmerge_adapter() first.")
    with _without_adapters(base):
        found = find_masks(base, masks)
    chosen = {}
    for name, mask in found.items():
        owner = name.rpartition(".")[0]
        layer = layers.get(owner)
        if layer is None:
            continue
        if type(layer) not in (LoraLinear, MaskedLoraLinear) or layer.lora_variant or any(layer.lora_bias.values()):
            raise ValueError(
                f"{owner} is pruned and has a {type(layer).__name__} of a kind that can't be masked: pass a LoraConfig "
                "for linear modules, without target_parameters, variants such as DoRA, and lora_bias."
            )
        chosen[owner] = mask
    for owner, mask in chosen.items():
        layers[owner].__class__ = MaskedLoraLinear
        layers[owner].register_buffer("pruned", ~mask, persistent=False)
    return model


def merge_adapters(model: PeftModel, masks: MaskSource = None) -> PreTrainedModel:
    """Merge the LoRA adapters of a pruned model into its weights, under the masks.

    Adapters that were trained under the masks (`mask_adapters`) lose nothing; of others, what they do to pruned weights
    is dropped.

    Args:
        model: A pruned model with LoRA adapters.
        masks: Where the masks come from, as in `masked_training`; not used if `mask_adapters` was called.

    Returns:
        The model without adapters, the object that the adapters were added to.

    Raises:
        ValueError: As `mask_adapters`, and if a merged weight is NaN or Inf.
        FileNotFoundError: If the folder or repository holds no masks.
    """
    if not any(isinstance(module, MaskedLoraLinear) for module in model.modules()):
        mask_adapters(model, masks)
    merged = model.merge_and_unload(safe_merge=True)
    mark_retrained(merged)
    return merged


@contextmanager
def _without_adapters(base: nn.Module) -> Iterator[None]:
    """Put the plain modules in the place of those with adapters, so that names are those of the plain model."""
    replaced = [
        (parent, key, child)
        for parent in base.modules()
        for key, child in parent.named_children()
        if isinstance(child, BaseTunerLayer)
    ]
    try:
        for parent, key, child in replaced:
            setattr(parent, key, child.get_base_layer())
        yield
    finally:
        for parent, key, child in reversed(replaced):
            setattr(parent, key, child)

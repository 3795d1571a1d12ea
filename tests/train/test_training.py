import contextlib

import pytest
import torch
from tiny_llama import tiny_tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_fista import masked_training
from optimum_fista.train.training import find_masks


class Noise(torch.optim.Optimizer):
    """Moves every weight, whatever its gradient."""

    def __init__(self, parameters, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(torch.randn_like(parameter), alpha=group["lr"])


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-1, weight_decay=0.1),
    "noise": lambda p: Noise(p, lr=1e-2),
}


def reload(saved, **options) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(saved.folder, **options).train()


def train(model: PreTrainedModel, optimizer, steps: int = 4, accumulate: int = 2, clip: float = 0.5) -> list[Tensor]:
    """Returns the norms of the gradients."""
    norms = []
    for _ in range(steps):
        for ids in tiny_tokens().split(4)[:accumulate]:
            model(ids, labels=ids).loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def strays(model: PreTrainedModel, masks: dict[str, Tensor]) -> int:
    """Weights outside the masks with any bit set, a sign included."""
    kinds = {2: torch.int16, 4: torch.int32}
    weights = {name: model.get_parameter(name).data for name in masks}
    return sum(int(w.view(kinds[w.element_size()])[~masks[name]].count_nonzero()) for name, w in weights.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_stay_zero_bit_for_bit_and_the_rest_is_trained(optimizer, dtype, saved):
    model = reload(saved, dtype=dtype)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    masks = find_masks(model, saved.folder)
    with masked_training(model, saved.folder):
        train(model, OPTIMIZERS[optimizer](model.parameters()))
        assert strays(model, masks) == 0
    for name, parameter in model.named_parameters():
        kept = masks.get(name, torch.ones(()).bool().expand_as(parameter))
        assert bool(torch.isfinite(parameter).all())
        assert (parameter != before[name])[kept].float().mean() > 0.1, name


def test_moments_and_clipping_never_see_pruned_weights(saved):
    models = [reload(saved), reload(saved)]
    masks = find_masks(models[0], saved.folder)
    norms, states = [], []
    for model, is_masked in zip(models, (True, False), strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, amsgrad=True)
        if is_masked:
            with masked_training(model, masks):
                norms.append(train(model, optimizer, steps=1)[0])
        else:  # the same by hand
            for ids in tiny_tokens().split(4)[:2]:
                model(ids, labels=ids).loss.backward()
            for name, mask in masks.items():
                model.get_parameter(name).grad.mul_(mask)
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
            optimizer.step()
        states.append(optimizer.state[model.get_parameter("model.layers.0.mlp.up_proj.weight")])
    assert torch.equal(*norms)
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert torch.equal(states[0][key], states[1][key])
        assert not bool(states[0][key][~masks["model.layers.0.mlp.up_proj.weight"]].any())
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_nan_gradients_of_pruned_weights_do_not_spread(saved):
    model = reload(saved)
    name = "model.layers.0.mlp.up_proj.weight"
    masks = find_masks(model)
    with masked_training(model):
        weight = model.get_parameter(name)
        (weight * torch.where(masks[name], 1.0, float("nan"))).sum().backward()
        assert bool(torch.isfinite(weight.grad).all())


def test_an_error_in_the_loop_ends_it(saved):
    model = reload(saved)
    masks = find_masks(model)
    with contextlib.suppress(KeyboardInterrupt), masked_training(model):
        model.get_parameter("model.layers.0.mlp.up_proj.weight").data.add_(1.0)
        raise KeyboardInterrupt
    assert strays(model, masks) == 0
    train(model, OPTIMIZERS["adamw"](model.parameters()), steps=1)
    assert strays(model, masks) > 8000


def test_other_models_are_left_alone(saved):
    model, other = reload(saved), reload(saved)
    masks = find_masks(model)
    with masked_training(model):
        train(other, OPTIMIZERS["adamw"](other.parameters()), steps=1)
    assert strays(other, masks) > 8000
    assert "retrained" not in model.config.fista_pruning


def test_frozen_weights_are_no_trouble(saved):
    model = reload(saved)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    weight = model.model.layers[0].mlp.up_proj.weight.clone()
    norm = model.model.norm.weight.clone()
    with masked_training(model):
        train(model, OPTIMIZERS["adamw"]([p for p in model.parameters() if p.requires_grad]))
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, weight)
    assert not torch.equal(model.model.norm.weight, norm)
    assert model.config.fista_pruning["retrained"]

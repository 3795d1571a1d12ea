"""Smaller models compared with the whole ones, whose removed parts are kept from having an effect."""

from __future__ import annotations

import contextlib
import copy

import torch
from families import logits
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.removal.parts import ModelOutline, Parts
from optimum_fista.removal.proof import require_same_outputs
from optimum_fista.removal.shrinking import Shrinking, plan_shrinking
from optimum_fista.removal.smaller_modules import shrink_model


def parts_of(model, kind) -> Parts:
    """All parts of one kind that a model can lose."""
    return ModelOutline(find_decoder_layers(model)).parts(kind)


def plan_for(model, layers=None, **counts) -> Shrinking:
    """Plan a smaller model that keeps `layers`, and in each layer these numbers of parts, by kind."""
    return plan_shrinking(ModelOutline(find_decoder_layers(model)), counts, layers=layers)


def some_groups(plan, seed=3):
    """As many groups of every part as planned, at random."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: sorted(
            torch.randperm(part.groups, generator=generator)[: plan.num_kept[name]].tolist()
        )
        for name, part in plan.parts.items()
    }


class ForbiddenExperts(TorchFunctionMode):
    """As a context: routers give experts that are to go a score of minus infinity."""

    def __init__(self, model, plan, kept):
        super().__init__()
        self.gone = {
            id(parameter): sorted(set(range(part.groups)).difference(kept[part.name]))
            for name, parameter in model.named_parameters()
            if (part := plan.part_of(name)) is not None
            and parameter.ndim == 2
            and f"{part.name}.weight" not in part.tensors
        }

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function is nn.functional.linear and id(args[1]) in self.gone:
            output = output.index_fill(-1, torch.tensor(self.gone[id(args[1])]), -torch.inf)
        return output


def skip(module, args, kwargs, output):
    """A forward hook: the hidden states leave a decoder layer as they entered it."""
    entering = args[0] if args else kwargs["hidden_states"]
    return (entering, *output[1:]) if isinstance(output, tuple) else entering


def expected_logits(model, plan, kept):
    """Logits of the model of full size, with columns set to zero, experts never chosen and decoder layers skipped."""
    model = copy.deepcopy(model)
    tensors = dict(model.state_dict())  # they share the model's memory
    has_experts = False
    for name, part in plan.parts.items():
        if f"{name}.weight" in part.tensors:
            tensors[f"{name}.weight"].copy_(
                part.without_columns(tensors[f"{name}.weight"], kept[name])
            )
            continue
        has_experts = True
        gone = torch.tensor(sorted(set(range(part.groups)).difference(kept[name])))
        for key, (axis, _) in part.tensors.items():
            if "bias" in key and not key.startswith(name):  # added to the scores of experts
                tensors[key].index_fill_(axis, gone, -torch.inf)
    for index, layer in enumerate(find_decoder_layers(model).modules):
        if index not in plan.layers:
            layer.register_forward_hook(skip, with_kwargs=True)
    with ForbiddenExperts(model, plan, kept) if has_experts else contextlib.nullcontext():
        return logits(model)


def assert_shrinks(model, folder, **numbers):
    """Shrink a model, save it and load it plainly: it computes what the whole one does without what is removed."""
    dense = logits(model)
    plan = plan_for(model, **numbers)
    kept = some_groups(plan)
    if "experts" not in numbers and len(plan.layers) == len(find_decoder_layers(model)):
        require_same_outputs(plan, "", model, kept, logits)
    expected = expected_logits(model, plan, kept)
    assert (expected - dense).norm() > 1e-3 * dense.norm()  # what is removed mattered
    shrink_model(model, plan, kept)
    assert_same(logits(model), expected)
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert type(again) is type(model)
    assert again.num_parameters() == model.num_parameters()
    assert_same(logits(again), expected)
    return again


def assert_same(found, expected):
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())


def generates_alike(model):
    """Whether generated tokens are the same with a cache of keys and values and without."""
    prompt = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cached, whole = (model.generate(prompt, use_cache=cache, **options) for cache in (True, False))
    return cached.shape == (1, 8) and torch.equal(cached, whole)

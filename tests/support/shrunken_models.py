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
from optimum_fista.removal.model_outline import ModelOutline
from optimum_fista.removal.parts import Parts
from optimum_fista.removal.proof import require_same_outputs
from optimum_fista.removal.routing_table import repointed
from optimum_fista.removal.shrinking import Shrinking, plan_shrinking
from optimum_fista.removal.smaller_modules import shrink_model


def parts_of(model, kind) -> Parts:
    """All parts of one kind that a model can lose."""
    return ModelOutline(find_decoder_layers(model)).parts(kind)


def plan_for(model, layers=None, **counts) -> Shrinking:
    """Plan a smaller model that keeps `layers`, and in each layer these numbers of parts, by kind."""
    return plan_shrinking(ModelOutline(find_decoder_layers(model)), counts, layers=layers)


def some_groups(plan, seed=3):
    """Choose as many groups of every part as planned, at random: rising numbers, by the name of the part."""
    generator = torch.Generator().manual_seed(seed)
    groups = {}
    for name, part in plan.parts.items():
        in_random_order = torch.randperm(part.groups, generator=generator)
        groups[name] = sorted(in_random_order[: plan.num_kept[name]].tolist())
    return groups


def removed_groups(part, kept):
    """The numbers of the groups of a part that are not among the groups `kept`, rising."""
    return sorted(set(range(part.groups)).difference(kept))


class ForbiddenExperts(TorchFunctionMode):
    """As a context: routers give removed experts a score of minus infinity."""

    def __init__(self, model, plan, kept):
        super().__init__()
        self.removed_experts = {}  # by the id of the router's weight [experts, hidden]
        for name, parameter in model.named_parameters():
            part = plan.part_of(name)
            if part is not None and part.is_mixture and parameter.ndim == 2:
                self.removed_experts[id(parameter)] = removed_groups(part, kept[part.name])

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function is nn.functional.linear and id(args[1]) in self.removed_experts:
            removed = torch.tensor(self.removed_experts[id(args[1])])
            output = output.index_fill(-1, removed, -torch.inf)
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
        if not part.is_mixture:
            continue
        has_experts = True
        if part.table is not None:
            # the table names only kept experts, by their old numbers
            new_numbers = repointed(tensors[part.table], part.groups, kept[name])
            tensors[part.table].copy_(torch.tensor(kept[name])[new_numbers])
        removed = torch.tensor(removed_groups(part, kept[name]))
        for key, (axis, _) in part.tensors.items():
            if "bias" in key and not key.startswith(name):  # added to the scores of experts
                tensors[key].index_fill_(axis, removed, -torch.inf)
    for name, tensor in tensors.items():
        with_zeros = plan.with_zeros(name, tensor, kept)
        if with_zeros is not None:
            tensor.copy_(with_zeros)
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
    keeps_all_layers = len(plan.layers) == len(find_decoder_layers(model))
    if "experts" not in numbers and keeps_all_layers:
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


def assert_same(outputs, expected):
    """Check that two tensors are the same but for rounding."""
    assert float((outputs - expected).norm()) <= 1e-5 * float(expected.norm())


def generates_alike(model):
    """Whether generated tokens are the same with a cache of keys and values and without."""
    prompt = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(prompt, use_cache=True, **options)
    without_cache = model.generate(prompt, use_cache=False, **options)
    return with_cache.shape == (1, 8) and torch.equal(with_cache, without_cache)

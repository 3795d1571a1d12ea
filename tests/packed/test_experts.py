"""Experts that stay packed compute what the fused experts of Transformers compute."""

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from optimum_fista.packed.experts import packed_experts_forward
from optimum_fista.packed.linear import PackedLinear


def experts_of(family):
    model = tiny_model(family)
    return next(m for name, m in model.named_modules() if name.endswith("experts"))


def routed(tokens, hidden, experts, k=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator)
    index = torch.rand(tokens, experts, generator=generator).topk(k).indices
    return x, index, torch.rand(tokens, k, generator=generator)


def pack_parameter(module, name):
    weight = getattr(module, name).detach()
    matrices = weight.mT if module.is_transposed else weight
    delattr(module, name)
    linears = []
    for matrix in matrices:
        linear = nn.Linear(*matrix.shape[::-1], bias=False, device="meta")
        linear.weight = nn.Parameter(matrix.contiguous())
        linears.append(PackedLinear.from_linear(linear))
    setattr(module, name, nn.ModuleList(linears))


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_packed_or_not_they_compute_the_same(family, tokens):
    module = experts_of(family)
    x, index, weights = routed(tokens, 32, 4)
    expected = module(x, index, weights) if tokens else x
    with torch.no_grad():
        assert torch.allclose(packed_experts_forward(module, x, index, weights), expected, atol=1e-5)
        for name in ("gate_up_proj", "down_proj"):
            pack_parameter(module, name)
            assert torch.allclose(packed_experts_forward(module, x, index, weights), expected, atol=1e-5)


def test_tokens_of_no_expert_here():
    """Numbers after the last expert, as expert parallelism gives them, add nothing."""
    module = experts_of("mixtral")
    x, index, weights = routed(6, 32, 4)
    alone = packed_experts_forward(module, x, index[:, :1], weights[:, :1])
    index[:, 1] = 4
    assert torch.allclose(packed_experts_forward(module, x, index, weights), alone, atol=1e-6)

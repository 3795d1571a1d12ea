"""Experts that stay packed compute what the fused experts of Transformers compute."""

import pytest
import torch
from tiny_models import tiny_model

from optimum_fista.packed.packed_experts import packed_experts_forward


@pytest.mark.parametrize("tokens", [0, 6])
def test_tokens_of_no_expert_here(tokens):
    """Numbers after the last expert, as expert parallelism gives them, add nothing."""
    module = next(m for name, m in tiny_model("mixtral").named_modules() if name.endswith("experts"))
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(tokens, 32, generator=generator), torch.rand(tokens, 2, generator=generator)
    index = torch.rand(tokens, 4, generator=generator).topk(2).indices
    alone = packed_experts_forward(module, x, index[:, :1], weights[:, :1])
    index[:, 1] = 4
    assert torch.allclose(packed_experts_forward(module, x, index, weights), alone, atol=1e-6)

"""Pruning a tiny model of any family of Transformers, saving it, loading it again, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from shrunken_config import VOCAB_SIZE, shrunken_config
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_fista import FistaPruner, FistaPruningConfig, PruningReport


def family_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A random tiny float32 model of a family; every parameter is random, biases and norms included."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(shrunken_config(family), dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn_like(parameter)
                if parameter.ndim < 2:
                    parameter.add_(noise, alpha=0.1)
                else:
                    parameter.copy_(noise).mul_(parameter.shape[-1] ** -0.5)
    return model


def family_tokens() -> list[Tensor]:
    """Two calibration batches of one sequence of 32 tokens."""
    ids = torch.randint(3, VOCAB_SIZE, (2, 32), generator=torch.Generator().manual_seed(1))
    return list(ids.split(1))


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.cat(family_tokens()), use_cache=False).logits

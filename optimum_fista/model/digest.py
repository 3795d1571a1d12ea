"""SHA-256 of tensors, decoder layers and models: equal if names, types, shapes and all bits are, wherever they lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from optimum_fista.model.offload import stored_tensor


def sha256_of(module: nn.Module, names: Iterable[str]) -> str:
    """Digest of the tensors of a module with these names, each read from where it is kept."""
    digests = {}
    for name in names:
        tensor = stored_tensor(module, name)
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        digests[name] = digest.hexdigest()
    return combined_sha256(digests)


def combined_sha256(digests: Mapping[str, str] | Iterable[str]) -> str:
    """One digest of several: of those of tensors by name, in any order, or of those of decoder layers in theirs."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()

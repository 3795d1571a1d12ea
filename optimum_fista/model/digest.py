"""SHA-256 of tensors, decoder layers and models: equal if names, types, shapes and all bits are, wherever they lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_fista.model.architecture import find_decoder_layers
from optimum_fista.model.offload import stored_tensor


def tensor_sha256(tensor: Tensor) -> str:
    """Digest of one tensor."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def combined_sha256(digests: Mapping[str, str] | Iterable[str]) -> str:
    """One digest of several: of those of tensors by name, in any order, or of those of decoder layers in theirs."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def layer_sha256(layer: nn.Module) -> str:
    """Digest of a decoder layer, whatever its number. Each tensor is read from where it is kept."""
    return combined_sha256({name: tensor_sha256(tensor_of(layer, name)) for name in layer.state_dict()})


def rest_sha256(model: PreTrainedModel) -> str:
    """Digest of all that is not in a decoder layer: embeddings, the last norm, and a head that is not tied to them."""
    return combined_sha256({name: tensor_sha256(tensor_of(model, name)) for name in names_of_rest(model)})


def names_of_rest(model: PreTrainedModel) -> list[str]:
    """Names of the tensors of a model that are in no decoder layer; of those that are tied, one."""
    prefix, tied = f"{find_decoder_layers(model).name}.", model.all_tied_weights_keys
    return [name for name in model.state_dict() if not name.startswith(prefix) and name not in tied]


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """A tensor of a module's state by its name, read from where it is kept."""
    owner, _, leaf = name.rpartition(".")
    return stored_tensor(module.get_submodule(owner), leaf)

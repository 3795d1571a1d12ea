"""Digests of tensors: the SHA-256 of their names, types, shapes and values, bit for bit.

`sha256_of` is of the tensors of a module, such as a decoder layer. `combined_sha256` makes one digest of several, such
as that of a model from those of its decoder layers.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from optimum_fista.model.offload import stored_tensor


def sha256_of(module: nn.Module, names: Iterable[str]) -> str:
    """Compute the digest of a module's parameters and buffers with these names, wherever their values are kept.

    `names` are relative to the module, such as "mlp.down_proj.weight". Changes nothing.
    """
    digests = {}  # by the name of the tensor
    for name in names:
        tensor = stored_tensor(module, name)
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(bytes_of_values(tensor))
        digests[name] = digest.hexdigest()
    return combined_sha256(digests)


def combined_sha256(digests: Mapping[str, str] | Iterable[str]) -> str:
    """Combine digests into one: those of tensors by name, in any order, or those of decoder layers, in their order."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def bytes_of_values(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's values, element by element, whatever its dtype, device and strides.

    Of a contiguous tensor in CPU memory these are not copied: do not write to the result.
    """
    elements = tensor.detach().cpu().contiguous().view(-1)
    # as bytes, because NumPy has no bfloat16
    return elements.view(torch.uint8).numpy().data

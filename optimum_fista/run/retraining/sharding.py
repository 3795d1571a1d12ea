"""Weights that are shared out: every process holds a part of every tensor (FSDP2), as a DTensor."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.distributed import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from optimum_fista.model.architecture import find_decoder_layers


def shard(model: PreTrainedModel, mesh: DeviceMesh, dtype: torch.dtype | None = None) -> None:
    """Leave of a model in CPU memory this process's part, on the mesh's device; every process calls it.

    A forward or backward pass gathers one decoder layer after another. What is in none of them is gathered too, for as
    long as the pass takes, and so are layers that share parameters with others.
    """
    layers = find_decoder_layers(model).modules
    holders = Counter(parameter for layer in layers for parameter in layer.parameters())
    alone = [layer for layer in layers if all(holders[parameter] == 1 for parameter in layer.parameters())]
    for module in (*alone, model):
        for tensor in (*module.parameters(), *module.buffers()):
            if dtype is not None and tensor.is_floating_point() and not isinstance(tensor, DTensor):
                tensor.data = tensor.data.to(dtype)
        # the model's own tensors too are given back after the forward pass, by default they stay
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        # sums that are divided: gloo of PyTorch 2.8 takes means for sums, in silence
        sharded.set_force_sum_reduction_for_comms(True)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is in this process, in the same memory; all of it if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_part(value: Tensor, like: Tensor) -> Tensor:
    """Of a tensor that every process has as a whole, the part that lies where this process's part of `like` does."""
    if not isinstance(like, DTensor):
        return value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).to_local()


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from the parts of all processes, which all call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

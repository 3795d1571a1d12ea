"""Counting the products that run in a context."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

_IN_PLACE = {torch.ops.aten.addmm_: lambda _, left, right, **__: 2 * left[0] * left[1] * right[1]}
"""Products that PyTorch's counter leaves out, by the shapes of what they take."""


def counted_products() -> FlopCounterMode:
    """A context that counts the FLOP of matrix products, products in place included (`get_total_flops`)."""
    return FlopCounterMode(display=False, custom_mapping=_IN_PLACE)

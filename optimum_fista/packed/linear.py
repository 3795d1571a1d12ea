"""A linear layer whose weight stays packed, in memory and while it computes.

Decoding one token reads every weight once and computes little, so a layer with fewer bytes is faster. If a layer
unpacked its weight first, it would also write and read the dense weight.
"""

import torch
from torch import Tensor, nn

from optimum_fista.packed.format import (
    PackedFormatError,
    PackedTensor,
    check,
    pack,
    unpack,
    unpack_mask,
)
from optimum_fista.packed.operation import packed_linear, row_starts


class PackedLinear(nn.Module):
    """`nn.Linear` with a sparse weight, kept as the three tensors of docs/formats.md.

    The weight is fixed; gradients reach the input and the bias. On the CPU the products are those of the compiled
    kernels. The tensors of `packed`, a matrix, are not copied. Tensors on the meta device are placeholders for those of
    a file.
    """

    weight_values: Tensor  # [num_kept], the kept weights
    weight_mask: Tensor  # uint8 [out_features, bytes]
    weight_layout: Tensor  # int64 [6]: version, 0, 0, nothing, out_features, in_features
    weight_starts: (
        Tensor | None
    )  # int64 [out_features + 1], where the values of each row start; not in the state
    bias: nn.Parameter | None

    def __init__(self, packed: PackedTensor, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        if len(packed.shape) != 2:
            raise PackedFormatError(
                f"weight_layout says shape {packed.shape}: a linear layer needs a matrix."
            )
        self.out_features, self.in_features = packed.shape
        for name, tensor in packed.named("weight").items():
            self.register_buffer(name, tensor)
        self.register_buffer("weight_starts", None, persistent=False)
        self.register_parameter("bias", bias)
        self.prepare()

    @property
    def weight(self) -> Tensor:
        """A dense copy of the weight [out_features, in_features], made at each access."""
        return unpack(self.packed)

    @property
    def packed(self) -> PackedTensor:
        """The weight's three tensors."""
        return PackedTensor(self.weight_values, self.weight_mask, self.weight_layout)

    def prepare(self) -> None:
        """Check the tensors and find the row starts. Call it after you replace a tensor."""
        if (
            self.weight_mask.is_meta
        ):  # offloaded: Accelerate wants a tensor for each buffer, and fills it later
            self.weight_starts = torch.empty(
                self.out_features + 1, dtype=torch.int64, device="meta"
            )
            return
        check(self.packed, checksum=False)
        wanted = (self.out_features, self.in_features)
        if self.packed.shape != wanted:
            raise PackedFormatError(
                f"weight_layout says shape {self.packed.shape}: this layer's weight is {wanted}."
            )
        self.weight_starts = row_starts(self.weight_mask)

    def transpose_(self) -> None:
        """Transpose the weight; it is dense for a moment, and the bias already fits the new shape."""
        self.in_features, self.out_features = self.out_features, self.in_features
        transposed = pack(unpack(self.packed).t(), unpack_mask(self.packed).t())
        for name, tensor in transposed.named("weight").items():
            setattr(self, name, tensor)
        self.prepare()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], sums in float32."""
        tensors = self._buffers  # quicker than attributes, which small layers would notice
        if (
            x.shape[-1] != self.in_features
        ):  # the operation knows the width only to the next multiple of 64
            raise ValueError(
                f"x has shape {tuple(x.shape)}: pass one of shape (..., {self.in_features})."
            )
        starts, mask = tensors["weight_starts"], tensors["weight_mask"]
        if starts is None or starts.is_meta > mask.is_meta:  # type: ignore[union-attr]
            self.prepare()
            starts, mask = self.weight_starts, self.weight_mask
        return packed_linear(x, tensors["weight_values"], mask, starts, self._parameters["bias"])  # type: ignore[arg-type]

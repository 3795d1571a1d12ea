"""A small decoder layer for tests that need to see inside one."""

import torch
from torch import Tensor, nn

from optimum_fista.model.operators import LinearOperator

Group = list[LinearOperator]


class ToyLayer(nn.Module):
    """Two operators on one input, a wide one after them, two narrow ones at the end, and a residual.

    `in_place`: operators' inputs and outputs are overwritten after use, as Falcon does. `unwound` counts the forward
    passes that have ended, by an error too.
    """

    def __init__(self, size: int = 8, *, in_place: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.left = nn.Linear(size, size, bias=bias)
        self.right = nn.Linear(size, size, bias=bias)
        self.up = nn.Linear(size, 2 * size, bias=bias)
        self.low = nn.Linear(2 * size, size // 4, bias=bias)
        self.high = nn.Linear(2 * size, size - size // 4, bias=bias)
        self.in_place = in_place
        self.unwound = 0

    def forward(self, hidden_states: Tensor, shift: float = 0.0) -> Tensor:
        """Output hidden states; `shift` is added to them."""
        try:
            normed = torch.tanh(hidden_states)
            mixed = self.left(normed) * self.right(normed)
            inner = torch.relu(self.up(mixed))
            if self.in_place:
                mixed.mul_(0.5)
            low = self.low(inner)
            high = self.high(inner)
            if self.in_place:
                low.mul_(0.5)
                high += mixed[..., : high.shape[-1]]
                inner.zero_()
            return torch.cat([low, high], dim=-1) + hidden_states + shift
        finally:
            self.unwound += 1

    def groups(self) -> list[Group]:
        """Groups of operators that share an input, in execution order."""
        groups = []
        for names in (["left", "right"], ["up"], ["low", "high"]):
            groups.append([LinearOperator(f"layer.{name}", getattr(self, name)) for name in names])
        return groups


def toy_layer(seed: int = 0, **options: bool | int) -> ToyLayer:
    """A toy layer with seeded weights. Sets PyTorch's seed; `options` are those of `ToyLayer`."""
    torch.manual_seed(seed)
    return ToyLayer(**options).eval()  # type: ignore[arg-type]

"""How many tokens of a text the routers of a model send to each expert, counted while the text runs through the model.

Whoever runs decoder layers on texts anyway (`text.loss`) makes `ExpertCounts`, finds the mixture of each layer by
`mixture_of`, and runs the layer inside `counted`. A decoder layer has at most one mixture: a module that keeps several
experts in fused tensors (`model.experts`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from optimum_fista.model.experts import FusedExperts, can_be_split, is_fused_experts


class ExpertCounts:
    """Numbers of tokens by text, decoder layer and expert."""

    def __init__(self) -> None:
        # By the key of a text and the number of a decoder layer: int64 [experts], on the device of the layer.
        self._num_tokens: dict[str, dict[int, Tensor]] = {}

    @contextmanager
    def counted(self, text: str, layer_number: int, mixture: FusedExperts | None) -> Iterator[None]:
        """Inside, add to the counts what the mixture of a decoder layer gets from its router in each pass.

        All tokens of a pass are counted, so it must have no padding. `text` is a key for the text that runs. `mixture`
        is that of the decoder layer number `layer_number`, or `None`: then nothing is counted. A hook is on the module
        of the mixture inside, and not afterwards.
        """
        if mixture is None:
            yield
            return

        def count(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            """Add the tokens of one pass to the counts of `text`; a forward pre-hook of the module of `mixture`."""
            num_tokens = mixture.assigned(*arguments, **keywords).num_tokens()
            of_text = self._num_tokens.setdefault(text, {})
            if layer_number in of_text:
                num_tokens = num_tokens + of_text[layer_number]
            of_text[layer_number] = num_tokens

        with mixture.module.register_forward_pre_hook(count, with_kwargs=True):
            yield

    def of(self, text: str) -> dict[int, tuple[int, ...]]:
        """How many tokens of a text reach each expert, by the number of the decoder layer; empty without mixtures."""
        of_text = self._num_tokens.get(text, {})
        return {layer: tuple(num_tokens.tolist()) for layer, num_tokens in of_text.items()}


def mixture_of(layer: nn.Module) -> FusedExperts | None:
    """Find the mixture of a decoder layer; `None` if it has none whose form is known. Changes nothing."""
    for name, module in layer.named_modules():
        if is_fused_experts(module) and can_be_split(module):
            return FusedExperts(name, module)
    return None

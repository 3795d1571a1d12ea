"""Operators arranged by decoder layer and kind."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from optimum_fista.run.reports.report import OperatorReport


@dataclass(frozen=True)
class OperatorGrid:
    """Operators by decoder layer (rows) and kind (columns); the experts of a mixture share a kind.

    Attributes:
        layers: Names of the decoder layers, in order, such as `model.layers.0`.
        kinds: Names of the operators without that of the layer, such as `self_attn.q_proj`, in pruning order; experts
            are counted by a `*`, as in `mlp.experts.*.down_proj`.
        cells: The operators of a layer and a kind; only those that there are.
    """

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    cells: Mapping[tuple[str, str], tuple[OperatorReport, ...]]

    @classmethod
    def of(cls, operators: Iterable[OperatorReport]) -> OperatorGrid:
        """Arrange the operators of a report."""
        cells: dict[tuple[str, str], list[OperatorReport]] = {}
        for operator in operators:
            cells.setdefault(layer_and_kind(operator.name), []).append(operator)
        layers = sorted({layer for layer, _ in cells}, key=lambda layer: (layer.rpartition(".")[0], layer_index(layer)))
        kinds = dict.fromkeys(kind for _, kind in cells)
        return cls(tuple(layers), tuple(kinds), {place: tuple(found) for place, found in cells.items()})

    def of_kind(self, kind: str) -> list[OperatorReport]:
        """The operators of a kind, layer by layer."""
        return [operator for layer in self.layers for operator in self.cells.get((layer, kind), ())]


def layer_and_kind(name: str) -> tuple[str, str]:
    """`model.layers.3` and `self_attn.q_proj` of `model.layers.3.self_attn.q_proj.weight`.

    The layer is empty if the name holds no number.
    """
    match = re.fullmatch(r"(.*?\.\d+)\.(.+)", name)
    layer, kind = match.groups() if match else ("", name)
    kind = re.sub(r"(experts)\.\d+\.", r"\1.*.", kind.removesuffix(".weight"))
    return layer, re.sub(r"\[\d+", "[*", kind)


def layer_index(layer: str) -> int:
    """3 of `model.layers.3`; -1 if there is no number."""
    number = layer.rpartition(".")[2]
    return int(number) if number.isdecimal() else -1

"""The operators of a report as a table: decoder layers are rows, kinds of operators are columns.

An operator is a pruned linear map. Its `name` is that of its weight, such as
"model.layers.3.self_attn.q_proj.weight"; the layer is then "model.layers.3", and the kind "self_attn.q_proj".
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from optimum_fista.records import OperatorReport


class OperatorGrid:
    """Operators by decoder layer (rows) and kind (columns); the experts of a mixture share a kind."""

    def __init__(self, operators: Iterable[OperatorReport]) -> None:
        """Put each operator of a report into the cell of its layer and kind.

        `operators` are in the order in which they were pruned, decoder layer by decoder layer, and stay in that order.
        """
        # The operators of a cell, by the names of layer and kind, such as ("model.layers.3", "mlp.down_proj"). A cell
        # has several if they are experts of a mixture.
        self.cells: dict[tuple[str, str], list[OperatorReport]] = {}
        # The operators of all layers, by kind.
        self.kinds: dict[str, list[OperatorReport]] = {}
        # Names of the layers, each once, in the order in which they were pruned.
        self.layers: list[str] = []
        for operator in operators:
            layer, kind = layer_and_kind(operator.name)
            self.cells.setdefault((layer, kind), []).append(operator)
            self.kinds.setdefault(kind, []).append(operator)
            if layer not in self.layers:
                self.layers.append(layer)


def layer_and_kind(name: str) -> tuple[str, str]:
    """Divide the name of an operator, or of its weight, into the name of its decoder layer and its kind.

    "model.layers.3.self_attn.q_proj.weight" gives "model.layers.3" and "self_attn.q_proj". Experts of a mixture have
    the same kind, such as "mlp.experts.*.w2". A name without a number is a kind of no layer, "".
    """
    layer = ""
    kind = name
    # The first number in the name is that of the layer.
    match = re.fullmatch(r"(.*?\.\d+)\.(.+)", name)
    if match:
        layer, kind = match.groups()
    kind = kind.removesuffix(".weight")
    # Experts that are modules: "experts.7.w2".
    kind = re.sub(r"(experts)\.\d+\.", r"\1.*.", kind)
    # Experts in one tensor: "experts.gate_up_proj[3, :, 0::2]".
    kind = re.sub(r"\[\d+", "[*", kind)
    return layer, kind

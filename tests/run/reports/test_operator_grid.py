import dataclasses

import pytest

from optimum_fista.run.reports.operator_grid import OperatorGrid, layer_and_kind, layer_index


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.3", "self_attn.q_proj"),
        ("transformer.h.11.attn.c_attn.weight", "transformer.h.11", "attn.c_attn"),
        ("model.layers.0.block_sparse_moe.experts.7.w2.weight", "model.layers.0", "block_sparse_moe.experts.*.w2"),
        ("model.layers.0.mlp.shared_experts.up_proj.weight", "model.layers.0", "mlp.shared_experts.up_proj"),
        (
            "model.layers.1.mlp.experts.gate_up_proj[31, :, 0::2]",
            "model.layers.1",
            "mlp.experts.gate_up_proj[*, :, 0::2]",
        ),
        ("model.layers.1.convs.2.weight", "model.layers.1", "convs.2"),
        ("<b>.weight", "", "<b>"),
    ],
)
def test_layer_and_kind(name, layer, kind):
    assert layer_and_kind(name) == (layer, kind)


def test_layers_are_in_order_and_cells_hold_all_experts(saved):
    operators = [
        dataclasses.replace(saved.report.operators[0], name=name, num_kept=number)
        for number, name in enumerate(
            ["l.10.up.weight", "l.2.up.weight", "l.2.experts.0.w.weight", "l.2.experts.1.w.weight"]
        )
    ]
    grid = OperatorGrid.of(operators)
    assert grid.layers == ("l.2", "l.10")
    assert [layer_index(layer) for layer in grid.layers] == [2, 10]
    assert grid.kinds == ("up", "experts.*.w")
    assert {place: [o.num_kept for o in found] for place, found in grid.cells.items()} == {
        ("l.10", "up"): [0],
        ("l.2", "up"): [1],
        ("l.2", "experts.*.w"): [2, 3],
    }
    assert [o.num_kept for o in grid.of_kind("up")] == [1, 0]

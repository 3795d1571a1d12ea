import pytest
from small_reports import operator

from optimum_fista.operator_grid import OperatorGrid, layer_and_kind


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.3", "self_attn.q_proj"),
        (
            "model.layers.0.block_sparse_moe.experts.7.w2.weight",
            "model.layers.0",
            "block_sparse_moe.experts.*.w2",
        ),
        (
            "model.layers.0.mlp.shared_experts.up_proj.weight",
            "model.layers.0",
            "mlp.shared_experts.up_proj",
        ),
        (
            "h.11.mlp.experts.gate_up_proj[31, :, 0::2]",
            "h.11",
            "mlp.experts.gate_up_proj[*, :, 0::2]",
        ),
        ("<b>.weight", "", "<b>"),
    ],
)
def test_the_name_of_an_operator_has_a_decoder_layer_and_a_kind(name, layer, kind):
    assert layer_and_kind(name) == (layer, kind)


def test_a_grid_has_all_operators_of_a_kind():
    names = ["l.2.up.weight", "l.2.experts.0.w.weight", "l.2.experts.1.w.weight", "l.10.up.weight"]

    grid = OperatorGrid(operator(name) for name in names)

    names_of_cells = {place: [o.name for o in cell] for place, cell in grid.cells.items()}
    assert names_of_cells == {
        ("l.2", "up"): names[:1],
        ("l.2", "experts.*.w"): names[1:3],
        ("l.10", "up"): names[3:],
    }
    assert grid.layers == ["l.2", "l.10"]
    assert [o.name for o in grid.kinds["up"]] == [names[0], names[3]]

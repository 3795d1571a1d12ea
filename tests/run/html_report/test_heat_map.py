import dataclasses
import math

import pytest

from optimum_fista.run.html_report.heat_map import STEPS, heat_map
from optimum_fista.run.reports.operator_grid import OperatorGrid


@pytest.fixture
def operator(saved):
    def make(name: str, error: float):
        return dataclasses.replace(saved.report.operators[0], name=f"{name}.weight", relative_error=error)

    return make


def drawn(operators, **options):
    settings = {"text_of": "{:.4f}".format, "short_of": "{:.3f}".format, "from_zero": True}
    return heat_map(OperatorGrid.of(operators), "relative error", lambda o: o.relative_error, **settings | options)


def test_cells_colours_and_the_table_tell_the_same(operator):
    map_ = drawn([operator("l.0.attn.q", 0.0), operator("l.0.mlp.up", 0.25), operator("l.2.attn.q", 1.0)])
    assert map_.headings == ("attn.q", "mlp.up")
    assert map_.rows == ("0", "2")
    assert map_.table == (("0.0000", "0.2500"), ("1.0000", ""))
    assert [(c.row, c.column, c.step, c.text) for c in map_.cells] == [
        (0, 0, 0, "0.000"),
        (0, 1, STEPS // 4, "0.250"),
        (1, 0, STEPS - 1, "1.000"),
    ]
    assert [c.title for c in map_.cells][2] == "l.2.attn.q: relative error 1.0000"
    assert (map_.low, map_.high) == ("0.0000", "1.0000")
    assert [(group.start, group.span, group.lines) for group in map_.groups] == [(0, 1, ("attn",)), (1, 1, ("mlp",))]


def test_experts_get_a_column_of_means_and_one_of_maxima(operator):
    map_ = drawn([operator(f"l.0.experts.{i}.w", error) for i, error in enumerate([0.1, 0.2, 0.6])])
    assert map_.headings == ("experts.*.w mean", "experts.*.w max")
    assert map_.table == (("0.3000", "0.6000"),)
    assert [c.title for c in map_.cells] == [
        "l.0.experts.*.w: relative error 0.3000, mean of 3",
        "l.0.experts.*.w: relative error 0.6000, max of 3",
    ]


def test_numbers_that_are_not_finite_or_all_equal_have_a_colour_or_none(operator):
    map_ = drawn([operator("l.0.a", math.nan), operator("l.0.b", 0.5), operator("l.1.b", 0.5)], from_zero=False)
    assert [c.step for c in map_.cells] == [None, 0, 0]


def test_long_names_are_broken_into_lines_that_fit_the_column(operator):
    map_ = drawn([operator("l.0.self_attn.kv_a_proj_with_mqa", 0.1), operator("l.0.self_attn.o_proj", 0.1)])
    assert map_.columns == (("kv_a_", "proj_", "with_", "mqa"), ("o_proj",))
    assert map_.groups[0].lines == ("self_attn",)
    assert map_.least_width == 44

import dataclasses
import math

import pytest

from optimum_fista.page.charts import STEPS, heat_map, line_chart


@pytest.fixture
def operator(saved):
    def make(name: str, error: float = 0.1, **changes):
        return dataclasses.replace(saved.report.operators[0], name=f"{name}.weight", fit_error=error, **changes)

    return make


def map_of(operators, *, from_zero=True):
    return heat_map(operators, "relative error", lambda o: o.fit_error, "{:.4f}".format, from_zero=from_zero)


@pytest.mark.parametrize(("from_zero", "steps"), [(True, [2, 4, 8]), (False, [0, 3, 8])])
def test_cells_tell_number_and_colour(operator, from_zero, steps):
    operators = [operator("l.0.attn.q", 0.25), operator("l.0.mlp.up", 0.5), operator("l.2.attn.q", 1.0)]
    drawn = map_of(operators, from_zero=from_zero)
    assert drawn.columns == ["attn.q", "mlp.up"]
    assert drawn.rows == [
        ("0", [("0.2500", steps[0]), ("0.5000", steps[1])]),
        ("2", [("1.0000", steps[2]), ("", None)]),
    ]
    assert steps[2] == STEPS - 1
    assert (drawn.low, drawn.high) == ("0.0000" if from_zero else "0.2500", "1.0000")


def test_experts_get_a_column_of_means_and_one_of_maxima(operator):
    drawn = map_of([operator(f"l.0.experts.{i}.w", error) for i, error in enumerate([0.1, 0.2, 0.6])])
    assert drawn.columns == ["experts.*.w mean", "experts.*.w max"]
    assert [text for text, _ in drawn.rows[0][1]] == ["0.3000", "0.6000"]


def chart(labels, values):
    return line_chart(labels, {"error": values}, "{:.3f}".format)


def test_points_are_where_their_values_are():
    drawn = chart(["0", "1", "2", "3"], [0.1, 0.2, None, 0.4])
    (points,) = drawn.lines.values()
    assert [(p.x, p.title) for p in points] == [
        (0.125, "layer 0: 0.100"),
        (0.375, "layer 1: 0.200"),
        (0.875, "layer 3: 0.400"),
    ]
    assert [p.y for p in points] == pytest.approx([0.75, 0.5, 0])
    assert [text for _, text in drawn.ticks] == ["0.0", "0.1", "0.2", "0.3", "0.4"]
    assert [y for y, _ in drawn.ticks] == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_several_lines_share_an_axis_and_have_names():
    found = {"resident": [4096, 2048], "anonymous": [1024, None], "on the GPU": [None, None]}
    drawn = line_chart(["0", "1"], found, str, 1024)
    assert {name: [(p.x, p.y, p.title) for p in points] for name, points in drawn.lines.items()} == {
        "resident": [(0.25, 0, "layer 0, resident: 4096"), (0.75, 0.5, "layer 1, resident: 2048")],
        "anonymous": [(0.25, 0.75, "layer 0, anonymous: 1024")],
    }
    assert [text for _, text in drawn.ticks] == ["0", "1", "2", "3", "4"]
    assert drawn.labels == [(0.25, "0"), (0.75, "1")]


@pytest.mark.parametrize("highest", [0.0, 0.013, 1.0])
def test_ticks_hold_all_values_and_are_few(highest):
    drawn = chart(["0", "1"], [0.0, highest])
    assert 0 <= drawn.lines["error"][1].y <= 1
    assert 2 <= len(drawn.ticks) <= 6
    assert len({text for _, text in drawn.ticks}) == len(drawn.ticks)


def test_labels_are_thinned_out_and_nothing_is_no_chart():
    assert len(chart([str(i) for i in range(126)], [0.1] * 126).labels) <= 12
    assert chart(["0", "1"], [None, math.nan]) is None

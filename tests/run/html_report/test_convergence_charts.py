import dataclasses

import pytest

from optimum_fista.run.html_report.convergence_charts import HEIGHT, convergence_charts
from optimum_fista.solve.convergence import Convergence


@pytest.fixture
def operator(saved):
    def make(name: str, seconds: float, *residuals: float, measure: str = "change"):
        return dataclasses.replace(
            saved.report.operators[0],
            name=f"{name}.weight",
            solve_seconds=seconds,
            convergence=Convergence.of(measure, residuals),
        )

    return make


def test_steps_are_where_their_residuals_are(operator):
    drawn = convergence_charts([operator("l.0.mlp.up", 1.0, 1.0, 0.1, 0.01), operator("l.1.mlp.up", 2.0, 0.1, 1e-4)])
    assert [(chart.name, chart.seconds) for chart in drawn.charts] == [
        ("layer 1: mlp.up", 2.0),
        ("layer 0: mlp.up", 1.0),
    ]
    first, second = drawn.charts
    assert [(s.x, s.y) for s in first.steps] == [(0, pytest.approx(HEIGHT / 4)), (50, pytest.approx(HEIGHT))]
    assert [(s.x, s.y) for s in second.steps] == [
        (0, 0),
        (50, pytest.approx(HEIGHT / 4)),
        (100, pytest.approx(HEIGHT / 2)),
    ]
    assert [text for _, text in drawn.ticks] == ["1e-4", "1e-3", "1e-2", "1e-1", "1"]
    assert [y for y, _ in drawn.ticks] == pytest.approx([HEIGHT, 0.75 * HEIGHT, 0.5 * HEIGHT, 0.25 * HEIGHT, 0])
    assert drawn.last == 3
    assert second.summary == "1 → 0.01 in 3 steps"
    assert second.table == "1: 1, 2: 0.1, 3: 0.01"
    assert second.steps[1].title == "step 2: 0.1"


def test_operators_solved_together_share_a_chart(operator):
    group = [operator(f"l.3.attn.{kind}", 0.5, 0.3, 0.2) for kind in ("q", "k", "v")]
    (chart,) = convergence_charts(group).charts
    assert chart.name == "layer 3: attn.q, k, v"
    assert chart.seconds == 1.5


def test_zeros_have_no_place_and_many_decades_few_ticks(operator):
    drawn = convergence_charts([operator("l.0.up", 1.0, 1e-1, 0.0, 1e-14)])
    assert [step.title for step in drawn.charts[0].steps] == ["step 1: 0.1", "step 3: 1e-14"]
    assert "2: 0, " in drawn.charts[0].table
    assert all(0 <= step.y <= HEIGHT for step in drawn.charts[0].steps)
    assert 3 <= len(drawn.ticks) <= 5


def test_the_slowest_are_drawn_and_nothing_is_no_chart(operator):
    many = [operator(f"l.{i}.up", float(i), 0.5, 0.1 + i) for i in range(40)]
    assert [chart.name for chart in convergence_charts(many).charts] == [f"layer {39 - i}: up" for i in range(12)]
    assert convergence_charts([operator("l.0.up", 1.0)]) is None
    assert convergence_charts([operator("l.0.up", 1.0, 0.0)]) is None

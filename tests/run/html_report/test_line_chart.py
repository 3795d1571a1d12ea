import math

import pytest

from optimum_fista.run.html_report.line_chart import HEIGHT, line_chart


def test_points_are_where_their_values_are():
    chart = line_chart(["0", "1", "2", "3"], [0.1, 0.2, None, 0.4])
    assert [(p.x, p.label, p.value) for p in chart.points] == [(12.5, "0", 0.1), (37.5, "1", 0.2), (87.5, "3", 0.4)]
    assert [p.y for p in chart.points] == pytest.approx([HEIGHT * 0.75, HEIGHT * 0.5, 0])
    assert [text for _, text in chart.ticks] == ["0.0", "0.1", "0.2", "0.3", "0.4"]
    assert [y for y, _ in chart.ticks] == pytest.approx([HEIGHT, 150, 100, 50, 0])


@pytest.mark.parametrize("highest", [0.0, 1e-7, 0.013, 0.99, 1.0, 37.0])
def test_ticks_hold_all_values_and_are_few(highest):
    chart = line_chart(["0", "1"], [0.0, highest])
    assert 0 <= chart.points[1].y <= HEIGHT
    assert 2 <= len(chart.ticks) <= 6
    assert len({text for _, text in chart.ticks}) == len(chart.ticks)


def test_labels_are_thinned_out_and_nothing_is_no_chart():
    assert len(line_chart([str(i) for i in range(126)], [0.1] * 126).labelled) <= 16
    assert line_chart(["0", "1"], [None, math.nan]) is None

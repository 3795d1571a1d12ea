import math

import pytest

from optimum_fista.run.html_report.line_chart import HEIGHT, line_chart


def chart(labels, values):
    return line_chart(labels, {"error": values}, "{:.3f}".format)


def test_points_are_where_their_values_are():
    drawn = chart(["0", "1", "2", "3"], [0.1, 0.2, None, 0.4])
    (line,) = drawn.lines
    assert [(p.x, p.label, p.value) for p in line.points] == [(12.5, "0", 0.1), (37.5, "1", 0.2), (87.5, "3", 0.4)]
    assert [p.y for p in line.points] == pytest.approx([HEIGHT * 0.75, HEIGHT * 0.5, 0])
    assert [p.title for p in line.points] == ["layer 0: 0.100", "layer 1: 0.200", "layer 3: 0.400"]
    assert [text for _, text in drawn.ticks] == ["0.0", "0.1", "0.2", "0.3", "0.4"]
    assert [y for y, _ in drawn.ticks] == pytest.approx([HEIGHT, 150, 100, 50, 0])
    assert drawn.names == ()


def test_several_lines_share_an_axis_and_have_names():
    found = {"resident": [4096, 2048], "anonymous": [1024, None], "on the GPU": [None, None]}
    drawn = line_chart(["0", "1"], found, str, (1024, "KiB"))
    assert drawn.names == ("resident", "anonymous")
    assert [[(p.x, p.y, p.title) for p in line.points] for line in drawn.lines] == [
        [(25, 0, "layer 0, resident: 4096"), (75, HEIGHT / 2, "layer 1, resident: 2048")],
        [(25, 0.75 * HEIGHT, "layer 0, anonymous: 1024")],
    ]
    assert [text for _, text in drawn.ticks] == ["0", "1", "2", "3", "4"]
    assert drawn.unit == "KiB"
    assert drawn.labelled == ((25, "0"), (75, "1"))


@pytest.mark.parametrize("highest", [0.0, 1e-7, 0.013, 0.99, 1.0, 37.0])
def test_ticks_hold_all_values_and_are_few(highest):
    drawn = chart(["0", "1"], [0.0, highest])
    assert 0 <= drawn.lines[0].points[1].y <= HEIGHT
    assert 2 <= len(drawn.ticks) <= 6
    assert len({text for _, text in drawn.ticks}) == len(drawn.ticks)


def test_labels_are_thinned_out_and_nothing_is_no_chart():
    assert len(chart([str(i) for i in range(126)], [0.1] * 126).labelled) <= 12
    assert chart(["0", "1"], [None, math.nan]) is None

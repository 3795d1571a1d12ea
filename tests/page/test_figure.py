"""The first figure of the page: what was removed, and sizes and losses before and after."""

import dataclasses
import math

import pytest
from small_reports import measured_text, mixture, mixture_report, operator, report

from optimum_fista.origin import OriginReport, StepReport
from optimum_fista.page.figure import figure_of
from optimum_fista.page.render import render_page
from optimum_fista.records import LoopCount


def of_experts(**changes):
    """A run that removed experts, with texts."""
    made = mixture_report(mixture("model.layers.0.mlp.experts", (0, 1, 3), (20, 60, 80, 0)))
    made.model["active_parameters"] = {"before": 300, "after": 300}
    made.weight_bytes_before = 2048
    texts = [measured_text("sea.txt", 1.0, 1.25), measured_text("sky.txt", 0.5, 0.51, at_most=1.01)]
    return dataclasses.replace(made, texts=texts, **changes)


def row_of(made, name):
    """The row with this name."""
    (row,) = [row for row in figure_of(made).rows if row.name == name]
    return row


def test_the_figure_of_removed_experts_says_what_went_and_what_that_cost():
    figure = figure_of(of_experts(), weight_bytes=1536)

    assert figure.caption == "Removed: 1 of 4 experts of every decoder layer (25.00%)"
    assert [(row.name, row.before, row.after, row.change) for row in figure.rows] == [
        ("Parameters", "500", "400", "-20.0%"),
        ("Parameters that a token uses", "300", "300", "+0.0%"),
        ("Weight files", "2.00kiB", "1.50kiB", "-25.0%"),
        ("Bits per byte of sea.txt", "1.000", "1.250", "+25.0%"),
        ("Bits per byte of sky.txt", "0.500", "0.510", "+2.0%"),
    ]


def test_both_bars_of_a_row_begin_at_0_and_have_one_scale():
    parameters = row_of(of_experts(), "Parameters")
    loss = row_of(of_experts(), "Bits per byte of sea.txt")

    assert (parameters.width_before, parameters.width_after) == (100, pytest.approx(80))
    assert (loss.width_before, loss.width_after) == (pytest.approx(80), 100)


def test_loops_of_all_texts_are_counted_together():
    made = of_experts()
    texts = [
        dataclasses.replace(
            text,
            loops_dense=LoopCount(32, 128, num_loops=1),
            loops_pruned=LoopCount(32, 128, num_loops=8),
        )
        for text in made.texts
    ]

    row = row_of(dataclasses.replace(made, texts=texts), "Greedy continuations that end in a loop")

    assert (row.before, row.after) == ("2 of 64", "16 of 64")
    assert (row.width_before, row.width_after) == (pytest.approx(3.125), 25)


def test_a_loss_that_is_larger_than_allowed_stands_out():
    made = of_experts()

    assert row_of(made, "Bits per byte of sky.txt").is_alert
    assert not row_of(made, "Bits per byte of sea.txt").is_alert
    assert render_page(made).count('<div class="pair alert">') == 1


def test_zeros_are_shown_if_nothing_was_removed():
    perplexity = {
        "dense": 20.0,
        "pruned": 30.0,
        "num_tokens": 4096,
        "text": "sea",
        "vocabulary": 64,
    }
    zeros = dataclasses.replace(
        report(operator("layers.0.up.weight")),
        config={"method": "wanda", "pattern": "2:4", "sparsity": 0.5},
        perplexity=perplexity,
    )

    figure = figure_of(zeros)

    assert figure.caption == "50.0% of the weights of 1 operators are zero (2:4)"
    assert [(row.name, row.before, row.after) for row in figure.rows] == [
        ("Parameters", "400", "400"),
        ("Parameters that are not zero", "400", "384"),
        ("Perplexity on sea", "20.00", "30.00"),
    ]


def test_after_several_runs_the_figure_begins_at_the_first_model():
    origin = OriginReport(
        "made/first",
        num_parameters=1000,
        steps=[StepReport("layers:0.5", "", num_parameters=500)],
        texts={"sea.txt": 0.8},
    )

    made = of_experts(origin=origin)

    # Of the first model, neither its files nor the loss on sky.txt are known.
    assert [(row.name, row.before, row.after) for row in figure_of(made).rows] == [
        ("Parameters", "1.00\u00a0K", "400"),
        ("Bits per byte of sea.txt", "0.800", "1.250"),
    ]


@pytest.mark.parametrize(("loss", "shown"), [(math.inf, "inf"), (math.nan, "nan")])
def test_a_loss_that_is_not_finite_has_the_whole_width(loss, shown):
    texts = [measured_text("sea.txt", 1.0, loss)]

    row = row_of(dataclasses.replace(of_experts(), texts=texts), "Bits per byte of sea.txt")

    assert (row.width_after, row.after, row.change) == (100, shown, "")


def test_the_figure_is_the_first_on_the_page():
    page = render_page(of_experts(warnings=["careful"]), weight_bytes=1536)

    assert page.index('<figure class="bars">') < page.index("careful")
    assert page.index('<figure class="bars">') == page.index("<figure")
    assert "<b>Weight files</b><em>-25.0%</em></div>" in page

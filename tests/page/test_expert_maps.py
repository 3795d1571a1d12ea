"""The maps show which experts each text uses, and which of them were removed."""

import dataclasses
import re

import pytest
import torch
from small_reports import measured_text, mixture, mixture_report, report

from optimum_fista.page.expert_maps import COLOURS, colour_of, expert_maps, texts_of
from optimum_fista.page.render import render_page

MIDDLE = COLOURS // 2
# Of four experts, the first two are used by one text, the third by the other one, and the last by none.
SEA = (20, 60, 0, 0)
ZOO = (0, 0, 80, 0)


def two_texts():
    """A run that was calibrated on sea.txt and zoo.txt, and measured on sky.txt; the expert 2 was removed."""
    first = mixture(
        "model.layers.0.mlp.experts",
        (0, 1, 3),
        (20, 60, 80, 0),
        of_sources=(SEA, ZOO),
        of_texts=((0, 0, 30, 10),),
    )
    second = mixture(
        "model.layers.1.mlp.experts",
        (0, 1, 2),
        (40, 40, 40, 40),
        of_sources=((20, 20, 20, 20), (20, 20, 20, 20)),
        of_texts=((10, 10, 10, 10),),
    )
    made = mixture_report(first, second)
    made.calibration["sources"] = [{"source": "sea.txt"}, {"source": "zoo.txt"}]
    return dataclasses.replace(made, texts=[measured_text("sky.txt", 1.0, 1.1)])


def cells_of(one_map, row):
    """The colours of the cells in a row of a map, by their left ends, rounded down to whole cells."""
    colours = {}
    for colour, data in one_map.paths:
        for begin, middle, length in re.findall(r"M([\d.]+) ([\d.]+)h(\d+)", data):
            if float(middle) == row + 0.5:
                for cell in range(int(length)):
                    colours[int(float(begin)) + cell] = colour
    return [colours[cell] for cell in sorted(colours)]


def test_each_text_has_a_map_with_the_removed_experts_on_the_right():
    maps = expert_maps(two_texts())

    assert [(one.text, one.is_calibration) for one in maps.maps] == [
        ("sea.txt", True),
        ("zoo.txt", True),
        ("sky.txt", False),
    ]
    # The experts that stayed are sorted by the text that uses them most: 1 and 0 by sea.txt, 3 by sky.txt.
    sea, zoo, sky = maps.maps
    assert cells_of(sea, 0) == [colour_of(3.0), MIDDLE, 0, 0]
    assert cells_of(zoo, 0) == [0, 0, 0, colour_of(4.0)]
    assert cells_of(sky, 0) == [0, 0, MIDDLE, colour_of(3.0)]
    assert all(cells_of(one, 1) == [MIDDLE] * 4 for one in maps.maps)
    # three cells, a gap, one cell
    assert maps.removed_begin == pytest.approx(100 * 3.12 / 4.12)


def test_a_map_says_which_share_of_the_choices_removed_experts_had():
    sea, zoo, sky = expert_maps(two_texts()).maps

    assert (sea.removed_share, sea.highest_share, sea.highest_layer) == ("12.5%", "25.0%", "1")
    assert (zoo.removed_share, zoo.highest_share, zoo.highest_layer) == ("62.5%", "100.0%", "0")
    assert (sky.removed_share, sky.highest_share, sky.highest_layer) == ("50.0%", "75.0%", "0")


def test_a_report_of_an_older_version_has_one_map_of_the_calibration():
    old = mixture_report(mixture("model.layers.0.mlp.experts", (0, 1, 3), (20, 60, 80, 0)))

    maps = expert_maps(old)

    (only,) = maps.maps
    assert (only.text, only.is_calibration, only.removed_share) == ("sea.txt", True, "50.0%")


def test_a_text_without_a_number_for_each_expert_has_no_map():
    damaged = mixture_report(
        mixture(
            "model.layers.0.mlp.experts",
            (0, 1, 9),
            (20, 60, 80, 0),
            of_texts=((1, 2), (1, 2, 3, 4)),
        )
    )
    texts = [measured_text("sky.txt", 1.0, 1.1), measured_text("code.txt", 1.0, 1.1)]

    shown = texts_of(dataclasses.replace(damaged, texts=texts))

    assert [text.name for text in shown] == ["sea.txt", "code.txt"]


def test_a_run_that_removed_no_experts_has_no_maps():
    assert expert_maps(report()) is None


@pytest.mark.parametrize(
    ("num_experts", "together"),
    [
        (8, 1),
        (64, 1),
        (128, 2),
        (512, 8),
    ],
)
def test_maps_of_many_layers_with_many_experts_stay_small(num_experts, together):
    generator = torch.Generator().manual_seed(0)

    def random_tokens():
        tokens = torch.randint(0, 1000, (num_experts,), generator=generator)
        return tuple(tokens.tolist())

    mixtures = [
        mixture(
            f"model.layers.{layer}.mlp.experts",
            tuple(range(3 * num_experts // 4)),
            random_tokens(),
            of_texts=tuple(random_tokens() for _ in range(3)),
        )
        for layer in range(48)
    ]
    texts = [measured_text(f"{number}.txt", 1.0, 1.1) for number in range(3)]
    large = dataclasses.replace(mixture_report(*mixtures), texts=texts)

    maps = expert_maps(large)

    assert maps.experts_in_a_cell == together
    assert len(maps.maps) == 4
    for one in maps.maps:
        assert sum(len(data) for _, data in one.paths) < 30_000
    assert maps.num_rows * maps.row_height <= 400
    assert len(render_page(large)) < 250_000


def test_of_many_texts_only_the_first_have_maps_and_the_page_counts_the_others():
    tokens = (20, 60, 80, 0)
    one = mixture("model.layers.0.mlp.experts", (0, 1, 2), tokens, of_texts=(tokens,) * 20)
    texts = [measured_text(f"{number}.txt", 1.0, 1.1) for number in range(20)]
    many = dataclasses.replace(mixture_report(one), texts=texts)

    maps = expert_maps(many)

    assert (len(maps.maps), maps.num_left_out) == (12, 9)
    assert "9 more texts have no map" in render_page(many)


def test_the_page_shows_the_maps_and_nothing_in_a_name_becomes_markup():
    hostile = two_texts()
    hostile.calibration["sources"][0]["source"] = "<script>alert(1)</script>"

    page = render_page(hostile)

    assert "Which experts each text uses" in page
    assert page.count("<svg ") == 3
    assert "<script" not in page
    assert "<b>sky.txt</b> (measured): removed experts had 50.0% of the choices, at most" in page


def test_colours_are_of_shares_relative_to_equal_ones():
    assert [colour_of(relative) for relative in (0, 0.1, 0.25, 0.5, 1, 2, 4, 100)] == [
        0,
        0,
        0,
        2,
        MIDDLE,
        6,
        8,
        8,
    ]

"""The page says what the folder holds, and nothing from the folder becomes markup."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import pytest

from optimum_fista.memory import MemoryPeak
from optimum_fista.origin import OriginReport, StepReport
from optimum_fista.page.render import (
    COLOURS,
    _columns_left,
    by_operator,
    coloured,
    read_pruned_report,
    render_page,
)

HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"


class Outline(HTMLParser):
    """Tags and texts of a page; every tag must be closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open_tags

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "wbr"):
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag
        self.text += " "

    def handle_data(self, data):
        if self.open_tags[-1:] != ["style"]:
            self.text += data


@pytest.fixture(scope="module")
def report(saved):
    return read_pruned_report(saved.folder)


def text_of(report, **changes) -> str:
    """The text of the page, on one line, if the report had these values of its fields."""
    page = render_page(dataclasses.replace(report, **changes))
    return " ".join(Outline(page).text.split())


def test_the_perplexity_has_the_verdict_and_that_of_the_dense_model(report):
    perplexity = {"dense": 20.0, "pruned": 30.0, "num_tokens": 4096, "text": "self"}
    perplexity["vocabulary"] = 64

    text = text_of(report, perplexity=perplexity)

    assert (
        "Perplexity 30.00 no verdict on text of its own; 20.00 of the dense model, "
        "on 4,096 tokens of text of its own that no weight was"
    ) in text
    assert "Perplexity" not in text_of(report)


def test_bits_per_byte_stand_beside_the_perplexities(report):
    perplexity = {"dense": 20.0, "pruned": 30.0, "num_tokens": 4096, "text": "sea"}
    perplexity |= {"vocabulary": 64, "bits_per_byte": {"dense": 1.0, "pruned": 1.25}}

    text = text_of(report, perplexity=perplexity)

    assert "of the dense model (1.250 and 1.000 bits per byte), on" in text


def test_the_perplexity_of_a_model_at_chance_has_its_verdict_beside_it(report):
    perplexity = {"dense": 60.0, "pruned": 61.0, "num_tokens": 4096, "text": "sea"}
    perplexity["vocabulary"] = 64

    text = text_of(report, perplexity=perplexity)

    assert "Perplexity 61.00 no verdict: the dense model is no better than chance; 60.00 of" in text


def test_each_size_that_layers_give_an_operator_has_a_row(report):
    kind = "mlp.down_proj"
    operators = [
        operator for operator in report.operators if operator.name.endswith(f"{kind}.weight")
    ]
    smaller = [
        dataclasses.replace(operator, groups_kept=[0], shape=(32, width), target_sparsity=0.5)
        for operator, width in zip(operators, (32, 64), strict=False)
    ]

    rows = _columns_left(dataclasses.replace(report, operators=smaller))

    assert rows == [(kind, 32, 64), (kind, 64, 128)]


def test_headline_numbers_and_all_operators_are_there(report, saved):
    totals = saved.report.totals

    text = text_of(report)

    assert f"{totals['sparsity']:.2%}" in text
    assert f"Mean fit error {totals['mean_fit_error']:.3f}" in text
    assert f"Largest fit error {totals['max_fit_error']:.3f}" in text
    for index in (0, 1):
        operators = [
            o for o in saved.report.operators if o.name.startswith(f"model.layers.{index}.")
        ]
        rows = [
            [f"{o.fit_error:.3f}" for o in operators],
            [f"{o.output_error:.3f}" for o in operators],
            [f"{o.sparsity:.1%}" for o in operators],
        ]
        for row in rows:
            assert f" {index} {' '.join(row)} " in text
    assert saved.report.calibration["sha256"] in text
    config = json.dumps(saved.report.config, indent=2)
    assert " ".join(config.split()) in text


def test_the_page_needs_nothing_else(report):
    page = render_page(report)

    tags = Outline(page).tags
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in tags}
    assert not [attrs for _, attrs in tags if {"src", "href", "onclick", "onload"} & set(attrs)]
    assert not re.findall(r"url\(|@import|https?://", page)
    assert "default-src 'none'" in page


def test_hostile_texts_are_escaped(report):
    first, *others = report.operators
    first = dataclasses.replace(
        first,
        name=f"model.layers.0.{HOSTILE}.weight",
        message=HOSTILE,
        converged=False,
        solve_seconds=1e9,
    )
    steps = [StepReport(HOSTILE, HOSTILE)]
    hostile = dataclasses.replace(
        report,
        operators=[first, *others],
        warnings=[HOSTILE],
        left_dense={HOSTILE: HOSTILE},
        model=report.model | {"name": HOSTILE, "class": HOSTILE, "dtype": HOSTILE},
        config=report.config | {"method": HOSTILE, "include": [HOSTILE]},
        calibration=report.calibration | {"source": HOSTILE, "sha256": HOSTILE},
        versions=report.versions | {HOSTILE: HOSTILE},
        origin=OriginReport(HOSTILE, steps=steps),
    )

    page = render_page(hostile)

    assert not re.search(r"<script|<img", page)
    assert not {"script", "img"} & {tag for tag, _ in Outline(page).tags}
    assert Outline(page).text.count("<script>alert(1)</script>") > 20


PARTS_THAT_MAY_MISS = (
    "layer hidden states time",
    "output error",
    "seconds to solve iterations converged",
    "Where the zeros are",
)


def test_what_was_measured_and_differs_is_shown(report):
    layers = [dataclasses.replace(layer, hidden_state_error=0.125) for layer in report.layers]

    text = text_of(report, layers=layers)

    for part in (*PARTS_THAT_MAY_MISS, " 1 0.125 "):
        assert part in text


def test_what_was_not_measured_or_is_the_same_everywhere_is_not_shown(report):
    less = {"output_error": None, "iterations": 0, "sparsity": 0.5, "converged": True}
    operators = [dataclasses.replace(operator, **less) for operator in report.operators]
    layers = [dataclasses.replace(layer, hidden_state_error=None) for layer in report.layers]

    text = text_of(report, layers=layers, operators=operators)

    for part in (*PARTS_THAT_MAY_MISS, "not known", "Not measured", "Not converged"):
        assert part not in text


def test_time_and_memory_are_shown_by_layer(report):
    first, second = report.layers
    layers = [
        dataclasses.replace(
            first, hidden_state_error=None, seconds=90.0, memory=MemoryPeak(3 << 30, 2 << 29)
        ),
        dataclasses.replace(
            second,
            hidden_state_error=None,
            seconds=91.0,
            memory=MemoryPeak(3 << 30, 3 << 29, 7 << 28),
        ),
    ]

    text = text_of(report, layers=layers)

    assert " 0 1 min 30 s 1.00GiB 3.00GiB 1 1 min 31 s 1.50GiB 3.00GiB 1.75GiB " in text
    peaks = "1.50GiB anonymous, 3.00GiB resident, 1.75GiB on the GPU"
    assert f"Peak memory 1.75GiB {peaks}, while a layer" in text
    assert "1\u00a0min\u00a031\u00a0s" in render_page(dataclasses.replace(report, layers=layers))


def test_warnings_and_operators_that_did_not_converge_are_in_plain_sight(report):
    operators = [
        dataclasses.replace(o, converged=False, message="take more steps") for o in report.operators
    ]

    text = text_of(report, operators=operators, warnings=["careful"])

    assert "1 warning careful" in text
    assert "Not converged 14 of 14 operators" in text
    assert "Not converged, slowest first (10 of 14)" in text
    assert "take more steps" in text


def test_endless_lists_are_cut(report):
    text = text_of(report, warnings=[f"careful {i}" for i in range(400)])

    assert "400 warnings" in text
    assert "careful 299" in text
    assert "careful 300" not in text
    assert "and 100 more, in fista/report.json" in text


def test_the_page_of_a_retrained_model_says_what_was_measured_before(report):
    perplexity = {"dense": 12.0, "pruned": 15.5, "num_tokens": 100, "text": "sea"}
    perplexity["vocabulary"] = 64

    text = text_of(report, retrained=True, perplexity=perplexity)

    verdict = "no verdict on fewer than 4,096 tokens"
    assert f"Perplexity, before retraining 15.50 {verdict}; 12.00 of the dense model" in text
    assert "then retrained under its masks: errors of operators are those before" in text


def test_a_folder_without_a_report_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"holds no fista/report\.json: pass a folder saved by"
    ):
        read_pruned_report(tmp_path)


def test_a_report_without_pruned_operators_is_refused(saved, tmp_path):
    (tmp_path / "fista").mkdir()
    empty = dataclasses.replace(saved.report, operators=[]).to_json()
    (tmp_path / "fista" / "report.json").write_text(empty)

    with pytest.raises(ValueError, match="names no pruned operator: pass another folder"):
        read_pruned_report(tmp_path)


def test_a_report_of_removed_layers_alone_is_refused(saved, tmp_path):
    (tmp_path / "fista").mkdir()
    size = saved.report.model["num_parameters"]
    model = saved.report.model | {"dense_num_parameters": size + 1}
    report = dataclasses.replace(saved.report, operators=[], model=model)
    (tmp_path / "fista" / "report.json").write_text(report.to_json())

    with pytest.raises(
        ValueError, match=r"only decoder layers were removed, so .*model card, README.md"
    ):
        read_pruned_report(tmp_path)


def test_held_out_errors_are_beside_the_others(report):
    operators = [
        dataclasses.replace(o, held_out_fit_error=1.25 * o.fit_error) for o in report.operators
    ]
    operators[0] = dataclasses.replace(operators[0], held_out_fit_error=None)
    held_out = {"sha256": "cd", "num_tokens": 1234, "num_sequences": 3}
    calibration = report.calibration | {"held_out": held_out}

    text = text_of(report, operators=operators, calibration=calibration)

    sentence = "on 1,234 tokens that nothing was fitted to: 1.25 times that on the calibration"
    assert sentence in text
    assert "1,234 tokens of 3 sequences" in text
    of_first = sum(o.name.startswith("model.layers.0.") for o in operators)
    of_second = len(operators) - of_first
    first_row = " ".join(["1.250"] * (of_first - 1))
    second_row = " ".join(["1.250"] * of_second)
    assert f" 0 {first_row} 1 {second_row} " in text
    assert "held-out" not in text_of(report).lower()


def test_numbers_are_coloured_by_one_scale():
    columns = {"up": [0.25, 1.0], "down": [0.5, math.nan], "no": [None, None]}

    table = coloured("errors", ["l.0", "l.2"], columns, str)

    assert table.columns == ["up", "down"]
    assert table.rows == [
        ("0", [("0.25", 0), ("0.5", COLOURS // 3)]),
        ("2", [("1.0", COLOURS - 1), ("nan", None)]),
    ]
    assert (table.low, table.high) == ("0.25", "1.0")


def test_a_table_without_numbers_is_left_out():
    assert coloured("errors", ["l.0"], {"up": [None]}, str) is None


def test_experts_get_a_column_of_means_and_one_of_maxima(report):
    first = report.operators[0]
    errors = {"l.0.experts.0.w": 0.1, "l.0.experts.1.w": 0.2, "l.0.experts.2.w": 0.6, "l.1.up": 0.4}
    operators = [
        dataclasses.replace(first, name=name, fit_error=error) for name, error in errors.items()
    ]

    table = by_operator(operators, "fit error", lambda o: o.fit_error, "{:.1f}".format)

    assert table.columns == ["experts.*.w mean", "experts.*.w max", "up"]
    texts = [[text for text, _ in cells] for _, cells in table.rows]
    assert texts == [["0.3", "0.6", ""], ["", "", "0.4"]]

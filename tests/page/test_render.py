"""The page says what the folder holds, and nothing from the folder becomes markup."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import pytest

from optimum_fista.memory import MemoryPeak
from optimum_fista.page.render import STEPS, by_operator, coloured, read_pruned_report, render_page

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


def text_of(report) -> str:
    return " ".join(Outline(render_page(report)).text.split())


def test_the_perplexity_is_that_of_the_card(report):
    found = {"dense": 20.0, "pruned": 30.0, "num_tokens": 4096, "text": "self", "vocabulary": 64}
    shown = (
        "Perplexity 30.00 no verdict on text of its own; 20.00 of the dense model, "
        "on 4,096 tokens of text of its own that no weight was"
    )
    assert shown in text_of(dataclasses.replace(report, perplexity=found))
    found["bits_per_byte"] = {"dense": 1.0, "pruned": 1.25}
    assert "of the dense model (1.250 and 1.000 bits per byte), on" in text_of(
        dataclasses.replace(report, perplexity=found)
    )
    assert "Perplexity" not in text_of(report)


def test_the_perplexity_of_a_model_at_chance_has_its_verdict_beside_it(report):
    found = {"dense": 60.0, "pruned": 61.0, "num_tokens": 4096, "text": "sea", "vocabulary": 64}
    shown = text_of(dataclasses.replace(report, perplexity=found))
    assert (
        "Perplexity 61.00 no verdict: the dense model is no better than chance; 60.00 of" in shown
    )


def test_headline_numbers_and_all_operators_are_there(report, saved):
    text, totals = text_of(report), saved.report.totals
    assert f"{totals['sparsity']:.2%}" in text
    assert f"Mean fit error {totals['mean_fit_error']:.3f}" in text
    assert f"Largest fit error {totals['max_fit_error']:.3f}" in text
    for index in (0, 1):
        found = [o for o in saved.report.operators if o.name.startswith(f"model.layers.{index}.")]
        for row in (
            [f"{o.fit_error:.3f}" for o in found],
            [f"{o.output_error:.3f}" for o in found],
        ):
            assert f" {index} {' '.join(row)} " in text
        assert f" {index} {' '.join(f'{o.sparsity:.1%}' for o in found)} " in text
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
    name = f"model.layers.0.{HOSTILE}.weight"
    operators = [
        dataclasses.replace(first, name=name, message=HOSTILE, converged=False, solve_seconds=1e9),
        *others,
    ]
    hostile = dataclasses.replace(
        report,
        operators=operators,
        warnings=[HOSTILE],
        left_dense={HOSTILE: HOSTILE},
        model=report.model | {"name": HOSTILE, "class": HOSTILE, "dtype": HOSTILE},
        config=report.config | {"method": HOSTILE, "include": [HOSTILE]},
        calibration=report.calibration | {"source": HOSTILE, "sha256": HOSTILE},
        versions=report.versions | {HOSTILE: HOSTILE},
    )
    page = render_page(hostile)
    assert not re.search(r"<script|<img", page)
    assert not {"script", "img"} & {tag for tag, _ in Outline(page).tags}
    assert Outline(page).text.count("<script>alert(1)</script>") > 20


def test_what_was_not_measured_or_is_the_same_everywhere_is_not_shown(report):
    layers = [dataclasses.replace(layer, hidden_state_error=0.125) for layer in report.layers]
    whole = text_of(dataclasses.replace(report, layers=layers))
    parts = (
        "layer hidden states time",
        "output error",
        "seconds to solve iterations converged",
        "Where the zeros are",
    )
    assert all(part in whole for part in (*parts, " 1 0.125 "))
    less = {"output_error": None, "iterations": 0, "sparsity": 0.5, "converged": True}
    operators = [dataclasses.replace(operator, **less) for operator in report.operators]
    layers = [dataclasses.replace(layer, hidden_state_error=None) for layer in report.layers]
    shown = text_of(dataclasses.replace(report, layers=layers, operators=operators))
    assert not [
        part for part in (*parts, "not known", "Not measured", "Not converged") if part in shown
    ]


def test_time_and_memory_by_layer(report):
    layers = [
        dataclasses.replace(
            layer,
            hidden_state_error=None,
            seconds=90.0 + index,
            memory=MemoryPeak(3 << 30, (2 + index) << 29, device),
        )
        for index, (layer, device) in enumerate(zip(report.layers, (None, 7 << 28), strict=True))
    ]
    text = text_of(dataclasses.replace(report, layers=layers))
    assert " 0 1 min 30 s 1.00GiB 3.00GiB 1 1 min 31 s 1.50GiB 3.00GiB 1.75GiB " in text
    assert (
        "Peak memory 1.75GiB 1.50GiB anonymous, 3.00GiB resident, 1.75GiB on the GPU, while a layer"
        in text
    )
    assert "1\u00a0min\u00a031\u00a0s" in render_page(dataclasses.replace(report, layers=layers))


def test_warnings_and_operators_that_did_not_converge_are_in_plain_sight_and_endless_lists_are_cut(
    report,
):
    operators = [
        dataclasses.replace(o, converged=False, message="take more steps") for o in report.operators
    ]
    text = text_of(
        dataclasses.replace(
            report, operators=operators, warnings=[f"careful {i}" for i in range(400)]
        )
    )
    assert "400 warnings" in text
    assert "careful 299" in text
    assert "careful 300" not in text
    assert "and 100 more, in fista/report.json" in text
    assert "Not converged 14 of 14 operators" in text
    assert "Not converged, slowest first (10 of 14)" in text
    assert "take more steps" in text


def test_a_retrained_model(report):
    found = {"dense": 12.0, "pruned": 15.5, "num_tokens": 100, "text": "sea", "vocabulary": 64}
    text = text_of(dataclasses.replace(report, retrained=True, perplexity=found))
    assert (
        "Perplexity, before retraining 15.50 no verdict on fewer than 4,096 tokens; 12.00 " in text
    )
    assert "then retrained under its masks: errors of operators are those before" in text


def test_folders_that_are_not_pruned_are_refused(saved, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"holds no fista/report\.json: pass a folder saved by"
    ):
        read_pruned_report(tmp_path)
    (tmp_path / "fista").mkdir()
    empty = dataclasses.replace(saved.report, operators=[]).to_json()
    (tmp_path / "fista" / "report.json").write_text(empty)
    with pytest.raises(ValueError, match="names no pruned operator"):
        read_pruned_report(tmp_path)


def test_held_out_errors_are_beside_the_others(report):
    assert "held-out" not in text_of(report).lower()
    operators = [
        dataclasses.replace(o, held_out_fit_error=1.25 * o.fit_error) for o in report.operators
    ]
    operators[0] = dataclasses.replace(operators[0], held_out_fit_error=None)
    held_out = {"sha256": "cd", "num_tokens": 1234, "num_sequences": 3}
    text = text_of(
        dataclasses.replace(
            report, operators=operators, calibration=report.calibration | {"held_out": held_out}
        )
    )
    assert (
        "on average on 1,234 tokens that nothing was fitted to: 1.25 times that on the calibration tokens"
        in text
    )
    assert "1,234 tokens of 3 sequences" in text
    in_layer = [
        sum(o.name.startswith(f"model.layers.{index}.") for o in operators) for index in (0, 1)
    ]
    assert (
        f" 0 {' '.join(['1.250'] * (in_layer[0] - 1))} 1 {' '.join(['1.250'] * in_layer[1])} "
        in text
    )


def test_numbers_are_coloured_by_one_scale():
    found = coloured(
        "errors",
        ["l.0", "l.2"],
        {"up": [0.25, 1.0], "down": [0.5, math.nan], "no": [None, None]},
        str,
    )
    assert found.columns == ["up", "down"]
    assert found.rows == [
        ("0", [("0.25", 0), ("0.5", STEPS // 3)]),
        ("2", [("1.0", STEPS - 1), ("nan", None)]),
    ]
    assert (found.low, found.high) == ("0.25", "1.0")
    assert coloured("errors", ["l.0"], {"up": [None]}, str) is None


def test_experts_get_a_column_of_means_and_one_of_maxima(report):
    first, names = report.operators[0], [*(f"l.0.experts.{i}.w" for i in range(3)), "l.1.up"]
    errors = [0.1, 0.2, 0.6, 0.4]
    operators = [
        dataclasses.replace(first, name=n, fit_error=e) for n, e in zip(names, errors, strict=True)
    ]
    found = by_operator(operators, "fit error", lambda o: o.fit_error, "{:.1f}".format)
    assert found.columns == ["experts.*.w mean", "experts.*.w max", "up"]
    assert [[text for text, _ in cells] for _, cells in found.rows] == [
        ["0.3", "0.6", ""],
        ["", "", "0.4"],
    ]

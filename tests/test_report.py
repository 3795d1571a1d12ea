import dataclasses
import json
import math

import pytest
from small_reports import operator, report

from optimum_fista.records import MixtureReport
from optimum_fista.report import PruningReport, lines_of_unplaced
from optimum_fista.run_record import words_of_pattern

TWO = report(
    operator("layers.0.up.weight"),
    operator(
        "layers.0.down.weight",
        shape=(2, 4),
        num_kept=2,
        sparsity=0.75,
        fit_error=0.6,
        converged=False,
    ),
)


def test_totals_are_sums_and_means():
    known = {name: value for name, value in TWO.totals.items() if value is not None}

    assert known == {
        "num_operators": 2,
        "num_weights": 40,
        "num_zeros": 22,
        "sparsity": 22 / 40,
        "model_sparsity": 22 / 400,
        "num_removed": 0,
        "share_removed": 0.0,
        "mean_fit_error": pytest.approx(0.4),
        "max_fit_error": 0.6,
        "solve_seconds": 0.5,
        "num_not_converged": 1,
    }


def test_a_model_that_is_badly_broken_without_its_tokens_has_a_verdict():
    bits = {"dense": 2.0, "pruned": 300.0, "num_bytes": 40_000, "num_tokens": 10_000, "text": "c4"}
    model = TWO.model | {"vocabulary": {"before": 64_000, "kept": 1_000}}

    broken = dataclasses.replace(TWO, model=model, bits_per_byte=bits)  # 1200 bits a token

    assert broken.verdict_of_tokens == "broken: prune less"


def test_a_report_without_operators_has_no_zeros():
    assert report().totals["sparsity"] == 0


def test_a_report_is_read_from_its_json_as_it_was():
    values = json.loads(TWO.to_json())

    assert values["totals"] == TWO.totals
    assert values["operators"][1]["shape"] == [2, 4]
    assert PruningReport.from_dict(values) == TWO


def test_lists_of_numbers_are_in_one_line_of_the_json():
    mixture = MixtureReport(
        name="layers.0.experts",
        groups_kept=(0, 2),
        saliency=(0.5, math.nan, 1e-7, math.inf),
        expert_tokens=(5, 0, 7, 1),
        fit_error=0.25,
        fit_error_before=0.5,
        num_refitted=2,
        solve_seconds=1.0,
        tokens_of_sources=((5, 0, 7, 1), (4, 3, 2, 1)),
    )
    layer = dataclasses.replace(TWO.layers[0], mixture=mixture)
    with_mixture = dataclasses.replace(
        TWO, layers=[layer], warnings=["few tokens [ 1 ]", "[1,\n2]"]
    )

    text = with_mixture.to_json()

    assert '"saliency": [0.5, NaN, 1e-07, Infinity],\n' in text
    assert '"expert_tokens": [5, 0, 7, 1],\n' in text
    assert "     [5, 0, 7, 1],\n     [4, 3, 2, 1]\n" in text
    again = PruningReport.from_dict(json.loads(text))
    assert again.warnings == with_mixture.warnings
    assert again.layers[0].mixture.tokens_of_sources == mixture.tokens_of_sources
    assert again.operators == TWO.operators


def test_a_report_of_no_parameters_is_refused():
    values = json.loads(TWO.to_json())
    values["model"]["num_parameters"] = 0

    with pytest.raises(TypeError, match="model has 0 parameters"):
        PruningReport.from_dict(values)


def test_the_summary_for_people_has_the_numbers():
    assert str(TWO) == (
        "2 operators pruned by fista, 22 of 40 weights zero (55.00%); fit error 0.4000 on average, "
        "0.6000 at most, output error not known; 1.5 s, of which solving 0.5 s"
    )


def test_held_out_errors_are_compared_with_fit_errors_of_the_same_operators():
    first, second = TWO.operators
    first = dataclasses.replace(first, held_out_fit_error=0.25)
    third = dataclasses.replace(
        first, name="layers.0.gate.weight", fit_error=0.4, held_out_fit_error=0.5
    )
    held_out = report(first, second, third)
    held_out.calibration["held_out"] = {"sha256": "cd", "num_tokens": 1024, "num_sequences": 2}

    totals = held_out.totals

    assert totals["mean_held_out_fit_error"] == pytest.approx(0.375)
    assert totals["max_held_out_fit_error"] == 0.5
    assert totals["held_out_ratio"] == pytest.approx(0.75 / 0.6)
    sentence = (
        "0.6000 at most (1.25 times that on 1,024 held-out tokens, 0.3750 on average), output"
    )
    assert sentence in str(held_out)
    assert PruningReport.from_dict(json.loads(held_out.to_json())) == held_out


def test_output_errors_have_totals_of_the_operators_that_know_them():
    first, second = TWO.operators
    known = dataclasses.replace(first, output_error=0.25, held_out_output_error=0.5)
    other = dataclasses.replace(first, name="layers.0.gate.weight", output_error=0.75)
    three = report(known, second, other)

    totals = three.totals

    assert (totals["mean_output_error"], totals["max_output_error"]) == (0.5, 0.75)
    assert (totals["mean_held_out_output_error"], totals["max_held_out_output_error"]) == (0.5, 0.5)
    assert "output error 0.5000 on average, 0.7500 at most" in str(three)


@pytest.mark.parametrize(
    ("text", "sparsity", "words"),
    [
        ("unstructured", 0.5, "50% unstructured"),
        ("unstructured", None, "50% unstructured"),
        ("unstructured", 0.625, "62.5% unstructured"),
        ("2:4", 0.5, "2:4"),
        ("channels:0.25", None, "channels:0.25"),
        ("vocab:unused", None, "vocab:unused"),
    ],
)
def test_a_pattern_is_said_with_its_share(text, sparsity, words):
    assert words_of_pattern(text, sparsity) == words


def test_a_report_is_shown_by_one_line_and_in_a_notebook_by_the_head_of_its_page(saved):
    line = repr(saved.report)
    head = saved.report._repr_html_()

    assert len(line) < 300
    assert "14 operators in 2 decoder layers" in line
    assert head.startswith("<h3>LlamaForCausalLM, 2:4</h3><table>")
    assert f"<td>{saved.report.totals['sparsity']:.2%}</td>" in head


def test_a_notebook_gets_no_markup_from_names(saved):
    model = saved.report.model | {"name": "<img src=x>"}

    head = dataclasses.replace(saved.report, model=model)._repr_html_()

    assert "<img" not in head


def test_control_characters_of_others_are_spelled_out():
    values = json.loads(TWO.to_json())
    values["model"]["name"] = "evil\x1b[2Jname\u202egnp.exe"
    values["left_dense"] = {"a\x9b": "b\x07"}

    found = PruningReport.from_dict(values)

    assert found.model["name"] == r"evil\x1b[2Jname\u202egnp.exe"
    assert found.left_dense == {r"a\x9b": r"b\x07"}
    with pytest.warns(UserWarning, match=r"a\\x1bb"):
        found.warn("a\x1bb")
    (line,) = lines_of_unplaced({"mtp\x1b": 3}, {})
    assert line.endswith(r"are copied: mtp\x1b (3)")

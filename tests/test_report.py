import dataclasses
import json

import pytest

from optimum_fista.memory import MemoryPeak
from optimum_fista.operator_grid import OperatorGrid, layer_and_kind
from optimum_fista.plain_text import plain_text
from optimum_fista.public_names import public_name
from optimum_fista.report import LayerReport, OperatorReport, PruningReport


def operator(name: str, **changes) -> OperatorReport:
    values = {
        "name": name,
        "shape": (4, 8),
        "stored_transposed": False,
        "pattern": "unstructured",
        "scope": "matrix",
    }
    values |= {
        "target_sparsity": 0.5,
        "num_kept": 16,
        "sparsity": 0.5,
        "method": "fista",
        "fit_error": 0.2,
    }
    values |= {
        "l1_penalty": 0.03,
        "iterations": 40,
        "converged": True,
        "message": "",
        "num_tokens": 128,
    }
    values |= {"solve_seconds": 0.25}
    return OperatorReport(**values | changes)


def report(*operators: OperatorReport) -> PruningReport:
    return PruningReport(
        config={"method": "fista"},
        model={"num_parameters": 400},
        calibration={"sha256": "ab", "num_tokens": 128, "num_sequences": 8},
        operators=list(operators),
        layers=[
            LayerReport("layers.0", 0.25, 1.0, MemoryPeak(5, 3)),
            LayerReport("layers.1", None, 0.5),
        ],
        left_dense={"layers.0.gate": "exclude"},
        warnings=["few tokens"],
        seconds={"total": 1.5},
    )


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
    assert {name: value for name, value in TWO.totals.items() if value is not None} == {
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


def test_json_round_trip():
    values = json.loads(TWO.to_json())
    assert values["totals"] == TWO.totals
    assert values["operators"][1]["shape"] == [2, 4]
    assert PruningReport.from_dict(values) == TWO
    assert report().totals["sparsity"] == 0


def test_summary_for_people():
    assert str(TWO) == (
        "2 operators pruned by fista, 22 of 40 weights zero (55.00%); fit error 0.4000 on average, "
        "0.6000 at most, output error not known; 1.5 s, of which solving 0.5 s"
    )


def test_held_out_errors_are_compared_with_those_of_the_same_operators():
    first, second = TWO.operators
    third = dataclasses.replace(
        first, name="layers.0.gate.weight", fit_error=0.4, held_out_fit_error=0.5
    )
    held_out = report(dataclasses.replace(first, held_out_fit_error=0.25), second, third)
    held_out.calibration["held_out"] = {"sha256": "cd", "num_tokens": 1024, "num_sequences": 2}
    totals = held_out.totals
    assert totals["mean_held_out_fit_error"] == pytest.approx(0.375)
    assert totals["max_held_out_fit_error"] == 0.5
    assert totals["held_out_ratio"] == pytest.approx(0.75 / 0.6)
    assert (
        "0.6000 at most (1.25 times that on 1,024 held-out tokens, 0.3750 on average), output"
        in str(held_out)
    )
    assert PruningReport.from_dict(json.loads(held_out.to_json())) == held_out


def test_output_errors_have_totals_of_the_operators_that_know_them():
    first, second = TWO.operators
    known = dataclasses.replace(first, output_error=0.25, held_out_output_error=0.5)
    other = dataclasses.replace(first, name="layers.0.gate.weight", output_error=0.75)
    totals = report(known, second, other).totals
    assert (totals["mean_output_error"], totals["max_output_error"]) == (0.5, 0.75)
    assert (totals["mean_held_out_output_error"], totals["max_held_out_output_error"]) == (0.5, 0.5)
    assert "output error 0.5000 on average, 0.7500 at most" in str(report(known, second, other))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("random tokens, half 1/2", "random tokens, half 1/2"),
        ("models/tiny/", "tiny"),
        ("~/gone/tiny", "tiny"),
        ("/gone/texts/sea.txt", "sea.txt"),
        ("models/tiny/..", "models"),
        ("x" * 5000, "x" * 5000),
    ],
)
def test_only_the_last_part_of_a_path_is_public(name, shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    assert public_name(name) == shown


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.3", "self_attn.q_proj"),
        (
            "model.layers.0.block_sparse_moe.experts.7.w2.weight",
            "model.layers.0",
            "block_sparse_moe.experts.*.w2",
        ),
        (
            "model.layers.0.mlp.shared_experts.up_proj.weight",
            "model.layers.0",
            "mlp.shared_experts.up_proj",
        ),
        (
            "h.11.mlp.experts.gate_up_proj[31, :, 0::2]",
            "h.11",
            "mlp.experts.gate_up_proj[*, :, 0::2]",
        ),
        ("<b>.weight", "", "<b>"),
    ],
)
def test_layer_and_kind(name, layer, kind):
    assert layer_and_kind(name) == (layer, kind)


def test_a_grid_has_all_operators_of_a_kind():
    names = ["l.2.up.weight", "l.2.experts.0.w.weight", "l.2.experts.1.w.weight", "l.10.up.weight"]
    grid = OperatorGrid(operator(name) for name in names)
    found = {place: [o.name for o in found] for place, found in grid.cells.items()}
    assert found == {
        ("l.2", "up"): names[:1],
        ("l.2", "experts.*.w"): names[1:3],
        ("l.10", "up"): names[3:],
    }
    assert grid.layers == ["l.2", "l.10"]
    assert [o.name for o in grid.kinds["up"]] == [names[0], names[3]]


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
    assert public_name("evil\x1bname") == r"evil\x1bname"
    with pytest.warns(UserWarning, match=r"a\\x1bb"):
        found.warn("a\x1bb")


def test_lines_of_text_stay_as_they_are():
    assert plain_text("first\n\tsecond é 海 🌊") == "first\n\tsecond é 海 🌊"

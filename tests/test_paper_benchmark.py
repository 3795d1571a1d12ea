"""benchmarks/paper.py and its modules measure what they say, on tiny models and random layer problems."""

import copy
import importlib
import json
import sys

import pytest
import torch
from layer_problems import example
from tiny_llama import TEXT, save_tiny_folder, tiny_llama, tiny_tokens

from optimum_fista.solve.methods.dsnot import Dsnot
from optimum_fista.solve.problem import InputStatistics, LayerProblem
from optimum_fista.solve.proximal_gradient import fista


@pytest.fixture
def layers(benchmark, no_gradients):
    return benchmark("paper_layers")


@pytest.fixture
def blocks(benchmark):
    return benchmark("paper_blocks")


def operator_of(parts=4, rows=12, columns=16):
    """An operator whose calibration text are the parts of one random text, and its inputs [tokens, in]."""
    layers = importlib.import_module("paper_layers")
    whole = example(rows, columns, tokens=parts * 32)
    problems = []
    for inputs in whole.inputs.split(32):
        statistics = InputStatistics(inputs.T @ inputs, len(inputs), inputs.mean(0))
        problems.append(LayerProblem(whole.weight, statistics))
    merged = layers.merged(problems)
    fresh = example(rows, columns, tokens=64, seed=1).problem
    operator = layers.Operator("o", problems, {parts: merged}, fresh, fresh)
    return operator, whole


def test_merged_problems_are_the_problem_of_all_tokens(layers):
    operator, whole = operator_of()

    merged = operator.problem

    torch.testing.assert_close(merged.gram, whole.problem.gram)
    torch.testing.assert_close(merged.statistics.mean, whole.problem.statistics.mean)
    assert merged.statistics.num_tokens == whole.problem.statistics.num_tokens


@pytest.mark.parametrize("way", ["proximal gradient", "proximal gradient, momentum"])
def test_proximal_descents_stay_at_the_solution_of_the_lasso(layers, way):
    operator, _ = operator_of()
    problem = operator.problem
    penalty = 0.1 * float(problem.target.abs().max())
    lipschitz = problem.statistics.lipschitz
    solution = fista(
        problem.gram,
        problem.target,
        problem.weight,
        penalty,
        lipschitz,
        max_iterations=5000,
        tolerance=0,
    ).weight

    *_, last = layers.DESCENTS[way].run(operator, solution, penalty, rate=1.0)

    assert 0 < float((solution == 0).float().mean()) < 1
    torch.testing.assert_close(last, solution, rtol=1e-6, atol=1e-8)


def test_stochastic_descents_take_each_sequence_with_the_weight_of_all(layers):
    """If all sequences are the same, SGD takes the steps of gradient descent."""
    operator, _ = operator_of(parts=1)
    same = layers.Operator("o", 3 * operator.sequences, {}, operator.fresh, operator.other)
    same.by_count[3] = layers.merged(same.sequences)
    start = torch.zeros_like(same.problem.weight)

    iterates = [
        list(layers.DESCENTS[way].run(same, start, l1_penalty=0.5, rate=0.3))
        for way in ("proximal SGD, momentum", "proximal gradient, momentum")
    ]

    torch.testing.assert_close(iterates[0], iterates[1])


def test_fista_falls_further_than_the_proximal_gradient(layers):
    operator, _ = operator_of()

    rows = list(layers.descents(operator, "first trial"))

    falls = {(row["way"], row["steps"]): row["fall"] for row in rows}
    assert falls["FISTA", 80] >= falls["FISTA", 20]
    assert falls["FISTA", 80] > falls["proximal gradient", 80] > 0
    assert falls["Wanda, no step", 0] == 0
    assert all(row["relative_penalty"] == pytest.approx(1e-3) for row in rows)


def test_the_penalty_that_is_found_is_that_of_the_search(layers):
    operator, _ = operator_of()
    wanda = layers.create_method("wanda").prune(operator.problem, layers.pattern_of("0.5", "row"))
    found = layers.Fista(max_trials=4).search_penalty(
        operator.problem, layers.pattern_of("0.5"), wanda
    )

    row, *_ = layers.descents(operator, "found")

    largest = float(operator.problem.target.abs().max())
    assert row["relative_penalty"] == found.l1_penalty / largest


def test_a_chain_counts_steps_and_its_error_never_rises(layers):
    operator, _ = operator_of()
    pattern = layers.pattern_of("0.5")
    start = operator.problem.weight * pattern.mask(operator.problem.weight)
    chain = layers.Chain(operator.problem, pattern, start)

    layers.at_random(chain, 0)

    assert chain.steps == 240
    errors = [error for _, error in chain.curve]
    assert errors == sorted(errors, reverse=True)
    assert len(errors) > 1
    assert chain.error_after(0) == errors[0]
    assert chain.error_after(240) == errors[-1] == chain.error


def test_a_trial_that_is_not_finished_costs_its_steps_only(layers):
    operator, _ = operator_of()
    pattern = layers.pattern_of("0.5")
    chain = layers.Chain(operator.problem, pattern, operator.problem.weight * 0)

    next(chain.trial(-3.0, layers.RUNGS))

    assert chain.steps == layers.RUNGS[0]


def test_dsnot_after_wanda_is_dsnot(layers):
    operator, _ = operator_of()
    by_rows = layers.pattern_of("0.5", "row")

    rows = {row["way"]: row for row in layers.swaps(operator, "0.5")}

    own = Dsnot().prune(operator.problem, by_rows)
    assert rows["Wanda, then DSnoT"]["swapped"] > 0
    assert rows["Wanda, then DSnoT"]["calibration"] == pytest.approx(own.fit_error**2)
    assert rows["default"]["swapped"] == 0


def test_starts_begin_the_same_search(layers):
    operator, _ = operator_of()

    rows = {row["way"]: row for row in layers.starts(operator, "2:4")}

    assert rows["nothing"]["start"]["calibration"] == pytest.approx(1)
    for row in rows.values():
        assert row["searched"]["calibration"] <= row["start"]["calibration"]
        assert row["refitted"]["calibration"] <= row["searched"]["calibration"]


def test_rounded_weights_keep_zeros_and_err_by_half_a_step(benchmark):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 64, generator=generator)
    weight[:, ::2] = 0

    for bits, largest_integer in ((8, 127), (4, 7)):
        rounded = benchmark("paper").round_to_bits(weight, bits)

        assert bool((rounded[:, ::2] == 0).all())
        step = weight.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / largest_integer
        error = (rounded - weight).unflatten(1, (-1, 32)).abs()
        assert bool((error <= step / 2 + 1e-6).all())
        assert float(error.max()) > 0


def test_a_cut_model_computes_its_last_layer_as_before(blocks):
    model = tiny_llama(num_hidden_layers=3)
    expected = blocks.record(model, 1, tiny_tokens(2)).outputs

    blocks.cut_after(model, 1)

    assert len(model.model.layers) == 2
    torch.testing.assert_close(blocks.record(model, 1, tiny_tokens(2)).outputs, expected)


def test_only_one_layer_is_pruned(blocks):
    model = tiny_llama()
    dense = {name: weight.clone() for name, weight in model.state_dict().items()}

    layer, seconds, peak_bytes = blocks.prune_one_layer(model, 1, "wanda", tiny_tokens())

    for name, weight in layer.named_parameters():
        if weight.ndim == 2:
            share_of_zeros = (weight == 0).float().mean().item()
            assert share_of_zeros == pytest.approx(0.5, abs=0.01), name
    assert seconds > 0
    assert peak_bytes > 0
    assert all(torch.equal(weight, dense[name]) for name, weight in model.state_dict().items())


def test_peak_bytes_count_tensors_that_live_at_one_time(blocks):
    memory = blocks.PeakBytes()
    with memory:
        torch.zeros(1000)  # not counted: the count is not active yet
        memory.active = True
        first = torch.zeros(1000)
        view = first.view(10, 100)
        second = view + 1
        del first, view, second
        third = torch.zeros(1500)
        del third

    assert memory.peak == 2 * 4000


@pytest.mark.parametrize("penalty", [None, 0.3])
def test_sgd_lowers_the_error_of_a_layer(blocks, penalty):
    model = tiny_llama()
    recorded = blocks.record(model, 1, tiny_tokens())
    wanda, _, _ = blocks.prune_one_layer(model, 1, "wanda", tiny_tokens())
    masks = [p != 0 for p in wanda.parameters()]
    sgd = blocks.Sgd(recorded, wanda, rate=3e-3, penalty=penalty)

    steps = sgd.train(seconds=0.5)

    assert steps > 1
    if penalty is None:
        assert all(
            bool((weight[~mask] == 0).all())
            for weight, mask in zip(sgd.layer.parameters(), masks, strict=True)
        )
        assert recorded.error(sgd.layer) < recorded.error(wanda)
    else:
        before = recorded.error(sgd.layer)
        sgd.round()
        assert 0 < before < recorded.error(sgd.layer)


@pytest.fixture
def measured(benchmark, tmp_path, monkeypatch):
    """`measured("start")` runs paper.py for these questions on a tiny model, and returns the rows of its record."""
    save_tiny_folder(tmp_path / "model")
    (tmp_path / "sea.txt").write_text(TEXT)
    (tmp_path / "calm.txt").write_text(TEXT[::-1])
    script = benchmark("paper")
    output = tmp_path / "out.json"
    flags = ["--calibration", str(tmp_path / "calm.txt"), "--texts", str(tmp_path / "sea.txt")]
    flags += ["--other", str(tmp_path / "sea.txt"), "--layers", "0,1", "--operators", "o_proj"]
    flags += ["--sample-counts", "2,8", "--num-samples", "4", "--num-fresh", "2"]
    flags += ["--sequence-length", "16", "--max-windows", "3", "--output", str(output)]

    def run(questions, *more_flags):
        command = [
            "paper.py",
            str(tmp_path / "model"),
            "--questions",
            questions,
            *flags,
            *more_flags,
        ]
        monkeypatch.setattr(sys, "argv", command)
        script.main()
        return json.loads(output.read_text())["rows"]

    return run


def test_every_unit_is_measured_once(measured, benchmark, monkeypatch, capsys):
    monkeypatch.setattr(benchmark("paper"), "SAMPLED", [("wanda", 2), ("wanda", 8)])

    rows = measured("start,samples")

    starts = [row for row in rows if row["part"] == "starts"]
    units = {(row["layer"], row["kind"], row["pattern"], row["way"]) for row in starts}
    assert len(units) == len(starts) == 2 * 1 * 2 * 4
    samples = [row for row in rows if row["part"] == "samples"]
    assert {row["samples"] for row in samples} == {2, 4, 8}
    few, many = (row for row in rows if row["part"] == "sampled")
    assert (few["samples"], many["samples"]) == (2, 8)
    assert few["perplexity"] != many["perplexity"]
    assert "| 50% | sparsegpt |" in capsys.readouterr().out

    monkeypatch.setattr(benchmark("paper_layers"), "operators_of", lambda *_, **__: 1 / 0)
    assert measured("start,samples") == rows


def test_whole_models_are_pruned_and_rounded(measured, benchmark, monkeypatch):
    script = benchmark("paper")
    monkeypatch.setattr(script, "QUANTIZED", [("dense", "-"), ("wanda", "0.5")])
    monkeypatch.setattr(script, "WHOLE_MODELS", {"parts": [("wanda", "0.5")]})

    rows = measured("parts,quantize")

    whole = {row["method"]: row["perplexity"] for row in rows if row["part"] == "models"}
    exact = {row["method"]: row["perplexity"] for row in rows if row.get("bits") == 32}
    assert whole["dense"] == pytest.approx(exact["dense"])
    assert whole["wanda"] == pytest.approx(exact["wanda"])
    assert whole["wanda"] != whole["dense"]
    assert len([row for row in rows if row["part"] == "quantized"]) == 2 * 3


def test_structured_models_are_trained_for_equal_time(measured, benchmark, monkeypatch, tmp_path):
    script = benchmark("paper")
    units = [("llm-pruner", "heads:0.5+channels:0.25"), ("flap", "channels:0.25")]
    monkeypatch.setattr(script, "STRUCTURED", units)
    monkeypatch.setattr(script, "ADAPTER_RATES", (1e-2,))
    monkeypatch.setattr(script, "NUM_TRAINING_WINDOWS", 100)

    rows = measured("structured", "--work", str(tmp_path / "work"), "--tokens", "1024")

    for method, _ in units:
        nothing, everything, adapters = (row for row in rows if row["method"] == method)
        trained = [row["trained"] for row in (nothing, everything, adapters)]
        assert trained == ["nothing", "all", "adapters"]
        assert adapters["core_minutes"] == everything["core_minutes"] > 0
        assert nothing["parameters"] == everything["parameters"]
        assert adapters["num_tokens"] >= 2 * 16
        assert everything["perplexity"] != nothing["perplexity"]
        assert adapters["perplexity"] != nothing["perplexity"]
        assert adapters["perplexity"] != everything["perplexity"]


def test_adapters_after_zeros_keep_the_zeros(benchmark):
    structured = benchmark("paper_structured")
    model = tiny_llama()
    linear = model.model.layers[0].mlp.up_proj
    dense = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    linear.weight.data[:, ::2] = 0
    kept = linear.weight.detach().clone()
    windows = torch.randint(0, model.config.vocab_size, (4, 16))

    trained, num_tokens = structured.train_masked_adapters(
        model, windows, seconds=0.5, rate=1e-2, seed=0
    )

    assert num_tokens % (2 * 16) == 0
    weights = trained.state_dict()
    assert not any("parametrizations" in name for name in weights)
    assert (weights["model.layers.0.mlp.up_proj.weight"][:, ::2] == 0).all()
    assert not torch.equal(weights["model.layers.0.mlp.up_proj.weight"], kept)
    change = weights["model.layers.1.mlp.up_proj.weight"] - dense
    assert 0 < torch.linalg.matrix_rank(change) <= structured.RANK


def test_llm_pruner_removes_the_groups_with_the_least_first_order_importance(benchmark):
    structured = benchmark("paper_structured")
    model = tiny_llama()
    before = copy.deepcopy(model)
    windows = torch.randint(0, model.config.vocab_size, (4, 16))
    # Two channels and a group of heads that do nothing are the least important of their layers.
    for one in (model, before):
        layer = one.model.layers[1]
        layer.mlp.down_proj.weight.data[:, [1, 5]] = 0
        head_size = layer.self_attn.head_dim
        queries = layer.self_attn.num_key_value_groups * head_size
        layer.self_attn.o_proj.weight.data[:, :queries] = 0
    num_channels = model.config.intermediate_size
    num_heads = model.config.num_key_value_heads

    structured.remove_parts(
        model, list(windows.split(2)), {"channels": 2 / num_channels, "heads": 1 / num_heads}
    )

    assert model.config.intermediate_size == num_channels - 2
    assert model.config.num_key_value_heads == num_heads - 1
    inputs = torch.randn(1, 16, model.config.hidden_size)
    kept, whole = model.model.layers[1].mlp, before.model.layers[1].mlp
    torch.testing.assert_close(kept(inputs), whole(inputs))
    kept_output = model.model.layers[1].self_attn.o_proj.weight
    whole_output = before.model.layers[1].self_attn.o_proj.weight
    torch.testing.assert_close(kept_output, whole_output[:, queries:])
    rebuilt = type(model)(model.config)
    rebuilt.load_state_dict(model.state_dict())
    logits = rebuilt.eval()(windows).logits
    torch.testing.assert_close(logits, model.eval()(windows).logits)


def test_unknown_questions_are_refused(measured):
    with pytest.raises(SystemExit, match="'sky' is unknown; pass some of correction, sgd"):
        measured("start,sky")

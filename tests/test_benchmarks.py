"""The scripts of benchmarks/ do what they say, on tiny models."""

import json
import sys
from pathlib import Path

import pytest
import torch
from layer_problems import example
from tiny_llama import TEXT, save_tiny_folder, tiny_llama, tiny_tokenizer, tiny_tokens
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.run.evaluation.perplexity import evaluate_perplexity
from optimum_fista.run.texts.text import load_text
from optimum_fista.run.texts.windows import calibration_windows, evaluation_windows
from optimum_fista.solve.methods.fista import Fista
from optimum_fista.solve.patterns import Unstructured

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "scale.md").read_text()
TEXTS = ("calibration", "fresh", "other")


def test_a_training_text_has_no_window_that_is_measured_on(benchmark, tmp_path):
    words = [f"word{number} " for number in range(600)]
    (tmp_path / "text.txt").write_text("".join(words))
    tokenizer, script = tiny_tokenizer(), benchmark("recovery")
    windows = calibration_windows(tokenizer, load_text(str(tmp_path / "text.txt"), "calibration"), 6, 64, 0)
    left = script.text_without(str(tmp_path / "text.txt"), windows[4:], tokenizer, tmp_path).read_text()
    found = [tokenizer.decode(window) in left for window in windows]
    assert found == [True] * 4 + [False] * 2
    assert len("".join(words)) - len(left) == 2 * (64 - 2)


@pytest.mark.parametrize(
    ("bits", "largest_error"), [(32, 0), (16, 2**-11), (8, 0.5 / 127 + 2**-11), (4, 1 / 8 + 2**-11)]
)
def test_gguf_files_hold_the_weights(benchmark, tmp_path, bits, largest_error):
    """Transformers reads a Llama back with errors of at most so many times the largest weight of a matrix."""
    model = tiny_llama(intermediate_size=64, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    benchmark("llama_cpp").write_gguf(tmp_path, tmp_path / "model.gguf", bits)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).state_dict()
    for name, weight in model.state_dict().items():
        error = (found[name] - weight).abs().max() / weight.abs().max()
        if weight.ndim == 1:
            assert error == 0
        elif bits == 4 and name in ("model.embed_tokens.weight", "lm_head.weight"):  # the head keeps 8 bits
            assert 0 < error < 0.5 / 127 + 2**-11
        else:
            assert largest_error / 8 <= error <= largest_error


def test_block_wise_sgd_keeps_the_zeros_and_lowers_the_error_of_every_layer(benchmark):
    model, dense, windows = tiny_llama(), tiny_llama(), tiny_tokens()
    FistaPruner(FistaPruningConfig(method="wanda", pattern="2:4"), progress=False).prune(model, windows.split(4))
    zeros = {name: weight == 0 for name, weight in model.state_dict().items()}
    errors = benchmark("reconstruction").train_layers(model, dense, windows, 40, 1e-2, 0)
    assert len(errors) == 2
    assert all(0 < after < before for before, after in errors)
    assert all(torch.equal(weight == 0, zeros[name]) for name, weight in model.state_dict().items())


@pytest.fixture
def compared(benchmark, tmp_path, monkeypatch, capsys):
    """`compared("--flag", ...)` runs compare.py on a tiny model and returns the lines of its table and its record."""
    save_tiny_folder(tmp_path / "model")
    (tmp_path / "sea.txt").write_text(TEXT)
    (tmp_path / "calm.txt").write_text(TEXT[::-1])
    script, output = benchmark("compare"), tmp_path / "out" / "compare.json"
    given = ["--texts", str(tmp_path / "sea.txt"), "--calibration", str(tmp_path / "calm.txt"), "--output", str(output)]
    given += ["--num-samples", "6", "--sequence-length", "32", "--max-windows", "3", "--device", "cpu"]
    monkeypatch.setattr(script, "release_memory", lambda **_: None)

    def run(*flags, model=tmp_path / "model"):
        monkeypatch.setattr(sys, "argv", ["compare.py", str(model), *given, *flags])
        script.main()
        return capsys.readouterr().out, json.loads(output.read_text())

    return run


def test_compared_rows_are_what_pruning_and_measuring_give(compared, tmp_path):
    shown, record = compared("--methods", "wanda:error_correction=intra", "--patterns", "2:4,3:5", "--held-out", "2")
    dense, wanda, failed = record["rows"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    windows = evaluation_windows(tiny_tokenizer(), load_text(str(tmp_path / "sea.txt"), "test"), 32, 3)
    tokens = calibration_windows(tiny_tokenizer(), load_text(str(tmp_path / "calm.txt"), "calibration"), 8, 32, 0)
    assert dense["perplexity"]["held-out"] == evaluate_perplexity(model, tokens[6:]).perplexity
    assert dense["perplexity"]["calibrated"] == evaluate_perplexity(model, tokens[:2]).perplexity
    config = FistaPruningConfig(pattern="2:4", method="wanda", error_correction="intra", held_out=2)
    report = FistaPruner(config, progress=False).prune(model, tokens.split(1))
    assert wanda["perplexity"]["sea"] == evaluate_perplexity(model, windows).perplexity
    assert wanda["totals"]["mean_held_out_fit_error"] == report.totals["mean_held_out_fit_error"]
    assert "rows of 32 inputs" in failed["error"]
    assert "| 3:5 | `wanda:error_correction=intra` | failed |" in shown
    assert "random windows of 32 tokens of file calm.txt" in record["recipe"][1]


def test_a_comparison_resumes_and_its_table_is_shown_again(compared, tmp_path):
    _, first = compared("--methods", "magnitude,nothing", "--patterns", "0.5")
    first["rows"][1]["seconds"]["total"] = 12345
    (tmp_path / "out" / "compare.json").write_text(json.dumps(first))
    shown, second = compared("--methods", "wanda", "--patterns", "0.5", "--seeds", "0,1")
    assert second["rows"][:2] == first["rows"][:2]
    assert [(row["method"], row["seed"], row["error"]) for row in second["rows"][2:]] == [
        ("wanda", 0, None),
        ("wanda", 1, None),
    ]
    table = shown[shown.index("| pattern |") :]
    assert compared(model=tmp_path / "out" / "compare.json")[0] == table
    assert [line.count(" ± ") for line in table.splitlines()[2:5]] == [0, 0, 5]
    with pytest.raises(SystemExit, match="other settings"):
        compared("--num-samples", "5")


def test_the_best_of_a_pattern_is_bold_and_tasks_have_their_mean(benchmark):
    def row(method, pattern, perplexity, first, second):
        scores = {"a": {"acc": {"value": first, "stderr": 0.01}}, "b": {"acc": {"value": second, "stderr": 0.02}}}
        found = {"method": method, "pattern": pattern, "seed": 0, "error": None, "accuracy": scores, "seconds": {}}
        return found | {"perplexity": {"sea": perplexity}, "totals": {"sparsity": 0.5} if pattern != "-" else {}}

    rows = [row("dense", "-", 10, 0.75, 0.5), row("wanda", "0.5", 20, 0.6, 0.25), row("fista", "0.5", 15, 0.4, 0.5)]
    assert benchmark("compare").table(rows)[2:] == [
        "|  | `dense` | 10.00 | 75.0 ± 1.0 | 50.0 ± 2.0 | 62.5 |  |  |  |  |",
        "| 0.5 | `wanda` | 20.00 | **60.0** ± 1.0 | 25.0 ± 2.0 | 42.5 |  | 50.00 |  |  |",
        "| 0.5 | `fista` | **15.00** | 40.0 ± 1.0 | **50.0** ± 2.0 | **45.0** |  | 50.00 |  |  |",
    ]


def test_speed_of_every_variant_and_the_table_again(benchmark, tmp_path, monkeypatch, capsys):
    script, output = benchmark("speed"), tmp_path / "speed.json"
    pruner, model = FistaPruner(FistaPruningConfig(method="magnitude"), progress=False), tiny_llama()
    pruner.prune(model, tiny_tokens())
    pruner.save_pretrained(model, tmp_path / "pruned")
    monkeypatch.setattr(
        script.multiprocessing, "get_context", lambda _, get=script.multiprocessing.get_context: get("fork")
    )
    flags = ["--variants", "dense float32,packed float32", "--batch-sizes", "1,2", "--rounds", "2", "--threads", "1"]
    flags += ["--new-tokens", "4", "--prompt-tokens", "3", "--prefill-tokens", "5", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["speed.py", str(tmp_path / "pruned"), *flags])
    script.main()
    shown, variants = capsys.readouterr().out, json.loads(output.read_text())["variants"]
    for found in variants.values():
        assert found["tokens_per_second"]["2"] == pytest.approx(8 / (sum(found["seconds"]["batch 2"]) / 2))
    dense, packed = variants["dense float32"], variants["packed float32"]
    assert (dense["same_tokens"], packed["same_tokens"]) == (None, 1)
    assert packed["weight_bytes"] < dense["weight_bytes"] == 4 * model.num_parameters()
    monkeypatch.setattr(sys, "argv", ["speed.py", str(output)])
    script.main()
    assert capsys.readouterr().out == shown[shown.index("| pruned |") :]


def test_gguf_blocks_need_rows_of_whole_blocks(benchmark, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=r"down_proj.weight has rows of 48 weights; Q4_0 needs a multiple of 32"):
        benchmark("llama_cpp").write_gguf(tmp_path, tmp_path / "model.gguf", 4)
    with pytest.raises(SystemExit, match="--bits 5 is not known"):
        benchmark("llama_cpp").write_gguf(tmp_path, tmp_path / "model.gguf", 5)


def test_llama_cpp_writes_the_tokens_of_transformers(benchmark, tmp_path):
    """Greedy tokens of a smaller Llama, whose heads are no longer hidden_size / num_attention_heads wide."""
    pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
    pruner, model = FistaPruner(FistaPruningConfig(pattern="channels:0.25+heads:0.5"), progress=False), tiny_llama()
    pruner.prune(model, tiny_tokens().split(4))
    assert (model.config.num_attention_heads, model.config.head_dim) == (2, 8)
    model.save_pretrained(tmp_path)
    benchmark("llama_cpp").require_same_tokens(tmp_path, tmp_path / "float32.gguf", tiny_tokens()[0], 24, threads=1)


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_neox"])
def test_a_small_model_resumes_its_training(benchmark, monkeypatch, tmp_path, architecture):
    """An interrupted training ends with the same weights; nothing that is held out was trained on."""
    script, text = benchmark("train_small"), tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{number}: {TEXT}" for number in range(40)))
    sizes = ["--hidden", "64", "--layers", "1", "--ffn", "64", "--vocabulary", "300", "--sequence-length", "16"]
    sizes += [
        "--texts",
        str(text),
        "--steps",
        "4",
        "--every",
        "2",
        "--architecture",
        architecture,
        "--max-windows",
        "2",
    ]

    def run(name):
        arguments = [
            "train_small.py",
            *sizes,
            "--folder",
            str(tmp_path / name),
            "--output",
            str(tmp_path / f"{name}.json"),
        ]
        monkeypatch.setattr(sys, "argv", arguments)
        script.main()
        return AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict(), json.loads(
            (tmp_path / f"{name}.json").read_text()
        )

    whole, record = run("whole")
    with monkeypatch.context() as killed:
        killed.setattr(script, "trange", lambda first, last, **_: tqdm(range(first, last // 2)))
        half, _ = run("resumed")
    resumed, record_of_both = run("resumed")
    assert record == record_of_both
    assert [row["step"] for row in record["rows"]] == [2, 4]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert not all(torch.equal(half[name], tensor) for name, tensor in whole.items())
    trained, held_out = (
        (tmp_path / "whole" / "texts" / f"text-{part}.txt").read_text() for part in ("trained", "held-out")
    )
    assert trained + held_out == text.read_text()
    assert 0.8 < len(trained) / len(text.read_text()) < 1
    sizes[sizes.index("--steps") + 1] = "6"
    with pytest.raises(SystemExit, match="other settings"):
        run("whole")


def test_every_head_is_measured_and_put_back(benchmark):
    model, tokens = tiny_llama(), tiny_tokens(3, 16)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    rows = benchmark("heads").measure(model, tokens[:2], tokens[2:])
    heads = [(i, j) for i in range(model.config.num_hidden_layers) for j in range(model.config.num_attention_heads)]
    assert [(row["layer"], row["head"]) for row in rows] == heads
    assert all(row["predicted"] > 0 and row["measured"] != 0 and 0 < row["attention"] < 1 for row in rows)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_ablations_are_paired_by_seed(benchmark):
    def row(label, pattern, seed, perplexity):
        return {"label": label, "pattern": pattern, "seed": seed, "perplexity": {"a": perplexity, "b": 4 * perplexity}}

    rows = [row("dense", "-", 0, 2.0)]
    rows += [row("default", "0.5", 0, 3.0), row("default", "0.5", 1, 5.0)]
    rows += [row("worse", "0.5", 0, 3.3), row("worse", "0.5", 1, 6.0)]
    rows += [row("other", "2:4", 0, 7.0)]
    assert benchmark("ablations").table({"rows": rows})[2:] == [
        "| default | 4.00±1.41/16.00±5.66 |  |",
        "| worse | 4.65±1.91/18.60±7.64 (1.150±0.071) |  |",
        "| other |  | 7.00/28.00 |",
    ]


@pytest.fixture
def penalty_search(benchmark, tmp_path, monkeypatch):
    """`penalty_search(output)` runs the script on a tiny model and returns it and what it wrote."""
    pytest.importorskip("optuna", reason="needs Optuna: pip install 'optimum-fista[benchmarks]'")
    save_tiny_folder(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    given = [str(tmp_path / "model"), "--calibration", str(tmp_path / "text.txt"), "--plot", str(tmp_path / "plot.png")]
    small = "--num-samples 6 --num-fresh 2 --sequence-length 16 --layers 1 --operators q_proj,down_proj --seeds 2"
    budgets = "--budget 200 --chained-budget 100"

    def run(name):
        output = tmp_path / name
        monkeypatch.setattr(sys, "argv", ["_", *given, *small.split(), *budgets.split(), "--output", str(output)])
        script = benchmark("penalty_search")
        script.main()
        return script, json.loads(output.read_text())

    return run


def test_penalty_search_on_a_tiny_model(penalty_search, tmp_path, capsys):
    script, record = penalty_search("first.json")
    assert "\n".join(script.table(record["rows"])) in capsys.readouterr().out
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    rows = record["rows"]
    assert len(rows) == 2 * 2 * (8 + 5 * 2)
    for row in rows:
        alike = [r for r in rows if (r["pattern"], r["operator"]) == (row["pattern"], row["operator"])]
        ends = {r["way"]: r["curve"][-1][1] for r in alike}
        steps, errors = zip(*row["curve"], strict=True)
        assert list(steps) == sorted(steps)
        assert list(errors) == sorted(errors, reverse=True)
        assert steps[-1] <= row["steps"]
        assert errors[0] == ends["SparseGPT, no trial"]
        if row["way"] in ("TPE", "random"):
            assert errors[-1] >= ends["grid, 20 steps"]
            assert 200 <= row["steps"] < 220
        if row["way"] == "TPE with Hyperband":
            assert errors[-1] >= ends["grid, up to 80 steps"]
    for entry in record["by_penalty"]:
        assert len(entry["errors"]) == 13
        assert entry["errors"]["0.0"] == pytest.approx([1] * 4, abs=0.02)
    _, again = penalty_search("second.json")
    assert rows == again["rows"]


@pytest.mark.parametrize("correlation", [1.0, 4.0])
def test_ways_to_the_penalty(benchmark, correlation):
    """The package's own method takes the same trials; those of the table are those of FISTA."""
    trials, made = benchmark("penalty_trials"), example(24, 48, correlation=correlation)
    pattern = Unstructured(0.5)
    task = trials.Task(trials.Data(made.problem, made.problem, pattern))
    for settings, search in (
        ({"max_trials": 4}, trials.bisection(task, 3, 4)),
        ({"max_trials": 30}, trials.bisection(task, 3, 30)),
    ):
        pruned = Fista(**settings).prune(made.problem, pattern)
        assert pruned.fit_error**2 == pytest.approx(search.best.refitted["calibration"], rel=1e-9)
        assert pruned.l1_penalty is None or search.steps > 0
    for exponent, by_rung in task.table.items():
        for rung, trial in zip(trials.RUNGS, by_rung, strict=True):
            solution = task.solve(task.start.weight, task.penalty(exponent), rung)
            expected = trials.Rounded(task.data, solution.weight)
            assert trial.steps == solution.iterations
            assert torch.equal(trial.rounded.weight, expected.weight)
    chain, alone, longer = trials.constant(task, 100), trials.grid(task, (20,)), trials.grid(task, trials.RUNGS)
    assert alone.best.error == min(by_rung[1].rounded.error for by_rung in task.table.values()) < task.start.error
    assert chain.curve[1] == (20, alone.best)
    assert longer.best.error <= alone.best.error
    judged = trials.grid(task, trials.RUNGS, after_refit=True).best.refitted["calibration"]
    assert judged <= min(s.best.refitted["calibration"] for s in (alone, longer, trials.Search(task)))


def test_penalty_search_names_the_missing_library(benchmark, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SystemExit, match=r"pip install '.\[benchmarks\]'"):
        benchmark("penalty_search").import_optuna()


def test_products_in_place_are_counted(benchmark):
    left, right = torch.ones(3, 4), torch.ones(4, 5)
    with benchmark("shared").counted_products() as counter:
        torch.zeros(3, 5).addmm_(left, right)
        left @ right
    assert counter.get_total_flops() == 2 * (2 * 3 * 4 * 5)

"""The scripts of benchmarks/ do what they say, on tiny models."""

import json
import math
import multiprocessing
import sys
from argparse import Namespace

import pytest
import torch
from tiny_llama import TEXT, save_tiny_folder, tiny_llama, tiny_tokenizer, tiny_tokens
from transformers import (
    AutoModelForCausalLM,
    Ernie4_5_MoeConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Qwen3MoeConfig,
)

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.evaluate.perplexity import evaluate_perplexity
from optimum_fista.text.sources import load_text
from optimum_fista.text.windows import calibration_windows, evaluation_windows


def test_a_training_text_has_no_window_that_is_measured_on(benchmark, tmp_path):
    words = [f"word{number} " for number in range(600)]
    (tmp_path / "text.txt").write_text("".join(words))
    source = str(tmp_path / "text.txt")
    tokenizer = tiny_tokenizer()
    windows = calibration_windows(tokenizer, load_text(source, "calibration"), 6, 64, 0)

    file = benchmark("recovery").text_without(source, windows[4:], tokenizer, tmp_path / "rest.txt")

    rest = file.read_text()
    assert all(tokenizer.decode(window) in rest for window in windows[:4])
    assert not any(tokenizer.decode(window) in rest for window in windows[4:])
    assert len("".join(words)) - len(rest) == 2 * (64 - 2)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    ("bits", "largest_error"),
    [
        ("32", 0),
        ("16", 2**-11),
        ("8", 0.5 / 127 + 2**-11),
        ("5", 1 / 16 + 2**-11),
        ("4", 1 / 8 + 2**-11),
    ],
)
def test_gguf_files_hold_the_weights_of_the_model(benchmark, tmp_path, bits, largest_error, family):
    """Transformers reads a model back with errors of at most so many times the largest weight of a matrix."""
    model = tiny_llama(intermediate_size=64, tie_word_embeddings=True)
    if family == "gemma3_text":
        config = model.config.to_dict() | {
            "head_dim": 32,
            "layer_types": None,
            "rope_parameters": None,
        }
        model = Gemma3ForCausalLM(Gemma3TextConfig.from_dict(config | {"model_type": family}))
    for vector in (parameter for parameter in model.parameters() if parameter.ndim == 1):
        vector.data.uniform_(1, 2)
    model.save_pretrained(tmp_path)

    benchmark("llama_cpp").write_gguf(tmp_path, tmp_path / "model.gguf", bits)

    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    weights = read.state_dict()
    for name, weight in model.state_dict().items():
        error = (weights[name] - weight).abs().max() / weight.abs().max()
        is_head = name in ("model.embed_tokens.weight", "lm_head.weight")
        if weight.ndim == 1:
            assert error < 1e-6
        elif is_head and bits in ("5", "4"):  # the head keeps 8 bits
            assert 0 < error < 0.5 / 127 + 2**-11
        else:
            assert largest_error / 8 <= error <= largest_error


@pytest.fixture
def compared(benchmark, tmp_path, monkeypatch, capsys):
    """`compared("--flag", ...)` runs compare.py on a tiny model and returns the lines of its table and its record."""
    save_tiny_folder(tmp_path / "model")
    (tmp_path / "sea.txt").write_text(TEXT)
    (tmp_path / "calm.txt").write_text(TEXT[::-1])
    script = benchmark("compare")
    output = tmp_path / "out" / "compare.json"
    usual_flags = [
        "--texts",
        str(tmp_path / "sea.txt"),
        "--calibration",
        str(tmp_path / "calm.txt"),
    ]
    usual_flags += ["--output", str(output), "--device", "cpu"]
    usual_flags += ["--num-samples", "6", "--sequence-length", "32", "--max-windows", "3"]
    monkeypatch.setattr(script, "release_memory", lambda **_: None)

    def run(*flags, model=tmp_path / "model"):
        monkeypatch.setattr(sys, "argv", ["compare.py", str(model), *usual_flags, *flags])
        script.main()
        return capsys.readouterr().out, json.loads(output.read_text())

    return run


def test_compared_rows_are_what_pruning_and_measuring_give(compared, tmp_path):
    shown, record = compared(
        "--methods", "wanda:error_correction=intra", "--patterns", "2:4,3:5", "--held-out", "2"
    )

    dense, wanda, failed = record["rows"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    windows = evaluation_windows(
        tiny_tokenizer(), load_text(str(tmp_path / "sea.txt"), "test"), 32, 3
    )
    tokens = calibration_windows(
        tiny_tokenizer(), load_text(str(tmp_path / "calm.txt"), "calibration"), 8, 32, 0
    )
    assert dense["perplexity"]["held-out"] == evaluate_perplexity(model, tokens[6:]).perplexity
    assert dense["perplexity"]["calibrated"] == evaluate_perplexity(model, tokens[:2]).perplexity
    config = FistaPruningConfig(pattern="2:4", method="wanda", error_correction="intra", held_out=2)
    report = FistaPruner(config, progress=False).prune(model, tokens.split(1))
    assert wanda["perplexity"]["sea"] == evaluate_perplexity(model, windows).perplexity
    assert wanda["totals"]["mean_held_out_fit_error"] == report.totals["mean_held_out_fit_error"]
    assert "rows of 32 inputs" in failed["error"]
    assert "| 3:5 | `wanda:error_correction=intra` | failed |" in shown
    assert "random windows of 32 tokens of calm.txt" in record["recipe"][1]


def test_several_texts_of_a_comparison_have_equal_shares_of_the_calibration(compared, tmp_path):
    texts = {name: tmp_path / f"{name}.txt" for name in ("calm", "sea")}
    _, record = compared(
        "--methods",
        "wanda",
        "--patterns",
        "2:4",
        "--calibration",
        ",".join(map(str, texts.values())),
    )

    wanda = record["rows"][1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    batches = [
        {"input_ids": ids, "source": name}
        for name, path in texts.items()
        for ids in calibration_windows(
            tiny_tokenizer(), load_text(str(path), "calibration"), 3, 32, 0
        ).split(1)
    ]
    config = FistaPruningConfig(pattern="2:4", method="wanda", held_out=0)
    report = FistaPruner(config, progress=False).prune(model, batches)
    assert wanda["totals"]["mean_fit_error"] == report.totals["mean_fit_error"]
    assert record["settings"]["calibration"] == "calm.txt,sea.txt"
    _, of_calm, of_sea = record["recipe"]
    assert "3 random windows of 32 tokens of calm.txt" in of_calm
    assert "3 random windows of 32 tokens of sea.txt" in of_sea


def test_batches_of_a_comparison_on_several_texts_name_their_text(compared, tmp_path, monkeypatch):
    prune = FistaPruner.prune
    named = []

    def watched(pruner, model, batches):
        named.extend(batch["source"] for batch in batches)
        return prune(pruner, model, batches)

    monkeypatch.setattr(FistaPruner, "prune", watched)
    paths = []
    for folder in ("first", "second"):  # two texts of one name
        path = tmp_path / folder / "train.txt"
        path.parent.mkdir()
        path.write_text(TEXT if folder == "first" else TEXT[::-1])
        paths.append(str(path))

    flags = ["--methods", "wanda", "--patterns", "2:4"]
    compared(*flags, "--calibration", f"{paths[0]}, {paths[1]}")

    assert named == 3 * [paths[0]] + 3 * [paths[1]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--calibration", "a.txt,a.txt"], "pass each text once"),
        (["--calibration", "a.txt,b.txt", "--num-samples", "5"], "pass a multiple of the 2 texts"),
        (["--calibration", "a.txt,b.txt", "--held-out", "2"], "pass one --calibration"),
    ],
)
def test_a_comparison_refuses_texts_that_it_cannot_share_out(compared, flags, message):
    with pytest.raises(SystemExit, match=message):
        compared("--methods", "wanda", *flags)


def test_a_comparison_resumes_and_its_table_is_shown_again(compared, tmp_path):
    _, first = compared("--methods", "magnitude,nothing", "--patterns", "0.5")
    first["rows"][1]["seconds"]["total"] = 12345  # shows that this row is not measured again
    (tmp_path / "out" / "compare.json").write_text(json.dumps(first))

    shown, second = compared("--methods", "wanda", "--patterns", "0.5", "--seeds", "0,1")

    assert second["rows"][:2] == first["rows"][:2]
    added = [(row["method"], row["seed"], row["error"]) for row in second["rows"][2:]]
    assert added == [("wanda", 0, None), ("wanda", 1, None)]
    table = shown[shown.index("| pattern |") :]
    assert compared(model=tmp_path / "out" / "compare.json")[0] == table
    # Only the third row is of two seeds, so only its numbers have a spread.
    assert [line.count(" ± ") for line in table.splitlines()[2:5]] == [0, 0, 5]

    with pytest.raises(SystemExit, match="other settings"):
        compared("--num-samples", "5")


def test_the_speed_script_records_tokens_per_second_of_every_variant(
    benchmark, tmp_path, monkeypatch
):
    script = benchmark("speed")
    output = tmp_path / "speed.json"
    model = tiny_llama()
    model.save_pretrained(tmp_path / "original")
    pruner = FistaPruner(FistaPruningConfig(method="magnitude"), progress=False)
    pruner.prune(model, tiny_tokens())
    pruner.save_pretrained(model, tmp_path / "pruned")
    get = script.multiprocessing.get_context
    monkeypatch.setattr(script.multiprocessing, "get_context", lambda _: get("fork"))
    flags = f"--original {tmp_path / 'original'} --variants original\xa0float32,pruned\xa0float32"
    flags += " --batch-sizes 1,2 --rounds 2 --threads 1 --new-tokens 4 --prompt-tokens 3"
    flags += f" --prefill-tokens 5 --output {output}"
    arguments = [flag.replace("\xa0", " ") for flag in flags.split(" ")]
    monkeypatch.setattr(sys, "argv", ["speed.py", str(tmp_path / "pruned"), *arguments])

    script.main()

    variants = json.loads(output.read_text())["variants"]
    assert list(variants) == ["original float32", "pruned float32"]
    for measured in variants.values():
        seconds = sum(measured["seconds"]["batch 2"]) / 2
        assert measured["tokens_per_second"]["2"] == pytest.approx(8 / seconds)
        assert measured["weight_bytes"] == 4 * model.num_parameters()


def test_the_frontier_is_measured_on_whole_texts_and_resumes(
    benchmark, tmp_path, monkeypatch, capsys
):
    script = benchmark("frontier")
    model = tiny_llama(intermediate_size=64)
    for part in (model, tiny_tokenizer()):
        part.save_pretrained(tmp_path / "model")
    text = tmp_path / "sea.txt"
    text.write_text(TEXT)
    flags = ["--calibration", str(text), "--texts", str(text), "--bytes", "100"]
    flags += ["--num-samples", "4", "--sequence-length", "32", "--work", str(tmp_path)]
    flags += ["--variants", "dense,channels:0.5,0.5", "--formats", "32,8"]
    flags += ["--plot", str(tmp_path / "plot.png"), "--output", str(tmp_path / "rows.json")]
    monkeypatch.setattr(sys, "argv", ["frontier.py", str(tmp_path / "model"), *flags])

    script.main()

    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["format"] for row in rows] == ["32", "8", "32", "8", "packed"]
    assert rows[0]["bytes"] == 4 * model.num_parameters() > 3 * rows[1]["bytes"]
    ids = torch.tensor(tiny_tokenizer()(TEXT[:100]).input_ids)
    nats = 0.0
    for window in ids[:32], ids[31:63], ids[62:94], ids[93:]:
        nats += (len(window) - 1) * float(model(window[None], labels=window[None]).loss)
    # The script takes products in bfloat16.
    assert rows[0]["mean"] == pytest.approx(nats / math.log(2) / 100, rel=1e-2)
    assert (tmp_path / "plot.png").stat().st_size > 0

    table = capsys.readouterr().out
    monkeypatch.setattr(script, "measure", None)
    script.main()
    assert table.endswith(capsys.readouterr().out)

    points = {0: (1.0, 3.0), 1: (2.0, 3.0), 2: (4.0, 1.0), 3: (3.0, 2.0), 4: (5.0, 1.5)}
    assert script.frontier(points) == [0, 3, 2]


def test_the_frontier_trains_the_dense_model_by_itself_or_by_the_text_alone(
    benchmark, tmp_path, monkeypatch
):
    script = benchmark("frontier")
    for part in (tiny_llama(), tiny_tokenizer()):
        part.save_pretrained(tmp_path / "model")
    text = tmp_path / "sea.txt"
    text.write_text(TEXT * 8)
    flags = ["--calibration", str(text), "--texts", str(text), "--bytes", "100"]
    flags += ["--sequence-length", "32", "--work", str(tmp_path), "--variants", "dense"]
    flags += ["--formats", "32", "--tokens", "0,1024", "--output", str(tmp_path / "rows.json")]

    for more_flags in ([], ["--label-share", "1"], ["--label-share", "1"]):
        program = ["frontier.py", str(tmp_path / "model"), *flags, *more_flags]
        monkeypatch.setattr(sys, "argv", program)
        script.main()

    untrained, by_itself, by_text = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert (untrained["commands"], untrained["label_share"]) == ([], None)
    assert (by_itself["tokens"], by_itself["label_share"]) == (1024, None)
    assert (by_text["tokens"], by_text["label_share"]) == (1024, "1")
    (command,) = by_text["commands"]
    assert command.startswith("optimum-fista recover model --teacher model --tokens 1024 ")
    assert "--label-share 1 " in command
    assert len({row["mean"] for row in (untrained, by_itself, by_text)}) == 3


MIXTURE_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.mark.parametrize(
    "config",
    [
        Qwen3MoeConfig(num_experts=4, num_experts_per_tok=2, **MIXTURE_SIZES),
        Ernie4_5_MoeConfig(moe_num_experts=4, moe_k=2, **MIXTURE_SIZES),
    ],
    ids=["qwen3_moe", "ernie4_5_moe"],
)
def test_experts_are_rounded_and_their_router_is_not(benchmark, config):
    model = AutoModelForCausalLM.from_config(config)
    before = {name: weight.clone() for name, weight in model.named_parameters()}

    num_bytes = benchmark("frontier").round_weights(model, "8")

    for name, weight in model.named_parameters():
        is_exact = weight.ndim == 1 or ".mlp.gate." in name
        assert torch.equal(weight, before[name]) == is_exact, name
    assert model.num_parameters() < num_bytes < 2 * model.num_parameters()


def test_stages_of_a_run_add_up_to_its_time(benchmark, tmp_path):
    stages = benchmark("stages")
    model = save_tiny_folder(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 400)
    arguments = Namespace(
        model=str(model),
        calibration=str(text),
        pattern="0.5",
        num_samples=8,
        sequence_length=32,
        dtype="float32",
        seed=0,
    )

    with multiprocessing.get_context("spawn").Pool(1) as process:  # its functions are replaced
        run = process.apply(stages.measure, (arguments, "default"))

    assert sum(run["stages"].values()) == pytest.approx(run["processor_seconds"])
    assert {stage for stage, seconds in run["stages"].items() if seconds > 0} == {
        *stages.STAGES,
        stages.REST,
    }
    lines = stages.table({"runs": [run]})
    assert lines[0].startswith("| stage | default |")
    assert len(lines) == 2 + len(stages.STAGES) + 3


def test_a_long_text_is_read_from_both_kinds_of_files(benchmark, tmp_path, monkeypatch, capsys):
    script = benchmark("long_text")
    model = save_tiny_folder(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    words = [model, "--calibration", text, "--tokens", 20_000, "--sequence-length", 32]
    words += ["--output", tmp_path / "rows.json"]
    monkeypatch.setattr("sys.argv", ["long_text.py", *map(str, words)])

    script.main()

    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["file"] for row in rows] == [".txt", ".jsonl"]
    assert {row["tokens"] for row in rows} == {20_000}
    assert all(row["bytes"] > 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 4

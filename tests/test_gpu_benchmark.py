"""benchmarks/gpu.py runs, resumes and compares on a CPU, and its arithmetic counts what a run does."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from tiny_llama import TEXT, save_tiny_folder, tiny_llama, tiny_tokens
from torch.utils.flop_counter import shape_wrapper

from optimum_fista import FistaPruner
from optimum_fista.prune import plan


def counts_attention_on_a_cpu(counter):
    """Make a counter of products count those of attention on a CPU: two forwards, and five backwards."""

    def forwards(query, key, *_, **__):
        """FLOP of [batch, heads, positions, channels]."""
        return 4 * query[0] * query[1] * query[2] * key[2] * query[3]

    def backwards(_, query, key, *__, **___):
        """FLOP of the same shapes, after that of the gradient by the output."""
        return 2.5 * forwards(query, key)

    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    gradient = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    counter.flop_registry[attention] = shape_wrapper(forwards)
    counter.flop_registry[gradient] = shape_wrapper(backwards)
    return counter


@pytest.mark.parametrize(
    ("method", "pattern"), [("default", "0.5"), ("default", "2:4"), ("sparsegpt", "0.5")]
)
def test_the_arithmetic_for_a_gpu_counts_the_products_of_a_run(
    benchmark, method, pattern, monkeypatch
):
    monkeypatch.setattr(plan, "choose_products", lambda *_: "tf32")  # as on such a device
    arithmetic = benchmark("gpu_arithmetic")
    run = arithmetic.Run(
        hidden=64,
        ffn=96,
        layers=3,
        heads=4,
        key_value_heads=2,
        vocabulary=64,
        num_samples=16,
        num_held_out=1,
        sequence_length=24,
        batch_size=2,
        method=method,
        pattern=pattern,
        way="memory",
    )
    model = tiny_llama(
        hidden_size=run.hidden, intermediate_size=run.ffn, num_hidden_layers=run.layers
    )
    tokens = tiny_tokens(run.num_samples + run.num_held_out, run.sequence_length)
    batches = list(tokens[: run.num_samples].split(run.batch_size))
    batches.append({"input_ids": tokens[run.num_samples :], "held_out": True})
    config = benchmark("shared").parse_config(method, pattern)

    with counts_attention_on_a_cpu(benchmark("shared").counted_products()) as counter:
        stopwatch = benchmark("stages").Stopwatch(counter.get_total_flops)
        with stopwatch.installed():
            FistaPruner(config, progress=False).prune(model, batches)
        stopwatch.lap()

    expected = {}
    for stage, work in arithmetic.work_by_stage(run).items():
        expected[stage] = work["float32"] + work["tf32"] + work["bfloat16"]
    assert expected == {stage: stopwatch.seconds[stage] for stage in expected}


@pytest.fixture
def on_gpu(benchmark, tmp_path, monkeypatch, capsys):
    """`on_gpu("--flag", ...)` runs gpu.py on the CPU and a tiny random model; returns what it shows and its record."""
    script = benchmark("gpu")
    get = script.multiprocessing.get_context
    monkeypatch.setattr(script.multiprocessing, "get_context", lambda _: get("fork"))
    sizes = "--hidden 32 --ffn 48 --layers 2 --heads 4 --key-value-heads 2 --vocabulary 64"
    sizes += " --num-samples 8 --sequence-length 16 --trained-samples 8 --max-windows 2"
    output = tmp_path / "gpu.json"
    flags = ["--device", "cpu", "--folder", str(tmp_path / "models"), "--output", str(output)]

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *sizes.split(), *flags, *more])
        script.main()
        return capsys.readouterr().out, json.loads(output.read_text())

    return run


def test_a_first_day_on_a_gpu_is_measured_by_stage_and_resumes(on_gpu, tmp_path):
    flags = ["--methods", "default,sparsegpt", "--patterns", "2:4"]

    shown, record = on_gpu(*flags, "--ways", "files,memory")

    rows = record["rows"]
    names = [(row["way"], row["method"], row["by_stage"]) for row in rows]
    assert names[:4] == [
        ("files", "default", False),
        ("files", "default", True),
        ("files", "sparsegpt", False),
        ("files", "sparsegpt", True),
    ]
    assert len(rows) == 8
    for row in rows:
        assert "error" not in row
        assert row["peak_host_bytes"] > 0
        if row["by_stage"]:
            assert sum(row["stages"].values()) == row["seconds"]
            assert row["stages"].keys() <= row["expected"].keys()
    assert (
        "| stage (cpu, memory, 2:4) | default, seconds | expected | sparsegpt, seconds |" in shown
    )
    assert not list((tmp_path / "models").glob("tmp*"))

    rows[0]["seconds"] = 12345.0  # shows that this row is not measured again
    rows[1]["expected"] = {}  # of an earlier version of the arithmetic
    rows[3]["error"] = "no memory"  # a row with an error is
    (tmp_path / "gpu.json").write_text(json.dumps(record))
    shown, resumed = on_gpu(*flags, "--ways", "files")

    assert resumed["rows"][:7] == [*rows[:3], *rows[4:]]
    assert "error" not in resumed["rows"][7]
    assert "12345.0" in shown


def test_a_run_whose_process_is_killed_is_a_row_and_the_others_are_measured(
    on_gpu, benchmark, tmp_path, monkeypatch
):
    script = benchmark("gpu")
    parse_config = script.parse_config

    def killed(method, *given):
        """Kill the process that is about to run the default method, as a system without memory does."""
        if method == "default":
            os.kill(os.getpid(), signal.SIGKILL)
        return parse_config(method, *given)

    monkeypatch.setattr(script, "parse_config", killed)

    shown, record = on_gpu("--methods", "default,magnitude", "--patterns", "2:4", "--ways", "files")

    default, by_stage, magnitude, magnitude_by_stage = record["rows"]
    assert "BrokenProcessPool" in default["error"]
    assert "BrokenProcessPool" in by_stage["error"]
    assert magnitude["seconds"] > 0
    assert magnitude_by_stage["expected"] == {}  # the arithmetic does not know the method
    assert "| cpu | files | 2:4 | default | BrokenProcessPool" in shown
    assert len(list((tmp_path / "models").iterdir())) == 1  # the random model


def test_an_unknown_way_is_refused(on_gpu):
    with pytest.raises(SystemExit, match="--ways has disk: pass some of files, memory"):
        on_gpu("--ways", "disk")


def test_a_trained_model_is_compared_on_two_devices(on_gpu, tmp_path):
    save_tiny_folder(tmp_path / "model")
    text = tmp_path / "sea.txt"
    text.write_text(TEXT * 8)
    flags = ["--trained", str(tmp_path / "model"), "--calibration", str(text)]
    flags += ["--texts", str(text), "--patterns", "0.5", "--trained-methods", "default"]

    shown, record = on_gpu(*flags)

    (row,) = record["rows"]
    assert row["equal_zeros"] == 1.0  # both devices are the CPU
    perplexities = [result["perplexity"]["sea"] for result in row["results"]]
    assert perplexities[0] == perplexities[1]
    assert f"| 1.0000 | sea {perplexities[0]:.3f} | sea {perplexities[1]:.3f} |" in shown


def test_the_arithmetic_of_the_page_is_that_of_the_script(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--arithmetic", "--ways", "files"])
    benchmark("gpu").main()

    table = capsys.readouterr().out
    page = Path("docs/gpu.md").read_text()
    assert table.count("\n") > 10
    assert table in page

"""Plans beside what real runs took: peak memory and time, estimate and measurement.

Every case is a random Llama, written to a folder, planned from its configuration, and pruned from files to files in a
process of its own, whose anonymous memory (not the pages of files) is sampled. A MODEL is planned and pruned too. All
times, those of the plan's own measurements included, are seconds of one thread's processor, so that what else the
machine does counts for little.

    python benchmarks/plan.py --cases default,wide,float32,sparsegpt --output benchmarks/results/plan.json
    python benchmarks/plan.py --cases none --model folder-with-a-gguf-file
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from memory import anonymous
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.planning import machine
from optimum_fista.run.planning.plan import PruningPlan, plan_pruning

CASES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden": 256, "ffn": 1024, "layers": 4, "samples": 8},
    "small": {"hidden": 384, "ffn": 1536, "layers": 3, "samples": 8},
    "default": {"hidden": 512, "ffn": 2048, "layers": 6, "samples": 16},
    "wide": {"hidden": 768, "ffn": 3072, "layers": 8, "samples": 16},
    "vocabulary": {"hidden": 512, "ffn": 1536, "layers": 4, "samples": 16, "vocabulary": 32000},
    "long": {"hidden": 512, "ffn": 1536, "layers": 4, "samples": 64, "length": 512},
    "float32": {"hidden": 768, "ffn": 3072, "layers": 4, "samples": 16, "dtype": "float32"},
    "batches": {"hidden": 768, "ffn": 2048, "layers": 4, "samples": 32, "batch": 8},
    "pattern": {"hidden": 768, "ffn": 3072, "layers": 4, "samples": 16, "config": {"pattern": "2:4"}},
    "uniform": {"hidden": 768, "ffn": 3072, "layers": 4, "samples": 16, "config": {"allocation": "uniform"}},
    "sparsegpt": {"hidden": 768, "ffn": 3072, "layers": 4, "samples": 16, "config": {"method": "sparsegpt"}},
    "sparsegpt-full": {
        "hidden": 512,
        "ffn": 2048,
        "layers": 6,
        "samples": 16,
        "config": {"method": "sparsegpt", "error_correction": "full"},
    },
    "wanda": {"hidden": 768, "ffn": 3072, "layers": 4, "samples": 16, "config": {"method": "wanda"}},
    "wanda-none": {
        "hidden": 768,
        "ffn": 3072,
        "layers": 4,
        "samples": 16,
        "config": {"method": "wanda", "error_correction": "none"},
    },
    "fista": {"hidden": 512, "ffn": 2048, "layers": 4, "samples": 16, "config": {"method": "fista"}},
    "fista-float32": {
        "hidden": 768,
        "ffn": 3072,
        "layers": 2,
        "samples": 16,
        "dtype": "float32",
        "config": {"method": "fista", "error_correction": "none"},
    },
}

_RUN = """
import json, sys, time
time.perf_counter = time.process_time  # before the imports: seconds of the processor
import torch
from optimum_fista import FistaPruner, FistaPruningConfig
from transformers import AutoModelForCausalLM, LlamaForCausalLM
import transformers.core_model_loading
torch.set_num_threads(1)
source, output, samples, length, batch, vocabulary, config = sys.argv[1:]
tokens = torch.randint(4, int(vocabulary), (int(samples), int(length)), generator=torch.Generator().manual_seed(0))
pruner = FistaPruner(FistaPruningConfig.from_dict(json.loads(config)), progress=False)
print("ready", flush=True)
sys.stdin.readline()
report = pruner.prune(source, tokens.split(int(batch)), output_dir=output, device="cpu")
solving = sum(operator.solve_seconds for operator in report.operators)
print(json.dumps(report.seconds | {"solving": solving}), flush=True)
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help=f"some of {', '.join(CASES)}, or none")
    parser.add_argument("--model", help="a model folder, or a folder with one GGUF file")
    parser.add_argument("--num-samples", type=int, default=16, help="sequences of 512 tokens for --model")
    parser.add_argument("--seconds", type=float, default=10, help="measurements of the machine, for each plan")
    parser.add_argument("--measured", type=Path, help="plan again the runs measured in this earlier output, run none")
    parser.add_argument("--output", type=Path, default=Path("runs/plan.json"))
    return parser.parse_args()


def measure(source: str, output: Path, case: dict[str, Any]) -> dict[str, float]:
    """Peak anonymous memory and time of a run in a process of its own."""
    settings = [case["samples"], case.get("length", 256), case.get("batch", 1), case.get("vocabulary", 256)]
    command = [sys.executable, "-c", _RUN, source, str(output), *map(str, settings)]
    command.append(json.dumps(case.get("config", {})))
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    imports, held = anonymous(process.pid), [0]

    def watch() -> None:
        while process.poll() is None:
            held.append(anonymous(process.pid))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    process.stdin.write("go\n")
    process.stdin.flush()
    told = process.stdout.readline()
    process.wait()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"the run of {source} failed")
    seconds = json.loads(told)
    return {"peak_bytes": max(held), "import_bytes": imports, **{f"{name}_seconds": s for name, s in seconds.items()}}


def plan(source: str, case: dict[str, Any]) -> PruningPlan:
    return plan_pruning(
        source,
        FistaPruningConfig.from_dict(case.get("config", {})),
        num_samples=case["samples"],
        sequence_length=case.get("length", 256),
        batch_size=case.get("batch", 1),
        device="cpu",
    )


def run_case(
    name: str, source: str, case: dict[str, Any], folder: Path, measured: dict[str, float] | None = None
) -> dict[str, Any]:
    planned = plan(source, case)
    measured = measured or measure(source, folder / "out", case)
    seconds = planned.seconds
    assert seconds is not None
    row = {
        "case": name,
        "settings": case,
        "planned_bytes": planned.peaks["host"].total,
        "moment": planned.peaks["host"].moment,
        "parts": planned.peaks["host"].parts,
        "planned_seconds": sum(seconds.values()),
        "planned_stages": seconds,
        "measured": measured,
    }
    row["memory_ratio"] = row["planned_bytes"] / measured["peak_bytes"]
    row["time_ratio"] = row["planned_seconds"] / measured["total_seconds"]
    print(
        f"{name:<16}{row['planned_bytes'] / 2**20:>9.0f}{measured['peak_bytes'] / 2**20:>9.0f} MiB"
        f"{row['memory_ratio']:>7.2f}{row['planned_seconds']:>9.1f}{measured['total_seconds']:>9.1f} s"
        f"{row['time_ratio']:>7.2f}   {row['moment']}",
        flush=True,
    )
    return row


def save_llama(case: dict[str, Any], folder: Path) -> None:
    config = LlamaConfig(
        hidden_size=case["hidden"],
        intermediate_size=case["ffn"],
        num_hidden_layers=case["layers"],
        num_attention_heads=case["hidden"] // 64,
        vocab_size=case.get("vocabulary", 256),
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(getattr(torch, case.get("dtype", "bfloat16"))).save_pretrained(folder)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The table of docs/scale.md."""
    lines = ["| case | MiB planned | measured | ratio | seconds planned | measured | ratio |", "|---" * 7 + "|"]
    for row in rows:
        memory = [row["planned_bytes"] / 2**20, row["measured"]["peak_bytes"] / 2**20]
        times = [row["planned_seconds"], row["measured"]["total_seconds"]]
        cells = [f"{memory[0]:.0f}", f"{memory[1]:.0f}", f"{row['memory_ratio']:.2f}"]
        cells += [f"{times[0]:.1f}", f"{times[1]:.1f}", f"{row['time_ratio']:.2f}"]
        lines.append(f"| {row['case']} | {' | '.join(cells)} |")
    return lines


def save(rows: list[dict[str, Any]], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"cases": rows}, indent=1) + "\n")


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    time.perf_counter = time.process_time
    machine.SECONDS = arguments.seconds
    print(f"{'':<16}{'planned':>9}{'measured':>9}    {'ratio':>7}{'planned':>9}{'measured':>9}  {'ratio':>7}   peak at")
    rows: list[dict[str, Any]] = []
    known: dict[str, Any] = {}
    if arguments.measured:
        known = {row["case"]: row["measured"] for row in json.loads(arguments.measured.read_text())["cases"]}
        arguments.cases = ",".join(name for name in known if name in CASES) or "none"
    for name in [] if arguments.cases == "none" else arguments.cases.split(","):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            save_llama(CASES[name], folder / "source")
            rows.append(run_case(name, str(folder / "source"), CASES[name], folder, known.get(name)))
            save(rows, arguments.output)
    if arguments.model:
        case = {"samples": arguments.num_samples, "length": 512}
        with tempfile.TemporaryDirectory() as temporary:
            name = Path(arguments.model).name
            rows.append(run_case(name, arguments.model, case, Path(temporary), known.get(name)))
            save(rows, arguments.output)


if __name__ == "__main__":
    main()

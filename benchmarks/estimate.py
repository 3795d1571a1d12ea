"""Estimates beside what real runs took, and of models that don't fit this machine. Tables of docs/howto/big-models.md.

    python benchmarks/estimate.py --output benchmarks/results/estimate.json

Every case is a random Llama, written to a folder, estimated from its configuration, and pruned from files to files in a
process of its own, whose anonymous memory (not the pages of files) is sampled. Seconds are those of one thread's
processor, in the estimate as well, which is taken before and after the run, so that what else the machine does counts
for little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from shared import save_llama, watched
from tqdm import tqdm
from transformers import AutoConfig

from optimum_fista.config import FistaPruningConfig
from optimum_fista.estimate.estimate import Estimate

_LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "dtype": "bfloat16",
}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3-8B": _LLAMA | dict(zip(_SIZES, (4096, 14336, 32, 32), strict=True)),
    "Llama-3-70B": _LLAMA | dict(zip(_SIZES, (8192, 28672, 80, 64), strict=True)),
    "Mixtral-8x22B": dict(zip(_SIZES, (6144, 16384, 56, 48), strict=True))
    | {"model_type": "mixtral", "vocab_size": 32768, "num_key_value_heads": 8, "dtype": "bfloat16"}
    | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "Llama-3.1-405B": _LLAMA | dict(zip(_SIZES, (16384, 53248, 126, 128), strict=True)),
}
_SMALL = {"hidden": 384, "ffn": 1536, "layers": 3, "samples": 8}
_SMOLLM2 = {"hidden": 576, "ffn": 1536, "layers": 3, "samples": 8, "heads": 9, "vocabulary": 49152}
CASES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden": 256, "ffn": 1024, "layers": 4, "samples": 8},
    "small": _SMALL,
    "3 layers of SmolLM2-135M": _SMOLLM2,
    "3 layers of SmolLM2-135M, wanda 2:4": _SMOLLM2
    | {"config": {"method": "wanda", "pattern": "2:4"}},
    "a large vocabulary, channels": {
        "hidden": 64,
        "ffn": 256,
        "layers": 2,
        "samples": 8,
        "heads": 3,
    }
    | {"vocabulary": 65536, "unseen": 16, "config": {"pattern": "channels:0.25"}},
    "2:4": _SMALL | {"config": {"pattern": "2:4"}},
    "channels": _SMALL | {"config": {"pattern": "channels:0.25"}},
    "float32, batches of 4": _SMALL | {"dtype": "float32", "batch": 4},
    "sparsegpt": _SMALL | {"config": {"method": "sparsegpt"}},
    "alps": _SMALL | {"layers": 2, "config": {"method": "alps"}},
    "fista": _SMALL | {"layers": 2, "config": {"method": "fista"}},
    "fista 2:4": _SMALL | {"layers": 2, "config": {"method": "fista", "pattern": "2:4"}},
    "wanda, intra, wide": {"hidden": 768, "ffn": 3072, "layers": 2, "samples": 8}
    | {"config": {"method": "wanda", "error_correction": "intra"}},
}


def large_models_table() -> list[str]:
    """What pruning each of `MODELS` takes on a GPU, from its published sizes: the table of docs/howto/big-models.md."""
    rows: dict[str, list[str]] = {"": list(MODELS), "---": ["---"] * len(MODELS)}
    for settings in MODELS.values():
        sizes = {name: value for name, value in settings.items() if name != "model_type"}
        model = AutoConfig.for_model(settings["model_type"], max_position_embeddings=8192, **sizes)
        estimate = Estimate(model, device="cuda", storage_device="cpu", batch_size=1)
        cells = {
            "weights": _size(estimate.weight_bytes),
            **{
                f"{place}, peak": _size(sum(parts.values()))
                for place, parts in estimate.memory.items()
            },
            "disk": _size(sum(estimate.disk_bytes.values())),
        }
        for name, cell in cells.items():
            rows.setdefault(name, []).append(cell)
    return [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]


def _size(count: float) -> str:
    """Write a number of bytes, such as "1.5GiB"."""
    return tqdm.format_sizeof(count, "iB", 1024)


def beside_a_run(
    case: dict[str, Any], measured: dict[str, float] | None = None
) -> dict[str, float]:
    """Return peak memory and time of a case, estimated and measured.

    `case` is one of `CASES`. `measured` is what an earlier call has measured of it; without it the case is run.
    """
    run = {"length": 256, "vocabulary": 256, "batch": 1, "config": {}, "dtype": "bfloat16"}
    run |= {"unseen": 0} | case
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        heads = {"num_key_value_heads": run["heads"] // 3} if "heads" in run else {}
        save_llama(
            source,
            run["hidden"],
            run["ffn"],
            run["layers"],
            run["dtype"],
            vocab_size=run["vocabulary"],
            **heads,
        )

        def estimated() -> Estimate:
            """Estimate the run anew: the seconds of an estimate are measured once."""
            return Estimate(
                source,
                FistaPruningConfig.from_dict(run["config"]),
                num_samples=run["samples"],
                sequence_length=run["length"],
                batch_size=run["batch"],
                device="cpu",
                measures_perplexity=run["unseen"] > 0,
            )

        seconds_before = sum(estimated().seconds.values())
        if measured is None:
            names = ("samples", "unseen", "length", "vocabulary", "batch", "config")
            imports, curve, seconds = watched(
                source=source,
                output=f"{folder}/out",
                processor_time=True,
                **{name: run[name] for name in names},
            )
            measured = {
                "import_bytes": imports,
                "measured_bytes": max(held for _, held in curve),
                "measured_seconds": seconds["processor"],
            }
        estimated_bytes = sum(estimated().memory["host"].values())
        seconds_after = sum(estimated().seconds.values())
    return measured | {
        "estimated_bytes": estimated_bytes,
        "estimated_seconds": statistics.mean([seconds_before, seconds_after]),
    }


def runs_table(runs: dict[str, dict[str, float]]) -> list[str]:
    """Make a table of estimates beside what the runs took."""
    lines = [
        "| case | MiB estimated | measured | ratio | seconds estimated | measured | ratio |",
        "|---" * 7 + "|",
    ]
    for name, run in runs.items():
        estimated_mib = run["estimated_bytes"] / 2**20
        measured_mib = run["measured_bytes"] / 2**20
        estimated_seconds = run["estimated_seconds"]
        measured_seconds = run["measured_seconds"]
        cells = [f"{estimated_mib:.0f}", f"{measured_mib:.0f}"]
        cells += [f"{estimated_mib / measured_mib:.2f}"]
        cells += [f"{estimated_seconds:.1f}", f"{measured_seconds:.1f}"]
        cells += [f"{estimated_seconds / measured_seconds:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Print both tables, and write the runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", default=";".join(CASES), help="some of the cases, separated by ;"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/estimate.json"))
    parser.add_argument(
        "--measured", type=Path, help="estimate the runs of this earlier output again, run none"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs: dict[str, dict[str, float]] = {}
    measured = json.loads(arguments.measured.read_text())["runs"] if arguments.measured else {}
    print("\n".join(large_models_table()))
    # The trial of an estimate takes this clock, so that what else the machine does counts for little.
    time.perf_counter = time.process_time
    for name in measured or arguments.cases.split(";"):
        runs[name] = beside_a_run(CASES[name], measured.get(name))
        print(runs_table(runs)[-1], flush=True)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({"runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()

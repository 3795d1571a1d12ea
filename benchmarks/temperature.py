"""Temperature scaling: perplexity of pruned models with the temperature that a run fits, and without it.

Every model is pruned once, and measured before and after its last norm is put back. Finished rows are read from the
output file; all is computed in bfloat16.

    python benchmarks/temperature.py MODEL --calibration TEXT --texts TEXT1,TEXT2 --windows 16 --patterns 2:4,0.5,0.7
"""

from __future__ import annotations

import dataclasses
import itertools
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from shared import calibration_of, open_record, parse_arguments, save, texts_of

from optimum_fista import FistaPruner
from optimum_fista.run.checkpoints.loading import load_model
from optimum_fista.run.comparison.compare import measure_row
from optimum_fista.run.comparison.settings import parse_config

_METHOD = "default:compute_dtype=bfloat16:temperature_scaling=true"


def measure(arguments: Namespace, pattern: str, count: int) -> list[dict[str, Any]]:
    """Prune on `count` windows, and measure without the temperature and with it."""
    model, tokenizer = load_model(arguments.model, dtype="bfloat16", device="cpu")
    windows = calibration_of(arguments, tokenizer, count + arguments.held_out)
    texts = texts_of(arguments, tokenizer, arguments.sequence_length)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.ndim == 1}
    config = parse_config(_METHOD, pattern, arguments.seed, arguments.held_out)
    report = FistaPruner(config).prune(model, windows.split(4))
    assert report.temperature is not None
    rows = []
    for label in (f"{count} windows, scaled", f"{count} windows"):
        row = measure_row(label, pattern, model, texts, seed=arguments.seed, batch_size=4, progress=False)
        values = {name: getattr(row, name) for name in ("pattern", "seed", "perplexity", "versions")}
        rows.append({"label": label, **values})
        for name in report.temperature.tensors:
            model.get_parameter(name).data.copy_(before[name])
    rows[0]["temperature"] = dataclasses.asdict(report.temperature)
    return rows[::-1]


def main() -> None:
    ways = {"patterns": ["2:4", "0.5", "0.7"], "windows": [16], "seeds": [0, 1, 2]}
    sizes = {"held_out": 8, "sequence_length": 512, "max_windows": 16, "threads": 1}
    files = {"output": Path("runs/temperature.json")}
    helps = {"windows": "numbers of them", "held_out": "further windows, to which the temperature is fitted"}
    arguments = parse_arguments(__doc__, "model", "calibration", "texts", helps=helps, **ways, **sizes, **files)
    torch.set_num_threads(arguments.threads)
    record = open_record(arguments, *ways)
    for seed, count, pattern in itertools.product(arguments.seeds, arguments.windows, arguments.patterns):
        arguments.seed = seed
        found = {(row["label"], row["pattern"], row["seed"]) for row in record["rows"]}
        if (f"{count} windows", pattern, seed) not in found:
            record["rows"] += measure(arguments, pattern, count)
            save(arguments, record)


if __name__ == "__main__":
    main()

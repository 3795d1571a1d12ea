"""Temperature scaling: perplexity of pruned models with the temperature that a run fits, and without it.

Every model is pruned once, and measured before and after its last norm is put back. Rows "rotated" start from the model
that `optimum-fista rotate` makes with the same seed and its defaults. Finished rows are read from the output file; all
is computed in bfloat16.

    python benchmarks/temperature.py MODEL --calibration TEXT --texts TEXT1,TEXT2 --folder runs/temperature
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from shared import calibration_of, open_record, parse_arguments, save, texts_of

from optimum_fista import FistaPruner, rotate
from optimum_fista.run.checkpoints.loading import load_model
from optimum_fista.run.comparison.compare import measure_row
from optimum_fista.run.comparison.settings import parse_config

_METHOD = "default:compute_dtype=bfloat16:temperature_scaling=true"


def measure(arguments: Namespace, pattern: str, rotated: bool) -> list[dict[str, Any]]:
    """Prune with one seed, and measure without the temperature and with it."""
    source = arguments.model
    if rotated:
        source = str(arguments.folder / f"rotated-{Path(arguments.model).name}-{arguments.seed}")
        if not Path(source).exists():
            options = {"seed": arguments.seed, "device": "cpu", "compute_dtype": "bfloat16"}
            rotate(arguments.model, source, calibration=arguments.calibration, **options)
    model, tokenizer = load_model(source, dtype="bfloat16", device="cpu")
    windows = calibration_of(arguments, tokenizer, arguments.num_samples + arguments.held_out)
    texts = texts_of(arguments, tokenizer, arguments.sequence_length)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.ndim == 1}
    config = parse_config(_METHOD, pattern, arguments.seed, arguments.held_out)
    report = FistaPruner(config).prune(model, windows.split(4))
    assert report.temperature is not None
    rows = []
    for label in ("default:temperature_scaling=true", "default"):
        row = measure_row(label, pattern, model, texts, seed=arguments.seed, batch_size=4, progress=False)
        values = {name: getattr(row, name) for name in ("pattern", "seed", "perplexity", "versions")}
        label = label.removeprefix("default:")
        rows.append({"label": f"rotated, {label}" if rotated else label, **values})
        for name in report.temperature.tensors:
            model.get_parameter(name).data.copy_(before[name])
    rows[0]["temperature"] = dataclasses.asdict(report.temperature)
    return rows[::-1]


def main() -> None:
    ways = {"patterns": ["2:4", "0.5", "0.7"], "rotated": ["2:4"], "seeds": [0, 1, 2]}
    sizes = {"num_samples": 16, "held_out": 8, "sequence_length": 512, "max_windows": 16, "threads": 1}
    files = {"folder": Path("runs/temperature"), "output": Path("runs/temperature.json")}
    helps = {
        "rotated": "patterns of the rotated models",
        "held_out": "further windows, to which the temperature is fitted",
        "folder": "where rotated models are kept",
    }
    arguments = parse_arguments(__doc__, "model", "calibration", "texts", helps=helps, **ways, **sizes, **files)
    torch.set_num_threads(arguments.threads)
    record = open_record(arguments, "folder", "seeds")
    for seed in arguments.seeds:
        arguments.seed = seed
        for rotated, patterns in ((False, arguments.patterns), (True, arguments.rotated)):
            for pattern in patterns:
                name = "rotated, default" if rotated else "default"
                if (name, pattern, seed) not in {(r["label"], r["pattern"], r["seed"]) for r in record["rows"]}:
                    record["rows"] += measure(arguments, pattern, rotated)
                    save(arguments, record)


if __name__ == "__main__":
    main()

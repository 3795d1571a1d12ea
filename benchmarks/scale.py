"""Plans of models that don't fit this machine, from their published sizes: the tables of docs/scale.md.

python benchmarks/scale.py --output benchmarks/results/scale.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.planning.plan import PruningPlan, plan_pruning
from optimum_fista.run.planning.text import size
from optimum_fista.solve.cost import SolveCost

_LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "dtype": "bfloat16"}
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3-8B": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 8192,
    },
    "Llama-3-70B": _LLAMA
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "max_position_embeddings": 8192,
    },
    "Mixtral-8x22B": {
        "model_type": "mixtral",
        "vocab_size": 32768,
        "hidden_size": 6144,
        "intermediate_size": 16384,
        "num_hidden_layers": 56,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 65536,
        "dtype": "bfloat16",
    },
    "Llama-3.1-405B": _LLAMA
    | {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "max_position_embeddings": 131072,
    },
}
RATES = ((100, 20), (400, 50))
"""TFLOP/s of the model's products in bfloat16, and of those in float32: what a reader's GPU might keep up."""


def plan(name: str) -> PruningPlan:
    settings = dict(MODELS[name])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    return plan_pruning(
        config,
        FistaPruningConfig(),
        num_samples=128,
        sequence_length=2048,
        device="cuda",
        storage_device="cpu",
        measure=False,
    )


def hours(plan: PruningPlan, model_rate: float, float_rate: float) -> float:
    """Products over rates; nothing else is counted."""
    model = sum(stage.forward.products + stage.forward.attention for stage in plan.stages.values())
    return (model / model_rate + (plan.products - model) / float_rate) / 3600


def totals(plans: dict[str, PruningPlan]) -> list[str]:
    lines = ["| | " + " | ".join(plans) + " |", "|---" * (len(plans) + 1) + "|"]

    def row(label: str, values: list[str]) -> None:
        lines.append(f"| {label} | " + " | ".join(values) + " |")

    found = list(plans.values())
    row("parameters", [f"{p.model['num_parameters'] / 1e9:.1f} billion" for p in found])
    row("of them in operators to prune", [f"{sum(g.parameters for g in p.groups.values()) / 1e9:.1f}" for p in found])
    row("zeros", [f"{sum(g.zeros for g in p.groups.values()) / 1e9:.1f}" for p in found])
    row("weights", [size(p.model["bytes"]) for p in found])
    row("**device, peak**", [f"**{size(p.peaks['device'].total)}**" for p in found])
    row("**host, peak**", [f"**{size(p.peaks['host'].total)}**" for p in found])
    row("**disk**", [f"**{size(sum(p.disk_bytes.values()))}**" for p in found])
    row("**products**, PFLOP", [f"**{p.products / 1e15:,.0f}**" for p in found])
    for stage in ("allocation", "forward passes", "statistics", "solving"):
        row(f"... {stage}", [f"{p.stages[stage].products / 1e15:,.1f}" for p in found])
    for model_rate, float_rate in RATES:
        row(
            f"hours at {model_rate} and {float_rate} TFLOP/s",
            [f"{hours(p, model_rate * 1e12, float_rate * 1e12):,.1f}" for p in found],
        )
    return lines


def parts(name: str, plan: PruningPlan) -> list[str]:
    lines = [f"| {name} | |", "|---|---|"]
    for place, peak in plan.peaks.items():
        lines.append(f"| **{place}**, {peak.moment} | **{size(peak.total)}** |")
        shown = sorted(peak.parts.items(), key=lambda part: -part[1])
        lines += [f"| {part} | {size(held)} |" for part, held in shown if held >= 2**26]
    lines.append(f"| **disk** | **{size(sum(plan.disk_bytes.values()))}** |")
    lines += [f"| {part} | {size(held)} |" for part, held in plan.disk_bytes.items() if held]
    return lines


def split_rows(cost: SolveCost, operators: dict[str, tuple[int, int]]) -> list[str]:
    """Speed-up of solving when the rows are split and every rank makes the factorisations again."""
    lines = ["| operator | products, PFLOP | factorisations | 2 ranks | 4 ranks | 8 ranks |", "|---" * 6 + "|"]
    for name, (rows, columns) in operators.items():
        products, factor = cost.product_operations(rows, columns), cost.factor_operations(columns)
        gains = [(products + factor) / (products / ranks + factor) for ranks in (2, 4, 8)]
        shown = " | ".join(f"{gain:.1f}x" for gain in gains)
        lines.append(f"| {name}, {rows} x {columns} | {products / 1e15:.2f} | {factor / 1e15:.2f} | {shown} |")
    return lines


def tables() -> tuple[list[list[str]], dict[str, PruningPlan]]:
    """All tables of docs/scale.md in their order."""
    plans = {name: plan(name) for name in MODELS}
    cost = FistaPruningConfig().create_method("llama").cost()
    operators = {}
    for name, size_of in (("70B", MODELS["Llama-3-70B"]), ("405B", MODELS["Llama-3.1-405B"])):
        hidden, inner = size_of["hidden_size"], size_of["intermediate_size"]
        operators |= {f"{name} gate and up, stacked": (2 * inner, hidden), f"{name} down": (hidden, inner)}
    return [totals(plans), *(parts(name, p) for name, p in plans.items()), split_rows(cost, operators)], plans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found, plans = tables()
    print("\n\n".join("\n".join(table) for table in found))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        values = {name: p.to_dict() for name, p in plans.items()}
        arguments.output.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Time to prune a decoder layer with many small experts: solved together, and one after the other.

    python benchmarks/small_experts.py --output small_experts.json
    python benchmarks/small_experts.py --show benchmarks/results/small_experts.json

A random Qwen3-MoE model of one decoder layer is pruned on random tokens, to half of its weights by the default method.
Both ways run in turn, in one process and on one thread. In the first way, each group of operators that share their
inputs is solved alone. Times are of the processor, so that other programs matter less. The two results must be equal
bit for bit.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
import warnings
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from shared import parse_arguments, save
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig, PruningCallback
from optimum_fista.environment import processor_name
from optimum_fista.folder.card import markdown_lines
from optimum_fista.model import groups
from optimum_fista.prune import loop

WAYS = ("one by one", "together")
HELPS = {
    "show": "JSON file of an earlier call, to show it again",
    "experts": "numbers of experts, between commas",
    "hidden": "size of the hidden states, the inputs of gate and up projections",
    "intermediate": "inputs of the down projections",
    "batch_size": "sequences in a batch",
}


class LayerTime(PruningCallback):
    """Processor time of all decoder layers, from the first one's begin to the last one's end."""

    def __init__(self) -> None:
        """Begin without a time; the two methods below are called by the run."""
        self.seconds = 0.0
        self._started = 0.0

    def on_layers_begin(self, *_: Any) -> None:
        """Note when the layers begin."""
        self._started = time.process_time()

    def on_layer_end(self, *_: Any) -> None:
        """Note the time until now."""
        self.seconds = time.process_time() - self._started


def random_mixture(arguments: Namespace, num_experts: int) -> PreTrainedModel:
    """Make a random Qwen3-MoE model of one decoder layer, with weights of usual size; 8 experts for each token."""
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=arguments.hidden,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=512,
        moe_intermediate_size=arguments.intermediate,
        num_experts=num_experts,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    )
    torch.manual_seed(arguments.seed)
    model = Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model


def time_once(
    model: PreTrainedModel, batches: Sequence[torch.Tensor], way: str
) -> tuple[dict[str, float], PreTrainedModel]:
    """Prune a copy of a model in one of `WAYS`; returns the seconds of the layer and of its solver, and the copy."""
    pruned = copy.deepcopy(model)
    layer_time = LayerTime()
    solver_seconds = 0.0

    def solve_groups(*arguments: Any) -> Any:
        """Solve as the run does, and add the time."""
        nonlocal solver_seconds
        started = time.process_time()
        solutions = original(*arguments)
        solver_seconds += time.process_time() - started
        return solutions

    original = loop.solve_groups
    pruner = FistaPruner(FistaPruningConfig(), progress=False, callbacks=[layer_time])
    with mock.patch.object(loop, "solve_groups", solve_groups):
        if way == "together":
            pruner.prune(pruned, batches)
        else:
            with mock.patch.object(groups, "matrices_in_stack", return_value=1):
                pruner.prune(pruned, batches)
    return {"layer": layer_time.seconds, "solver": solver_seconds}, pruned


def measure(arguments: Namespace, num_experts: int) -> dict[str, Any]:
    """Time both ways in turn on one model, after a short run of each that warms up. Returns a row of the record."""
    model = random_mixture(arguments, num_experts)
    generator = torch.Generator().manual_seed(arguments.seed)
    shape = (arguments.num_samples, arguments.sequence_length)
    batches = torch.randint(512, shape, generator=generator).split(arguments.batch_size)
    for way in WAYS:
        time_once(model, batches[:1], way)

    seconds: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    is_equal = True
    for turn in range(1, arguments.rounds + 1):
        results = []
        for way in WAYS:
            times, pruned = time_once(model, batches, way)
            seconds[way].append(times)
            results.append(pruned.state_dict())
            print(f"{num_experts} experts, round {turn}, {way}: {times}", flush=True)
        first, second = results
        is_equal = is_equal and all(torch.equal(first[name], second[name]) for name in first)
    return {"experts": num_experts, "seconds": seconds, "bit_for_bit": is_equal}


def table(record: dict[str, Any]) -> list[str]:
    """Medians of the seconds of both ways, and the medians of their ratios by pairs."""
    lines = []
    for row in record["rows"]:
        pairs = list(zip(*(row["seconds"][way] for way in WAYS), strict=True))
        for part in ("solver", "layer"):
            alone = statistics.median(pair[0][part] for pair in pairs)
            together = statistics.median(pair[1][part] for pair in pairs)
            ratio = statistics.median(pair[0][part] / pair[1][part] for pair in pairs)
            lines.append((row["experts"], part, f"{alone:.2f}", f"{together:.2f}", f"{ratio:.1f}"))
    head = ("experts", "processor time of", *(f"{way}, s" for way in WAYS), "times as fast")
    return markdown_lines(head, lines)


def main() -> None:
    """Measure, unless the rows of an earlier call are shown, and print the table."""
    arguments = parse_arguments(
        __doc__,
        helps=HELPS,
        show=Path,
        experts=[128],
        hidden=256,
        intermediate=64,
        num_samples=32,
        sequence_length=512,
        batch_size=4,
        rounds=5,
        seed=0,
        output=Path("runs/small_experts.json"),
    )
    if arguments.show:
        print("\n".join(table(json.loads(arguments.show.read_text()))))
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = [measure(arguments, num_experts) for num_experts in arguments.experts]
    save(arguments, {"rows": rows, "processor": processor_name()})
    print("\n".join(table(json.loads(arguments.output.read_text()))))


if __name__ == "__main__":
    main()

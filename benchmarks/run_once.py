"""Prunes once in a process of its own, for benchmarks that measure it: `run_once.py JSON`.

Options: `source`, `output`, `samples`, `length`; `vocabulary` (256), `batch` (1), `dtype` ("auto"), `config` ({}),
`in_memory` (load, prune and save instead of pruning from files to files), `processor_time` (all clocks are the
processor's), `unseen` (sequences to measure the perplexity on, besides), `waits` (for a line, once everything is
imported).

Prints `ready`, and seconds at the end: `wall`, `processor`, and those of the report.
"""

import json
import sys
import time

OPTIONS = {"vocabulary": 256, "batch": 1, "config": {}, "dtype": "auto"} | json.loads(sys.argv[1])
if OPTIONS.get("processor_time"):
    time.perf_counter = time.process_time  # before the package is imported

import matplotlib.backends.backend_agg  # noqa: E402, F401, for the picture of the card
import torch  # noqa: E402
import transformers.core_model_loading  # noqa: E402, F401
from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: E402, F401

from optimum_fista import FistaPruner, FistaPruningConfig  # noqa: E402


def main() -> None:
    """Prune as `OPTIONS` say, on random tokens, and print the seconds."""
    generator = torch.Generator().manual_seed(0)
    samples = OPTIONS["samples"]
    unseen = OPTIONS.get("unseen", 0)
    shape = (samples + unseen, OPTIONS["length"])
    tokens = torch.randint(0, OPTIONS["vocabulary"], shape, generator=generator)
    batches = list(tokens[:samples].split(OPTIONS["batch"]))
    if unseen:
        batches.append({"input_ids": tokens[samples:], "held_out": True})
    config = FistaPruningConfig.from_dict(OPTIONS["config"])
    pruner = FistaPruner(config, progress=False)
    print("ready", flush=True)
    if OPTIONS.get("waits"):
        sys.stdin.readline()
    wall_started = time.perf_counter()
    processor_started = time.process_time()
    if OPTIONS.get("in_memory"):
        model = AutoModelForCausalLM.from_pretrained(OPTIONS["source"])
        report = pruner.prune(model, batches)
        pruner.save_pretrained(model, OPTIONS["output"])
    else:
        report = pruner.prune(
            OPTIONS["source"],
            batches,
            output_dir=OPTIONS["output"],
            device="cpu",
            dtype=OPTIONS["dtype"],
        )
    seconds = {
        "wall": time.perf_counter() - wall_started,
        "processor": time.process_time() - processor_started,
    }
    print(json.dumps(seconds | report.seconds), flush=True)


if __name__ == "__main__":
    main()

"""Write a random Llama in bfloat16 with the sizes of TinyLlama-1.1B, pruned by magnitude, for `speed.py`.

Random weights are enough, because the speed depends on the number of zeros, or on what was removed, alone.

    python benchmarks/random_llama.py --folder runs/llama
    python benchmarks/random_llama.py --folder runs/smaller --pattern channels:0.18+heads:0.5 --original runs/original
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from shared import parse_arguments, parse_config, save_llama

from optimum_fista import FistaPruner


def main() -> None:
    helps = {
        "folder": "where the pruned model is written",
        "pattern": "a fraction of zeros or a pattern",
        "original": "where the model is written before it is pruned; it is not kept without",
    }
    arguments = parse_arguments(
        __doc__, helps=helps, folder=Path("runs/llama"), layers=22, pattern="0.5", original=Path
    )
    pruner = FistaPruner(parse_config("magnitude", arguments.pattern))
    with tempfile.TemporaryDirectory() as temporary:
        original = arguments.original or Path(temporary)
        sizes = {"num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000}
        save_llama(original, 2048, 5632, arguments.layers, **sizes)
        pruner.prune(original, torch.arange(64).view(1, 64), output_dir=arguments.folder)


if __name__ == "__main__":
    main()

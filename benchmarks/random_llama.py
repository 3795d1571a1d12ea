"""Write a random Llama in bfloat16 with the sizes of TinyLlama-1.1B, pruned by magnitude, for `optimum-fista bench`.

Random weights are enough, because the speed depends on the number of zeros alone.

    python benchmarks/random_llama.py --folder runs/llama
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from shared import parse_arguments, save_llama

from optimum_fista import FistaPruner, FistaPruningConfig


def main() -> None:
    helps = {"folder": "where the pruned model is written"}
    arguments = parse_arguments(__doc__, helps=helps, folder=Path("runs/llama"), layers=22, sparsity=0.5)
    pruner = FistaPruner(FistaPruningConfig(sparsity=arguments.sparsity, method="magnitude"))
    with tempfile.TemporaryDirectory() as dense:
        sizes = {"num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000}
        save_llama(Path(dense), 2048, 5632, arguments.layers, **sizes)
        pruner.prune(dense, torch.arange(64).view(1, 64), output_dir=arguments.folder)


if __name__ == "__main__":
    main()

"""Decoding speed of a pruned model, dense and packed: `optimum-fista bench` on a random Llama of 1.1B, or on MODEL.

The random model has the sizes of TinyLlama-1.1B and is pruned by magnitude, because the speed depends on the number of
zeros alone. MODEL is pruned in the same way.

    python benchmarks/decoding.py --output benchmarks/results/decoding.json --plot docs/decoding.png
"""

from __future__ import annotations

import json
import tempfile
from argparse import Namespace
from pathlib import Path

import torch
from shared import parse_arguments, save_llama

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.run.checkpoints.loading import gguf_file, load_model
from optimum_fista.run.speed.measure import measure_speed
from optimum_fista.run.speed.speed_report import VARIANTS, SpeedSettings, draw_speed, speed_table

_HELP = {
    "model": "a model folder, or a folder with one GGUF file, instead of the random Llama",
    "name": "what the table calls it",
    "layers": "decoder layers of the random Llama",
}


def save_dense(arguments: Namespace, folder: Path) -> None:
    """Write the model in bfloat16."""
    if arguments.model is None:
        settings = {"num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000}
        save_llama(folder, 2048, 5632, arguments.layers, **settings)
        return
    model, tokenizer = load_model(arguments.model, device="cpu", dtype="bfloat16")
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def main() -> None:
    sizes = {"layers": 22, "sparsity": 0.5, "variants": list(VARIANTS[:3]), "batch_sizes": [1, 4, 16]}
    sizes |= {"prefill_tokens": 512, "new_tokens": 16, "rounds": 3, "threads": 2}
    files = {"output": Path("runs/decoding.json"), "plot": Path}
    arguments = parse_arguments(__doc__, helps=_HELP, model=str, name=str, **sizes, **files)
    torch.set_num_threads(arguments.threads)
    settings = SpeedSettings(
        variants=arguments.variants,
        batch_sizes=arguments.batch_sizes,
        new_tokens=arguments.new_tokens,
        prefill_tokens=arguments.prefill_tokens,
        rounds=arguments.rounds,
        threads=arguments.threads,
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        name = arguments.name or Path(arguments.model or "random Llama").name
        made = arguments.model is None or gguf_file(arguments.model) is not None
        dense = folder / "dense" if made else Path(arguments.model)
        if made:
            save_dense(arguments, dense)
        config = FistaPruningConfig(
            sparsity=arguments.sparsity, method="magnitude", allocation="uniform", error_correction="none"
        )
        FistaPruner(config).prune(dense, torch.arange(64).view(1, 64), output_dir=folder / name)
        report = measure_speed(folder / name, settings, progress=print)
    print(speed_table(report))
    values = report.to_dict() | {"sparsity": arguments.sparsity}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(values, indent=1) + "\n")
    if arguments.plot is not None:
        draw_speed(report, arguments.plot)


if __name__ == "__main__":
    main()

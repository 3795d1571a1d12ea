"""Decoding speed of a pruned model, dense and packed: `optimum-fista bench` on a random Llama of 1.1B, or on MODEL.

The random model has the sizes of TinyLlama-1.1B and is pruned by magnitude, because the speed depends on the number of
zeros alone. MODEL is pruned in the same way.

    python benchmarks/decoding.py --output benchmarks/results/decoding.json --plot docs/decoding.png
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.run.checkpoints.loading import gguf_file, load_model
from optimum_fista.run.speed.measure import VARIANTS, SpeedSettings, measure_speed
from optimum_fista.run.speed.table import draw_speed, speed_table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder, or a folder with one GGUF file, instead of the random Llama")
    parser.add_argument("--name", help="what the table calls it")
    parser.add_argument("--layers", type=int, default=22, help="decoder layers of the random Llama (default 22)")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--variants", default=",".join(VARIANTS[:3]))
    parser.add_argument("--batch-sizes", default="1,4,16")
    parser.add_argument("--prefill-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/decoding.json"))
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def save_dense(arguments: argparse.Namespace, folder: Path) -> None:
    """Write the model in bfloat16."""
    if arguments.model is not None:
        model, tokenizer = load_model(arguments.model, device="cpu", dtype="bfloat16")
        tokenizer.save_pretrained(folder)
    else:
        config = LlamaConfig(
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=arguments.layers,
            num_attention_heads=32,
            num_key_value_heads=4,
            vocab_size=32000,
            max_position_embeddings=2048,
        )
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).bfloat16()
    print(f"{model.num_parameters() / 1e6:,.0f} million parameters")
    model.save_pretrained(folder)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    settings = SpeedSettings(
        variants=arguments.variants.split(","),
        batch_sizes=[int(size) for size in arguments.batch_sizes.split(",")],
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

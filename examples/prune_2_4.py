"""Prune a model to 2:4, the pattern of sparse tensor cores, on your own text, and measure what it costs.

Two of every four consecutive inputs of a row are kept. The matrices that suffer most can be given another pattern.

python examples/prune_2_4.py --calibration texts.jsonl --test other.txt --output pruned-2-4
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_fista import (
    FistaPruner,
    FistaPruningConfig,
    calibration_tokens,
    evaluate_perplexity,
    evaluation_windows,
    load_text,
    verify_checkpoint,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id or model folder"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("pruned-2-4"), help="folder to write the model to"
    )
    parser.add_argument(
        "--calibration", default="self", help="text to calibrate on: .txt, .jsonl, c4, self, ..."
    )
    parser.add_argument(
        "--test", default="pydoc", help="text to measure on: .txt, .jsonl, wikitext2, pydoc, ..."
    )
    parser.add_argument("--num-samples", type=int, default=32, help="calibration sequences")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens a sequence")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto").to(device)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    length = arguments.sequence_length
    text = load_text(arguments.test, "test")
    windows = evaluation_windows(tokenizer, text, length, max_windows=16)
    dense = evaluate_perplexity(model, windows).perplexity

    tokens = calibration_tokens(
        arguments.calibration, model, tokenizer, arguments.num_samples, length
    )
    # Down projections get 25% zeros, anywhere.
    config = FistaPruningConfig(pattern="2:4", overrides={"*.down_proj": 0.25})
    pruner = FistaPruner(config)
    print(pruner.prune(model, tokens.split(1), calibration_source=arguments.calibration))
    sparse = evaluate_perplexity(model, windows).perplexity
    print(f"perplexity {dense:.2f} -> {sparse:.2f} on {arguments.test}")

    pruner.save_pretrained(model, arguments.output, tokenizer)
    # Reads the files again and checks every group of four.
    proven = verify_checkpoint(arguments.output)
    print(
        f"{proven.num_operators} operators keep their pattern: {proven.num_zeros:,} of {proven.num_weights:,} zero"
    )


if __name__ == "__main__":
    main()

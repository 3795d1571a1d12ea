"""Prune a model to 2:4, then win back part of what it lost by training the kept weights for minutes.

python examples/retrain_masked.py --calibration texts.jsonl --test other.txt --output retrained-2-4
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
    masked_training,
    verify_checkpoint,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id or model folder"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("retrained-2-4"), help="folder to write the model to"
    )
    parser.add_argument(
        "--calibration",
        default="self",
        help="text to prune and train on: .txt, .jsonl, c4, self, ...",
    )
    parser.add_argument(
        "--test", default="pydoc", help="text to measure on: .txt, .jsonl, wikitext2, pydoc, ..."
    )
    parser.add_argument(
        "--num-samples", type=int, default=64, help="sequences; each is a step of training"
    )
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens a sequence")
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    length = arguments.sequence_length
    text = load_text(arguments.test, "test")
    windows = evaluation_windows(tokenizer, text, length, max_windows=16)
    tokens = calibration_tokens(
        arguments.calibration, model, tokenizer, arguments.num_samples, length
    )

    # It is pruned on the first sequences, and trained on all of them.
    pruner = FistaPruner(FistaPruningConfig(pattern="2:4"))
    print(pruner.prune(model, tokens[:32].split(1), calibration_source=arguments.calibration))
    before = evaluate_perplexity(model, windows).perplexity

    # Inside masked_training, pruned weights stay zero whatever the optimizer does.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    with masked_training(model, pruner):
        for sequence in tokens.split(1):
            model(sequence, labels=sequence).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    after = evaluate_perplexity(model, windows).perplexity
    print(f"perplexity {before:.2f} -> {after:.2f} on {arguments.test}")

    # The report says that the model was retrained.
    pruner.save_pretrained(model, arguments.output, tokenizer)
    print(f"{verify_checkpoint(arguments.output).num_zeros:,} weights are still zero")


if __name__ == "__main__":
    main()

"""Prune a model to 2:4, then win back part of what it lost by training little of it for minutes (as PERP does).

Norms, biases and low-rank adapters are trained on the calibration text; the adapters are masked, so merging them keeps
every zero and changes no output. Needs PEFT: pip install '.[peft]'.

python examples/retrain_masked.py --calibration texts.jsonl --test other.txt --output retrained-2-4
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_fista import (
    FistaPruner,
    FistaPruningConfig,
    calibration_tokens,
    evaluate_perplexity,
    evaluation_windows,
    load_text,
    mask_adapters,
    merge_adapters,
    verify_checkpoint,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id or model folder")
    parser.add_argument("--output", type=Path, default=Path("retrained-2-4"), help="folder to write the model to")
    parser.add_argument("--calibration", default="self", help="text to prune and train on: .txt, .jsonl, c4, self, ...")
    parser.add_argument("--test", default="pydoc", help="text to measure on: .txt, .jsonl, wikitext2, pydoc, ...")
    parser.add_argument("--num-samples", type=int, default=64, help="sequences; each is a step of training")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens a sequence")
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    num_samples, length = arguments.num_samples, arguments.sequence_length
    windows = evaluation_windows(tokenizer, load_text(arguments.test, "test"), length, max_windows=16)
    tokens = calibration_tokens(arguments.calibration, model, tokenizer, num_samples, length)
    pruner = FistaPruner(FistaPruningConfig(pattern="2:4"))
    print(pruner.prune(model, tokens[:32].split(1), calibration_source=arguments.calibration))
    before = evaluate_perplexity(model, windows).perplexity

    adapters = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = mask_adapters(get_peft_model(model, adapters), pruner).train()
    trained = [p for name, p in model.named_parameters() if "lora_" in name or p.ndim == 1]  # norms and biases are 1-D
    optimizer = torch.optim.AdamW([p.requires_grad_() for p in trained], lr=5e-4)
    for sequence in tokens.split(1):
        peft_model(sequence, labels=sequence).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model = merge_adapters(peft_model)
    print(f"perplexity {before:.2f} -> {evaluate_perplexity(model, windows).perplexity:.2f} on {arguments.test}")
    pruner.save_pretrained(model, arguments.output, tokenizer)  # the report says that it was retrained
    print(f"{verify_checkpoint(arguments.output).num_zeros:,} weights are still zero")


if __name__ == "__main__":
    main()

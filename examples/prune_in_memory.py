"""Prune a model in memory to 50% zeros, save it, and load it again with plain Transformers.

python examples/prune_in_memory.py --model HuggingFaceTB/SmolLM2-135M-Instruct --output pruned-50
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_fista import FistaPruner, FistaPruningConfig, calibration_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id or model folder")
    parser.add_argument("--output", type=Path, default=Path("pruned-50"), help="folder to write the model to")
    parser.add_argument("--num-samples", type=int, default=32, help="calibration sequences")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens a sequence")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto").to(device)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)

    # "self": the model writes its own calibration text. A path to a .txt or .jsonl file, "wikitext2" or "c4"
    # work as well, and so does any iterable of {"input_ids": ..., "attention_mask": ...} in place of `batches`.
    tokens = calibration_tokens("self", model, tokenizer, arguments.num_samples, arguments.sequence_length)
    batches = tokens.split(1)  # one sequence a forward pass

    # Half of the weights of every linear operator of the decoder layers become zero; all else stays as it is.
    pruner = FistaPruner(FistaPruningConfig(sparsity=0.5))
    report = pruner.prune(model, batches, calibration_source="self")
    print(report)
    for operator in report.operators[:4]:
        print(f"{operator.name}: {operator.sparsity:.1%} zeros, fit error {operator.fit_error:.4f}")

    pruner.save_pretrained(model, arguments.output, tokenizer)
    reloaded = AutoModelForCausalLM.from_pretrained(arguments.output)
    prompt = tokenizer("The sea", return_tensors="pt")
    print(tokenizer.decode(reloaded.generate(**prompt, max_new_tokens=20, do_sample=False)[0]))


if __name__ == "__main__":
    main()

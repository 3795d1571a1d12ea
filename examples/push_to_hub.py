"""Prune a model and push it to the Hugging Face Hub, with its masks, its report and a model card.

Log in first with `hf auth login`, or set HF_TOKEN. The files stay in --output: if the upload fails, the error says
how to repeat it without pruning again.

python examples/push_to_hub.py --repo my-name/SmolLM2-135M-Instruct-50 --private
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_fista import FistaPruner, FistaPruningConfig, calibration_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id or model folder")
    parser.add_argument("--repo", required=True, help="model repository, created if it is absent")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--output", type=Path, default=Path("pruned-to-push"), help="folder to write the model to")
    parser.add_argument("--num-samples", type=int, default=32, help="calibration sequences")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens a sequence")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto").to(device)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokens = calibration_tokens("self", model, tokenizer, arguments.num_samples, arguments.sequence_length)

    pruner = FistaPruner(FistaPruningConfig(sparsity=0.5))
    print(pruner.prune(model, tokens.split(1), calibration_source="self"))
    url = pruner.push_to_hub(model, arguments.repo, tokenizer, folder=arguments.output, private=arguments.private)
    print(url)


if __name__ == "__main__":
    main()

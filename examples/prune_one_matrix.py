"""Prune a single matrix on inputs of your own and compare the methods, without touching a model.

It minimizes || W* X* - W X ||_F: here W is one linear operator of a model and X* = X what it sees in a text. Any
weight [out, in] with inputs [tokens, in] will do, wherever they come from.

python examples/prune_one_matrix.py --operator model.layers.3.mlp.down_proj
"""

import argparse

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_fista import calibration_windows, load_text
from optimum_fista.solve.methods import create_method
from optimum_fista.solve.patterns import parse_pattern
from optimum_fista.solve.problem import InputStatistics, LayerProblem


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id or model folder"
    )
    parser.add_argument(
        "--operator", default="model.layers.0.self_attn.o_proj", help="name of a linear operator"
    )
    parser.add_argument("--pattern", default="2:4", help="n:m or unstructured (50%%)")
    parser.add_argument("--num-samples", type=int, default=8, help="sequences")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens a sequence")
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    # Python's own documentation: English that needs no download.
    text = load_text("pydoc", "calibration")
    tokens = calibration_windows(
        tokenizer, text, arguments.num_samples, arguments.sequence_length, seed=0
    )

    operator = model.get_submodule(arguments.operator)
    inputs = inputs_of(operator, model, tokens)
    # For W* on other inputs X* than those of the dense network, pass `W X X*^T` and the squared norms of the rows of
    # `W X` as well.
    statistics = InputStatistics(inputs.T @ inputs, len(inputs), inputs.mean(0))
    problem = LayerProblem(operator.weight.detach(), statistics)
    pattern = parse_pattern(arguments.pattern)

    print(
        f"{arguments.operator} {tuple(operator.weight.shape)} on {len(inputs)} tokens, {arguments.pattern}"
    )
    for method in ("magnitude", "wanda", "sparsegpt", "fista"):
        pruned = create_method(method).prune(problem, pattern)
        penalty = "" if pruned.l1_penalty is None else f", penalty {pruned.l1_penalty:.3g}"
        print(
            f"{method:<10} fit error {pruned.fit_error:.4f}, {pruned.sparsity:.1%} zeros, "
            f"{pruned.iterations} iterations{penalty}"
        )


def inputs_of(operator: nn.Module, model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Run a model on token ids [sequences, length], and return the inputs of one of its modules, [tokens, in]."""
    batches: list[torch.Tensor] = []

    def keep_input(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        """Keep the input of the module; a forward pre-hook."""
        (inputs,) = arguments
        batches.append(inputs.flatten(0, 1))

    hook = operator.register_forward_pre_hook(keep_input)
    with torch.no_grad():
        model(tokens)
    hook.remove()
    return torch.cat(batches)


if __name__ == "__main__":
    main()

"""LLaMA-3-8B at 50% and 2:4: FISTAPruner, SparseGPT with and without error correction, Wanda.

How long the paper's windows are is not known here: the model's context, as in Wanda's scripts.

python examples/paper/llama_3_8b.py --model HuggingFaceTB/SmolLM2-135M-Instruct --num-samples 8 --sequence-length 2048
"""

from recipe import measure, show

PUBLISHED = {
    ("0.5", "paper"): {"wikitext2": 8.00},
    ("0.5", "sparsegpt"): {"wikitext2": 8.64},
    ("0.5", "sparsegpt:error_correction=intra"): {"wikitext2": 8.58},
    ("2:4", "paper"): {"wikitext2": 14.54},
    ("2:4", "sparsegpt"): {"wikitext2": 14.65},
    ("2:4", "wanda"): {"wikitext2": 22.56},
}


def main() -> None:
    comparison = measure(
        __doc__,
        "meta-llama/Meta-Llama-3-8B",
        "llama_3_8b",
        methods=["paper", "sparsegpt", "sparsegpt:error_correction=intra", "wanda", "default"],
        patterns=["0.5", "2:4"],
        texts=["wikitext2"],
        sequence_length=8192,
    )
    show(comparison, PUBLISHED)


if __name__ == "__main__":
    main()

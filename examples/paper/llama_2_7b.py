"""LLaMA-2-7B at 50%: FISTAPruner, ADMM, SparseGPT, Wanda.

How long the paper's windows are is not known here: the model's context, as in Wanda's scripts.

python examples/paper/llama_2_7b.py --model HuggingFaceTB/SmolLM2-135M-Instruct --num-samples 8 --sequence-length 2048
"""

from recipe import measure, show

PUBLISHED = {
    ("0.5", "paper"): {"wikitext2": 6.35},
    ("0.5", "admm"): {"wikitext2": 6.33},
    ("0.5", "sparsegpt"): {"wikitext2": 6.54},
    ("0.5", "wanda"): {"wikitext2": 6.46},
}


def main() -> None:
    comparison = measure(
        __doc__,
        "meta-llama/Llama-2-7b-hf",
        "llama_2_7b",
        methods=["paper", "admm", "sparsegpt", "wanda", "default"],
        patterns=["0.5"],
        texts=["wikitext2"],
        sequence_length=4096,
    )
    show(comparison, PUBLISHED)


if __name__ == "__main__":
    main()

"""LLaMA-2-70B at 50% and 2:4: FISTAPruner, SparseGPT, Wanda.

How long the paper's windows are is not known here: the model's context, as in Wanda's scripts.
That the second and third value are those of SparseGPT and Wanda is the order of the other tables.

python examples/paper/llama_2_70b.py --model HuggingFaceTB/SmolLM2-135M-Instruct --num-samples 8 --sequence-length 2048
"""

from recipe import measure, show

PUBLISHED = {
    ("0.5", "paper"): {"wikitext2": 3.93},
    ("0.5", "sparsegpt"): {"wikitext2": 3.99},
    ("0.5", "wanda"): {"wikitext2": 3.97},
    ("2:4", "paper"): {"wikitext2": 5.16},
    ("2:4", "sparsegpt"): {"wikitext2": 5.38},
    ("2:4", "wanda"): {"wikitext2": 5.20},
}


def main() -> None:
    comparison = measure(
        __doc__,
        "meta-llama/Llama-2-70b-hf",
        "llama_2_70b",
        methods=["paper", "sparsegpt", "wanda", "default"],
        patterns=["0.5", "2:4"],
        texts=["wikitext2"],
        sequence_length=4096,
        device_map="auto",
    )
    show(comparison, PUBLISHED)


if __name__ == "__main__":
    main()

"""OPT-125M at 2:4: FISTAPruner with and without error correction, SparseGPT, Wanda.

python examples/paper/opt_125m_2_4.py --model HuggingFaceTB/SmolLM2-135M-Instruct --num-samples 8
"""

from recipe import measure, show

PUBLISHED = {
    ("-", "dense"): {"wikitext2": 27.66, "c4": 26.56, "ptb": 38.99},
    ("2:4", "paper"): {"wikitext2": 45.16, "c4": 38.08, "ptb": 67.80},
    ("2:4", "paper:error_correction=none"): {"wikitext2": 55.14, "c4": 48.53, "ptb": 90.57},
    ("2:4", "sparsegpt"): {"wikitext2": 60.02, "c4": 52.11, "ptb": 94.21},
    ("2:4", "wanda"): {"wikitext2": 80.32, "c4": 64.73, "ptb": 111.55},
}


def main() -> None:
    comparison = measure(
        __doc__,
        "facebook/opt-125m",
        "opt_125m_2_4",
        methods=["paper", "paper:error_correction=none", "sparsegpt", "wanda", "default"],
        patterns=["2:4"],
        texts=["wikitext2", "c4", "ptb"],
        sequence_length=2048,
    )
    show(comparison, PUBLISHED)


if __name__ == "__main__":
    main()

"""OPT-125M at 50%: FISTAPruner, SparseGPT with and without error correction, Wanda, magnitude.

python examples/paper/opt_125m_50.py --model HuggingFaceTB/SmolLM2-135M-Instruct --num-samples 8
"""

from recipe import measure, show

PUBLISHED = {
    ("-", "dense"): {"wikitext2": 27.66},
    ("0.5", "paper"): {"wikitext2": 33.54},
    ("0.5", "sparsegpt"): {"wikitext2": 37.01},
    ("0.5", "sparsegpt:error_correction=intra"): {"wikitext2": 36.83},
    ("0.5", "wanda"): {"wikitext2": 38.96},
    ("0.5", "magnitude"): {"wikitext2": 193.35},
}


def main() -> None:
    comparison = measure(
        __doc__,
        "facebook/opt-125m",
        "opt_125m_50",
        methods=["paper", "sparsegpt", "sparsegpt:error_correction=intra", "wanda", "magnitude", "default"],
        patterns=["0.5"],
        texts=["wikitext2"],
        sequence_length=2048,
    )
    show(comparison, PUBLISHED)


if __name__ == "__main__":
    main()

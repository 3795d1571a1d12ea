"""OPT-125M at 5 to 50%: errors corrected inside decoder layers, between them as well, or not at all.

python examples/paper/opt_125m_correction.py --model HuggingFaceTB/SmolLM2-135M-Instruct --num-samples 8
"""

from recipe import measure, show

INTRA, BOTH, NONE = "paper", "paper:error_correction=full", "paper:error_correction=none"
PUBLISHED = {
    ("-", "dense"): {"wikitext2": 27.66, "c4": 26.56, "ptb": 38.99},
    ("0.05", INTRA): {"wikitext2": 27.64, "c4": 26.57, "ptb": 38.99},
    ("0.05", BOTH): {"wikitext2": 27.63, "c4": 26.56, "ptb": 38.98},
    ("0.05", NONE): {"wikitext2": 27.69, "c4": 26.60, "ptb": 38.98},
    ("0.1", INTRA): {"wikitext2": 27.47, "c4": 26.59, "ptb": 39.00},
    ("0.1", BOTH): {"wikitext2": 27.43, "c4": 26.58, "ptb": 39.04},
    ("0.1", NONE): {"wikitext2": 27.52, "c4": 26.69, "ptb": 39.07},
    ("0.2", INTRA): {"wikitext2": 27.36, "c4": 26.71, "ptb": 39.39},
    ("0.2", BOTH): {"wikitext2": 27.37, "c4": 26.72, "ptb": 39.53},
    ("0.2", NONE): {"wikitext2": 27.61, "c4": 26.91, "ptb": 39.85},
    ("0.5", INTRA): {"wikitext2": 33.54, "c4": 30.93, "ptb": 49.79},
    ("0.5", BOTH): {"wikitext2": 35.90, "c4": 32.93, "ptb": 55.24},
    ("0.5", NONE): {"wikitext2": 34.48, "c4": 32.24, "ptb": 54.11},
}


def main() -> None:
    comparison = measure(
        __doc__,
        "facebook/opt-125m",
        "opt_125m_correction",
        methods=[INTRA, BOTH, NONE],
        patterns=["0.05", "0.1", "0.2", "0.5"],
        texts=["wikitext2", "c4", "ptb"],
        sequence_length=2048,
    )
    show(comparison, PUBLISHED)


if __name__ == "__main__":
    main()

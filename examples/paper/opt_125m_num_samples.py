"""OPT-125M at 50%: the number of calibration sequences.

Only the value for 128 sequences is published as a number.

python examples/paper/opt_125m_num_samples.py --model HuggingFaceTB/SmolLM2-135M-Instruct --max-windows 20
"""

from recipe import measure, show

PUBLISHED = {
    ("-", "dense, 2 sequences"): {"wikitext2": 27.66},
    ("0.5", "paper, 128 sequences"): {"wikitext2": 33.54},
    ("0.5", "sparsegpt, 128 sequences"): {"wikitext2": 37.01},
    ("0.5", "wanda, 128 sequences"): {"wikitext2": 38.96},
}


def main() -> None:
    comparison = measure(
        __doc__,
        "facebook/opt-125m",
        "opt_125m_num_samples",
        methods=["paper", "sparsegpt", "wanda", "default"],
        patterns=["0.5"],
        texts=["wikitext2"],
        sequence_length=2048,
        num_samples=(2, 8, 32, 128),
    )
    show(comparison, PUBLISHED)


if __name__ == "__main__":
    main()

"""OPT-125M at 50%: where FISTA starts from.

The paper starts from SparseGPT's result for OPT (33.54) and gives 38.62 for a worse start, dense or magnitude.

python examples/paper/opt_125m_warm_starts.py --model HuggingFaceTB/SmolLM2-135M-Instruct --num-samples 8
"""

from recipe import measure, show

STARTS = ("sparsegpt", "wanda", "magnitude", "dense")
PUBLISHED = {("-", "dense"): {"wikitext2": 27.66}, ("0.5", "paper:warm_start=sparsegpt"): {"wikitext2": 33.54}}


def main() -> None:
    comparison = measure(
        __doc__,
        "facebook/opt-125m",
        "opt_125m_warm_starts",
        methods=[f"paper:warm_start={start}" for start in STARTS],
        patterns=["0.5"],
        texts=["wikitext2"],
        sequence_length=2048,
    )
    show(comparison, PUBLISHED)


if __name__ == "__main__":
    main()

"""LLaMA-3-70B at 50% and 2:4: how much of the dense model's zero-shot accuracy is left.

The tasks are the usual ones of the pruning literature; which ones the paper averaged is not certain.

python examples/paper/llama_3_70b.py --model HuggingFaceTB/SmolLM2-135M-Instruct --num-samples 8 --limit 100
"""

from recipe import measure, show

KEPT = {("0.5", "paper"): 0.986, ("2:4", "paper"): 0.956}


def main() -> None:
    comparison = measure(
        __doc__,
        "meta-llama/Meta-Llama-3-70B",
        "llama_3_70b",
        methods=["paper", "default"],
        patterns=["0.5", "2:4"],
        texts=[],
        tasks=["arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "rte", "winogrande"],
        sequence_length=2048,
        device_map="auto",
    )
    show(comparison, kept=KEPT)


if __name__ == "__main__":
    main()

"""Peak memory of pruning from files to files, against the size of the model.

Writes a random bfloat16 Llama of equal decoder layers, prunes it in a process of its own, and samples that process's
anonymous memory (not the pages of files) over time. The peak counts from what the imports take.

    python benchmarks/memory.py --layers 24,48 --plot docs/memory.png
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from shared import parse_arguments, save, save_llama, thinned, watched

_HELP = {
    "layers": "decoder layers of each run",
    "fewer_steps": "a step of each kind: the same memory, less time",
}


def measure(arguments: Namespace, layers: int) -> dict[str, Any]:
    """Measure the peak, and the memory over time, of pruning a model of that many decoder layers."""
    steps = {}
    if arguments.fewer_steps:
        steps = {"stages": 1, "iterations": 2, "refit_iterations": 1}
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "source"
        save_llama(source, arguments.hidden, arguments.ffn, layers)
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        imports, samples, _ = watched(
            source=source,
            output=Path(temporary) / "out",
            config={"method_options": steps},
            samples=arguments.num_samples,
            length=arguments.sequence_length,
        )
    # After the end of the process no memory is held.
    curve = [(moment, held - imports) for moment, held in samples if held]
    peak = max(held for _, held in curve)
    print(
        f"{layers} layers: model {size / 2**20:.0f} MiB, peak {peak / 2**20:.0f} MiB, {peak / size:.0%}",
        flush=True,
    )
    return {"layers": layers, "model_bytes": size, "peak_bytes": peak, "curve": thinned(curve)}


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the memory over time, a panel for each run, with the size of the model."""
    import matplotlib.pyplot as plt

    size = (5.5 * len(runs), 3.6)
    figure, axes = plt.subplots(1, len(runs), figsize=size, layout="constrained", squeeze=False)
    for axis, run in zip(axes[0], runs, strict=True):
        seconds, held = zip(*run["curve"], strict=True)
        mebibytes = [value / 2**20 for value in held]
        axis.plot(seconds, mebibytes, linewidth=0.8, label="anonymous memory above the imports")
        axis.axhline(
            run["model_bytes"] / 2**20, color="black", linestyle="--", label="the whole model"
        )
        axis.set(
            title=f"{run['layers']} decoder layers", xlabel="seconds", ylabel="MiB", ylim=(0, None)
        )
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure all runs, write the record, and draw if asked to."""
    arguments = parse_arguments(
        __doc__,
        helps=_HELP,
        layers=[24],
        hidden=768,
        ffn=3072,
        num_samples=8,
        sequence_length=512,
        fewer_steps=False,
        output=Path("runs/memory.json"),
        plot=Path,
    )
    runs = [measure(arguments, layers) for layers in arguments.layers]
    save(arguments, {"runs": runs})
    if arguments.plot:
        plot(runs, arguments.plot)


if __name__ == "__main__":
    main()

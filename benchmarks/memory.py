"""Peak memory of pruning from files to files, against the size of the model.

Writes a random bfloat16 Llama of equal decoder layers, prunes it in a process of its own, and samples that process's
anonymous memory (not the pages of files) over time. The peak counts from what the imports take.

    python benchmarks/memory.py --layers 24,48 --plot docs/memory.png
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

_RUN = """
import json, sys, torch
from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.run.memory.free_memory import keep_large_blocks_apart
from optimum_fista.run.streamed import streaming
from transformers import AutoModelForCausalLM, LlamaForCausalLM
import transformers.core_model_loading
samples, length, options = int(sys.argv[3]), int(sys.argv[4]), json.loads(sys.argv[5])
tokens = torch.randint(0, 256, (samples, length), generator=torch.Generator().manual_seed(0))
keep_large_blocks_apart()  # as the command line does
print("ready", flush=True)
sys.stdin.readline()
config = FistaPruningConfig(method_options=options["method_options"])
pruner = FistaPruner(config, progress=False, storage_device=options["storage_device"])
pruner.prune(sys.argv[1], tokens.split(1), output_dir=sys.argv[2])
"""

SETTINGS = ("hidden", "ffn", "num_samples", "sequence_length", "storage_device", "fewer_steps")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="24", help="decoder layers of each run, such as 24,48")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--ffn", type=int, default=3072)
    parser.add_argument("--num-samples", type=int, default=8, help="calibration sequences")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--storage-device", help="where activations wait; default: files beside the output")
    parser.add_argument("--fewer-steps", action="store_true", help="a step of each kind: the same memory, less time")
    parser.add_argument("--output", type=Path, default=Path("runs/memory.json"))
    parser.add_argument("--append", action="store_true", help="keep the runs that --output already holds")
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def anonymous(process: int) -> int:
    """Anonymous memory of a process in bytes; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def measure(arguments: argparse.Namespace, layers: int) -> dict:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = LlamaConfig(
            hidden_size=arguments.hidden,
            intermediate_size=arguments.ffn,
            num_hidden_layers=layers,
            num_attention_heads=12,
            vocab_size=256,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "source")
        size = sum(file.stat().st_size for file in (folder / "source").glob("*.safetensors"))
        command = [sys.executable, "-c", _RUN, str(folder / "source"), str(folder / "out")]
        steps = {"stages": 1, "iterations": 2, "refit_iterations": 1} if arguments.fewer_steps else {}
        options = {"storage_device": arguments.storage_device, "method_options": steps}
        command += [str(arguments.num_samples), str(arguments.sequence_length), json.dumps(options)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        imports = anonymous(process.pid)
        process.stdin.write("go\n")
        process.stdin.flush()
        started, curve = time.perf_counter(), []
        while process.poll() is None:
            held = anonymous(process.pid)
            if held:
                curve.append((round(time.perf_counter() - started, 3), held - imports))
            time.sleep(0.02)
        if process.returncode:
            raise SystemExit(f"the run of {layers} layers failed")
    peak = max(held for _, held in curve)
    print(f"{layers} layers: model {size / 2**20:.0f} MiB, peak {peak / 2**20:.0f} MiB, {peak / size:.0%}", flush=True)
    settings = {key: getattr(arguments, key) for key in SETTINGS}
    sizes = {"model_bytes": size, "import_bytes": imports, "peak_bytes": peak}
    return {"layers": layers, **settings, "seconds": curve[-1][0], **sizes, "curve": thinned(curve)}


def thinned(curve: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """The largest value of every 500th of the time."""
    step = curve[-1][0] / 500 or 1.0
    largest: dict[int, tuple[float, int]] = {}
    for moment, held in curve:
        place = int(moment / step)
        largest[place] = max(largest.get(place, (moment, held)), (moment, held), key=lambda point: point[1])
    return list(largest.values())


def plot(runs: list[dict], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(runs), figsize=(5.5 * len(runs), 3.6), layout="constrained", squeeze=False)
    for axis, run in zip(axes[0], runs, strict=True):
        times, held = zip(*run["curve"], strict=True)
        axis.plot(times, [value / 2**20 for value in held], linewidth=0.8, label="anonymous memory above the imports")
        axis.axhline(run["model_bytes"] / 2**20, color="black", linestyle="--", label="the whole model")
        axis.set(title=f"{run['layers']} decoder layers", xlabel="seconds", ylabel="MiB", ylim=(0, None))
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    arguments = parse_arguments()
    runs = [measure(arguments, int(layers)) for layers in arguments.layers.split(",")]
    if arguments.append and arguments.output.exists():
        runs = json.loads(arguments.output.read_text())["runs"] + runs
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"runs": runs}))
    if arguments.plot:
        plot(runs, arguments.plot)


if __name__ == "__main__":
    main()

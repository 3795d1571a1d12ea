"""Prune with the activations of the calibration text in CPU memory, so that the GPU holds little but the model.

Between two decoder layers the hidden states of all calibration tokens wait somewhere: 128 sequences of 2048
tokens with 4096 features in bfloat16 take 2 GB, twice as much if errors are corrected from layer to layer (the
default). With storage_device="cpu" they wait in CPU memory and visit the GPU one batch at a time.

The weights can wait elsewhere, too: --device-map auto, or cpu or disk for all of them, has Accelerate offload what does
not fit, and one decoder layer is on the GPU at a time.

python examples/prune_offloaded.py --model HuggingFaceTB/SmolLM2-135M-Instruct --output pruned-offloaded
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_fista import FistaPruner, FistaPruningConfig, calibration_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id or model folder"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("pruned-offloaded"), help="folder to write the model to"
    )
    parser.add_argument("--num-samples", type=int, default=64, help="calibration sequences")
    parser.add_argument("--sequence-length", type=int, default=1024, help="tokens a sequence")
    parser.add_argument(
        "--device-map", help="Accelerate's device_map: auto, cpu, disk (default: all on the device)"
    )
    arguments = parser.parse_args()

    has_gpu = torch.cuda.is_available()
    device_map = arguments.device_map
    if device_map == "disk":
        device_map = {"": "disk"}  # all modules; Accelerate has no word for that
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype="auto", device_map=device_map
    )
    if device_map is None:
        model = model.to("cuda" if has_gpu else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokens = calibration_tokens(
        "self", model, tokenizer, arguments.num_samples, arguments.sequence_length
    )

    pruner = FistaPruner(FistaPruningConfig(sparsity=0.5), storage_device="cpu")
    # Batches of one sequence take least memory.
    report = pruner.prune(model, tokens.split(1), calibration_source="self")
    print(report)
    peaks = []
    for layer in report.layers:
        if layer.memory is not None:
            # Without a GPU there are no bytes of a device.
            peaks.append(layer.memory.device_bytes or layer.memory.resident_bytes)
    place = "on the GPU" if has_gpu else "of the process"
    print(f"peak memory {max(peaks) / 2**30:.1f} GiB {place}")
    pruner.save_pretrained(model, arguments.output, tokenizer)


if __name__ == "__main__":
    main()

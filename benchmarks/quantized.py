"""Bits per byte and bytes of what other tools made of a folder (docs/howto/quantize.md): GGUF files, and folders.

Weights are dequantized to float32 and measured as `frontier.py` does, on the first `--bytes` of every text, whatever
kernels the tool itself would use. Folders of compressed-tensors need `pip install '.[compressed-tensors]'`. The weights
of AutoRound and GPTQModel are unpacked here; all their tensors that are not quantized must be those of DIR. Of a file,
the bytes of all tensors count; of a folder, 16 bits for each number that is not quantized.

    python benchmarks/quantized.py DIR --results IQ4_NL.gguf,DIR-autoround/DIR-w4g32 --texts TEXT1,TEXT2
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import gguf
import torch
from ablations import geometric_mean
from frontier import bits_per_byte, starts_of
from safetensors.torch import load_file
from shared import open_record, parse_arguments, save
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_fista.source.loading import load_model, require_tokenizer


def unpacked(numbers: Tensor, dim: int) -> Tensor:
    """Unpack eight numbers of 4 bits from each int32; they are side by side along the dimension `dim`."""
    parts = [(numbers >> 4 * place) & 15 for place in range(8)]
    return torch.stack(parts, dim + 1).flatten(dim, dim + 1)


def with_unpacked(model: PreTrainedModel, tensors: dict[str, Tensor]) -> PreTrainedModel:
    """Put weights, int32 [in / 8, out] with scales [groups, out], in the place of a model's [out, in]."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        base, _, kind = name.rpartition(".")
        if kind == "weight" and not torch.equal(parameters[name].to(tensor.dtype), tensor):
            raise SystemExit(f"{name} is not that of DIR.")
        if kind == "qweight":
            scales = tensors[f"{base}.scales"].float()  # [groups, out]
            values = unpacked(tensor, 0)  # [in, out]
            zeros = unpacked(tensors[f"{base}.qzeros"], 1)  # [groups, out]
            # of symmetric weights: 8, which the format of GPTQ stores less 1
            zeros = zeros + (zeros == 7)
            group = len(values) // len(scales)
            zeros_of_inputs = zeros.repeat_interleave(group, 0)
            scales_of_inputs = scales.repeat_interleave(group, 0)
            dense = (values - zeros_of_inputs) * scales_of_inputs
            parameters[f"{base}.weight"].data.copy_(dense.T)
    return model


def opened(folder: str, result: str) -> tuple[PreTrainedModel, int]:
    """The dequantized model of a result, and the bytes that it takes."""
    file = Path(result)
    if file.suffix == ".gguf":
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
        return model, sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(file).tensors)
    tensors: dict[str, Tensor] = {}
    for part in sorted(file.glob("*.safetensors")):
        tensors |= load_file(part)
    num_bytes = 0
    for tensor in tensors.values():
        is_packed = tensor.dtype in (torch.int32, torch.int64)
        num_bytes += tensor.nbytes if is_packed else 2 * tensor.numel()
    is_unpacked_here = any(name.endswith(".qweight") for name in tensors)
    if not is_unpacked_here:
        model, _ = load_model(result, dtype="float32", device="cpu")
        return model, num_bytes
    model, _ = load_model(folder, dtype="float32", device="cpu")
    return with_unpacked(model, tensors), num_bytes


def measure(arguments: Namespace, result: str, texts: dict[str, str]) -> dict[str, Any]:
    """A row: a result of a tool, or DIR itself."""
    model, size = opened(arguments.model, result)
    tokenizer = require_tokenizer(arguments.model)
    with torch.autocast("cpu", torch.bfloat16):
        losses = {
            name: bits_per_byte(model.eval(), tokenizer, text, 512) for name, text in texts.items()
        }
    return {
        "result": Path(result).name,
        "bytes": size,
        "bits_per_byte": losses,
        "mean": geometric_mean(losses.values()),
    }


def main() -> None:
    """Measure the results that the output file lacks."""
    helps = {
        "results": "GGUF files and folders that were made of the model",
        "bytes": "of each text to measure on",
    }
    arguments = parse_arguments(
        __doc__,
        "model",
        "texts",
        "results",
        helps=helps,
        bytes=30_000,
        threads=1,
        output=Path("runs/quantized.json"),
    )
    torch.set_num_threads(arguments.threads)
    texts = starts_of(arguments)
    record = open_record(arguments, "results", "threads")
    for result in [arguments.model, *arguments.results.split(",")]:
        if not any(row["result"] == Path(result).name for row in record["rows"]):
            record["rows"].append(measure(arguments, result, texts))
            save(arguments, record)
            print(record["rows"][-1], flush=True)


if __name__ == "__main__":
    main()

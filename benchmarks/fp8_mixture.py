"""Memory and time of removing experts from a large mixture in FP8, from files to files.

Writes a random mixture with the shapes of Qwen3-30B-A3B in fine-grained FP8 (by default 20 GB, 128 experts in each of
32 decoder layers), prunes it in a process of its own, and samples that process's anonymous memory, which does not count
the pages of files. Beside it stands the estimate that `optimum-fista prune --dry-run` prints. Needs twice the model's
bytes of disk. A model that an earlier call has written into `--folder` is used again.

    python benchmarks/fp8_mixture.py --folder runs/fp8 --output runs/fp8_mixture.json

Calibrated on one text, the run refits no expert, and the experts that stay keep their bytes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from shared import parse_arguments, save, thinned, watched
from torch import Tensor
from transformers import Qwen3MoeConfig

from optimum_fista.config import FistaPruningConfig
from optimum_fista.environment import processor_name
from optimum_fista.estimate.estimate import Estimate

BLOCK = 128  # rows and columns that share a scale
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
    "modules_to_not_convert": ["lm_head"],
}
# Of every block: values are about 0.7, so that weights are about 0.02.
SCALE = 0.03
INDEX = "model.safetensors.index.json"


def mixture_config(num_layers: int) -> Qwen3MoeConfig:
    """The configuration of Qwen3-30B-A3B with another number of decoder layers."""
    return Qwen3MoeConfig(
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=151_936,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        architectures=["Qwen3MoeForCausalLM"],
        dtype="bfloat16",
    )


def random_fp8(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Draw a matrix [rows, columns] in FP8 (e4m3): signs and mantissas are random, and sizes from 0.5 to 0.94."""
    drawn = torch.empty(rows * columns // 8, dtype=torch.int64)
    drawn.random_(generator=generator)
    numbers = drawn.view(torch.uint8)
    numbers &= 0b1000_0111  # the sign and the mantissa stay
    numbers |= 0b0011_0000  # the exponent of 0.5
    return numbers.view(torch.float8_e4m3fn).view(rows, columns)


def layer_tensors(
    config: Qwen3MoeConfig, number: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Draw the tensors of a decoder layer as its file has them; matrices but the router are in FP8 with scales."""
    hidden = config.hidden_size
    of_experts = config.moe_intermediate_size
    of_queries = config.num_attention_heads * config.head_dim
    of_keys = config.num_key_value_heads * config.head_dim
    shapes = {
        "self_attn.q_proj": (of_queries, hidden),
        "self_attn.k_proj": (of_keys, hidden),
        "self_attn.v_proj": (of_keys, hidden),
        "self_attn.o_proj": (hidden, of_queries),
    }
    for expert in range(config.num_experts):
        shapes[f"mlp.experts.{expert}.gate_proj"] = (of_experts, hidden)
        shapes[f"mlp.experts.{expert}.up_proj"] = (of_experts, hidden)
        shapes[f"mlp.experts.{expert}.down_proj"] = (hidden, of_experts)

    tensors = {}
    for module, (rows, columns) in shapes.items():
        tensors[f"{module}.weight"] = random_fp8(rows, columns, generator)
        scales = torch.full((rows // BLOCK, columns // BLOCK), SCALE)
        tensors[f"{module}.weight_scale_inv"] = scales
    router = torch.randn(config.num_experts, hidden, generator=generator) * SCALE
    tensors["mlp.gate.weight"] = router.bfloat16()
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    for norm in ("self_attn.q_norm", "self_attn.k_norm"):
        tensors[f"{norm}.weight"] = torch.ones(config.head_dim, dtype=torch.bfloat16)
    return {f"model.layers.{number}.{name}": tensor for name, tensor in tensors.items()}


def write_mixture(folder: Path, config: Qwen3MoeConfig) -> None:
    """Write a random mixture, a file for each decoder layer; the index comes last and says that all is there.

    `BLOCK` divides the rows and columns of all matrices in the decoder layers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = config.to_dict() | {"quantization_config": QUANTIZATION}
    (folder / "config.json").write_text(json.dumps(settings, indent=2))

    generator = torch.Generator().manual_seed(0)
    file_by_tensor: dict[str, str] = {}

    def write(file: str, tensors: dict[str, Tensor]) -> None:
        """Write a file, and note it for the index."""
        save_file(tensors, folder / file, {"format": "pt"})
        file_by_tensor.update(dict.fromkeys(tensors, file))
        print(file, flush=True)

    for number in range(config.num_hidden_layers):
        write(f"layer-{number:02}.safetensors", layer_tensors(config, number, generator))
    shape = (config.vocab_size, config.hidden_size)
    others = {
        name: (torch.randn(shape, generator=generator) * SCALE).bfloat16()
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    others["model.norm.weight"] = torch.ones(config.hidden_size, dtype=torch.bfloat16)
    write("others.safetensors", others)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": file_by_tensor}))


def bytes_of(folder: Path) -> int:
    """Count the bytes of the weights in a model folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def measure(
    source: Path, output: Path, config: dict[str, Any], *, num_samples: int, length: int
) -> dict[str, Any]:
    """Estimate a run on random tokens, and measure its memory and time; its result in `output` is deleted again."""
    estimate = Estimate(
        source,
        FistaPruningConfig.from_dict(config),
        num_samples=num_samples,
        sequence_length=length,
        batch_size=1,
        device="cpu",
        measures_perplexity=False,
    )
    parts = estimate.memory["host"]
    # `held_bytes` has what the process held at each moment: 0 once it had ended.
    import_bytes, held_bytes, seconds = watched(
        source=source,
        output=output,
        samples=num_samples,
        length=length,
        vocabulary=estimate.vocabulary,
        config=config,
    )
    curve = [(moment, held) for moment, held in held_bytes if held]
    row = {
        "pattern": config["pattern"],
        "num_tokens": num_samples * length,
        "source_bytes": bytes_of(source),
        "result_bytes": bytes_of(output),
        "import_bytes": import_bytes,
        "estimated_bytes": sum(parts.values()),
        "estimated_parts": parts,
        "peak_bytes": max(held for _, held in curve),
        "seconds": seconds,
        "processor": processor_name(),
        "curve": thinned(curve),
    }
    shutil.rmtree(output)
    return row


def main() -> None:
    """Write the model if it is not there, measure the run, and write the record."""
    helps = {
        "folder": "for the model, and for the result until it is measured",
        "layers": "decoder layers; 0.62 GB each",
        "pattern": "what is removed",
    }
    arguments = parse_arguments(
        __doc__,
        helps=helps,
        folder=Path("runs/fp8"),
        layers=32,
        pattern="experts:0.25",
        num_samples=8,
        sequence_length=512,
        output=Path("runs/fp8_mixture.json"),
    )
    source = arguments.folder / f"mixture-{arguments.layers}"
    if not (source / INDEX).exists():
        write_mixture(source, mixture_config(arguments.layers))
    row = measure(
        source,
        arguments.folder / "pruned",
        {"pattern": arguments.pattern},
        num_samples=arguments.num_samples,
        length=arguments.sequence_length,
    )
    save(arguments, {"runs": [row]})
    print(
        f"{row['source_bytes'] / 1e9:.1f} GB of weights, {row['result_bytes'] / 1e9:.1f} GB left: peak "
        f"{row['peak_bytes'] / 1e9:.2f} GB, {row['estimated_bytes'] / 1e9:.2f} GB estimated; {row['seconds']}"
    )


if __name__ == "__main__":
    main()

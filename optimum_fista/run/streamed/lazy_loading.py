"""Models whose weights stay in their files until they are needed."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_fista.model.offload import move_execution
from optimum_fista.run.checkpoints.loading import (
    floating_dtype,
    gguf_file,
    load_model,
    load_tokenizer,
    read_model,
    usable_device,
)


def load_lazily(
    name: str, offload_folder: Path, *, device: str | None = None, dtype: str | torch.dtype = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A model whose weights stay in its files until they are needed, and its tokenizer where it has one.

    The weights of a GGUF file are dequantized in memory, because they can't be read one at a time.

    Raises:
        ValueError: If `name` is a folder without a model, its files are damaged, or the device or dtype can't be used.
    """
    if gguf_file(name) is not None:
        return load_model(name, device=device, dtype=dtype)
    target = usable_device(device)
    model = read_model(
        name,
        dtype=dtype if dtype == "auto" else floating_dtype(dtype),
        device_map={"": "disk"},
        offload_folder=offload_folder,
    )
    move_execution(model, target)
    return model, load_tokenizer(name)

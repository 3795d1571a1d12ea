"""Text that a model writes, to be read beside that of another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from optimum_fista.folder.loading import load_model
from optimum_fista.memory import release_memory


def continue_prompts(
    name: str,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 48,
    device: str | None = None,
    dtype: str = "auto",
    progress: bool = True,
) -> list[str]:
    """Load a model, continue every prompt by its most probable tokens, and free the model.

    Args:
        name: Hub id, model folder, or folder with one GGUF file.
        prompts: Texts; those of chat models are not put in a template.
        max_new_tokens: Tokens at most.
        device: Where to compute; `None`: the accelerator if there is one, otherwise the CPU.
        dtype: Dtype of the model; `"auto"` takes the checkpoint's.
        progress: Whether to show a progress bar.

    Returns:
        The continuations, without the prompts and special tokens.
    """
    if not all(prompts):
        raise ValueError("prompts holds an empty text: pass some words.")
    model, tokenizer = load_model(name, device=device, dtype=dtype)
    generate: Any = model.generate
    texts = []
    for prompt in tqdm(prompts, desc="Generating", unit="prompt", disable=not progress):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
        ids = generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        texts.append(str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)))
    del model, generate
    release_memory(collect=True)
    return texts

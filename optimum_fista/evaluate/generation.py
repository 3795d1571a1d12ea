"""Texts of several models, to compare them.

Each model is loaded and freed by one call, so that the dense and the pruned model are never in memory together.
"""

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
    """Load a model by name, continue every prompt by its most probable tokens, and free the model.

    Prompts of chat models are not put in a template. Returns the continuations, without prompts and special tokens.
    """
    if not all(prompts):
        raise ValueError("prompts holds an empty text: pass some words.")
    model, tokenizer = load_model(name, device=device, dtype=dtype)
    generate: Any = model.generate
    texts = []
    for prompt in tqdm(prompts, desc="Generating", unit="prompt", disable=not progress):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
        ids = generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        new = ids[0, inputs["input_ids"].shape[1] :]  # [1, prompt + new] -> [new]
        texts.append(str(tokenizer.decode(new, skip_special_tokens=True)))
    del model, generate  # a bound method holds the model too
    release_memory(collect=True)
    return texts

import pytest
import torch
from tiny_llama import tiny_llama, tiny_tokenizer

from optimum_fista.evaluate.generation import continue_prompts


def test_continuations_are_the_most_probable_tokens(tiny_folder):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    prompts, expected = ["the sea", "a"], []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        start = ids.shape[1]
        for _ in range(6):
            with torch.no_grad():
                following = model(ids).logits[0, -1].argmax()
            if following == model.config.eos_token_id:
                break
            ids = torch.cat([ids, following[None, None]], dim=1)
        expected.append(tokenizer.decode(ids[0, start:], skip_special_tokens=True))
    found = continue_prompts(str(tiny_folder), prompts, max_new_tokens=6, device="cpu", progress=False)
    assert found == expected
    assert any(found)


def test_an_empty_prompt_is_refused_before_loading():
    with pytest.raises(ValueError, match="empty text"):
        continue_prompts("no such model", ["a", ""])

"""Loops: how often a model that continues a text greedily ends in a cycle of tokens, which it repeats without end.

Pruned models repeat themselves long before their loss is bad, and a loss does not show it. `count_loops` lets a model
continue prompts from a text, and counts the continuations that end in a loop (`ends_in_loop`). The dense model and the
pruned one get the same prompts, so the two counts can be compared.

A *stretch* is a piece of a text (`text.loss`). A *prompt* is the beginning of a piece of a stretch, in tokens. All
prompts have the same length, so that batches have no padding, which some families can't continue.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from optimum_fista.bars import tqdm
from optimum_fista.memory import available_bytes, size_text
from optimum_fista.model.calibration import equal_shares
from optimum_fista.model.hooks import evaluation_mode
from optimum_fista.model.layers import token_limits
from optimum_fista.model.offload import execution_device, offload_hook, onloaded
from optimum_fista.records import LoopCount
from optimum_fista.text.windows import first_token

NUM_PROMPTS = 64
"""Of all texts together."""
NEW_TOKENS = 128
"""Tokens of a continuation, unless the model takes fewer or stops by itself."""
_PROMPT_TOKENS = 32  # without BOS
# Enough for a prompt: a token of ordinary text has fewer than 10 characters on average.
_PROMPT_CHARACTERS = 10 * _PROMPT_TOKENS
# Prompts that are continued together; this limits the memory of keys and values.
_TOGETHER = 16

_LONGEST_CYCLE = 64
_LEAST_REPETITIONS = 3
# A short cycle is repeated more often: three dots at the end are no loop.
_LEAST_REPEATED_TOKENS = 16


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Tell whether a continuation ends in a loop: its last tokens are a cycle that is repeated.

    The cycle has at most 64 tokens, and its repetitions are the last 16 tokens of the continuation or more. There are
    at least three of them. The continuation may end within a further repetition.
    """
    tokens = list(tokens)
    longest = min(_LONGEST_CYCLE, len(tokens) // _LEAST_REPETITIONS)
    for cycle in range(1, longest + 1):
        num_repeated = max(_LEAST_REPETITIONS * cycle, _LEAST_REPEATED_TOKENS)
        if num_repeated > len(tokens):
            continue
        end = tokens[-num_repeated:]
        # Each token equals the one that comes a cycle later.
        if end[:-cycle] == end[cycle:]:
            return True
    return False


def count_loops(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Sequence[str]],
    *,
    progress: bool,
    label: str = "Continuing",
) -> list[LoopCount]:
    """Let a model continue `NUM_PROMPTS` prompts greedily, equally many of each text, and count the loops of each text.

    A continuation that the model ends by itself (EOS) is no loop. The model is in evaluation mode meanwhile; its mode
    and its generation config are as before at the end. Weights that are offloaded are loaded together until then.

    Args:
        model: With a language-model head.
        tokenizer: That of the model.
        texts: The stretches of each text.
        progress: Show a bar.
        label: What the bar says.

    Raises:
        ValueError: If the model can't generate, its weights do not fit into the free memory, it takes too few tokens,
            or a text is too short for a prompt.
    """
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} can't generate text")
    require_memory(model)
    bos = first_token(tokenizer)
    prompts = [
        _prompts(stretches, share, tokenizer, bos)
        for stretches, share in zip(texts, equal_shares(NUM_PROMPTS, len(texts)), strict=True)
    ]
    num_new_tokens = _num_new_tokens(model, prompts[0].shape[1])
    num_prompts = sum(len(prompts_of_text) for prompts_of_text in prompts)
    counts = list[LoopCount]()
    with (
        evaluation_mode(model),
        torch.no_grad(),
        onloaded(model.modules(), read_only=True),
        _greedy(model) as end_tokens,
        tqdm(total=num_prompts, desc=label, unit="prompt", disable=not progress) as bar,
    ):
        for prompts_of_text in prompts:
            num_loops = 0
            for batch in prompts_of_text.split(_TOGETHER):
                for continuation in _continuations(model, batch, num_new_tokens):
                    is_ended = any(token in end_tokens for token in continuation)
                    if not is_ended and ends_in_loop(continuation):
                        num_loops += 1
                bar.update(len(batch))
            counts.append(LoopCount(len(prompts_of_text), num_new_tokens, num_loops))
    return counts


def require_memory(model: PreTrainedModel) -> None:
    """Refuse a model whose offloaded weights do not fit into the free memory of its device; ValueError.

    Each new token needs all weights, so they can't be read from files layer by layer.
    """
    device = execution_device(model.get_input_embeddings())
    offloaded = [module for module in model.modules() if offload_hook(module) is not None]
    parameters = {id(p): p for module in offloaded for p in module.parameters(recurse=False)}
    needed = sum(parameter.nbytes for parameter in parameters.values())
    free = available_bytes(device)
    # keys, values and logits need memory, too
    if needed and free is not None and needed > 0.8 * free:
        raise ValueError(
            f"the weights take {size_text(needed)}, and {size_text(free)} of memory are free: on a larger machine, "
            "optimum-fista evaluate MODEL --loops counts them"
        )


def _prompts(
    stretches: Sequence[str], number: int, tokenizer: PreTrainedTokenizerBase, bos: int | None
) -> Tensor:
    """Cut prompts out of the stretches of a text, int64 [prompts, tokens], at most `number`; ValueError if none fits.

    They are spread evenly over the stretches. `bos` is the token that each begins with; `None`: there is none.
    """
    rows = list[list[int]]()
    prompts_of_stretch = math.ceil(number / len(stretches))
    for index in range(number):
        # One prompt of each stretch, then the second one of each, ...
        number_in_stretch, number_of_stretch = divmod(index, len(stretches))
        stretch = stretches[number_of_stretch]
        start = number_in_stretch * len(stretch) // prompts_of_stretch
        piece = stretch[start : start + _PROMPT_CHARACTERS]
        ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= _PROMPT_TOKENS:
            beginning = [] if bos is None else [bos]
            rows.append(beginning + ids[:_PROMPT_TOKENS])
    if not rows:
        raise ValueError(f"the text has no piece of {_PROMPT_TOKENS} tokens to continue")
    return torch.tensor(rows)


def _num_new_tokens(model: PreTrainedModel, prompt_length: int) -> int:
    """Return how many tokens a continuation may have; ValueError if the model takes too few for a loop."""
    _, limit = token_limits(model)  # of positions; None: no limit
    number = NEW_TOKENS if limit is None else min(NEW_TOKENS, limit - prompt_length)
    if number < _LEAST_REPEATED_TOKENS:
        raise ValueError(f"the model takes {limit} tokens, which are too few to continue a text")
    return number


@contextmanager
def _greedy(model: PreTrainedModel) -> Iterator[set[int]]:
    """Have `generate` choose the most likely token, without penalties of the model's own generation config.

    Yields the tokens that end a continuation. Afterwards the model has its own generation config again.
    """
    settings = model.generation_config
    end_tokens = settings.eos_token_id if settings is not None else model.config.eos_token_id
    if end_tokens is None:
        end_tokens = []
    elif isinstance(end_tokens, int):
        end_tokens = [end_tokens]
    padding = end_tokens[0] if end_tokens else 0  # after the end of a continuation
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=end_tokens or None, pad_token_id=padding
    )
    try:
        yield set(end_tokens)
    finally:
        model.generation_config = settings


def _continuations(model: PreTrainedModel, prompts: Tensor, num_new_tokens: int) -> list[list[int]]:
    """Continue prompts [prompts, tokens] by at most `num_new_tokens` each; returns the new tokens of each."""
    ids = prompts.to(execution_device(model.get_input_embeddings()))
    written: Tensor = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_new_tokens,
        use_cache=True,
    )
    new_tokens: list[list[int]] = written[:, ids.shape[1] :].tolist()
    return new_tokens

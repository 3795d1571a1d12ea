"""Self-sampling: the model writes its own calibration tokens.

No other text is needed, and the model's text is like its training text. But writing the text takes time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from optimum_fista.bars import tqdm
from optimum_fista.model.hooks import evaluation_mode
from optimum_fista.model.layers import token_limits
from optimum_fista.model.offload import execution_device

SAMPLED_TOGETHER = 32  # samples; this limits the memory of keys and values
_TEXTS = 4  # in a sample: more beginnings, which differ most


def num_batches(num_samples: int) -> int:
    """How many batches samples are written in."""
    return max(1, round(num_samples / SAMPLED_TOGETHER))


def num_texts(sequence_length: int) -> int:
    """How many texts a sample consists of."""
    return _TEXTS if sequence_length >= 2 * _TEXTS else 1


def sample_text_from_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    sequence_length: int,
    seed: int,
    progress: bool = True,
) -> torch.Tensor:
    """Let the model write calibration tokens: int64 [num_samples, sequence_length], on the CPU.

    A sample is four texts of a quarter of its length, one after the other; one of less than 8 tokens is one text. Every
    text starts with BOS (EOS if there is none). The next token of each is drawn without replacement from the model's
    distribution over ordinary tokens, so that no two texts start alike even if the model is sure how a text starts.
    Without BOS and EOS, the first tokens are ordinary ones, drawn uniformly without replacement. The rest is sampled at
    temperature 1 from the whole distribution: less likely tokens make worse reading, but better calibration text
    (docs/ablations.md). EOS does not end a text: the model continues with the next document.
    """
    for name, value, least in (
        ("num_samples", num_samples, 1),
        ("sequence_length", sequence_length, 2),
    ):
        if value < least:
            raise ValueError(f"{name}={value}; pass {least} or more.")
    _, limit = token_limits(model)
    if limit is not None and sequence_length > limit:
        raise ValueError(
            f"sequence_length={sequence_length}: pass at most {limit} (max_position_embeddings)."
        )
    with evaluation_mode(model), _own_sampling(model, seed), torch.no_grad():
        texts = num_texts(sequence_length)
        beginnings = _beginnings(
            model, tokenizer, num_samples * texts, torch.Generator().manual_seed(seed)
        )
        new_tokens = (
            -(-sequence_length // texts) - beginnings.shape[1]
        )  # rounded up: the last text is cut below
        total, written = len(beginnings) * new_tokens, beginnings
        if new_tokens:
            with tqdm(total=total, desc="Self-sampling", unit="token", disable=not progress) as bar:
                batches = beginnings.tensor_split(num_batches(num_samples))
                written = torch.cat([_continue(model, batch, new_tokens, bar) for batch in batches])
    return written.reshape(num_samples, -1)[:, :sequence_length]  # [N * texts, tokens] -> [N, T]


def _beginnings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """First tokens of every sample [N, 1 or 2]."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        weights = torch.ones(len(tokenizer), dtype=torch.float64)
    else:
        prompt = torch.full((1, 1), start, device=execution_device(model.get_input_embeddings()))
        logits = model(input_ids=prompt, use_cache=False).logits[0, -1]
        # Some heads have more rows than the tokenizer has tokens. The floor keeps every token drawable.
        weights = logits[: len(tokenizer)].cpu().double().softmax(dim=0).clamp(min=1e-30)
    # A special token would begin a conversation or an image that the text does not go on with.
    weights[[token for token in tokenizer.all_special_ids if token < len(weights)]] = 0
    replacement = num_samples > int(weights.count_nonzero())
    draws = torch.multinomial(
        weights, num_samples, replacement=replacement, generator=generator
    ).unsqueeze(1)
    return draws if start is None else torch.cat([torch.full_like(draws, start), draws], dim=1)


def _continue(
    model: PreTrainedModel, beginnings: torch.Tensor, new_tokens: int, bar: tqdm
) -> torch.Tensor:
    ids = beginnings.to(execution_device(model.get_input_embeddings()))
    options: Any = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "max_new_tokens": new_tokens,
        "use_cache": True,
    }
    options |= {"attention_mask": torch.ones_like(ids), "streamer": _Counter(bar)}
    samples: torch.Tensor = model.generate(input_ids=ids, **options)  # type: ignore[operator]
    return samples.cpu()


class _Counter(BaseStreamer):
    """Shows how many tokens `generate` has written."""

    def __init__(self, bar: tqdm) -> None:
        self.bar, self.prompt_seen = bar, False

    def put(self, value: torch.Tensor) -> None:
        """Count the new tokens; the first call brings the prompt."""
        self.bar.update(value.numel() * self.prompt_seen)
        self.prompt_seen = True

    def end(self) -> None:
        """Nothing to do: one bar serves all batches."""


@contextmanager
def _own_sampling(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Have `generate` ignore the model's EOS, penalties and lengths, and seed the generators that it draws from.

    Afterwards they and the model's generation config are as they were.
    """
    device, settings = execution_device(model.get_input_embeddings()), model.generation_config
    devices = range(torch.accelerator.device_count()) if device.type != "cpu" else ()
    model.generation_config = GenerationConfig()
    try:
        with torch.random.fork_rng(devices=devices, device_type=device.type):
            # torch.manual_seed reaches all accelerators, which are forked only if one of them samples
            (torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed)(
                seed
            )
            yield
    finally:
        model.generation_config = settings

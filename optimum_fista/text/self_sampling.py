"""Self-sampling: the model writes its own calibration tokens.

No other text is needed, and the model's text is like its training text. But writing the text takes time. A *sample* is
one sequence of calibration tokens. It consists of several *texts*, each of which has a *beginning* of one or two tokens
that is chosen here, and goes on as the model writes it (`ModelWriter`).

Texts are written in *batches*. After each batch, the texts so far may be kept in a file, with the state of the random
generator, and a later call resumes there.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_fista.atomic import write_file
from optimum_fista.bars import tqdm
from optimum_fista.model.hooks import evaluation_mode
from optimum_fista.model.layers import token_limits
from optimum_fista.model.offload import execution_device
from optimum_fista.text.model_writer import ModelWriter

# Samples that are written together; this limits the memory of keys and values.
SAMPLED_TOGETHER = 32
# Texts in a sample. More texts have more beginnings, which differ most.
_TEXTS = 4


def num_batches(num_samples: int) -> int:
    """How many batches `num_samples` samples are written in."""
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
    kept_file: Path | None = None,
) -> Tensor:
    """Let the model write calibration tokens: int64 [num_samples, sequence_length], on the CPU.

    A sample is four texts of a quarter of its length, one after the other; a sample of less than 8 tokens is one text.
    Every text starts with BOS (EOS if there is none). The next token of each text is drawn without replacement from the
    model's distribution over ordinary tokens, so that no two texts start alike even if the model is sure how a text
    starts. Without BOS and EOS, the first tokens are ordinary ones, drawn uniformly without replacement. The rest is
    sampled at temperature 1 from the whole distribution: less likely tokens make worse reading, but better calibration
    text (docs/ablations.md). EOS does not end a text: the model continues with the next document.

    After each batch, the texts so far are written to `kept_file`. The same call resumes there, also in another
    process, and gives the same tokens; the caller names another file for other arguments, and deletes it. `None`: an
    interrupt loses all.

    `seed` decides what is drawn. Afterwards the model's mode and generation config are as they were; the global random
    state is not used. ValueError if a number makes no sense, or the model takes no sequences of this length.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}; pass 1 or more.")
    if sequence_length < 2:
        raise ValueError(f"sequence_length={sequence_length}; pass 2 or more.")
    _, limit = token_limits(model)  # rows of the embedding, and positions
    if limit is not None and sequence_length > limit:
        raise ValueError(
            f"sequence_length={sequence_length}: pass at most {limit} (max_position_embeddings)."
        )

    texts_per_sample = num_texts(sequence_length)
    # Rounded up: a sample is then a few tokens too long, and is cut below.
    length = math.ceil(sequence_length / texts_per_sample)
    generator = torch.Generator().manual_seed(seed)
    with evaluation_mode(model), torch.no_grad():
        beginnings = _beginnings_of_texts(
            model, tokenizer, num_samples * texts_per_sample, generator
        )
        num_new_tokens = length - beginnings.shape[1]
        batches = beginnings.tensor_split(num_batches(num_samples))
        finished = _Finished(kept_file, generator)
        texts = finished.read(batches)
        with tqdm(
            total=len(beginnings) * num_new_tokens,
            initial=sum(len(batch) for batch in texts) * num_new_tokens,
            desc="Self-sampling",
            unit="token",
            disable=not progress,
        ) as bar:
            writer = ModelWriter(model, generator, bar)
            for batch in batches[len(texts) :]:
                texts.append(writer.write(batch, num_new_tokens))
                finished.write(texts)

    # [N * texts, tokens] -> [N, texts * tokens]
    samples = torch.cat(texts).reshape(num_samples, -1)
    return samples[:, :sequence_length]


def _beginnings_of_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    number: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Choose the first tokens of `number` texts: BOS or EOS if there is one, and an ordinary token.

    Returns ids, int64 [texts, 1 or 2]. The state of `generator`, which draws on the CPU, moves on.
    """
    start = tokenizer.bos_token_id
    if start is None:
        start = tokenizer.eos_token_id
    if start is None:
        # The weight of each token in the draw, by its id: equal ones.
        weights = torch.ones(len(tokenizer), dtype=torch.float64)
    else:
        prompt = torch.full((1, 1), start, device=execution_device(model.get_input_embeddings()))
        logits = model(input_ids=prompt, use_cache=False).logits[0, -1]
        # Some heads have more rows than the tokenizer has tokens.
        logits_of_tokens = logits[: len(tokenizer)].cpu().double()
        # The floor keeps every token drawable, also one whose probability is rounded to zero.
        weights = logits_of_tokens.softmax(dim=0).clamp(min=1e-30)
    # A special token would begin a conversation or an image that the text does not go on with.
    special_ids = [token for token in tokenizer.all_special_ids if token < len(weights)]
    weights[special_ids] = 0

    num_ordinary_tokens = int(weights.count_nonzero())
    # Tokens are drawn more than once only if there are fewer tokens than texts.
    draws = torch.multinomial(
        weights, number, replacement=number > num_ordinary_tokens, generator=generator
    )
    draws = draws.unsqueeze(1)  # [texts] -> [texts, 1]
    if start is None:
        return draws
    return torch.cat([torch.full_like(draws, start), draws], dim=1)


class _Finished:
    """The batches that are finished, in a file, with the state of the random generator after them."""

    def __init__(self, file: Path | None, generator: torch.Generator) -> None:
        """Read nothing yet. `file` is the file, `None` if nothing is kept. `generator` draws all texts."""
        self._file = file
        self._generator = generator

    def read(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Return the batches of texts that an earlier call has finished, and set the generator to where it was.

        `batches` are the beginnings of all texts, int64 [texts, ids] each. A result is [texts, tokens]. A file
        (`self._file`) that is missing or damaged, or has other texts, counts as none.
        """
        if self._file is None:
            return []
        try:
            kept = load_file(self._file)
        except (FileNotFoundError, SafetensorError):
            return []

        state = kept.pop("generator")
        texts = [kept[f"texts.{number}"] for number in range(len(kept))]
        for text, beginnings in zip(texts, batches, strict=False):
            if not text[:, : beginnings.shape[1]].equal(beginnings):
                return []
        self._generator.set_state(state)
        return texts

    def write(self, texts: Sequence[Tensor]) -> None:
        """Write the finished batches, int64 [texts, tokens] each, and the state of the generator to `self._file`."""
        if self._file is None:
            return
        tensors = {f"texts.{number}": text.contiguous() for number, text in enumerate(texts)}
        tensors["generator"] = self._generator.get_state()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_file(self._file, tensors)

"""How often a text has each token of a model: `count_model` reads a model's files, and counts the tokens of texts.

That is the first step of removing tokens (`removal.tokens`). A `CountedModel` holds the counts, with all that the later
steps need to know of the dense model. One `CountedModel` serves for several plans: each decides on its own which tokens
stay (`removal.tokens_plan`).

Some of the text is held out: no token is counted on these *pieces*, strings on which the cost of the removal is
measured later. A model *without weights* is on the meta device, with the shapes and the configuration only. A *row* is
one of the embedding: most rows belong to a token, and some models have more rows than tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from optimum_fista import internals
from optimum_fista.bars import tqdm
from optimum_fista.folder.packed_folder import is_packed
from optimum_fista.model.calibration import read_batches
from optimum_fista.model.media import media_arguments
from optimum_fista.removal.token_ids import configurations_in
from optimum_fista.source import loading
from optimum_fista.source.files import source_folder
from optimum_fista.source.inventory import source_tensors
from optimum_fista.source.quantization import forget_quantization
from optimum_fista.source.source_tensors import SourceTensors
from optimum_fista.text.token_counts import HeldOutText, count_tokens

# Numbers below it are multiples, and sizes of codecs, not of another vocabulary.
_LEAST_VOCABULARY = 1024


@dataclass(frozen=True)
class CountedModel:
    """A dense model's files, and how often a text has each of its tokens: what plans are made of."""

    name: str  # a folder or a Hub id
    folder: Path  # of its files
    settings: PreTrainedConfig  # its configuration, without what it says of quantization
    model: PreTrainedModel  # without weights
    source: SourceTensors  # the tensors in its files
    tokenizer: PreTrainedTokenizerBase
    text_name: str | None
    counts: Tensor  # int64 [rows]: how often each token is in the text
    num_texts: int  # texts and batches that were read
    held_out: tuple[str, ...]  # pieces of text that were not counted


def count_model(
    name: str, texts: Iterable[Any], *, text_name: str | None, progress: bool = True
) -> CountedModel:
    """Read what a model's files say of its tokens, and count the tokens of texts.

    Downloads the weights of a Hub id into the cache.

    Args:
        name: The dense model: a folder or a Hub id.
        texts: Strings, or batches of ids as `FistaPruner.prune` takes them: tensors int64 [batch, tokens], or
            dictionaries with "input_ids". A batch with `held_out` is not counted. They are read once.
        text_name: Name of the texts, for the report.
        progress: Show a progress bar.

    Raises:
        ValueError: If no token of this model can be removed, or the text holds no token.
    """
    folder, settings = _read_source(name)
    tokenizer = loading.require_tokenizer(name)
    model = loading.model_without_weights(settings)
    source = source_tensors(model, folder)
    counts, num_texts, held_out = _count(tokenizer, texts, model, progress)
    return CountedModel(
        name=name,
        folder=folder,
        settings=settings,
        model=model,
        source=source,
        tokenizer=tokenizer,
        text_name=text_name,
        counts=counts,
        num_texts=num_texts,
        held_out=held_out,
    )


def _read_source(name: str) -> tuple[Path, PreTrainedConfig]:
    """Return the folder of a model's files, in the cache for a Hub id, and a copy of its configuration.

    The copy says nothing of quantization. Downloads the weights of a Hub id into the cache. `name` is a folder or a Hub
    id. ValueError if the model has no files from which tokens can be removed, such as a GGUF file.
    """
    if Path(name).is_file() or loading.gguf_file(name) is not None:
        raise ValueError(
            f"model={name!r}: tokens are removed from a model folder with a tokenizer: pass one, or a Hub id."
        )
    settings = copy.deepcopy(loading.read_config(name))
    revision = internals.commit_of(settings)
    folder = source_folder(name, revision)
    if not Path(name).is_dir():
        weights = ["model*.safetensors*", "pytorch_model*.bin*"]
        # `source_folder` has downloaded the other files
        snapshot_download(name, revision=revision, allow_patterns=weights)
    if is_packed(folder):
        raise ValueError(
            f"model={name!r} is packed, and tokens are removed from ordinary tensors: unpack it first "
            "(optimum-fista unpack)."
        )
    forget_quantization(settings)
    return folder, settings


def num_rows_of(model: PreTrainedModel) -> int:
    """Return the number of rows of the embedding and of the head.

    Raises ValueError if they differ, or if the configuration names a vocabulary besides, such as that of a codec, or
    the first of many ids that have to follow one another. `model` is without weights, and only read.
    """
    vocab_size = int(model.config.get_text_config(decoder=True).vocab_size)
    sizes = {"vocab_size": vocab_size}  # which all have to be equal
    modules = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    for name, module in modules.items():
        if module is None:
            continue
        for parameter in module.parameters():
            if parameter.ndim > 1:  # a matrix, not a norm
                sizes[name] = len(parameter)

    other_vocabularies = dict[str, int]()  # size by the setting that has it
    for section in configurations_in(model.config):
        for key, value in vars(section).items():
            if key.endswith("token_offset") and type(value) is int:
                # Apertus adds the codes of an image or a sound to it, so that they become ids.
                raise ValueError(
                    f"{type(model).__name__} computes ids of tokens from {key}={value}, so no token can be removed."
                )
            # A setting may have the number of tokens, or a table of them.
            size = len(value) if isinstance(value, dict | list) else value
            # "type_vocab_size" of BERT is no vocabulary: it is the number of kinds of sentences.
            is_other = "vocab" in key and key not in ("vocab_size", "type_vocab_size")
            # A smaller number is no size of a vocabulary of text. A table of tokens and ids is one of any size.
            is_table = isinstance(value, dict) and len(value) > 0
            if is_other and type(size) is int and (is_table or size >= _LEAST_VOCABULARY):
                other_vocabularies[key] = size

    have_one_size = len(set(sizes.values())) == 1
    if other_vocabularies or not have_one_size:
        shown = ", ".join(
            f"{name} of {size}" for name, size in {**sizes, **other_vocabularies}.items()
        )
        raise ValueError(
            f"{type(model).__name__} has more than one vocabulary, so no token can be removed: {shown}."
        )
    return vocab_size


def _count(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[Any], model: PreTrainedModel, progress: bool
) -> tuple[Tensor, int, tuple[str, ...]]:
    """Count the tokens of texts and batches, but hold some of them out; `model` is without weights.

    Returns how often each token was counted, int64 [rows]; how many texts and batches were read; and the pieces of text
    that were held out.
    """
    if isinstance(texts, str):
        raise ValueError(
            "calib_dataloader is one text: pass a list of texts, or an iterable of batches."
        )
    num_rows = num_rows_of(model)
    reader = _TextReader(tokenizer, model, num_rows)
    # `counted` reads the strings, passes on the text to count, and collects the rest of it in `pieces`. All texts and
    # batches are read when `count_tokens` has returned.
    held_out = HeldOutText()
    strings = reader.strings(texts, progress=progress)
    text_counts = count_tokens(tokenizer, held_out.counted(strings), num_rows)
    counts = text_counts + reader.batch_counts
    if not counts.any():
        raise ValueError("calib_dataloader holds no token: pass texts, or batches of token ids.")
    return counts, reader.num_texts, (*reader.held_out_texts, *held_out.pieces)


class _TextReader:
    """Reads texts and batches of token ids, and counts the tokens of the batches.

    Attributes:
        num_texts: Texts and batches that were read.
        batch_counts: How often each token is in the batches, int64 [rows].
        held_out_texts: Texts of the batches that the caller holds out, which are not counted.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, num_rows: int
    ) -> None:
        """Begin with nothing; `model`, without weights, has an embedding of `num_rows`."""
        self._tokenizer = tokenizer
        self._model = model
        self.num_texts = 0
        self.batch_counts = torch.zeros(num_rows, dtype=torch.int64)
        self.held_out_texts: list[str] = []

    def strings(self, items: Iterable[Any], *, progress: bool) -> Iterator[str]:
        """Yield those of `items` that are texts, and take the others as batches; `progress` shows a bar."""
        for item in tqdm(items, desc="Counting tokens", unit=" texts", disable=not progress):
            self.num_texts += 1
            if isinstance(item, str):
                yield item
            else:
                self._add_batch(item)

    def _add_batch(self, item: Any) -> None:
        """Count the tokens of a batch, or decode them if the batch is held out."""
        num_rows = len(self.batch_counts)
        # sequences of any length, because the model does not run on them
        batches = read_batches([item], num_rows, longest=None, media=media_arguments(self._model))
        for batch in batches:
            for row in batch.sequences_without_padding():
                ids = row.input_ids.flatten()
                if batch.held_out:
                    text = str(self._tokenizer.decode(ids, skip_special_tokens=True))
                    self.held_out_texts.append(text)
                else:
                    self.batch_counts.add_(torch.bincount(ids, minlength=num_rows))

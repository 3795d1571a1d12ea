"""Which tokens of a model stay, and what its files become: `plan_counted` decides it, a `TokensPlan` holds it.

This is the second step of removing tokens (`removal.tokens`), after the counting (`removal.counted_model`). Besides the
most frequent tokens, those stay that the files of the model or its chat template name, and those that the user wants to
keep. The tokens that stay decide the rows of the embedding and of the head that stay. Nothing is written here, and no
weight is read but, for its dtype, at most one.

A *row* is one of the embedding: most rows belong to a token, and some models have more rows than tokens. An *id* is the
number of a token and of its row; `new_ids` has the new id of each row that stays, by its old id. A model *without
weights* is on the meta device, with the shapes and the configuration only.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from optimum_fista.config import FistaPruningConfig
from optimum_fista.devices import floating_dtype
from optimum_fista.folder import checkpoint
from optimum_fista.folder.gguf_file import check_ids
from optimum_fista.origin import read_origin
from optimum_fista.public_names import public_name
from optimum_fista.removal.counted_model import CountedModel, count_model, num_rows_of
from optimum_fista.removal.earlier_masks import masks_in_folder
from optimum_fista.removal.removal import first_names
from optimum_fista.removal.token_ids import (
    ChatTemplateError,
    configuration_files,
    configurations_in,
    ids_in,
    ids_of_chat_template,
    renumbered,
)
from optimum_fista.removal.token_tensors import cut_to_tokens
from optimum_fista.report import PruningReport
from optimum_fista.source import loading
from optimum_fista.source.model_folder import read_json
from optimum_fista.source.stored_tensor import PLAIN_FLOATS, StoredTensor
from optimum_fista.text.vocabulary import (
    NumberOfTokensError,
    SmallerVocabulary,
    reduce_vocabulary,
)
from optimum_fista.text.windows import first_token
from optimum_fista.tokens_removal import TokensRemoval


@dataclass(frozen=True)
class TokensPlan:
    """The tokens of a model that stay, and all that is written; the embedding is read only then."""

    name: str  # of the dense model, a folder or a Hub id
    source: Path  # folder of its files
    model: PreTrainedModel  # the smaller one, without weights
    stored: Mapping[str, StoredTensor]  # all tensors of the result, by name
    quantized: Mapping[str, Any]  # what the configuration says of quantized weights
    dense_tokenizer: Mapping[str, Any]  # content of the dense tokenizer.json
    tokenizer: Mapping[str, Any]  # content of the new tokenizer.json
    check_ids: tuple[int, ...]  # by which llama.cpp's converter knows the dense tokenizer
    # old id of the token that begins each text (BOS); None if texts begin with none
    bos: int | None
    # The new ids of the rows that stay, by their old ids, in the order of the new ids 0, 1, 2, ... Rows of no token are
    # the last ones.
    new_ids: Mapping[int, int]
    held_out: tuple[str, ...]  # pieces of the text that no token was counted on
    report: PruningReport


def plan_tokens(
    name: str,
    texts: Iterable[Any],
    config: FistaPruningConfig,
    *,
    text_name: str | None,
    progress: bool = True,
) -> TokensPlan:
    """Count tokens of texts, and plan what changes in a model's files; see `count_model` and `plan_counted`.

    Downloads the weights of a Hub id into the cache; writes no other file.
    """
    counted = count_model(name, texts, text_name=text_name, progress=progress)
    return plan_counted(counted, config)


def plan_counted(counted: CountedModel, config: FistaPruningConfig) -> TokensPlan:
    """Decide which tokens stay, and plan what changes in the model's files.

    Changes nothing of `counted` and writes no file; warnings go to the report of the plan, and are issued.
    `counted` has the dense model's configuration (`settings`), tokenizer and tensors in files, and how often a text has
    each token (`counts`). `config.pattern` says what is removed, such as "vocab:0.35", and `config.keep_tokens` what
    stays in any case.
    ValueError if the pattern does not fit the model.
    """
    request = config.tokens_removal
    assert request is not None
    tokenizer = counted.tokenizer
    num_rows = len(counted.counts)

    token_ids = set(tokenizer.get_vocab().values())
    named_ids, template_warning = _named_ids(tokenizer, counted.settings, counted.folder)
    # Rows of no token that stay because they are named, such as a padding id after the last token.
    spare_rows = sorted(index for index in named_ids - token_ids if 0 <= index < num_rows)
    keep = (named_ids & token_ids) | _ids_to_keep(tokenizer, request)
    content = _tokenizer_content(tokenizer, counted.folder)
    smaller = _smaller_vocabulary(content, counted.counts, request, keep, num_spare=len(spare_rows))
    # in the order of the new rows: those of tokens first, as the smaller tokenizer numbers them
    old_ids = smaller.kept.tolist() + spare_rows
    # The model may have fewer tokens than the rows that are to stay: then rows of no token fill up the last multiple.
    unnamed_rows = sorted({*range(num_rows)} - token_ids - named_ids)
    old_ids += unnamed_rows[: -len(old_ids) % request.step(num_rows)]
    new_ids = {old: new for new, old in enumerate(old_ids)}

    model = _smaller_model(counted.settings, new_ids, num_rows)
    stored = cut_to_tokens(counted.source, counted.model, model, torch.tensor(old_ids))
    _set_dtype(model, counted.settings, stored)

    report = _new_report(counted, config, model)
    if template_warning:
        report.warn(template_warning)
    _warn_of_rows(report, num_rows - len(token_ids), counted.settings)
    num_seen = int(counted.counts[old_ids].count_nonzero())  # tokens that stay and are in the text
    if request.share is not None and num_seen < 0.9 * len(old_ids):
        report.warn(
            f"the text has only {num_seen} of the {len(old_ids)} tokens that stay: pass more of it."
        )
    return TokensPlan(
        name=counted.name,
        source=counted.folder,
        model=model,
        stored=stored,
        quantized=counted.source.settings,
        dense_tokenizer=content,
        tokenizer=smaller.tokenizer,
        check_ids=tuple(check_ids(tokenizer)),
        bos=first_token(tokenizer),
        new_ids=new_ids,
        held_out=counted.held_out,
        report=report,
    )


def _new_report(
    counted: CountedModel, config: FistaPruningConfig, model: PreTrainedModel
) -> PruningReport:
    """Make the report of the run, as far as it is known: configuration, both models, the text, masks of an earlier run.

    `model` is the smaller model, without weights. The masks are looked for in the folder of the dense model. Nothing is
    changed.
    """
    report = PruningReport(
        config=config.resolved().to_dict(),
        model=_described(counted, model),
        origin=read_origin(counted.settings),
        calibration={
            "source": counted.text_name,
            # The counts stand for the text, of which nothing else is kept.
            "sha256": hashlib.sha256(counted.counts.numpy().tobytes()).hexdigest(),
            "num_sequences": counted.num_texts,
            "num_tokens": int(counted.counts.sum()),
        },
    )
    earlier = masks_in_folder(counted.folder)  # of a run that has set weights to zero
    report.carried = earlier.operators
    report.lost_masks = earlier.lost
    if earlier.lost:
        report.warn(
            f"weights of {len(earlier.lost)} operators were changed since an earlier run set some of them to zero, so "
            f"their masks are not carried: {first_names(earlier.lost)}"
        )
    return report


def _named_ids(
    tokenizer: PreTrainedTokenizerBase, settings: PreTrainedConfig, folder: Path
) -> tuple[set[int], str]:
    """Collect ids of tokens that the files or the chat template of a model name, such as that of the end of a text.

    Returns also a warning if the template does not end, otherwise "". `settings` is the model's configuration, `folder`
    has its files. Some of the ids may be no row of the embedding, such as -1. Nothing is changed.
    """
    ids = set[int]()
    for section in configurations_in(settings):
        ids |= ids_in(vars(section))
    for values in configuration_files(folder).values():
        ids |= ids_in(values)
    try:
        return ids | ids_of_chat_template(tokenizer), ""
    except ChatTemplateError as error:
        return ids, f"{error}, so tokens that only it writes may be removed: pass keep_tokens."


def _ids_to_keep(tokenizer: PreTrainedTokenizerBase, request: TokensRemoval) -> set[int]:
    """Collect the ids that the user wants to keep: `request.keep` has ids, and texts such as "zebra".

    A text may have other tokens after a space than at the beginning. Both stay.
    """
    ids = set[int]()
    for token in request.keep:
        if isinstance(token, int):
            ids.add(token)
        else:
            ids.update(tokenizer.encode(token))
            ids.update(tokenizer.encode(f" {token}"))
    return ids


def _tokenizer_content(tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, Any]:
    """Return the content of a `tokenizer.json` that has all tokens of a loaded tokenizer, with their ids.

    That is the file in `folder`, as other programs read it. If Transformers adds tokens to those of the file, it is the
    content that Transformers would write. ValueError if neither has the ids that Transformers gives.
    """
    vocabulary = tokenizer.get_vocab()
    file = folder / "tokenizer.json"
    if file.exists():
        content: dict[str, Any] = read_json(file)
        if ids_of_tokens(content) == vocabulary:
            return content
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    if ids_of_tokens(content) != vocabulary:
        raise ValueError(
            f"model={str(folder)!r}: {type(tokenizer).__name__} of Transformers gives other ids than its "
            "tokenizer.json, so no token can be removed. Check its added tokens: two may have the same id."
        )
    return content


def _smaller_vocabulary(
    content: dict[str, Any],
    counts: Tensor,
    request: TokensRemoval,
    keep: set[int],
    num_spare: int,
) -> SmallerVocabulary:
    """Choose the tokens that stay, as many as the request says.

    Args:
        content: That of a `tokenizer.json`; not changed.
        counts: How often the text has each token, int64 [rows].
        request: The share of the rows that is removed; without a share, the tokens that the text never has.
        keep: Ids of tokens that stay whatever their counts are; not changed.
        num_spare: How many rows of no token stay besides the tokens.

    Raises:
        ValueError: If the request does not fit the model, or all rows would stay.
    """
    num_rows = len(counts)
    num_tokens = len(ids_of_tokens(content))
    try:
        if request.share is not None:
            num_kept = request.num_kept(num_rows)
        else:
            # The tokens that the text uses, and so many others that the number of rows that stay is a multiple of
            # `step`, a size for which kernels are fast.
            used = reduce_vocabulary(content, counts, num_kept=None, keep=keep).kept
            step = request.step(num_rows)
            num_kept = step * math.ceil((len(used) + num_spare) / step)
            keep = keep | set(used.tolist())
        # There may be fewer tokens than rows.
        num_tokens_kept = min(num_kept - num_spare, num_tokens)
        smaller = reduce_vocabulary(content, counts, num_tokens_kept, keep)
    except NumberOfTokensError as error:
        least = error.least + num_spare
        step = request.step(num_rows)
        fewest_rows = step * math.ceil(least / step)
        # three digits, rounded down
        largest_share = math.floor(1000 * (1 - fewest_rows / num_rows)) / 1000
        advice = f"pass a share of at most {largest_share}"
        if largest_share <= 0:
            advice = f"none can be removed, because a multiple of {step} stays"
        raise ValueError(
            f"pattern={str(request)!r}: {least} of the {num_rows} tokens always stay (the alphabet, punctuation, "
            f"special tokens, and those to keep): {advice}."
        ) from error
    except ValueError as error:
        raise ValueError(f"pattern={str(request)!r} of {num_rows} tokens: {error}") from error
    step = request.step(num_rows)
    if step * math.ceil((len(smaller.kept) + num_spare) / step) >= num_rows:
        raise ValueError(
            f"pattern={str(request)!r}: all {num_rows} tokens would stay, because a multiple of {step} stays."
        )
    return smaller


def _smaller_model(
    settings: PreTrainedConfig, new_ids: Mapping[int, int], num_rows: int
) -> PreTrainedModel:
    """Make the model with fewer tokens, without weights.

    `settings` is the configuration of the dense model, whose embedding has `num_rows`. It is only read: a copy gets the
    new ids of tokens (`new_ids`, by the old ones) and the new number of rows.
    """
    smaller = copy.deepcopy(settings)
    # The list is complete before the first size changes: sections are recognised by their size.
    for section in configurations_in(smaller):
        vars(section).update(renumbered(vars(section), new_ids))
        if getattr(section, "vocab_size", None) == num_rows:
            section.vocab_size = len(new_ids)
    return loading.model_without_weights(smaller)


def _set_dtype(
    model: PreTrainedModel, settings: PreTrainedConfig, stored: Mapping[str, StoredTensor]
) -> None:
    """Convert a model without weights, in place, to the dtype of the dense model.

    That is the dtype in `settings`, the configuration of the dense model. If it says none, it is that of the first
    tensor in plain floats of `stored`, which has the tensors of the result, by name.
    """
    dtype = getattr(settings, "dtype", None)
    if dtype is None:
        # Quantized tensors have a dtype of their own.
        in_floats = [tensor for tensor in stored.values() if tensor.dtype in PLAIN_FLOATS]
        dtype = in_floats[0].tensor().dtype  # reads this tensor
    torch.nn.Module.to(model, floating_dtype(dtype))  # the method of Transformers has no types


def _described(counted: CountedModel, model: PreTrainedModel) -> dict[str, Any]:
    """Make the field `model` of a `PruningReport`: names and sizes of the smaller model, and what is copied.

    `model` is the smaller one, without weights. `counted` has the dense model. Neither is changed.
    """
    num_rows_before = len(counted.counts)  # there is a count for each row of the embedding
    return {
        "class": type(model).__name__,
        "name": public_name(counted.name),
        "model_type": model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_parameters": model.num_parameters(),
        "dense_num_parameters": counted.model.num_parameters(),
        "vocabulary": {"kept": num_rows_of(model), "before": num_rows_before},
        # tensors that the model's class does not load are copied from file to file
        "copied": counted.source.num_copied_by_module,
    }


def _warn_of_rows(report: PruningReport, num_without: int, settings: PreTrainedConfig) -> None:
    """Warn in the report of rows without a token, and of zeros of an earlier run whose masks are not known.

    Adds to the warnings of `report`, which has the operators with known masks already. `num_without` is the number of
    rows without a token; `settings` is the configuration of the dense model.
    """
    if num_without:
        num_rows = report.model["vocabulary"]["before"]
        report.warn(
            f"{num_without} of the {num_rows} rows of the embedding belong to no token: they go first."
        )
    earlier = checkpoint.summary_of_latest_run(settings)
    if earlier.get("num_zeros") and not report.carried:
        report.warn(
            f"the model was pruned before: {earlier['num_zeros']} zeros stay, but their masks are not known. Pass the "
            "folder that the earlier run has saved."
        )


def ids_of_tokens(content: Mapping[str, Any]) -> dict[str, int]:
    """Return all tokens of the content of a `tokenizer.json`, with the ids that the library loads."""
    return dict(Tokenizer.from_str(json.dumps(content)).get_vocab())

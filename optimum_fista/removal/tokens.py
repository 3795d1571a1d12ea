"""Removing tokens: the embedding, head, tokenizer and ids in a model's files become those of a smaller vocabulary.

`remove_tokens` makes such a run: `count_model` counts tokens on a text, `plan_counted` decides which stay,
`TokensPlan.measure` measures on text that was held out of the counting what that costs, and `TokensPlan.write` writes
the smaller model. `write_plan` does both, in an output folder that is locked. No decoder layer is pruned: the tokens
that stay decide the rows of the embedding and the head that stay, and all other tensors are copied from file to file as
they are stored. Two models without weights, with the old and the new number of tokens, show which tensors have an entry
for each token.

A *row* is one of the embedding: most rows belong to a token, and some models have more rows than tokens. An *id* is the
number of a token and of its row; `new_ids` has the new id of each row that stays, by its old id. A model *without
weights* is on the meta device, with the shapes and the configuration only. *Pieces* are held-out texts: strings that no
token is counted on.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from optimum_fista import internals
from optimum_fista.atomic import write_file
from optimum_fista.bars import tqdm
from optimum_fista.config import FistaPruningConfig
from optimum_fista.devices import floating_dtype
from optimum_fista.folder import checkpoint
from optimum_fista.folder.output import FOLDER, locked_output, new_output
from optimum_fista.folder.packed_folder import is_packed
from optimum_fista.folder.writing import write_all_but_weights
from optimum_fista.model.calibration import read_batches
from optimum_fista.model.layers import token_limits
from optimum_fista.model.media import media_arguments
from optimum_fista.model.offload import execution_device
from optimum_fista.model.precision import choose_products, products_as
from optimum_fista.origin import read_origin
from optimum_fista.public_names import public_name
from optimum_fista.removal.earlier_masks import unchanged_masks
from optimum_fista.removal.token_ids import (
    ChatTemplateError,
    configuration_files,
    configurations_in,
    ids_in,
    ids_of_chat_template,
    renumbered,
)
from optimum_fista.removal.token_loss import measure_bits_per_byte
from optimum_fista.report import PruningReport, TextReport
from optimum_fista.source import loading
from optimum_fista.source.files import copy_source, source_folder
from optimum_fista.source.model_folder import names_in, read_json, write_index
from optimum_fista.source.quantization import forget_quantization
from optimum_fista.source.source_tensors import SourceTensors, source_tensors
from optimum_fista.source.stored_tensor import (
    PLAIN_FLOATS,
    StoredTensor,
    weight_files,
    write_stored,
)
from optimum_fista.text.loss import (
    MeasuredText,
    TextLoss,
    Tokenized,
    bits_per_byte,
    compared,
    longest_sequence,
    tokenized_text,
)
from optimum_fista.text.token_counts import HeldOutText, count_tokens
from optimum_fista.text.vocabulary import SmallerVocabulary, reduce_vocabulary
from optimum_fista.text.windows import first_token
from optimum_fista.tokens_removal import TokensRemoval

# Files that describe the old tokenizer; the new one is in tokenizer.json alone.
_OLD_TOKENIZER = re.compile(
    r"(vocab|encoder|merges|added_tokens|tekken)\.(json|txt|bpe)|.*\.(model(\.\w+)?|tiktoken|spm|vocab)"
)
# Numbers below it are multiples, and sizes of codecs, not of another vocabulary.
_LEAST_VOCABULARY = 1024


def remove_tokens(
    name: str,
    texts: Iterable[Any],
    output_dir: Path,
    config: FistaPruningConfig,
    *,
    text_name: str | None,
    device: str | None,
    dtype: str | torch.dtype,
    overwrite: bool,
    progress: bool,
    on_begin: Callable[[PruningReport], None],
) -> PruningReport:
    """Remove tokens from a model's files, write the smaller model to `output_dir`, and return the report.

    Downloads the weights of a Hub id into the cache. `output_dir` is locked against other runs from start to end.

    Args:
        name: The dense model: a folder or a Hub id. It is only read.
        texts: Texts on which tokens are counted, or batches of ids (see `count_model`). They are read once.
        output_dir: The new folder. Nothing is written there before all of it is ready.
        config: Its `pattern` says what is removed, such as "vocab:0.35".
        text_name: Name of the texts, for the report.
        device: Where to compute the loss; `None`: the accelerator if there is one.
        dtype: What the caller asked for; tensors are copied as they are stored, so another dtype is only warned of.
        overwrite: Replace a model that `output_dir` already holds.
        progress: Show progress bars.
        on_begin: Is called with the report when the plan is made.
    """
    started = time.perf_counter()
    with locked_output(output_dir):
        plan = plan_tokens(name, texts, config, text_name=text_name, progress=progress)
        on_begin(plan.report)
        return write_plan(
            plan,
            output_dir,
            started=started,
            device=device,
            dtype=dtype,
            overwrite=overwrite,
            progress=progress,
        )


def write_plan(
    plan: TokensPlan,
    output_dir: Path,
    *,
    started: float,
    device: str | None,
    dtype: str | torch.dtype,
    overwrite: bool,
    progress: bool,
) -> PruningReport:
    """Measure what a plan costs, and write its smaller model to `output_dir`; returns the plan's report.

    Changes that report (bits per byte, seconds, warnings) and the configuration of `plan.model`, which gets a summary
    of the run. `started` is when the run began, by `time.perf_counter`; the other arguments are those of
    `remove_tokens`.
    """
    stored_dtype = plan.report.model["dtype"]
    asked_dtype = str(dtype).removeprefix("torch.")  # "auto", or a name such as "bfloat16"
    if asked_dtype not in ("auto", stored_dtype):
        plan.report.warn(
            f"dtype={dtype} is not used: tensors are copied as they are stored ({stored_dtype})."
        )
    with locked_output(output_dir) as unfinished:
        # if this process is killed, the next run on `output_dir` deletes the temporary files in this folder
        plan.measure(unfinished / FOLDER, device, progress)
        with new_output(output_dir, overwrite, plan.source) as folder:
            plan.write(folder, started, progress)
    return plan.report


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
    first_token: int | None  # old id of BOS, if texts begin with it
    new_ids: Mapping[int, int]  # of the rows that stay, by their old ids; last, rows of no token
    held_out: tuple[str, ...]  # pieces of the text that no token was counted on
    report: PruningReport

    def measure(self, offload_parent: Path, device: str | None, progress: bool) -> None:
        """Add bits per byte of the held-out text, with all tokens and with those that stay, to the report.

        If they can't be measured, a warning of the report says why. `self.held_out` are pieces of text that no token
        was counted on. `offload_parent` is an existing folder; the files that are written there are deleted again.
        """
        if not self.held_out:
            self.report.warn(
                "bits per byte are not measured: the text is too short to hold some of it out. Pass at least 50,000 "
                'characters of it, or batches with "held_out".'
            )
            return
        dense_tokenizer = Tokenizer.from_str(json.dumps(self.dense_tokenizer))
        smaller_tokenizer = Tokenizer.from_str(json.dumps(self.tokenizer))
        try:
            with tempfile.TemporaryDirectory(prefix="offload-", dir=offload_parent) as offload:
                numbers = measure_bits_per_byte(
                    self.name,
                    self.held_out,
                    dense_tokenizer=dense_tokenizer,
                    smaller_tokenizer=smaller_tokenizer,
                    kept=torch.tensor(list(self.new_ids)),
                    bos=self.first_token,
                    offload_folder=Path(offload),
                    device=device,
                    compute_dtype=self.report.config["compute_dtype"],
                    progress=progress,
                )
        except (ValueError, RuntimeError, MemoryError) as error:  # also if memory runs out
            self.report.warn(
                f"bits per byte are not measured ({type(error).__name__}: {error}). The files do not depend on them."
            )
            return
        self.report.bits_per_byte = numbers | {"text": self.report.calibration["source"]}

    def write(self, folder: Path, started: float, progress: bool) -> None:
        """Write all files of the smaller model into an unfinished, empty folder.

        Adds the seconds since `started` (by `time.perf_counter`) to the report, and a summary of the run to the
        configuration of `self.model`. `self.source` is the folder of the dense model, which is only read.
        """
        copy_source(self.source, folder)  # all files but weights and what a run writes
        self._write_tokenizer(folder)
        self._write_weights(folder, progress)
        self.report.seconds["total"] = time.perf_counter() - started

        _, masks = unchanged_masks(self.source)  # of an earlier run that set weights to zero
        write_all_but_weights(
            folder,
            self.model,
            tokenizer=None,
            report=self.report,
            masks=masks,
            packed=None,
            quantized=self.quantized,
        )
        self._write_table(folder)

    def _write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer and the configurations beside that of the model, and delete the old tokenizer's files.

        `folder` is the unfinished folder, which has copies of the dense model's files; `self.tokenizer` is the content
        of the new tokenizer.json. ValueError if Transformers loads the new tokenizer with other ids.
        """
        for file in list(folder.iterdir()):
            if _OLD_TOKENIZER.fullmatch(file.name):
                file.unlink()
        for name, values in configuration_files(folder).items():
            changed = renumbered(values, self.new_ids)
            if changed != values:
                write_file(folder / name, json.dumps(changed, indent=2, ensure_ascii=False) + "\n")
        content = json.dumps(self.tokenizer, indent=2, ensure_ascii=False)
        write_file(folder / "tokenizer.json", content)

        with loading.reading(str(folder)):  # which makes errors name the folder
            loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        vocabulary = loaded.get_vocab()
        last_token = max(vocabulary, key=vocabulary.__getitem__)
        last_id = vocabulary[last_token]
        if last_id >= len(self.new_ids):
            raise ValueError(
                f"model={str(self.source)!r}: Transformers gives the token {last_token!r} the id {last_id}, "
                f"and the smaller embedding would have {len(self.new_ids)} rows, so no token can be removed. Check the "
                "added tokens in its tokenizer_config.json."
            )
        if vocabulary != _ids_of_tokens(self.tokenizer):
            raise ValueError(
                f"model={str(self.source)!r}: {type(loaded).__name__} of Transformers gives other ids than the smaller "
                "tokenizer.json, so no token can be removed."
            )

    def _write_weights(self, folder: Path, progress: bool) -> None:
        """Write the tensors to files with the names of the source's, and an index if there are several.

        `self.stored` has all tensors of the result, by name; their values are read from the source file by file.
        Tensors of other files than safetensors go to "model.safetensors".
        """
        files_of_source = dict[
            str, str
        ]()  # name of the file that has a tensor, by the tensor's name
        for file in weight_files(self.source):
            if file.suffix == ".safetensors":
                files_of_source |= dict.fromkeys(names_in(file), file.name)
        weight_map = {name: files_of_source.get(name, "model.safetensors") for name in self.stored}

        file_names = sorted(set(weight_map.values()))
        for file_name in tqdm(
            file_names, desc="Writing weights", unit="file", disable=not progress
        ):
            tensors = {
                name: tensor
                for name, tensor in self.stored.items()
                if weight_map[name] == file_name
            }
            write_stored(folder / file_name, tensors)
        if file_names != ["model.safetensors"]:
            metadata = {"total_parameters": self.model.num_parameters()}
            write_index(folder, "model", weight_map, metadata)

    def _write_table(self, folder: Path) -> None:
        """Write which rows of the first dense model stay; the source's table is continued if it has one.

        The table's "kept" has the id in the first model of each row of the result, its "num_tokens" the number of rows
        of the first model.
        """
        old_ids = list(self.new_ids)  # in the order of their new rows
        num_rows = self.report.model["vocabulary"]["before"]
        table: dict[str, Any] = {"kept": old_ids, "num_tokens": num_rows}

        earlier = checkpoint.kept_tokens(self.source)  # None if no run has removed tokens before
        # otherwise somebody has resized the embedding since the earlier run
        is_of_this_embedding = earlier is not None and len(earlier) == num_rows
        if earlier is not None and is_of_this_embedding:
            table = read_json(self.source / checkpoint.VOCABULARY_FILE)
            table["kept"] = earlier[old_ids].tolist()  # ids of the first model
        write_file(folder / checkpoint.VOCABULARY_FILE, json.dumps(table) + "\n")


def measure_plans(
    plans: Sequence[TokensPlan],
    texts: Sequence[MeasuredText],
    *,
    device: str | None,
    progress: bool,
) -> list[list[TextReport]]:
    """Measure what plans for one model cost on texts, before anything is written; in one pass over its decoder layers.

    Returns for each plan the losses on all texts, in their order. The model's files are only read; weights that are
    stored in another form than a model computes with are copied to a temporary folder for that time. ValueError if the
    loss is NaN or Inf. `device` is where to compute; `None`: the accelerator if there is one.
    """
    with tempfile.TemporaryDirectory(prefix="offload-") as offload:
        model = loading.load_lazily(plans[0].name, Path(offload), device=device).model
        vocabulary, num_positions = token_limits(model)
        main_device = execution_device(model.get_input_embeddings())
        compute_dtype = plans[0].report.config["compute_dtype"]

        def tokenized(content: Mapping[str, Any], old_ids: Sequence[int] | None) -> list[Tokenized]:
            """Write all texts in the tokens of a `tokenizer.json`, with the ids of the dense model."""
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer.from_str(json.dumps(content))
            )
            return [
                tokenized_text(
                    text.stretches,
                    tokenizer,
                    bos=plans[0].first_token,
                    longest=longest_sequence(num_positions),
                    old_ids=old_ids,
                )
                for text in texts
            ]

        variants = [tokenized(plans[0].dense_tokenizer, None)]
        removed = dict[str, Tensor]()  # ids that the model can't predict, by the key of a text
        for plan in plans:
            is_removed = torch.ones(vocabulary, dtype=torch.bool)
            is_removed[list(plan.new_ids)] = False
            for index in range(len(texts)):
                removed[f"{len(variants)}/{index}"] = is_removed.nonzero().flatten()
            variants.append(tokenized(plan.tokenizer, list(plan.new_ids)))
        by_key = {
            f"{number}/{index}": text
            for number, of_variant in enumerate(variants)
            for index, text in enumerate(of_variant)
        }
        with products_as(choose_products(compute_dtype, main_device, model.dtype)):
            bits = bits_per_byte(model, by_key, removed=removed, progress=progress)

    losses = [
        [
            TextLoss(
                bits_per_byte=bits[f"{number}/{index}"],
                num_tokens=text.num_tokens,
                num_bytes=text.num_bytes,
                vocabulary=vocabulary,
            )
            for index, text in enumerate(of_variant)
        ]
        for number, of_variant in enumerate(variants)
    ]
    return [compared(texts, losses[0], of_plan) for of_plan in losses[1:]]


@dataclass(frozen=True)
class CountedModel:
    """A dense model's files, and how often a text has each of its tokens: what plans are made of."""

    name: str  # a folder or a Hub id
    folder: Path  # of its files
    settings: PreTrainedConfig  # its configuration, called dense
    model: PreTrainedModel  # without weights
    source: SourceTensors  # the tensors in its files
    tokenizer: PreTrainedTokenizerBase
    text_name: str | None
    counts: Tensor  # int64 [rows]: how often each token is in the text
    num_texts: int  # texts and batches that were read
    held_out: tuple[str, ...]  # pieces of text that were not counted


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


def plan_counted(counted: CountedModel, config: FistaPruningConfig) -> TokensPlan:
    """Decide which tokens stay, and plan what changes in the model's files.

    Changes nothing of `counted` and writes no file; warnings go to the report of the plan, and are issued.
    `config.pattern` says what is removed, such as "vocab:0.35". ValueError if the pattern does not fit the model.
    """
    request = config.tokens_removal
    assert request is not None
    tokenizer = counted.tokenizer
    folder = counted.folder
    num_rows = len(counted.counts)

    ids_of_tokens = set(tokenizer.get_vocab().values())
    named_ids, template_warning = _named_ids(tokenizer, counted.settings, folder)
    # Rows of no token that are named, such as a padding id after the last token.
    spare_rows = sorted(index for index in named_ids - ids_of_tokens if 0 <= index < num_rows)
    keep = (named_ids & ids_of_tokens) | _ids_to_keep(tokenizer, request)
    content = _tokenizer_content(tokenizer, folder)
    smaller = _smaller_vocabulary(content, counted.counts, request, keep, num_spare=len(spare_rows))
    old_ids = smaller.kept.tolist() + spare_rows  # in the order of the new rows
    new_ids = {old: new for new, old in enumerate(old_ids)}

    model = _smaller_model(counted.settings, new_ids, num_rows)
    kept = torch.tensor(old_ids)
    stored = _cut(counted.source, counted.model, model, kept)
    _set_dtype(model, counted.settings, stored)
    report = PruningReport(
        config=config.resolved().to_dict(),
        model=_described(counted, model),
        origin=read_origin(counted.settings),
        calibration={
            "source": counted.text_name,
            "sha256": hashlib.sha256(counted.counts.numpy().tobytes()).hexdigest(),
            "num_sequences": counted.num_texts,
            "num_tokens": int(counted.counts.sum()),
        },
    )
    if template_warning:
        report.warn(template_warning)
    report.carried, _ = unchanged_masks(folder)  # operators with zeros of an earlier run
    num_rows_without_token = num_rows - len(ids_of_tokens)
    _warn_of_rows(report, num_rows_without_token, counted.settings)
    num_seen = int(counted.counts[kept].count_nonzero())
    if request.share is not None and num_seen < 0.9 * len(kept):
        report.warn(
            f"the text has only {num_seen} of the {len(kept)} tokens that stay: pass more of it."
        )
    return TokensPlan(
        name=counted.name,
        source=folder,
        model=model,
        stored=stored,
        quantized=counted.source.settings,
        dense_tokenizer=content,
        tokenizer=smaller.tokenizer,
        first_token=first_token(tokenizer),
        new_ids=new_ids,
        held_out=counted.held_out,
        report=report,
    )


def _read_source(name: str) -> tuple[Path, PreTrainedConfig]:
    """The folder of a model's files, in the cache for a Hub id, and its configuration without quantization.

    Downloads the weights of a Hub id. ValueError if the model has no files from which tokens can be removed.
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


def _num_rows(model: PreTrainedModel) -> int:
    """The number of rows of the embedding and of the head; refuses models with more than one vocabulary.

    `model` is without weights, and only read.
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
            size = len(value) if isinstance(value, dict | list) else value
            is_other = "vocab" in key and key not in ("vocab_size", "type_vocab_size")
            if is_other and type(size) is int and size >= _LEAST_VOCABULARY:
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
    num_rows = _num_rows(model)
    batch_counts = torch.zeros(num_rows, dtype=torch.int64)
    marked = list[str]()  # texts of batches that the caller holds out
    num_texts = 0

    def strings() -> Iterator[str]:
        """Yield the texts, and count texts and batches; ids of batches are added to `batch_counts`, or to `marked`."""
        nonlocal num_texts
        for item in tqdm(texts, desc="Counting tokens", unit=" texts", disable=not progress):
            num_texts += 1
            if isinstance(item, str):
                yield item
                continue
            for batch in read_batches([item], num_rows, None, media_arguments(model)):
                for row in batch.sequences_without_padding():
                    ids = row.input_ids.flatten()
                    if batch.held_out:
                        marked.append(str(tokenizer.decode(ids, skip_special_tokens=True)))
                    else:
                        batch_counts.add_(torch.bincount(ids, minlength=num_rows))

    # `counted` passes on the text to count, and collects the rest of it in `pieces`.
    held_out = HeldOutText()
    text_counts = count_tokens(tokenizer, held_out.counted(strings()), num_rows)
    counts = text_counts + batch_counts
    if not counts.any():
        raise ValueError("calib_dataloader holds no token: pass texts, or batches of token ids.")
    return counts, num_texts, (*marked, *held_out.pieces)


def _named_ids(
    tokenizer: PreTrainedTokenizerBase, settings: PreTrainedConfig, folder: Path
) -> tuple[set[int], str]:
    """Ids that the files or the chat template of a model name, and a warning if the template can't be read.

    `settings` is the model's configuration, `folder` has its files. Some of the ids may be no row.
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
    """The ids that the user wants to keep: `request.keep` has ids, and texts such as "zebra".

    Of a text, the tokens that it has alone and those that it has after a space stay.
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
    """The content of a `tokenizer.json` that has all tokens of a loaded tokenizer, with their ids.

    That is the file in `folder`, as other programs read it. If Transformers adds tokens to those of the file, it is the
    content that Transformers would write. ValueError if neither has the ids that Transformers gives.
    """
    vocabulary = tokenizer.get_vocab()
    file = folder / "tokenizer.json"
    if file.exists():
        content: dict[str, Any] = read_json(file)
        if _ids_of_tokens(content) == vocabulary:
            return content
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    if _ids_of_tokens(content) != vocabulary:
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
        request: What is removed.
        keep: Ids of tokens that stay whatever their counts are.
        num_spare: Rows of no token that stay besides them.
    """
    num_rows = len(counts)
    num_tokens = len(_ids_of_tokens(content))
    try:
        if request.share is not None:
            num_kept = request.num_kept(num_rows)
        else:
            # the tokens that the text uses, and as many of the others as make a multiple of `step`
            used = reduce_vocabulary(content, counts, None, keep).kept
            step = request.step(num_rows)
            num_kept = step * math.ceil((len(used) + num_spare) / step)
            keep = keep | set(used.tolist())
        num_tokens_kept = min(num_kept - num_spare, num_tokens)
        smaller = reduce_vocabulary(content, counts, num_tokens_kept, keep)
    except ValueError as error:
        raise ValueError(f"pattern={str(request)!r} of {num_rows} tokens: {error}") from error
    if len(smaller.kept) + num_spare >= num_rows:
        raise ValueError(f"pattern={str(request)!r}: all {num_rows} tokens would stay.")
    return smaller


def _smaller_model(
    settings: PreTrainedConfig, new_ids: Mapping[int, int], num_rows: int
) -> PreTrainedModel:
    """The model with fewer tokens, without weights.

    `settings` is the configuration of the dense model, whose embedding has `num_rows`. It is only read.
    """
    smaller = copy.deepcopy(settings)
    # all configurations are looked for before the first size changes
    for section in configurations_in(smaller):
        vars(section).update(renumbered(vars(section), new_ids))
        if getattr(section, "vocab_size", None) == num_rows:
            section.vocab_size = len(new_ids)
    return loading.model_without_weights(smaller)


def _set_dtype(
    model: PreTrainedModel, settings: PreTrainedConfig, stored: Mapping[str, StoredTensor]
) -> None:
    """Convert a model without weights to the dtype of its configuration, or that of the first stored tensor in floats.

    `settings` is the configuration of the dense model; `stored` has the tensors of the result, by name.
    """
    dtype = getattr(settings, "dtype", None)
    if dtype is None:
        in_floats = [tensor for tensor in stored.values() if tensor.dtype in PLAIN_FLOATS]
        dtype = in_floats[0].tensor().dtype  # reads this tensor
    torch.nn.Module.to(model, floating_dtype(dtype))


def _described(counted: CountedModel, model: PreTrainedModel) -> dict[str, Any]:
    """What a report says of the smaller model, which is without weights: `PruningReport.model`."""
    return {
        "class": type(model).__name__,
        "name": public_name(counted.name),
        "model_type": model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_parameters": model.num_parameters(),
        "dense_num_parameters": counted.model.num_parameters(),
        "vocabulary": {"kept": _num_rows(model), "before": len(counted.counts)},
        # numbers of tensors that the model's class does not load, by their module
        "copied": counted.source.num_copied,
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
    earlier = getattr(settings, checkpoint.CONFIG_KEY, None) or {}
    if earlier.get("num_zeros") and not report.carried:
        report.warn(
            f"the model was pruned before: {earlier['num_zeros']} zeros stay, but their masks are not known. Pass the "
            "folder that the earlier run has saved."
        )


def _ids_of_tokens(content: Mapping[str, Any]) -> dict[str, int]:
    """All tokens of a `tokenizer.json`, with the ids that the library loads."""
    return dict(Tokenizer.from_str(json.dumps(content)).get_vocab())


def _cut(
    source: SourceTensors, dense: PreTrainedModel, smaller: PreTrainedModel, kept: Tensor
) -> dict[str, StoredTensor]:
    """Describe all tensors of the files by name; those with an entry for each token have only the entries `kept`.

    The values are not read here, but when they are written. ValueError if the embedding or the head is missing, or a
    tensor with an entry for each token can't be cut.

    Args:
        source: The tensors in the dense model's files: `places` has the parameter as which each is loaded, by its name
            in the files, and `not_loaded` the names of those that the model's class does not load.
        dense: The dense model, without weights.
        smaller: The model with fewer tokens, without weights.
        kept: int64 [rows that stay]: their old ids.
    """
    num_rows = _num_rows(dense)
    axes = _axes_of_tokens(dense, smaller)
    in_files = set(source.places.values())  # names of the parameters that the files have
    tied = dense.all_tied_weights_keys  # maps a parameter to the one whose weights it uses
    shared_by_files = {target for name, target in tied.items() if name in in_files}
    available = in_files | set(tied) | shared_by_files
    missing = [name for name in axes if name not in available]
    if missing:
        raise ValueError(
            f"{str(smaller.config.name_or_path)!r} lacks {min(missing)}: download it again."
        )

    embedding = next(dense.get_input_embeddings().parameters())  # its matrix
    embedding_shape = tuple(embedding.shape)
    stored = dict[str, StoredTensor]()
    for name, tensor in source.stored.items():
        is_loaded = name not in source.not_loaded  # by the class of the model
        axis = axes.get(source.places[name]) if name in source.places else None
        if axis is None and not is_loaded and tensor.shape == embedding_shape:
            axis = 0  # embeddings and heads of layers that predict more tokens are cut too

        # a quantized tensor may be stored in another shape than its parameter, or without this axis
        has_axis = axis is not None and axis < len(tensor.shape)
        may_be_of_tokens = axis is not None or (not is_loaded and num_rows in tensor.shape)
        has_one_value = math.prod(tensor.shape) == 1  # a scale of a whole tensor
        if axis is not None and has_axis and tensor.shape[axis] == num_rows:
            stored[name] = tensor.selected(axis, kept)
        elif has_one_value or not may_be_of_tokens:
            stored[name] = tensor
        else:
            raise ValueError(
                f"{name} ({tensor.dtype} {[*tensor.shape]}) can't be cut to some of the {num_rows} tokens: delete it, "
                "or take a model whose embedding and head are in 16 bits."
            )
    return stored


def _axes_of_tokens(dense: PreTrainedModel, smaller: PreTrainedModel) -> dict[str, int]:
    """The axis of each tensor that has an entry for each token, by the tensor's name in the model.

    On this axis, the tensor has another size in `smaller`. Both models are without weights, and only read.
    """
    smaller_tensors = smaller.state_dict()
    axes = dict[str, int]()
    for name, tensor in dense.state_dict().items():
        sizes = zip(tensor.shape, smaller_tensors[name].shape, strict=True)
        for axis, (old, new) in enumerate(sizes):
            if old != new:
                axes[name] = axis
    return axes

"""Removing tokens: the embedding, head, tokenizer and ids in a model's files become those of a smaller vocabulary.

No decoder layer is loaded. Tokens are counted on a text, and those that stay decide the rows of the embedding and the
head that stay. All other tensors are copied from file to file as they are stored. Two models without weights, with the
old and the new number of tokens, show which tensors have an entry for each token.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from optimum_fista.config import FistaPruningConfig
from optimum_fista.folder import checkpoint
from optimum_fista.folder.atomic import write_file
from optimum_fista.folder.packed_folder import is_packed
from optimum_fista.folder.writing import write_all_but_weights
from optimum_fista.model.calibration import read_batches
from optimum_fista.model.media import media_arguments
from optimum_fista.origin import read_origin
from optimum_fista.report import PruningReport, public_name
from optimum_fista.source import loading
from optimum_fista.source.files import copy_source, source_folder
from optimum_fista.source.formats.dequantization import DENSE, forget_quantization
from optimum_fista.source.source_tensors import (
    SourceTensors,
    StoredTensor,
    source_tensors,
    weight_files,
    write_stored,
)
from optimum_fista.text.vocabulary import SmallerVocabulary, count_tokens, reduce_vocabulary

# Keys whose numbers are ids of tokens, in every family of Transformers; ids of sounds are not those of text.
_IDS = re.compile(
    r"(?!codec|codebook|audio_stream)(.*_)?"
    r"(tokens?_(ids?|index|indices)|(start|end|patch|newline|bos|eos|pad)_ids?|suppress_tokens|words_ids|sequence_bias)"
)
# Files that describe the old tokenizer; the new one is in tokenizer.json alone.
_OLD = re.compile(
    r"(vocab|encoder|merges|added_tokens|tekken)\.(json|txt|bpe)|.*\.(model(\.\w+)?|tiktoken|spm|vocab)"
)
_SMALL = 1024  # smaller numbers are multiples, and sizes of codecs, not of another vocabulary


@dataclass(frozen=True)
class VocabularyPlan:
    """The tokens of a model that stay, and all that is written; the embedding is read only then."""

    source: Path
    model: PreTrainedModel  # the smaller one, without weights
    stored: Mapping[str, StoredTensor]  # all tensors of the result, by name
    quantized: Mapping[str, Any]  # what the configuration says of quantized weights
    tokenizer: Mapping[str, Any]  # content of tokenizer.json
    new_ids: Mapping[int, int]  # of the tokens that stay, by their old ids; last, rows of no token
    report: PruningReport

    @classmethod
    def of(
        cls,
        name: str,
        texts: Iterable[Any],
        config: FistaPruningConfig,
        text_name: str | None,
        progress: bool = True,
    ) -> VocabularyPlan:
        """Count tokens of texts, or batches of ids, and plan what changes; ValueError if no token can be removed."""
        folder, settings = _source(name, config.pattern)
        tokenizer, dense = loading.require_tokenizer(name), loading.described(settings)
        source, size, sections = source_tensors(dense, folder), _size(dense), [*_sections(settings)]
        counts, documents = _count(tokenizer, texts, dense, progress)
        named, tokens = set[int](), {*(vocabulary := tokenizer.get_vocab()).values()}
        for values in [*map(vars, sections), *_configurations(folder).values()]:
            _with_ids(values, lambda index: named.add(index) or index)  # type: ignore[func-returns-value]
        for roles in (("system", "user", "assistant"), ("user", "assistant")):
            with suppress(
                Exception
            ):  # there is no chat template, or it refuses a role: it is code of other people
                turns = [{"role": role, "content": ""} for role in roles]
                chat = tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=True
                )
                named.update(tokenizer.encode(chat, add_special_tokens=False))
        spare = sorted(
            index for index in named - tokens if 0 <= index < size
        )  # rows of no token that are named
        given = (
            t
            for token in config.keep_tokens
            for t in ([token] if type(token) is int else [token, f" {token}"])
        )
        asked = ([token] if isinstance(token, int) else tokenizer.encode(token) for token in given)
        contents = [
            *map(checkpoint.read_json, folder.glob("tokenizer.json"))
        ]  # as other programs read it
        contents += [
            json.loads(tokenizer.backend_tokenizer.to_str())
        ]  # if Transformers adds tokens to the file
        content = next(content for content in contents if _vocabulary(content) == vocabulary)
        smaller = _smaller(content, counts, config, (named & tokens).union(*asked), len(spare))
        new_ids = {old: new for new, old in enumerate([*smaller.kept.tolist(), *spare])}
        for section in sections:
            vars(section).update(_with_ids(vars(section), lambda index: new_ids.get(index, index)))
            if getattr(section, "vocab_size", None) == size:
                section.vocab_size = len(new_ids)
        model, kept = loading.described(settings), torch.tensor([*new_ids])
        stored = _cut(source, dense, model, kept)
        dtypes = (tensor.tensor().dtype for tensor in stored.values() if tensor.dtype in DENSE)
        torch.nn.Module.to(
            model, loading.floating_dtype(getattr(settings, "dtype", None) or next(dtypes))
        )
        described: dict[str, Any] = {
            "class": type(model).__name__,
            "name": public_name(name),
        }
        described |= {
            "model_type": settings.model_type,
            "dtype": str(model.dtype).removeprefix("torch."),
        }
        described |= {
            "num_parameters": model.num_parameters(),
            "dense_num_parameters": dense.num_parameters(),
        }
        described |= {"vocabulary": {"kept": len(kept), "before": size}, "copied": source.copied}
        digest = hashlib.sha256(counts.numpy().tobytes()).hexdigest()
        text = {
            "source": text_name,
            "sha256": digest,
            "num_sequences": documents,
            "num_tokens": int(counts.sum()),
        }
        report = PruningReport(
            config.resolved().to_dict(), described, text, origin=read_origin(settings)
        )
        if without := size - len(tokens):
            report.warn(
                f"{without} of the {size} rows of the embedding belong to no token: they go first."
            )
        if config.sparsity and (seen := int(counts[kept].count_nonzero())) < 0.9 * len(kept):
            report.warn(
                f"the text has only {seen} of the {len(kept)} tokens that stay: pass more of it."
            )
        if zeros := (getattr(settings, checkpoint.CONFIG_KEY, None) or {}).get("num_zeros"):
            report.warn(
                f"the model was pruned before: {zeros} zeros stay, but not their masks. Remove tokens first."
            )
        return cls(folder, model, stored, source.settings, smaller.tokenizer, new_ids, report)

    def write(self, folder: Path, started: float, progress: bool) -> None:
        """Write all files of the smaller model into an unfinished folder, and note the seconds since `started`."""
        copy_source(self.source, folder)
        for file in [file for file in folder.iterdir() if _OLD.fullmatch(file.name)]:
            file.unlink()
        for name, values in _configurations(folder).items():
            changed = _with_ids(values, lambda index: self.new_ids.get(index, index))
            if added := values.get("added_tokens_decoder"):
                pairs = [(self.new_ids.get(int(old)), token) for old, token in added.items()]
                changed["added_tokens_decoder"] = {
                    str(new): token for new, token in pairs if new is not None
                }
            if changed != values:
                write_file(folder / name, json.dumps(changed, indent=2, ensure_ascii=False) + "\n")
        write_file(
            folder / "tokenizer.json", json.dumps(self.tokenizer, indent=2, ensure_ascii=False)
        )
        with loading.reading(str(folder)):
            found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if found.get_vocab() != _vocabulary(self.tokenizer):
            what = f"{type(found).__name__} of Transformers gives other ids than the smaller tokenizer.json"
            raise ValueError(f"model={str(self.source)!r}: {what}, so no token can be removed.")
        files = [file for file in weight_files(self.source) if file.suffix == ".safetensors"]
        shards = {name: file.name for file in files for name in checkpoint.names_in(file)}
        weight_map = {name: shards.get(name, "model.safetensors") for name in self.stored}
        for shard in tqdm(
            sorted({*weight_map.values()}),
            desc="Writing weights",
            unit="file",
            disable=not progress,
        ):
            write_stored(
                folder / shard,
                {name: t for name, t in self.stored.items() if weight_map[name] == shard},
            )
        if {*weight_map.values()} != {"model.safetensors"}:
            checkpoint.write_index(
                folder, "model", weight_map, {"total_parameters": self.model.num_parameters()}
            )
        self.report.seconds["total"] = time.perf_counter() - started
        write_all_but_weights(folder, self.model, None, self.report, {}, None, self.quantized)
        table = {"kept": [*self.new_ids], "num_tokens": self.report.model["vocabulary"]["before"]}
        old = checkpoint.kept_tokens(self.source)
        if (
            old is not None and len(old) == table["num_tokens"]
        ):  # else somebody has resized the embedding since
            known = checkpoint.read_json(
                self.source / checkpoint.VOCABULARY_FILE
            )  # ids are those of the first model
            table = known | {"kept": old[table["kept"]].tolist()}
        write_file(folder / checkpoint.VOCABULARY_FILE, json.dumps(table) + "\n")


def _source(name: str, pattern: str) -> tuple[Path, PreTrainedConfig]:
    """The folder of a model's files, in the cache for a Hub id, and its configuration, called dense."""
    what = f"model={name!r}: pattern={pattern!r} needs a model folder with a tokenizer"
    if Path(name).is_file() or loading.gguf_file(name) is not None:
        raise ValueError(f"{what}: pass one, or a Hub id.")
    settings = copy.deepcopy(loading.read_config(name))
    folder = source_folder(name, revision := getattr(settings, "_commit_hash", None))
    if not Path(name).is_dir():
        snapshot_download(
            name, revision=revision, allow_patterns=["model*.safetensors*", "pytorch_model*.bin*"]
        )
    if is_packed(folder):
        raise ValueError(f"{what}, and this one is packed: unpack it first (optimum-fista unpack).")
    forget_quantization(settings)
    return folder, settings


def _sections(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration and those in it, without those of other vocabularies, such as that of a codec."""
    size, waiting = config.get_text_config(decoder=True).vocab_size, [config]
    for section in waiting:
        if section is config or getattr(section, "vocab_size", size) == size:
            yield section
        waiting += [
            value for value in vars(section).values() if isinstance(value, PreTrainedConfig)
        ]


def _size(model: PreTrainedModel) -> int:
    """The number of rows of the embedding and of the head; refuses models with more than one vocabulary."""
    sizes = [("vocab_size", int(model.config.get_text_config(decoder=True).vocab_size))]
    modules = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    sizes += [
        (name, len(p)) for name, m in modules.items() if m for p in m.parameters() if p.ndim > 1
    ]  # no norms
    values = {
        key: v
        for part in _sections(model.config)
        for key, v in vars(part).items()
        if "vocab" in key
    }
    lengths = {
        key: len(value) if isinstance(value, dict | list) else value
        for key, value in values.items()
    }
    known = ("vocab_size", "type_vocab_size")
    others = [
        (key, n)
        for key, n in lengths.items()
        if key not in known and type(n) is int and n >= _SMALL
    ]
    if others or len({size for _, size in sizes}) > 1:
        shown = ", ".join(f"{name} of {size}" for name, size in sizes + others)
        raise ValueError(
            f"{type(model).__name__} has more than one vocabulary, so no token can be removed: {shown}."
        )
    return sizes[0][1]


def _count(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[Any], model: PreTrainedModel, progress: bool
) -> tuple[Tensor, int]:
    """How often each token is in texts and batches, int64 [rows of the embedding], and how many texts there are."""
    size, documents = _size(model), 0
    counts = torch.zeros(size, dtype=torch.int64)
    if isinstance(texts, str):
        raise ValueError(
            "calib_dataloader is one text: pass a list of texts, or an iterable of batches."
        )

    def strings() -> Iterator[str]:
        nonlocal documents
        for item in tqdm(texts, desc="Counting tokens", unit=" texts", disable=not progress):
            documents += 1
            if isinstance(item, str):
                yield item
                continue
            for batch in read_batches([item], size, None, media_arguments(model)):
                for row in batch.rows() if not batch.held_out else ():
                    counts.add_(torch.bincount(row.input_ids.flatten(), minlength=size))

    counts += count_tokens(tokenizer, strings(), size)
    if not counts.any():
        raise ValueError("calib_dataloader holds no token: pass texts, or batches of token ids.")
    return counts, documents


def _smaller(
    content: dict[str, Any], counts: Tensor, config: FistaPruningConfig, keep: set[int], spare: int
) -> SmallerVocabulary:
    """Keep as many tokens as the pattern says, besides `spare` rows that have no token."""
    assert config.whole_parts is not None
    share, size, tokens = config.whole_parts.shares[0], len(counts), _vocabulary(content)
    try:
        if share.share:
            number = share.num_kept(size)
        else:  # those that the text uses, and more of the others up to a multiple
            step = share.multiple_of or share.usual_step(share.kind, size)
            number = step * -(
                -(len(reduce_vocabulary(content, counts, None, keep).kept) + spare) // step
            )
        smaller = reduce_vocabulary(content, counts, min(number - spare, len(tokens)), keep)
    except ValueError as error:
        raise ValueError(f"pattern={str(share)!r} of {size} tokens: {error}") from error
    if len(smaller.kept) + spare >= size:
        raise ValueError(f"pattern={str(share)!r}: all {size} tokens would stay.")
    return smaller


def _vocabulary(content: Mapping[str, Any]) -> dict[str, int]:
    """All tokens of a tokenizer.json, with their ids."""
    return dict(Tokenizer.from_str(json.dumps(content)).get_vocab())


def _cut(
    source: SourceTensors, dense: PreTrainedModel, smaller: PreTrainedModel, kept: Tensor
) -> dict[str, StoredTensor]:
    """All tensors of the files, with the entries `kept` of those that have one for each token."""
    size, after, stored = _size(dense), smaller.state_dict(), dict[str, StoredTensor]()
    pairs = {
        n: [*enumerate(zip(t.shape, after[n].shape, strict=True))]
        for n, t in dense.state_dict().items()
    }
    axes = {name: axis for name, sizes in pairs.items() for axis, (old, new) in sizes if old != new}
    present, tied = {*source.places.values()}, dense.all_tied_weights_keys
    if missing := axes.keys() - present - {*tied} - {tied[name] for name in present & tied.keys()}:
        raise ValueError(
            f"{str(smaller.config.name_or_path)!r} lacks {min(missing)}: download it again."
        )
    rows = tuple(next(dense.get_input_embeddings().parameters()).shape)
    for name, tensor in source.stored.items():
        # embeddings and heads of layers that predict more tokens, which no class loads, are cut too
        axis = axes.get(
            source.places.get(name, ""),
            0 if name in source.others and tensor.shape == rows else None,
        )
        if axis is not None and tensor.shape[axis : axis + 1] == (size,):
            stored[name] = tensor.selected(axis, kept)
        elif math.prod(tensor.shape) == 1 or (
            axis is None and not (name in source.others and size in tensor.shape)
        ):
            stored[name] = tensor
        else:
            what = f"{name} ({tensor.dtype} {[*tensor.shape]}) can't be cut to some of the {size} tokens"
            raise ValueError(
                f"{what}: delete it, or take a model whose embedding and head are in 16 bits."
            )
    return stored


def _configurations(folder: Path) -> dict[str, dict[str, Any]]:
    """The configurations beside that of the model, by file: of generation, tokenizer and processor."""
    return {
        file.name: checkpoint.read_json(file) for file in sorted(folder.glob("[!.]*_config.json"))
    }


def _with_ids(value: Any, change: Callable[[int], int], named: bool = False) -> Any:
    """Replace all ids of tokens in JSON values; `named` says that the numbers in them are ids."""
    if isinstance(value, dict):
        return {
            key: _with_ids(inner, change, named or bool(_IDS.fullmatch(str(key))))
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(_with_ids(inner, change, named) for inner in value)
    return change(value) if named and type(value) is int else value

"""Make a tokenizer smaller: keep the tokens that a text uses, and what they are made of.

Everything here works on the content of a `tokenizer.json`: no model, no files. The smaller tokenizer splits a text into
the same tokens as before if all of these stay. It knows every character that is a token of its own, or all bytes, and
decodes texts of these as before. Each kind of tokenizer keeps this promise in its own way:

- **BPE** merges the adjacent pair of the lowest rank until no pair is left. A token stays with the two tokens of the
  last merge that makes it, and so on down to single symbols; a merge stays if its parts and its result do. *Proof*: no
  merge crosses the border of a token of the result, so the same merges make that token in every text, and all symbols
  on the way to it stay. The lowest merge of each step stays too, and no other comes before it: every step is the same.
- **Unigram** takes the path of the highest total score. Paths that went were not better than the one that stays, and of
  equal ones the same comes first. The lowest score stays, from which that of unknown characters is derived.
- **WordPiece** takes the longest piece at each place: if it stays, it is still the longest.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_KINDS = ("BPE", "Unigram", "WordPiece")
_BYTES = frozenset(
    f"<0x{byte:02X}>" for byte in range(256)
)  # tokens for the bytes of characters that are no token
_CHARACTERS = 1 << 15  # of a part that is tokenised alone
_PARTS = 32  # tokenised in one call, in parallel: 1 million characters, whose encodings need about 100 MB


@dataclass(frozen=True)
class SmallerVocabulary:
    """A tokenizer with fewer tokens."""

    tokenizer: dict[str, Any]  # content of its tokenizer.json, with ids from 0 without holes
    kept: Tensor  # int64, [new number of tokens]: the old id of each token, ascending


def count_tokens(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], size: int) -> Tensor:
    """Count each token in documents, read one after the other, without special tokens around them: int64, [size].

    Raises:
        ValueError: If the tokenizer is not a fast one, or has an id that is not less than `size`.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer={type(tokenizer).__name__} is not a fast one: pass one that has a tokenizer.json."
        )
    counts = torch.zeros(size, dtype=torch.int64)
    for texts in _texts(documents):
        encoded = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        ids = torch.tensor([token for text in encoded for token in text], dtype=torch.int64)
        if len(ids) and int(ids.max()) >= size:
            raise ValueError(
                f"size={size}, but the tokenizer has the id {int(ids.max())}: pass the rows of the model."
            )
        counts += torch.bincount(ids, minlength=size)
    return counts


def _texts(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents and parts of documents, at most about `_CHARACTERS` x `_PARTS` characters at once."""
    border = re.compile(r"(?<=\w)(?= \w)|(?<=\n)(?=\S)")  # that hardly any token crosses
    texts = list[str]()
    for document in documents:
        start = 0
        while start < len(document):
            cut = border.search(document, start + _CHARACTERS)
            texts.append(document[start : cut.end() if cut else None])
            start += len(texts[-1])
            if len(texts) == _PARTS:
                yield texts
                texts = []
    if texts:
        yield texts


def reduce_vocabulary(
    tokenizer: dict[str, Any], counts: Tensor, num_kept: int | None, keep: Iterable[int] = ()
) -> SmallerVocabulary:
    """Keep the tokens that save the most tokens on the text that was counted.

    Always kept: special and added tokens, those that padding and post-processor name, the token of unknown characters,
    those in `keep`, what all these are made of, and the alphabet: single characters, or the 256 bytes where characters
    that are no token become bytes; then characters stay by their counts.

    Args:
        tokenizer: Content of a `tokenizer.json`, or of `tokenizer.backend_tokenizer.to_str()`. Not changed.
        counts: How often the text has each token, int64, [at least the tokenizer's ids]. Ids that are no token (holes,
            or rows that only the model has) never stay.
        num_kept: How many tokens stay, exactly; `None`: those that the text uses and what these are made of.
        keep: Ids that stay whatever their counts are.

    Raises:
        ValueError: If the tokenizer can't be loaded or is of another kind than BPE, Unigram and WordPiece, `counts` is
            too short, an id of `keep` is no token, or `num_kept` is less than what always stays or more than there is.
    """
    try:  # the library's own form: ids as it loads them, each merge a pair
        content = json.loads(Tokenizer.from_str(json.dumps(tokenizer)).to_str())
    except Exception as error:  # the library raises nothing more special
        raise ValueError(
            f"tokenizer: it can't be loaded ({error}); pass the content of tokenizer.json."
        ) from error
    model = content["model"]
    if model["type"] not in _KINDS:
        raise ValueError(
            f"tokenizer: {model['type']} has no smaller pieces for what goes; pass one of {_KINDS}."
        )
    vocabulary = model["vocab"]
    pieces = (
        {entry[0]: i for i, entry in enumerate(vocabulary)}
        if model["type"] == "Unigram"
        else dict(vocabulary)
    )
    tokens = {i: token for token, i in pieces.items()} | {
        t["id"]: t["content"] for t in content["added_tokens"]
    }
    if len(counts) <= max(tokens):
        raise ValueError(
            f"counts is of {len(counts)} ids, but the tokenizer has {max(tokens) + 1}: count all of them."
        )
    required, asked = _always_kept(content, pieces), set(keep)
    for name, wanted in (("keep", asked), ("tokenizer: its padding or post-processor", required)):
        if unknown := sorted(wanted - tokens.keys()):
            raise ValueError(
                f"{name} has the id {unknown[0]}, which is no token; pass ids of 0 to {max(tokens)}."
            )
    required |= asked

    parts, uses = _parts(model, pieces), counts.tolist()
    length = {index: len(_symbols(token, model)) for index, token in tokens.items()}
    first = {index: index for index in tokens}
    for index in sorted(parts, key=length.__getitem__, reverse=True):
        for part in parts[index]:
            uses[part] += uses[index]  # merges pass through it
            first[part] = min(first[part], first[index])
        if index in required:
            required.update(parts[index])
    # Each use of a merge saves one token. To its uses a thirtieth of what Zipf's law expects is added, so that what the
    # text has once does not replace what it lacks by chance; equal ones go by the uses of their parts. Parts are first.
    zipf = 0 if num_kept is None else sum(counts.tolist()) / (30 * math.log(len(tokens) + 1))

    def rank(index: int) -> tuple[float, ...]:
        of_parts = min(uses[part] for part in parts.get(index, (index,)))
        return (
            index not in required,
            -uses[index] - zipf // (first[index] + 1),
            -of_parts,
            first[index],
            length[index],
        )

    if num_kept is None:
        num_kept = sum(index in required or uses[index] > 0 for index in tokens)
    if not len(required) <= num_kept <= len(tokens):
        raise ValueError(
            f"num_kept={num_kept}; pass {len(required)} (alphabet, special and added tokens, `keep`, and what they are "
            f"made of) to {len(tokens)} (all tokens)."
        )
    kept = sorted(sorted(tokens, key=rank)[:num_kept])
    _renumber(content, pieces, {old: new for new, old in enumerate(kept)})
    return SmallerVocabulary(content, torch.tensor(kept, dtype=torch.int64))


def _symbols(token: str, model: dict[str, Any]) -> list[str]:
    """The single characters of a token, as the model writes them inside and at the end of a word."""
    prefix, suffix = (
        model.get("continuing_subword_prefix") or "",
        model.get("end_of_word_suffix") or "",
    )
    inner = token.removesuffix(suffix)
    begin, end = (
        prefix if inner.startswith(prefix) else "",
        suffix if token.endswith(suffix) else "",
    )
    symbols = [prefix + character for character in inner.removeprefix(prefix)] or [""]
    symbols[0] = begin + symbols[0].removeprefix(prefix)
    symbols[-1] += end
    return symbols


def _always_kept(content: dict[str, Any], pieces: dict[str, int]) -> set[int]:
    """Ids of special and added tokens and of the alphabet."""
    model, required = content["model"], set[int]()
    _change_ids(content, lambda index: required.add(index) or index)  # type: ignore[func-returns-value]
    required |= {pieces[token] for token in [model.get("unk_token")] if token in pieces}
    if model["type"] == "Unigram":
        required.add(min(pieces.values(), key=lambda index: model["vocab"][index][1]))
    decoder = json.dumps(content["decoder"], ensure_ascii=False)
    if model.get("byte_fallback") and pieces.keys() >= _BYTES and '"ByteFallback"' in decoder:
        # The decoder replaces characters ("▁" by a space), which it would not find in their bytes.
        return required | {pieces[token] for token in _BYTES | set(decoder) & pieces.keys()}
    for token, index in pieces.items():
        symbols = _symbols(token, model)
        # a character that is no token is known only within those that have it
        if len(symbols) == 1 or not pieces.keys() >= set(symbols):
            required.add(index)
    return required


def _parts(model: dict[str, Any], pieces: dict[str, int]) -> dict[int, tuple[int, int]]:
    """The two tokens of the last merge that makes each token; only BPE has such."""
    prefix = len(model.get("continuing_subword_prefix") or "")
    ranks = {(left, right): rank for rank, (left, right) in enumerate(model.get("merges", ()))}
    merges, parts = defaultdict[str, list[tuple[str, str]]](list), {}
    for left, right in ranks:
        merges[left + right[prefix:]].append((left, right))
    for token, pairs in merges.items():
        pair = pairs[0] if len(pairs) == 1 else _last_merge(_symbols(token, model), ranks, prefix)
        if pair:
            parts[pieces[token]] = pieces[pair[0]], pieces[pair[1]]
    return parts


def _last_merge(
    symbols: list[str], ranks: dict[tuple[str, str], int], prefix: int
) -> tuple[str, str] | None:
    """Merge a token's symbols as the tokenizer does; `None` if they do not become one."""
    found = [ranks.get(pair, len(ranks)) for pair in pairwise(symbols)]
    while len(found) > 1 and (rank := min(found)) < len(ranks):
        place = found.index(rank)  # of equal ranks the first is merged
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1][prefix:]]
        near = slice(max(place - 1, 0), place + 2)
        found[near] = [ranks.get(pair, len(ranks)) for pair in pairwise(symbols[near])]
    return (symbols[0], symbols[1]) if len(found) == 1 and found[0] < len(ranks) else None


def _change_ids(content: dict[str, Any], change: Callable[[int], int]) -> None:
    """Replace all ids that stand outside of the model's vocabulary."""
    for token in content["added_tokens"]:
        token["id"] = change(token["id"])
    for owner, name in ((content["padding"], "pad_id"), (content["model"], "unk_id")):
        if owner and owner.get(name) is not None:
            owner[name] = change(owner[name])
    processors = [content["post_processor"] or {}]
    for processor in processors:
        processors += processor.get(
            "processors", []
        )  # those of a sequence are visited by this loop too
        for special in processor.get("special_tokens", {}).values():
            special["ids"] = [change(index) for index in special["ids"]]
        for name in {"sep", "cls"} & processor.keys():
            processor[name][1] = change(processor[name][1])


def _renumber(content: dict[str, Any], pieces: dict[str, int], new: dict[int, int]) -> None:
    """Remove what has no new id, and write the new ids everywhere."""
    _change_ids(content, new.__getitem__)
    model = content["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in new]
        return
    model["vocab"] = vocabulary = {
        token: new[index] for token, index in pieces.items() if index in new
    }
    if "merges" in model:
        prefix = len(model.get("continuing_subword_prefix") or "")
        results = ([left, right, left + right[prefix:]] for left, right in model["merges"])
        model["merges"] = [
            [*parts] for *parts, result in results if {*parts, result} <= vocabulary.keys()
        ]

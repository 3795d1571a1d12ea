"""Make a tokenizer smaller: keep the tokens that a text uses, and what they are made of.

`reduce_vocabulary` does it. Everything here works on the content of a `tokenizer.json`, a dictionary: no files are read
or written. The *model* is always that of the tokenizer (`content["model"]`): "BPE", "Unigram" or "WordPiece" with its
vocabulary. A *token* has an id; a *piece* is a token of the model, unlike an added token; the *parts* of a token are
the two tokens whose merge makes it; a *symbol* is a single character as the model writes it. *Uses* are how often the
tokenizer makes a token of the counted text, also on the way to another token.

The smaller tokenizer splits a text into the same tokens as before if all of these stay. It knows every character that
is a token of its own, or all bytes, and decodes texts of these as before. Each kind of tokenizer keeps this promise in
its own way:

- **BPE** merges the adjacent pair of the lowest rank until no pair is left. A token stays with the two tokens of the
  last merge that makes it, and so on down to single symbols; a merge stays if its parts and its result do. *Proof*: no
  merge crosses the border of a token of the result, so the same merges make that token in every text, and all symbols
  on the way to it stay. The lowest merge of each step stays too, and no other comes before it: every step is the same.
- **Unigram** takes the path of the highest total score. Paths with removed tokens were not better than the one that
  stays, and of equal ones the same comes first. The lowest score stays, from which that of unknown characters is
  derived.
- **WordPiece** takes the longest piece at each place: if it stays, it is still the longest.
"""

import json
import math
import string
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

_KINDS = ("BPE", "Unigram", "WordPiece")
# Tokens for the bytes of characters that are no token.
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))

# What Zipf's law expects of all tokens together, as a share of the tokens that were counted. Chosen on
# Qwen2.5-Coder-0.5B with 4 MB of web text and 6 MB of Python.
_SHARE_OF_ZIPF = 1 / 5

# Tokens of these characters alone always stay, if they are short: models write the form of their answers with them,
# such as "```" around a block of code, also where the counted text has none.
_PUNCTUATION = frozenset(string.punctuation + string.whitespace)  # of ASCII
_LONGEST_PUNCTUATION = 4  # characters; longer ones are mostly lines, such as "--------"


class NumberOfTokensError(ValueError):
    """More or fewer tokens should stay than can: `least` are those that always stay."""

    def __init__(self, least: int, message: str) -> None:
        super().__init__(message)
        self.least = least


@dataclass(frozen=True)
class SmallerVocabulary:
    """A tokenizer with fewer tokens."""

    tokenizer: dict[str, Any]  # content of its tokenizer.json, with ids from 0 without holes
    kept: Tensor  # int64, [new number of tokens]: the old id of each token, ascending


@dataclass(frozen=True)
class _Vocabulary:
    """The tokens of a tokenizer, before it becomes smaller."""

    content: dict[str, Any]  # of tokenizer.json, as the library writes it; a copy of the caller's
    pieces: dict[str, int]  # ids of the pieces of the model, by their texts
    tokens: dict[int, str]  # texts of all tokens, added ones too, by their ids
    parts: dict[int, tuple[int, int]]  # ids of the two parts of each token that a merge makes


def reduce_vocabulary(
    tokenizer: dict[str, Any], counts: Tensor, num_kept: int | None, keep: Iterable[int] = ()
) -> SmallerVocabulary:
    """Keep the tokens that save the most tokens on the text that was counted.

    Always kept: special and added tokens, those that padding and post-processor name, the token of unknown characters,
    tokens of one to four punctuation marks and spaces, those in `keep`, what all these are made of, and the alphabet:
    single characters, or the 256 bytes where characters that are no token become bytes (where they do, characters stay
    by their counts).

    Args:
        tokenizer: Content of a `tokenizer.json`, or of `tokenizer.backend_tokenizer.to_str()`. Not changed.
        counts: How often the text has each token, int64, [at least the tokenizer's ids]. Ids that are no token (holes,
            or rows that only the model has) never stay.
        num_kept: How many tokens stay, exactly; `None`: those that the text uses and what these are made of.
        keep: Ids that stay whatever their counts are.

    Raises:
        ValueError: If the tokenizer can't be loaded or is of another kind than BPE, Unigram and WordPiece, `counts` is
            too short, an id of `keep` is no token, `num_kept` is less than what always stays or more than there is, or
            the library gives other ids to the smaller tokenizer than its file says.
    """
    vocabulary = _read_vocabulary(tokenizer)
    num_ids = max(vocabulary.tokens) + 1
    if len(counts) < num_ids:
        raise ValueError(
            f"counts is of {len(counts)} ids, but the tokenizer has {num_ids}: count all of them."
        )

    num_symbols = {
        index: len(_symbols(token, vocabulary.content["model"]))
        for index, token in vocabulary.tokens.items()
    }
    # The tokens that have parts. Longer tokens come before their parts, so that one pass reaches the parts of parts.
    merged = sorted(vocabulary.parts, key=lambda index: num_symbols[index], reverse=True)

    required = _required(vocabulary, set(keep))
    for index in merged:
        if index in required:
            required.update(vocabulary.parts[index])
    uses = _uses_with_merges(vocabulary, merged, counts)

    if num_kept is None:
        stay = [index for index in vocabulary.tokens if index in required or uses[index] > 0]
        num_kept = len(stay)
        expected_uses = 0.0
    else:
        # Each use of a merge saves one token. Other text will have tokens that the counted text lacks by chance. So the
        # uses that Zipf's law expects are added, as if another text had been counted, too: one that is like the text
        # the tokenizer was made from, and a fifth as long. `expected_uses` are those of the most frequent token; token
        # i gets 1 / (i + 1) of them. The sum of these fractions is about the logarithm of their number.
        num_tokens_of_zipf = _SHARE_OF_ZIPF * sum(counts.tolist())
        expected_uses = num_tokens_of_zipf / math.log(len(vocabulary.tokens) + 1)
    if not len(required) <= num_kept <= len(vocabulary.tokens):
        raise NumberOfTokensError(
            len(required),
            f"num_kept={num_kept}; pass {len(required)} (alphabet, punctuation, special and added tokens, `keep`, "
            f"and what they are made of) to {len(vocabulary.tokens)} (all tokens).",
        )

    by_rank = _ranked(
        vocabulary,
        merged=merged,
        required=required,
        uses=uses,
        num_symbols=num_symbols,
        expected_uses=expected_uses,
    )
    old_ids = sorted(by_rank[:num_kept])
    new_ids = {old: new for new, old in enumerate(old_ids)}
    content = _renumbered(vocabulary, new_ids)  # changes `vocabulary`, which is not used any more
    return SmallerVocabulary(content, torch.tensor(old_ids, dtype=torch.int64))


def _read_vocabulary(tokenizer: dict[str, Any]) -> _Vocabulary:
    """Read the content of a `tokenizer.json`, which is not changed.

    ValueError if it can't be loaded, or if its model is none of `_KINDS`: tokens can be removed from these only.
    """
    try:  # the form that the library writes: ids as it loads them, each merge a pair
        content = json.loads(Tokenizer.from_str(json.dumps(tokenizer)).to_str())
    except Exception as error:  # the library raises nothing more special
        raise ValueError(
            f"tokenizer: it can't be loaded ({error}); pass the content of tokenizer.json as a dictionary, "
            "json.loads(file.read_text())."
        ) from error

    model = content["model"]
    if model["type"] not in _KINDS:
        raise ValueError(
            f"tokenizer: {model['type']} has no smaller pieces for removed tokens; pass one of {_KINDS}."
        )
    # Unigram has a list of pairs of piece and score, in the order of the ids; the others have a dictionary of ids.
    if model["type"] == "Unigram":
        pieces = {piece: index for index, (piece, _score) in enumerate(model["vocab"])}
    else:
        pieces = dict(model["vocab"])
    tokens = {index: token for token, index in pieces.items()}
    tokens |= {token["id"]: token["content"] for token in content["added_tokens"]}
    return _Vocabulary(content, pieces, tokens, _parts(model, pieces))


def _required(vocabulary: _Vocabulary, keep: set[int]) -> set[int]:
    """Return the ids of the tokens that always stay, without those that they are made of.

    `keep` has the ids that the user wants to keep. ValueError if one of them, or one that the tokenizer's padding or
    post-processor names, is no token. Changes nothing. `vocabulary.tokens` has all tokens by their ids.
    """
    # special and added tokens, and the alphabet
    required = _always_kept(vocabulary.content, vocabulary.pieces)
    required |= _ids_of_punctuation(vocabulary)
    ids_by_origin = {"keep": keep, "tokenizer: its padding or post-processor": required}
    for origin, ids in ids_by_origin.items():
        unknown = sorted(ids - vocabulary.tokens.keys())
        if unknown:
            raise ValueError(
                f"{origin} has the id {unknown[0]}, which is no token; pass ids of 0 to {max(vocabulary.tokens)}."
            )
    return required | keep


def _uses_with_merges(vocabulary: _Vocabulary, merged: list[int], counts: Tensor) -> list[int]:
    """Count how often the tokenizer makes each token of the counted text, also on the way to another token.

    The result has a number for each id. `merged` has the ids of the tokens that have parts; each stands before its
    parts. `counts`, int64 [ids], says how often the counted text has each token. No argument changes.
    """
    uses: list[int] = counts.tolist()
    for index in merged:
        # A token is made of its parts, so each use of it is one of theirs.
        for part in vocabulary.parts[index]:
            uses[part] += uses[index]
    return uses


def _ranked(
    vocabulary: _Vocabulary,
    *,
    merged: list[int],
    required: set[int],
    uses: list[int],
    num_symbols: dict[int, int],
    expected_uses: float,
) -> list[int]:
    """Sort the ids of all tokens: first those that should stay. Changes nothing.

    A token never comes before its parts: it has at most as many uses, its `smallest_id` is not smaller, and it is
    longer.

    Args:
        vocabulary: The tokens.
        merged: Ids of the tokens that have parts; each stands before its parts.
        required: Ids that always stay.
        uses: Uses of each id (`_uses_with_merges`).
        num_symbols: Symbols of each token, by id.
        expected_uses: Uses that the most frequent token gets in addition; the others get less, by Zipf's law. 0 if only
            counted uses matter.
    """
    # For each token: the smallest id of the token itself and of all tokens that it is a part of. Tokenizers have small
    # ids for tokens that are frequent in general.
    smallest_id = {index: index for index in vocabulary.tokens}
    for index in merged:
        for part in vocabulary.parts[index]:
            smallest_id[part] = min(smallest_id[part], smallest_id[index])

    def rank(index: int) -> tuple[float, ...]:
        """Return the sort key of a token, by which those that should stay come first.

        Required ones come before all others. Then more uses, more uses of the rarest part, a smaller `smallest_id`, and
        fewer symbols decide, in this order.
        """
        # A token without parts counts as its own part.
        parts = vocabulary.parts.get(index, (index,))
        is_optional = index not in required
        # By Zipf's law, the token with the id i is expected to be used in proportion to 1 / (i + 1).
        all_uses = uses[index] + expected_uses / (smallest_id[index] + 1)
        uses_of_parts = min(uses[part] for part in parts)
        return (is_optional, -all_uses, -uses_of_parts, smallest_id[index], num_symbols[index])

    return sorted(vocabulary.tokens, key=rank)


def _symbols(token: str, model: dict[str, Any]) -> list[str]:
    """Return the single characters of a token, as the model writes them inside and at the end of a word.

    `model` is that of a `tokenizer.json`. A WordPiece model writes "##" before the characters inside a word, so "##ab"
    has the symbols "##a" and "##b", and "ab" has "a" and "##b"; a BPE model may write "</w>" after the last one.
    """
    # Both may be missing or None; then nothing is written.
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""
    without_suffix = token.removesuffix(suffix)
    begins_inside_a_word = without_suffix.startswith(prefix)
    characters = without_suffix.removeprefix(prefix)

    symbols = [prefix + character for character in characters]
    if not characters:  # the token is the prefix, the suffix, or both
        symbols = [prefix if begins_inside_a_word else ""]
    elif not begins_inside_a_word:
        symbols[0] = characters[0]
    if token.endswith(suffix):
        symbols[-1] += suffix
    return symbols


def _always_kept(content: dict[str, Any], pieces: dict[str, int]) -> set[int]:
    """Return the ids of special and added tokens and of the alphabet.

    The alphabet is all single characters; or only the 256 bytes, if the tokenizer writes as bytes what is no token.
    `content` is that of a `tokenizer.json`, and stays as it is; `pieces` has the ids of the model's pieces, by their
    texts.
    """
    model = content["model"]
    required = set[int]()

    def note(index: int) -> int:
        """Add an id to `required`, and return the same id."""
        required.add(index)
        return index

    # Special and added tokens. Nothing in `content` changes, because `note` returns the same ids.
    _change_ids(content, note)
    if model.get("unk_token") in pieces:
        required.add(pieces[model["unk_token"]])
    # Unigram derives the score of unknown characters from the lowest score.
    if model["type"] == "Unigram":
        scores = [score for _piece, score in model["vocab"]]
        required.add(min(pieces.values(), key=scores.__getitem__))

    decoder = json.dumps(content["decoder"], ensure_ascii=False)
    has_all_bytes = pieces.keys() >= _BYTES
    decodes_bytes = '"ByteFallback"' in decoder
    if model.get("byte_fallback") and has_all_bytes and decodes_bytes:
        # The decoder replaces characters ("▁" by a space), which it would not find in their bytes. All characters of
        # its JSON are kept if they are tokens: a few needless ones, such as "{", cost little.
        characters_of_decoder = set(decoder) & pieces.keys()
        return required | {pieces[token] for token in _BYTES | characters_of_decoder}
    for token, index in pieces.items():
        symbols = _symbols(token, model)
        is_character = len(symbols) == 1
        # A character that is no token is known only within the tokens that have it.
        has_unknown_character = any(symbol not in pieces for symbol in symbols)
        if is_character or has_unknown_character:
            required.add(index)
    return required


def _ids_of_punctuation(vocabulary: _Vocabulary) -> set[int]:
    """Return the ids of short tokens whose text is punctuation marks and white space alone, such as " (" or ":\\n\\n".

    The marks are those of ASCII. No argument changes.
    """
    tokenizer = Tokenizer.from_str(json.dumps(vocabulary.content))
    prefix = vocabulary.content["model"].get("continuing_subword_prefix") or ""
    ids = list(vocabulary.tokens)
    texts = tokenizer.decode_batch([[index] for index in ids], skip_special_tokens=False)
    found = set[int]()
    for index, text in zip(ids, texts, strict=True):
        # What some decoders leave of the beginning of a word ("▁") or of a piece inside of one ("##").
        plain = text.replace("▁", " ").removeprefix(prefix)
        if 0 < len(plain) <= _LONGEST_PUNCTUATION and _PUNCTUATION.issuperset(plain):
            found.add(index)
    return found


def _parts(model: dict[str, Any], pieces: dict[str, int]) -> dict[int, tuple[int, int]]:
    """Return the ids of the two tokens of the last merge that makes each token, by the token's id.

    Only a BPE model has merges. `model` is that of a `tokenizer.json`, as the tokenizers library writes it: each merge
    is a pair of texts. `pieces` has the ids of its pieces, by their texts. Both stay as they are. A token for
    which several merges are listed, none of which the tokenizer comes to, is not in the result.
    """
    prefix_length = len(model.get("continuing_subword_prefix") or "")
    # The place of each merge in the list: the tokenizer does the lowest first.
    ranks = {(left, right): rank for rank, (left, right) in enumerate(model.get("merges", ()))}
    pairs_by_token = defaultdict[str, list[tuple[str, str]]](list)
    for left, right in ranks:
        token = left + right[prefix_length:]  # the prefix inside words goes when symbols are merged
        pairs_by_token[token].append((left, right))

    parts = dict[int, tuple[int, int]]()
    for token, pairs in pairs_by_token.items():
        last_pair: tuple[str, str] | None = pairs[0]
        if len(pairs) > 1:
            # Only one of these pairs is what the tokenizer merges.
            last_pair = _last_merge(_symbols(token, model), ranks, prefix_length)
        if last_pair is not None:  # None: the tokenizer never makes this token of its symbols
            left, right = last_pair
            parts[pieces[token]] = (pieces[left], pieces[right])
    return parts


def _last_merge(
    symbols: list[str], ranks: dict[tuple[str, str], int], prefix_length: int
) -> tuple[str, str] | None:
    """Merge a token's symbols as the tokenizer does, and return the last pair; `None` if they do not become one token.

    Changes `symbols` (`_symbols` of the token). `ranks` has the rank of each merge, by its pair of texts: the lowest is
    merged first. `prefix_length` is the number of characters of the prefix inside words, such as "##".
    """
    no_merge = len(ranks)  # a rank after all others
    pair_ranks = [ranks.get(pair, no_merge) for pair in pairwise(symbols)]
    # The last pair is not merged, but returned.
    while len(pair_ranks) > 1 and min(pair_ranks) < no_merge:
        place = pair_ranks.index(min(pair_ranks))  # of equal ranks the first is merged
        merged = symbols[place] + symbols[place + 1][prefix_length:]
        symbols[place : place + 2] = [merged]

        # Up to three pairs had one of the two symbols. The merged symbol has up to two, with its neighbours.
        near = slice(max(place - 1, 0), place + 2)
        pair_ranks[near] = [ranks.get(pair, no_merge) for pair in pairwise(symbols[near])]
    is_one_merge = len(pair_ranks) == 1 and pair_ranks[0] < no_merge
    return (symbols[0], symbols[1]) if is_one_merge else None


def _change_ids(content: dict[str, Any], change: Callable[[int], int]) -> None:
    """Replace all ids that stand outside of the model's vocabulary by what `change` returns of them.

    These are ids of added tokens, of padding, of the token of unknown characters, and of the post-processor. Changes
    `content`, that of a `tokenizer.json`.
    """
    for token in content["added_tokens"]:
        token["id"] = change(token["id"])
    padding = content["padding"]  # None if there is none
    for section, key in ((padding, "pad_id"), (content["model"], "unk_id")):
        if section and section.get(key) is not None:
            section[key] = change(section[key])

    waiting = [content["post_processor"] or {}]  # processors whose ids are still to be changed
    while waiting:
        processor = waiting.pop()
        waiting += processor.get("processors", [])  # those of a sequence of processors
        for special in processor.get("special_tokens", {}).values():
            special["ids"] = [change(index) for index in special["ids"]]
        for name in ("sep", "cls"):  # each a pair of a token's text and its id
            if name in processor:
                processor[name][1] = change(processor[name][1])


def _renumbered(vocabulary: _Vocabulary, new_ids: dict[int, int]) -> dict[str, Any]:
    """Remove tokens without a new id, and write the new ids everywhere; changes and returns the vocabulary's content.

    The content is that of a `tokenizer.json`. `new_ids` has the new id of each token that stays, by its old id.
    ValueError if the library would load other ids.
    """
    content = vocabulary.content
    pieces = vocabulary.pieces
    # Tokens that are named outside of the model's vocabulary all stay, so each has a new id.
    _change_ids(content, new_ids.__getitem__)
    model = content["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in new_ids]
    else:
        model["vocab"] = {
            token: new_ids[index] for token, index in pieces.items() if index in new_ids
        }
    if "merges" in model:
        prefix_length = len(model.get("continuing_subword_prefix") or "")
        merges = list[list[str]]()
        for left, right in model["merges"]:
            merged = left + right[prefix_length:]
            all_stay = all(token in model["vocab"] for token in (left, right, merged))
            if all_stay:
                merges.append([left, right])
        model["merges"] = merges

    loaded = Tokenizer.from_str(json.dumps(content)).get_vocab()
    for old, new in new_ids.items():
        token = vocabulary.tokens[old]
        if loaded.get(token) != new:
            raise ValueError(
                f"tokenizer: the library tokenizers loads its token {token!r} with the id {loaded.get(token)} instead "
                f"of {new}, because an added token and another one have the same id: pass a tokenizer in which every "
                "token has its own id."
            )
    return content

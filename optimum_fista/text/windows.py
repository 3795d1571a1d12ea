"""Windows: token sequences of equal length, cut at random for calibration and in order for perplexity.

Windows are tensors of token ids, int64, [windows, tokens]. `calibration_windows` draws them from a `TextSource`, and
`windows_with_answers` tells which of their tokens are of answers in conversations. `evaluation_windows` cuts a text
from its start, and `count_bytes` says how many bytes those windows stand for. BOS is the token that texts begin with:
every window starts with it if the tokenizer starts texts with it or is Gemma's. Inside this module, windows are without
BOS until `_with_bos`: there `length` is the number of tokens of text in a window.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from optimum_fista.options import require_seed
from optimum_fista.text.answers import answer_spans, tokens_in_spans
from optimum_fista.text.text_source import TextSource

# English has 4 to 5: a segment is longer than a window, so that its start is random.
_CHARACTERS_PER_TOKEN = 8
# A longer document is tokenised in segments of so many characters, or up to twice as many: a tokenizer takes about 130
# bytes of memory for a character.
_TOKENISED_TOGETHER = 1 << 19


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: TextSource,
    num_samples: int,
    sequence_length: int,
    seed: int,
    *,
    held_out: int = 0,
) -> torch.Tensor:
    """Draw random windows that do not overlap: token ids, int64, [num_samples, sequence_length].

    Several documents are put one after the other in random order, with the tokenizer's EOS between them if it has one.
    Conversations are written by the tokenizer's chat template. One document gives windows from random places. Only
    about as much text is tokenised as needed. The seed decides every random choice; the global random state is neither
    used nor changed. The first `held_out` of the windows are the same for every `num_samples`: the caller does not
    calibrate on these, but measures on them.

    Every window starts with BOS, which counts as a token of it, if the tokenizer starts texts with it or is Gemma's.

    Raises:
        ValueError: If the text has too few tokens, or a number makes no sense.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}; pass 1 or more.")
    if not 0 <= held_out < num_samples:
        raise ValueError(
            f"held_out={held_out}; pass 0 to {num_samples - 1}, fewer than num_samples."
        )
    require_seed(seed)
    text = text.written_by(tokenizer)
    bos, length = _bos_and_length(tokenizer, sequence_length)
    generator = torch.Generator().manual_seed(seed)
    if len(text.documents) > 1:
        # These windows follow one another in the text, so the first ones are the same for every `num_samples`.
        documents = text.documents
        windows = _windows_of_documents(
            text,
            lambda number: _with_eos(tokenizer, _ids_of_document(tokenizer, documents[number])),
            num_samples=num_samples,
            held_out=held_out,
            length=length,
            generator=generator,
        )
        return _with_bos(windows, bos)

    held_out_windows = torch.empty(0, length, dtype=torch.int64)
    if held_out:
        held_out_windows, text = _set_apart(
            tokenizer, text, held_out=held_out, length=length, generator=generator
        )
    others = _windows_of_document(
        tokenizer, text, num_samples=num_samples - held_out, length=length, generator=generator
    )
    return _with_bos(torch.cat([held_out_windows, others]), bos)


def windows_with_answers(
    tokenizer: PreTrainedTokenizerBase,
    text: TextSource,
    num_samples: int,
    sequence_length: int,
    seed: int,
    *,
    held_out: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw windows of conversations as `calibration_windows` does, and tell which of their tokens are of answers.

    Returns token ids, int64, and booleans, both [num_samples, sequence_length]. Documents that are no conversations
    count whole, as if they were answers. EOS between documents and BOS do not count. `text.answers` has more on what an
    answer is. A text of a single conversation is cut from its start.

    Arguments are those of `calibration_windows`, which draws the same windows of a text of several documents.

    Raises:
        ValueError: If the text has no conversation or too few tokens, if the tokenizer knows no places in the text, or
            if the chat template does not show where answers are.
    """
    require_seed(seed)
    if not text.conversations:
        raise ValueError(
            f"text {text.name!r} has no conversations (messages), so it has no answers: pass a text that has some."
        )
    written = text.written_by(tokenizer)
    if not tokenizer.is_fast:
        raise ValueError(
            "the model's tokenizer is a slow one, which does not tell where in a text a token is, so answers are not "
            "found: pass a model with a fast tokenizer (tokenizer.json)."
        )

    def ids_and_answers(number: int) -> torch.Tensor:
        """Return the ids of a document, and 1 for tokens of answers: int64 [2, tokens]."""
        document = written.documents[number]
        ids, offsets = _ids_and_offsets(tokenizer, document)
        turns = text.conversations[number]
        if turns:
            try:
                spans = answer_spans(tokenizer, turns, document)
            except ValueError as error:
                raise ValueError(
                    f"text {text.name!r}, conversation {number + 1}: {error}"
                ) from error
            are_of_answers = tokens_in_spans(offsets, spans).long()
        else:
            are_of_answers = torch.ones_like(ids)
        ids = _with_eos(tokenizer, ids)
        num_added = len(ids) - len(are_of_answers)
        return torch.stack([ids, pad(are_of_answers, (0, num_added))])

    bos, length = _bos_and_length(tokenizer, sequence_length)
    windows, answers = _windows_of_documents(
        text,
        ids_and_answers,
        num_samples=num_samples,
        held_out=held_out,
        length=length,
        generator=torch.Generator().manual_seed(seed),
    )
    answers = answers.bool()
    if bos is not None:
        answers = pad(answers, (1, 0), value=False)
    return _with_bos(windows, bos), answers


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: TextSource,
    sequence_length: int,
    max_windows: int | None = None,
) -> torch.Tensor:
    """Cut the joined text into consecutive windows from its start, as pruning papers measure perplexity.

    The whole text is tokenised at once, and a rest that is shorter than a window is dropped. Returns token ids, int64
    [windows, sequence_length]. There are at most `max_windows` windows, and at most as many as the protocol of the text
    says (`text.max_windows`); `None`: no limit. BOS is added as in `calibration_windows`. ValueError if the text is
    shorter than one window.
    """
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows={max_windows}; pass 1 or more, or None for all.")
    bos, length = _bos_and_length(tokenizer, sequence_length)
    text = text.written_by(tokenizer)
    ids = _ids_without_special_tokens(tokenizer, text.joined)
    if len(ids) < length:
        raise ValueError(
            f"text {text.name!r} has {len(ids)} tokens, fewer than one window of {length}; pass a longer text or a "
            "smaller sequence_length."
        )
    num_windows = len(ids) // length
    for limit in (text.max_windows, max_windows):
        if limit is not None:
            num_windows = min(num_windows, limit)
    windows = ids[: num_windows * length].view(num_windows, length)  # [tokens] -> [windows, tokens]
    return _with_bos(windows, bos)


def count_bytes(
    tokenizer: PreTrainedTokenizerBase, text: TextSource, windows: torch.Tensor
) -> int | None:
    """Count the UTF-8 bytes of a text that the predicted tokens of its first `evaluation_windows` stand for.

    The first token of a window is not predicted. A token stands for the bytes from the end of the token before it to
    its own end in the text itself, whatever the tokenizer does to capitals or white space. If the first token of a
    window is only a part of its character, the bytes of that character count. `None` if the tokenizer knows no places
    in the text (it is not a fast one), or the windows are of another text.

    `windows` are ids, int64 [windows, tokens], with or without BOS, as `evaluation_windows` makes them of `text`.
    """
    if not tokenizer.is_fast:
        return None
    joined = text.written_by(tokenizer).joined
    encoded = tokenizer(
        joined, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    ids = torch.tensor(encoded["input_ids"])
    places = encoded["offset_mapping"]  # first and last character (exclusive) of each token
    # Token i stands for the characters ends[i] to ends[i + 1].
    ends = [0]
    ends += [end for _, end in places]

    # Both are tried: windows of text alone, and windows with BOS before the text. BOS stands for no bytes.
    for num_bos in (0, 1):
        windows_without_bos = windows.cpu()[:, num_bos:]
        ids_of_windows = windows_without_bos.flatten().long()
        are_of_this_text = ids[: len(ids_of_windows)].equal(ids_of_windows)
        if not are_of_this_text:
            continue

        length = windows_without_bos.shape[1]
        num_bytes = 0
        for first in range(0, len(ids_of_windows), length):  # the first token of each window
            begin = ends[first]
            is_part_of_character = length > 1 and places[first + 1][0] < places[first][1]
            if num_bos == 0 and not is_part_of_character:
                begin = ends[first + 1]  # there is no BOS from which the first token is predicted
            predicted = joined[begin : ends[first + length]]
            # surrogatepass: a text that was made in Python may hold half of a surrogate pair.
            num_bytes += len(predicted.encode("utf-8", "surrogatepass"))
        return num_bytes
    return None


def first_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of BOS if texts have to begin with it, otherwise `None`. Changes nothing."""
    bos: int | None = tokenizer.bos_token_id
    if bos is None:
        return None
    # Llama 3's tokenizer adds BOS in its post-processor and leaves the attribute False. Gemma's perplexity without
    # BOS is meaningless, whatever its tokenizer's attribute says.
    is_written = tokenizer("a")["input_ids"][:1] == [bos]
    is_asked_for = getattr(tokenizer, "add_bos_token", False) is True
    is_gemma = "Gemma" in type(tokenizer).__name__
    begins_with_bos = is_written or is_asked_for or is_gemma
    return bos if begins_with_bos else None


def _bos_and_length(
    tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> tuple[int | None, int]:
    """Return the id of BOS if every window starts with it, and how many tokens of text a window then has.

    A window has `sequence_length` tokens, BOS included. The id is `None` if windows start with text; then all tokens
    are text. ValueError if windows have less than 2 tokens.
    """
    if sequence_length < 2:
        raise ValueError(f"sequence_length={sequence_length}; pass 2 or more.")
    bos = first_token(tokenizer)
    length = sequence_length if bos is None else sequence_length - 1
    return bos, length


def _with_bos(windows: torch.Tensor, bos: int | None) -> torch.Tensor:
    """Put BOS before every window, if there is one: [N, T - 1] -> [N, T]."""
    return windows if bos is None else pad(windows, (1, 0), value=bos)


def _ids_without_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Return the token ids of a text, int64, [tokens], without special tokens around it."""
    # verbose=False: a text longer than the model's context is no mistake here.
    encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def _ids_of_document(tokenizer: PreTrainedTokenizerBase, document: str) -> torch.Tensor:
    """Return the token ids of a document of any length, int64, [tokens], without special tokens around it.

    Where a long document is cut, the ids may differ from those of the document as a whole.
    """
    segments = _segments(document, _TOKENISED_TOGETHER)
    return torch.cat([_ids_without_special_tokens(tokenizer, segment) for segment in segments])


def _ids_and_offsets(
    tokenizer: PreTrainedTokenizerBase, document: str
) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Return the ids of `_ids_of_document`, and the first character of each token and the one after its last."""
    ids = list[int]()
    offsets = list[tuple[int, int]]()
    num_characters = 0  # before the segment
    for segment in _segments(document, _TOKENISED_TOGETHER):
        encoded = tokenizer(
            segment, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids += encoded["input_ids"]
        offsets += [
            (num_characters + first, num_characters + end)
            for first, end in encoded["offset_mapping"]
        ]
        num_characters += len(segment)
    return torch.tensor(ids, dtype=torch.int64), offsets


def _with_eos(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> torch.Tensor:
    """Append EOS to the ids of a document, int64 [tokens], if the tokenizer has it."""
    eos = tokenizer.eos_token_id
    return ids if eos is None else pad(ids, (0, 1), value=eos)


def _set_apart(
    tokenizer: PreTrainedTokenizerBase,
    text: TextSource,
    *,
    held_out: int,
    length: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, TextSource]:
    """Take the windows to hold out from the starts of `held_out` random segments of a text of one document.

    Returns these windows, ids, int64 [held_out, length]; and a new text without them. The generator's state moves on.
    ValueError if the text has too few segments of `length` tokens.
    """
    document = text.documents[0]
    windows = list[torch.Tensor]()
    # In a short text, segments are shorter than usual, so that there are at least `held_out` of them.
    characters_if_short = len(document) // (2 * held_out)
    characters = min(_CHARACTERS_PER_TOKEN * length, characters_if_short)
    segments = _segments(document, max(1, characters))
    for index in torch.randperm(len(segments), generator=generator).tolist():
        if len(windows) == held_out:
            break
        ids = _ids_without_special_tokens(tokenizer, segments[index])
        if len(ids) < length:
            continue
        windows.append(ids[:length])
        # What follows the window in its segment stays in the text.
        rest = str(tokenizer.decode(ids[length:], clean_up_tokenization_spaces=False))
        # U+FFFD: the window has the first tokens of a character, and the text begins after the character.
        segments[index] = rest.lstrip("\ufffd")
    if len(windows) < held_out:
        raise ValueError(
            f"held_out={held_out}: text {text.name!r} of {len(document):,} characters is too short to set as many "
            f"windows of {length} tokens apart; pass a smaller held_out, shorter sequences, or a longer text."
        )
    text_without_windows = replace(text, documents=("".join(segments),))
    return torch.stack(windows), text_without_windows


def _windows_of_document(
    tokenizer: PreTrainedTokenizerBase,
    text: TextSource,
    *,
    num_samples: int,
    length: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Draw a window from each of `num_samples` segments of a text of one document.

    Then only these segments are tokenised. If the document has too few segments, all windows are drawn from all of it.
    Returns ids, int64 [num_samples, length]. The generator's state moves on. ValueError if the text is too short.
    """
    document = text.documents[0]
    characters = _CHARACTERS_PER_TOKEN * length  # enough for a window, as a rule
    segments = _segments(document, characters)
    # A single segment is the whole document, which is tokenised below.
    while len(segments) >= max(num_samples, 2):
        chosen = torch.randperm(len(segments), generator=generator)[:num_samples].tolist()
        ids_of_segments = [
            _ids_without_special_tokens(tokenizer, segments[index]) for index in chosen
        ]
        each_has_a_window = min(len(ids) for ids in ids_of_segments) >= length
        if each_has_a_window:
            windows = [
                _spread_windows(ids, num_samples=1, length=length, generator=generator)
                for ids in ids_of_segments
            ]
            return torch.cat(windows)
        # All segments become longer. If only short ones were skipped, text with short tokens would be preferred.
        characters *= 2
        segments = _segments(document, characters)

    ids = _ids_of_document(tokenizer, document)
    _require_tokens(text, num_tokens=len(ids), num_samples=num_samples, length=length)
    return _spread_windows(ids, num_samples=num_samples, length=length, generator=generator)


def _segments(document: str, characters: int) -> list[str]:
    """Cut a document into consecutive segments of `characters` to twice as many characters.

    Cuts are before white space if there is some. The last segment may be shorter if the document is.
    """
    segments = list[str]()
    start = 0
    while len(document) - start > 2 * characters:
        earliest = start + characters
        latest = earliest + characters
        end = earliest
        # A cut within a word would make tokens that the text does not have.
        for place in range(earliest, latest):
            if document[place].isspace():
                end = place
                break
        segments.append(document[start:end])
        start = end
    segments.append(document[start:])
    return segments


def _spread_windows(
    ids: torch.Tensor, *, num_samples: int, length: int, generator: torch.Generator
) -> torch.Tensor:
    """Cut windows that do not overlap at random places of `ids`, and return them in random order.

    `ids`, int64 [tokens], has at least as many tokens as all windows together; the result is [num_samples, length]. The
    generator's state moves on.
    """
    num_spare = len(ids) - num_samples * length  # tokens that will be in no window
    # How many spare tokens stand before each window. The numbers are sorted, so each window lies after the one before.
    drawn = torch.randint(num_spare + 1, (num_samples,), generator=generator)
    spare_before = drawn.sort().values
    in_windows_before = length * torch.arange(num_samples)
    starts = spare_before + in_windows_before
    starts = starts[torch.randperm(num_samples, generator=generator)]
    return torch.stack([ids[start : start + length] for start in starts.tolist()])  # [N, T]


def _windows_of_documents(
    text: TextSource,
    ids_of: Callable[[int], torch.Tensor],
    *,
    num_samples: int,
    held_out: int,
    length: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Put documents one after the other in random order, and cut them into windows: ids, int64 [num_samples, length].

    `ids_of` returns the ids of the document with a number, with EOS at their end, [tokens]. It may return several rows
    [rows, tokens], with something else for each token; then the result is [rows, num_samples, length]. It is called for
    as many documents as needed. `held_out` says how many of the windows the caller holds out; it is only for the
    message of the ValueError that a text is too short. The generator's state moves on.
    """
    pieces = list[torch.Tensor]()
    num_tokens = 0
    for number in torch.randperm(len(text.documents), generator=generator).tolist():
        ids = ids_of(number)
        pieces.append(ids)
        num_tokens += ids.shape[-1]
        if num_tokens >= num_samples * length:
            break
    _require_tokens(
        text, num_tokens=num_tokens, num_samples=num_samples, length=length, held_out=held_out
    )
    ids = torch.cat(pieces, dim=-1)[..., : num_samples * length]
    return ids.unflatten(-1, (num_samples, length))  # [..., tokens] -> [..., N, T]


def _require_tokens(
    text: TextSource, *, num_tokens: int, num_samples: int, length: int, held_out: int = 0
) -> None:
    """Refuse a text of `num_tokens` tokens if `num_samples` windows of `length` need more: ValueError.

    `held_out` of the windows are held out, which the message says.
    """
    if num_tokens < num_samples * length:
        of_them = f" (held_out={held_out} of them)" if held_out else ""
        raise ValueError(
            f"text {text.name!r} has {num_tokens} tokens, and num_samples={num_samples} windows{of_them} of {length} "
            f"need {num_samples * length}; pass a longer text or smaller numbers."
        )

"""Windows: token sequences of equal length, cut at random for calibration and in order for perplexity.

Windows are tensors of token ids, int64, [windows, tokens]. `calibration_windows` draws them from a `TextSource`;
`evaluation_windows` cuts a text from its start, and `count_bytes` says how many bytes those windows stand for. BOS is
the token that texts begin with: every window starts with it if the tokenizer starts texts with it or is Gemma's.
"""

from dataclasses import replace

import torch
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from optimum_fista.options import require_seed
from optimum_fista.text.sources import TextSource

# English has 4 to 5: a segment is longer than a window, so that its start is random.
_CHARACTERS_PER_TOKEN = 8


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

    Several documents are put one after the other in random order, with the tokenizer's EOS between them when
    it has one. One document gives windows from random places. Only about as much text is tokenised as needed. The
    seed decides every random choice; the global random state is neither used nor changed. The first `held_out` windows
    are the same for every `num_samples`.

    Every window starts with BOS, which counts as a token of it, if the tokenizer starts texts with it or is Gemma's.

    Raises:
        ValueError: If the text has too few tokens, or a number makes no sense.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}; pass 1 or more.")
    require_seed(seed)
    bos, length = _bos_and_length(tokenizer, sequence_length)
    generator = torch.Generator().manual_seed(seed)
    if len(text.documents) > 1:
        # windows follow one another, so that the first ones are always the same
        windows = _windows_of_documents(tokenizer, text, num_samples, held_out, length, generator)
        return _with_bos(windows, bos)

    first = torch.empty(0, length, dtype=torch.int64)
    if held_out:
        first, text = _set_apart(tokenizer, text, held_out, length, generator)
    rest = _windows_of_document(tokenizer, text, num_samples - held_out, length, generator)
    return _with_bos(torch.cat([first, rest]), bos)


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: TextSource,
    sequence_length: int,
    max_windows: int | None = None,
) -> torch.Tensor:
    """Cut the joined text into consecutive windows from its start, as pruning papers measure perplexity.

    The whole text is tokenised at once; the tail shorter than a window is dropped: token ids, int64, [windows,
    sequence_length]. `max_windows=None` takes all, or as many as the text's protocol says. BOS is added as in
    `calibration_windows`. ValueError if the text is shorter than one window.
    """
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows={max_windows}; pass 1 or more, or None for all.")
    bos, length = _bos_and_length(tokenizer, sequence_length)
    ids = _tokenise(tokenizer, text.joined)
    if len(ids) < length:
        raise ValueError(
            f"text {text.name!r} has {len(ids)} tokens, fewer than one window of {length}; pass a longer text or a "
            "smaller sequence_length."
        )
    count = len(ids) // length
    windows = ids[: count * length].view(count, length)  # [tokens] -> [windows, tokens]
    return _with_bos(windows[: text.max_windows][:max_windows], bos)


def count_bytes(
    tokenizer: PreTrainedTokenizerBase, text: TextSource, windows: torch.Tensor
) -> int | None:
    """Count the UTF-8 bytes of a text that the predicted tokens of its first `evaluation_windows` stand for.

    The first token of a window is not predicted. A token stands for the bytes from the end of the token before it to
    its own end in the text itself, whatever the tokenizer does to capitals or white space. `None` if the tokenizer
    knows no places in the text (it is not a fast one), or the windows are of another text.
    """
    if not tokenizer.is_fast:
        return None
    joined = text.joined
    encoded = tokenizer(
        joined, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    ids = torch.tensor(encoded["input_ids"])
    # Characters of the text before each token, and at last before its end.
    ends = [0, *(end for _, end in encoded["offset_mapping"])]

    for num_bos in (
        0,
        1,
    ):  # a BOS token before every window is not predicted, and stands for nothing
        of_text = windows.cpu()[:, num_bos:].flatten()
        if not ids[: len(of_text)].equal(of_text.long()):
            continue
        length = windows.shape[1] - num_bos
        num_bytes = 0
        for first in range(0, len(of_text), length):
            # without BOS, the first token of the window is not predicted
            start = ends[first + 1 - num_bos]
            predicted = joined[start : ends[first + length]]
            num_bytes += len(predicted.encode("utf-8", "surrogatepass"))
        return num_bytes
    return None


def first_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of BOS if texts have to begin with it, otherwise `None`."""
    bos: int | None = tokenizer.bos_token_id
    if bos is None:
        return None
    # Llama 3's tokenizer adds BOS in its post-processor and leaves the attribute False. Gemma's perplexity without
    # BOS is meaningless, whatever its tokenizer's attribute says.
    is_written = tokenizer("a")["input_ids"][:1] == [bos]
    is_asked_for = getattr(tokenizer, "add_bos_token", False) is True
    is_gemma = "Gemma" in type(tokenizer).__name__
    return bos if is_written or is_asked_for or is_gemma else None


def _bos_and_length(
    tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> tuple[int | None, int]:
    """BOS id that every window starts with, `None` if none, and tokens of text in a window."""
    if sequence_length < 2:
        raise ValueError(f"sequence_length={sequence_length}; pass 2 or more.")
    bos = first_token(tokenizer)
    return bos, sequence_length if bos is None else sequence_length - 1


def _with_bos(windows: torch.Tensor, bos: int | None) -> torch.Tensor:
    """Put BOS before every window, if there is one: [N, T - 1] -> [N, T]."""
    return windows if bos is None else pad(windows, (1, 0), value=bos)


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """The token ids of a text, int64, [tokens], without special tokens around it."""
    # verbose=False: a text longer than the model's context is no mistake here.
    encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def _set_apart(
    tokenizer: PreTrainedTokenizerBase,
    text: TextSource,
    held_out: int,
    length: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, TextSource]:
    """The first window of each of `held_out` segments of a document, and the text without these windows.

    A window has `length` tokens. ValueError if the text has too few segments with as many.
    """
    document = text.documents[0]
    windows = list[torch.Tensor]()
    # less than usual if the text is short
    characters = min(_CHARACTERS_PER_TOKEN * length, len(document) // (2 * held_out))
    segments = _segments(document, max(1, characters))
    for index in torch.randperm(len(segments), generator=generator).tolist():
        ids = _tokenise(tokenizer, segments[index])
        if len(windows) < held_out and len(ids) >= length:
            windows.append(ids[:length])
            segments[index] = tokenizer.decode(ids[length:], clean_up_tokenization_spaces=False)
    if len(windows) < held_out:
        raise ValueError(
            f"held_out={held_out}: text {text.name!r} of {len(document):,} characters is too short to set as many "
            f"windows of {length} tokens apart; pass a smaller held_out, shorter sequences, or a longer text."
        )
    return torch.stack(windows), replace(text, documents=("".join(segments),))


def _windows_of_document(
    tokenizer: PreTrainedTokenizerBase,
    text: TextSource,
    num_samples: int,
    length: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """One window from each of `num_samples` segments; from the whole document if it has too few segments.

    Returns ids, [num_samples, length]. The generator's state moves on.
    """
    document = text.documents[0]
    characters = _CHARACTERS_PER_TOKEN * length
    segments = _segments(document, characters)
    while len(segments) >= max(num_samples, 2):
        chosen = torch.randperm(len(segments), generator=generator)[:num_samples].tolist()
        parts = [_tokenise(tokenizer, segments[index]) for index in chosen]
        if min(len(ids) for ids in parts) >= length:
            return torch.cat([_spread_windows(ids, 1, length, generator) for ids in parts])
        # if short segments were skipped, text with short tokens would be preferred
        characters *= 2
        segments = _segments(document, characters)

    ids = _tokenise(tokenizer, document)
    _require_tokens(text, len(ids), num_samples, length)
    return _spread_windows(ids, num_samples, length, generator)


def _segments(document: str, characters: int) -> list[str]:
    """Cut a document into consecutive parts of about `characters` each, before white space if there is some."""
    cuts = [0]
    while len(document) - cuts[-1] > 2 * characters:
        earliest = cuts[-1] + characters
        # a cut within a word would make tokens that the text does not have
        latest = earliest + characters
        spaces = (place for place in range(earliest, latest) if document[place].isspace())
        cuts.append(next(spaces, earliest))
    ends = [*cuts[1:], len(document)]
    return [document[start:end] for start, end in zip(cuts, ends, strict=True)]


def _spread_windows(
    ids: torch.Tensor, num_samples: int, length: int, generator: torch.Generator
) -> torch.Tensor:
    """Windows at random places of `ids`, in random order; the gaps between them are uniformly random.

    `ids` is [tokens], the result [num_samples, length]. The generator's state moves on.
    """
    slack = len(ids) - num_samples * length  # tokens that are in no window
    gaps = torch.randint(slack + 1, (num_samples,), generator=generator).sort().values
    starts = gaps + length * torch.arange(num_samples)
    starts = starts[torch.randperm(num_samples, generator=generator)]
    return torch.stack([ids[start : start + length] for start in starts.tolist()])  # [N, T]


def _windows_of_documents(
    tokenizer: PreTrainedTokenizerBase,
    text: TextSource,
    num_samples: int,
    held_out: int,
    length: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Windows of documents that follow one another in random order: ids, [num_samples, length].

    `held_out` of the windows are the caller's held-out ones, which only an error names. The generator's state moves on.
    """
    eos = tokenizer.eos_token_id
    separator = torch.tensor([] if eos is None else [eos], dtype=torch.int64)
    pieces = list[torch.Tensor]()
    num_tokens = 0
    for index in torch.randperm(len(text.documents), generator=generator).tolist():
        ids = _tokenise(tokenizer, text.documents[index])
        pieces += [ids, separator]
        num_tokens += len(ids) + len(separator)
        if num_tokens >= num_samples * length:
            break
    _require_tokens(text, num_tokens, num_samples, length, held_out)
    return torch.cat(pieces)[: num_samples * length].view(num_samples, length)  # [tokens] -> [N, T]


def _require_tokens(
    text: TextSource, num_tokens: int, num_samples: int, length: int, held_out: int = 0
) -> None:
    """Refuse a text of `num_tokens` if `num_samples` windows of `length`, of which some are held out, need more."""
    if num_tokens < num_samples * length:
        of_them = f" (held_out={held_out} of them)" if held_out else ""
        raise ValueError(
            f"text {text.name!r} has {num_tokens} tokens, and num_samples={num_samples} windows{of_them} of {length} "
            f"need {num_samples * length}; pass a longer text or smaller numbers."
        )

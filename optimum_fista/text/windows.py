"""Windows: token sequences of equal length, cut at random for calibration and in order for perplexity."""

from dataclasses import replace

import torch
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from optimum_fista.options import require_seed
from optimum_fista.text.sources import TextSource

_CHARACTERS_PER_TOKEN = (
    8  # English has 4 to 5: a segment is longer than a window, so that its start is random
)


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
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}; pass 1 or more.")
    require_seed(seed)
    bos, length = _bos_and_length(tokenizer, sequence_length)
    generator = torch.Generator().manual_seed(seed)
    if (
        len(text.documents) > 1
    ):  # windows follow one another, so that the first ones are always the same
        return _with_bos(
            _windows_of_documents(tokenizer, text, num_samples, length, generator), bos
        )
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
    `calibration_windows`.
    """
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows={max_windows}; pass 1 or more, or None for all.")
    bos, length = _bos_and_length(tokenizer, sequence_length)
    ids = _tokenise(tokenizer, text.joined)
    if len(ids) < length:
        few = f"{len(ids)} tokens, fewer than one window of {length}"
        raise ValueError(
            f"text {text.name!r} has {few}; pass a longer text or a smaller sequence_length."
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
    ids, ends = (
        torch.tensor(encoded["input_ids"]),
        [0, *(end for _, end in encoded["offset_mapping"])],
    )
    for bos in (0, 1):  # a BOS token before every window is not predicted, and stands for nothing
        of_text, length = windows.cpu()[:, bos:].flatten(), windows.shape[1] - bos
        if ids[: len(of_text)].equal(of_text.long()):
            parts = (
                joined[ends[i + 1 - bos] : ends[i + length]] for i in range(0, len(of_text), length)
            )
            return len("".join(parts).encode("utf-8", "surrogatepass"))
    return None


def _bos_and_length(
    tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> tuple[int | None, int]:
    """BOS id that every window starts with, `None` if none, and tokens of text in a window."""
    if sequence_length < 2:
        raise ValueError(f"sequence_length={sequence_length}; pass 2 or more.")
    bos = first_token(tokenizer)
    return bos, sequence_length - (bos is not None)


def first_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of BOS if texts have to begin with it, otherwise `None`."""
    # Llama 3's tokenizer adds BOS in its post-processor and leaves the attribute False. Gemma's perplexity without
    # BOS is meaningless, whatever its tokenizer's attribute says.
    known = tokenizer.bos_token_id is not None
    starts = known and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    attribute = getattr(tokenizer, "add_bos_token", False) is True
    if known and (starts or attribute or "Gemma" in type(tokenizer).__name__):
        bos: int | None = tokenizer.bos_token_id
        return bos
    return None


def _with_bos(windows: torch.Tensor, bos: int | None) -> torch.Tensor:
    return windows if bos is None else pad(windows, (1, 0), value=bos)  # [N, T - 1] -> [N, T]


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    # verbose=False: a text longer than the model's context is no mistake here.
    encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def _set_apart(
    tokenizer: PreTrainedTokenizerBase,
    text: TextSource,
    count: int,
    length: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, TextSource]:
    """The first window of each of `count` segments of a document, and the text without these windows."""
    document, windows = text.documents[0], list[torch.Tensor]()
    characters = min(
        _CHARACTERS_PER_TOKEN * length, len(document) // (2 * count)
    )  # less if the text is short
    segments = _segments(document, max(1, characters))
    for index in torch.randperm(len(segments), generator=generator).tolist():
        ids = _tokenise(tokenizer, segments[index])
        if len(windows) < count and len(ids) >= length:
            windows.append(ids[:length])
            segments[index] = tokenizer.decode(ids[length:], clean_up_tokenization_spaces=False)
    _check_enough(text, len(windows) * length, count, length)
    return torch.stack(windows), replace(text, documents=("".join(segments),))


def _windows_of_document(
    tokenizer: PreTrainedTokenizerBase,
    text: TextSource,
    num_samples: int,
    length: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """One window from each of `num_samples` segments; from the whole document if it has too few segments."""
    document, characters = text.documents[0], _CHARACTERS_PER_TOKEN * length
    while len(segments := _segments(document, characters)) >= max(num_samples, 2):
        chosen = torch.randperm(len(segments), generator=generator)[:num_samples].tolist()
        parts = [_tokenise(tokenizer, segments[index]) for index in chosen]
        if min(len(ids) for ids in parts) >= length:
            return torch.cat([_spread_windows(ids, 1, length, generator) for ids in parts])
        characters *= 2  # if short segments were skipped, text with short tokens would be preferred
    ids = _tokenise(tokenizer, document)
    _check_enough(text, len(ids), num_samples, length)
    return _spread_windows(ids, num_samples, length, generator)


def _segments(document: str, characters: int) -> list[str]:
    """Consecutive parts of about equal length, cut before white space if there is some."""
    cuts = [0]
    while len(document) - cuts[-1] > 2 * characters:
        cut = cuts[-1] + characters
        # a cut within a word would make tokens that the text does not have
        cuts.append(next((i for i in range(cut, cut + characters) if document[i].isspace()), cut))
    return [
        document[start:end] for start, end in zip(cuts, [*cuts[1:], len(document)], strict=True)
    ]


def _spread_windows(
    ids: torch.Tensor, num_samples: int, length: int, generator: torch.Generator
) -> torch.Tensor:
    """Windows at random places of `ids`, in random order; the gaps between them are uniformly random."""
    slack = len(ids) - num_samples * length  # tokens that are in no window
    gaps = torch.randint(slack + 1, (num_samples,), generator=generator).sort().values
    starts = gaps + length * torch.arange(num_samples)
    starts = starts[torch.randperm(num_samples, generator=generator)]
    return torch.stack([ids[start : start + length] for start in starts.tolist()])  # [N, T]


def _windows_of_documents(
    tokenizer: PreTrainedTokenizerBase,
    text: TextSource,
    num_samples: int,
    length: int,
    generator: torch.Generator,
) -> torch.Tensor:
    eos = tokenizer.eos_token_id
    separator = torch.tensor([] if eos is None else [eos], dtype=torch.int64)
    pieces, tokens = list[torch.Tensor](), 0
    for index in torch.randperm(len(text.documents), generator=generator).tolist():
        pieces += [_tokenise(tokenizer, text.documents[index]), separator]
        tokens += len(pieces[-2]) + len(separator)
        if tokens >= num_samples * length:
            break
    _check_enough(text, tokens, num_samples, length)
    return torch.cat(pieces)[: num_samples * length].view(num_samples, length)  # [tokens] -> [N, T]


def _check_enough(text: TextSource, tokens: int, num_samples: int, length: int) -> None:
    if tokens < num_samples * length:
        need = f"num_samples={num_samples} windows of {length} need {num_samples * length}"
        raise ValueError(
            f"text {text.name!r} has {tokens} tokens, and {need}; pass a longer text or smaller numbers."
        )

"""Calibration batches: the user's data is read once, checked, and fingerprinted.

A loader may give batches in any form that Transformers' models take. Ids and a mask are used, and images or audio if
the model takes them (`model.media`). Other arguments that would change the model's output are refused by name, because
they must not be ignored in silence; keys that would not are named in a warning.

`read_batches` is called first, then `hold_out`. All later steps get `CalibrationBatch` objects: `arguments` and `run`
run a model on them, `describe_batches` and `tokens_sha256` tell the report what they were, and `cut_batches` makes
smaller ones if memory runs out.
"""

import hashlib
import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.digests import bytes_of_values
from optimum_fista.model.media import TEXT_ONLY, MediaArguments, as_tensor, media_arguments
from optimum_fista.model.offload import execution_device

_CHANGES_OUTPUT = re.compile(
    "pixel|image|video|audio|bbox|embeds|input_(features|values)|coder_|cross_attention|token_type_ids|"
    "past_key_values|^cache$|per_layer_inputs|langs|mems|perm_mask"
)
"""Arguments that change a model's output for the same tokens."""
_PACKING = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")
"""Arguments that say where the documents in a row end."""
_READ = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "labels",
    "held_out",
    "source",
    "bytes_per_token",
    *_PACKING,
}
"""Keys of a batch that are read or checked, or that data collators add to every batch (`labels`)."""
_ERRORS_OF_PYTHON = (AttributeError, AssertionError, LookupError, NameError, TypeError, ValueError)
"""Errors in which a model of Transformers ends if an argument is `None` that it needs."""


@dataclass(frozen=True)
class CalibrationBatch:
    """One batch of token ids; a sequence with images is alone in its batch, without padding."""

    input_ids: Tensor  # int64 [batch, sequence]
    # bool [batch, sequence], True = a real token; None if all tokens are real
    attention_mask: Tensor | None = None
    held_out: bool = False  # whether no weight is fitted to it
    text: str | None = None  # name of its text, if it is held out and that is known
    # name of the text that all its sequences are of; None if all batches are of one text
    source: str | None = None
    bytes_per_token: float | None = None  # of its text in UTF-8, if known
    # other arguments of the model by name: images, types of tokens
    media: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Number of real tokens."""
        if self.attention_mask is None:
            return self.input_ids.numel()
        return int(self.attention_mask.sum())

    def sequences_without_padding(self) -> Iterator[Self]:
        """Yield every sequence as a new batch of its own, without padding; all other fields are those of this batch."""
        for row, ids in enumerate(self.input_ids):
            real = ids if self.attention_mask is None else ids[self.attention_mask[row]]
            # [tokens] -> [1, tokens]
            yield replace(self, input_ids=real[None], attention_mask=None)

    def arguments(self, model: PreTrainedModel) -> dict[str, Any]:
        """Keyword arguments to run a model with, on the device where it computes; images are in the model's dtype.

        `self.attention_mask` is bool, or `None` without padding. `self.media` are images and the like, by the names of
        the model's arguments. The model is only read.
        """
        device = execution_device(model.get_input_embeddings())
        mask = None
        if self.attention_mask is not None:
            mask = self.attention_mask.to(device).long()
        arguments: dict[str, Any] = {
            "input_ids": self.input_ids.to(device),
            "attention_mask": mask,
            "use_cache": False,
        }
        for name, value in self.media.items():
            dtype = model.dtype if value.is_floating_point() else value.dtype
            arguments[name] = value.to(device, dtype)
        return arguments

    def run(self, model: PreTrainedModel) -> Any:
        """Run a model on this batch, and return its output.

        `self.media` are its images and sounds, and the arguments that describe them, by name. If one of these arguments
        is missing, and the model therefore ends in an error of Python, the error that is raised names the argument.
        """
        try:
            return model(**self.arguments(model))
        except UnsupportedArchitectureError:  # by code of this package that runs inside the model
            raise
        # such as a TypeError, in which the model ends if an argument that it needs is `None`
        except _ERRORS_OF_PYTHON as error:
            # Arguments that describe images or sounds, which the model takes and the batch lacks. If the batch has no
            # image and no sound, there are none.
            lacking = media_arguments(model).lacking(self.media)
            if not lacking:
                raise
            raise ValueError(
                f"{type(model).__name__} can't run on a batch of calib_dataloader that holds "
                f"{' and '.join(sorted(self.media))} and lacks {' and '.join(lacking)} "
                f"({type(error).__name__}: {error}): pass all that the model's processor returns."
            ) from error

    def sequences(self, start: int, stop: int) -> Self:
        """Return a new batch of the sequences with the numbers `start` to `stop` (exclusive), which shares memory.

        All other fields are those of this batch. Its mask is `None` if no token of these sequences is padding.
        """
        mask = self.attention_mask
        if mask is not None:
            mask = mask[start:stop]
            if bool(mask.all()):
                mask = None  # attention is quicker without a mask
        return replace(self, input_ids=self.input_ids[start:stop], attention_mask=mask)


def read_batches(
    loader: Iterable[Any],
    vocab_size: int,
    longest: int | None = None,
    media: MediaArguments = TEXT_ONLY,
    warn: Callable[[str], None] = warnings.warn,
) -> list[CalibrationBatch]:
    """Read every batch of a calibration loader once, and move padding to the end of each sequence.

    The loader is an iterable of dicts with `input_ids` (and `attention_mask`), tensors of ids [batch, sequence] or
    [sequence], or lists of ids: a `torch.utils.data.DataLoader`, a data set or a generator. Ids must be smaller than
    `vocab_size`. A sequence may have `longest` tokens; `None`: any number. `labels`, which data collators add, are
    ignored. `held_out` marks a batch that only measures; its value may be the name of the text. `source` is the name of
    the text that a batch is of, if the calibration has several texts. A dict may also hold images and the like as the
    model's processor returns them, if they are among the model's `media` arguments; then every sequence becomes a
    batch.

    `warn` is called once if any batches have keys that are not read.
    """
    reader = _BatchReader(vocab_size, longest, media)
    batches = list[CalibrationBatch]()
    for number, item in enumerate(_items_of(loader)):
        batches += reader.read(item, f"calib_dataloader[{number}]")
    if not batches:
        raise ValueError(
            "calib_dataloader gave no batch: pass at least one batch; a generator can be read only once."
        )
    _require_sources(batches)
    if not any(batch.num_tokens for batch in batches):
        raise ValueError(
            "calib_dataloader holds no real token: every attention_mask is zero, and 1 marks a token that counts."
        )
    if reader.ignored_keys:
        names = " and ".join(map(repr, sorted(reader.ignored_keys)))
        warn(f"calib_dataloader holds {names}, which are not read: the model runs without them.")
    return batches


def _require_sources(batches: Sequence[CalibrationBatch]) -> None:
    """Refuse batches of which some name their text by `source` and others do not, or two name one text (ValueError).

    Batches that only measure (`held_out`) need not name it. Two texts are one if they have the same sequences: a refit
    of experts would test the text by itself. Sequences with images are not compared.
    """
    fitted = [batch for batch in batches if not batch.held_out]
    sources = sources_of(fitted)
    if None in sources and len(sources) > 1:
        named = next(source for source in sources if source is not None)
        raise ValueError(
            f"some batches of calib_dataloader have a 'source', such as {named!r}, and others have none: pass it in "
            "all batches that are calibrated on, or in none."
        )
    if len(sources) < 2 or any(batch.media for batch in fitted):
        return

    first_sources = dict[frozenset[bytes], str | None]()  # by the sequences of the text
    for source in sources:
        sequences = frozenset(
            ids.cpu().numpy().tobytes()
            for batch in fitted
            if batch.source == source
            for ids in batch.input_ids
        )
        first_source = first_sources.setdefault(sequences, source)
        if first_source != source:
            raise ValueError(
                f"calib_dataloader has the same sequences for the 'source' {first_source!r} as for {source!r}: pass "
                "one of the two."
            )


def sources_of(batches: Iterable[CalibrationBatch]) -> list[str | None]:
    """Return the names of the texts that batches are of, each once, in the order in which they come first.

    The list is `[None]` if the batches do not name their text.
    """
    return list(dict.fromkeys(batch.source for batch in batches))


def count_texts(loader: Iterable[Any]) -> tuple[Sequence[Any], int]:
    """Read a user's `calib_dataloader` to its end, and count the texts that its batches name.

    A run must know of how many texts its calibration is before `read_batches` reads it. Returns the batches as the
    loader gives them, because a generator can't be read again, and the number of different `"source"` entries of those
    that are not held out. The number is 1 if none is named. Whether the batches make sense is not checked here.
    """
    items = list(_items_of(loader))
    fitted = [item for item in items if isinstance(item, Mapping) and not item.get("held_out")]
    names = {str(item["source"]) for item in fitted if item.get("source") is not None}
    return items, max(1, len(names))


def _items_of(loader: Any) -> Iterable[Any]:
    """Iterate over the batches of the user's `calib_dataloader`; a single sequence of ids is one batch.

    Reads no batch yet. A loader is a list or tensor, an iterable, or a data set that has only `__getitem__`.
    """
    if isinstance(loader, Mapping | str) or not isinstance(loader, Iterable | Dataset):
        raise ValueError(
            f"calib_dataloader is a {type(loader).__name__}: pass an iterable of batches, such as a DataLoader or a "
            "list of {'input_ids': ..., 'attention_mask': ...} dicts."
        )
    if isinstance(loader, Tensor):
        # A tensor [sequences, length] gives one sequence after another. A tensor [length] is a single one.
        return loader if loader.ndim > 1 else [loader]
    if isinstance(loader, list | tuple):
        # a list of numbers, not of batches
        is_one_sequence = bool(loader) and all(isinstance(item, int) for item in loader)
        return [loader] if is_one_sequence else loader
    if isinstance(loader, Iterable):
        return loader
    if hasattr(loader, "__len__"):
        return (loader[i] for i in range(len(loader)))
    return iter(loader)  # a data set without a length, which is read until an IndexError


def hold_out(batches: Sequence[CalibrationBatch], num_sequences: int) -> list[CalibrationBatch]:
    """Mark the last `num_sequences` sequences as held out, and all others as not.

    If the batches are of several texts (`CalibrationBatch.source`), these are the last sequences of each text, in equal
    shares; of a remainder, the first texts get one more each.

    A batch in which the first of them is not the first sequence is cut in two. Returns new batches, first those that
    are not held out; the given ones are not changed. With 0 sequences, the batches are returned as they are.
    """
    if not num_sequences:
        return list(batches)
    sources = sources_of(batches)
    if len(sources) > 1:
        return _hold_out_of_each(batches, sources, num_sequences)
    total = sum(batch.input_ids.shape[0] for batch in batches)
    if num_sequences >= total:
        raise ValueError(
            f"held_out={num_sequences}: calib_dataloader holds {total} sequences, so none is left to calibrate on: "
            "pass a smaller number, or more sequences."
        )

    marked = list[CalibrationBatch]()
    # how many sequences, of this batch and of the later ones, are not held out
    num_fitted = total - num_sequences
    for batch in batches:
        size = batch.input_ids.shape[0]
        cut = min(num_fitted, size)  # sequences of this batch before `cut` are not held out
        if cut:
            marked.append(replace(batch.sequences(0, cut), held_out=False))
        if cut < size:
            marked.append(replace(batch.sequences(cut, size), held_out=True))
        num_fitted -= cut

    for held_out, name in ((False, "other"), (True, "held-out")):
        if not any(batch.num_tokens for batch in marked if batch.held_out == held_out):
            raise ValueError(
                f"held_out={num_sequences}: the {name} sequences hold no real token, every attention_mask is zero: 1 "
                "marks a token that counts."
            )
    return marked


def _hold_out_of_each(
    batches: Sequence[CalibrationBatch], sources: Sequence[str | None], num_sequences: int
) -> list[CalibrationBatch]:
    """Mark the last sequences of each text as held out, `num_sequences` together, as `hold_out` does.

    `sources` are the names of the texts (`sources_of`). ValueError if a text has no sequence to hold out, or none that
    is left.
    """
    if num_sequences < len(sources):
        raise ValueError(
            f"held_out={num_sequences} (--held-out): the calibration has {len(sources)} texts, and sequences of each "
            f"are held out: pass at least {len(sources)}, or 0."
        )
    fitted = list[CalibrationBatch]()
    held_out = list[CalibrationBatch]()
    for source, share in zip(sources, equal_shares(num_sequences, len(sources)), strict=True):
        of_source = [batch for batch in batches if batch.source == source]
        try:
            marked = hold_out(of_source, share)
        except ValueError as error:
            raise ValueError(f"of the text {source!r}, {error}") from error
        fitted += [batch for batch in marked if not batch.held_out]
        held_out += [batch for batch in marked if batch.held_out]
    return [*in_turns(fitted), *in_turns(held_out)]


def in_turns(batches: Iterable[CalibrationBatch]) -> list[CalibrationBatch]:
    """Order batches so that their texts take turns: the first batch of each text, then the second of each, ...

    Batches of one text keep their order; if all are of one text, nothing moves.
    """
    of_sources: dict[str | None, list[CalibrationBatch]] = {}
    for batch in batches:
        of_sources.setdefault(batch.source, []).append(batch)
    turns = itertools.zip_longest(*of_sources.values())
    return [batch for turn in turns for batch in turn if batch is not None]


def equal_shares(number: int, count: int) -> list[int]:
    """Divide a number of sequences into `count` equal shares; of a remainder, the first shares get one more each."""
    share, remainder = divmod(number, count)
    return [share + 1 if index < remainder else share for index in range(count)]


def describe_batches(batches: Sequence[CalibrationBatch]) -> dict[str, Any]:
    """Describe for the report the text (and images) to fit to, and under "held_out" the others if there are any."""
    described = _describe([batch for batch in batches if not batch.held_out])
    held_out = [batch for batch in batches if batch.held_out]
    if held_out:
        described["held_out"] = _describe(held_out)
    return described


def _describe(batches: Sequence[CalibrationBatch]) -> dict[str, Any]:
    """Describe batches by a digest, their sizes, and the names of their media arguments if they have any."""
    described: dict[str, Any] = {
        "sha256": tokens_sha256(batches),
        "num_sequences": sum(batch.input_ids.shape[0] for batch in batches),
        "num_tokens": sum(batch.num_tokens for batch in batches),
    }
    media = {name for batch in batches for name in batch.media}
    if media:
        described["media"] = sorted(media)
    return described


def shapes_of(batches: Sequence[CalibrationBatch]) -> list[list[int]]:
    """Shapes of the batches, in their order: `[count, sequences, tokens]` for `count` equal ones in a row."""
    all_shapes = [list(batch.input_ids.shape) for batch in batches]
    # `groupby` puts only neighbours together
    return [[len(list(same)), *shape] for shape, same in itertools.groupby(all_shapes)]


def tokens_sha256(batches: Sequence[CalibrationBatch]) -> str:
    """SHA-256 of all real tokens (and images) with the sequence boundaries, as hexadecimal digits.

    It depends on the order of the sequences, but not on how they are cut into batches. Changes nothing.
    """
    digest = hashlib.sha256()
    for batch in batches:
        for row in batch.sequences_without_padding():
            # the bar ends a sequence, so that the hash depends on how tokens are cut into sequences
            digest.update(row.input_ids.cpu().to(torch.int64).numpy().tobytes() + b"|")
            for name, values in sorted(row.media.items()):
                digest.update(f"{name} {values.dtype} {tuple(values.shape)} ".encode())
                digest.update(bytes_of_values(values))
    return digest.hexdigest()


@dataclass
class _BatchReader:
    """Reads the batches of one loader, and collects the keys that are ignored.

    The fields are the arguments of `read_batches`. In all methods, `where` names the batch in errors, such as
    "calib_dataloader[3]".
    """

    vocab_size: int
    longest: int | None
    media: MediaArguments
    ignored_keys: set[str] = field(default_factory=set)

    def read(self, item: Any, where: str) -> list[CalibrationBatch]:
        """Read one item of the loader: one batch, or a batch for each sequence if there are images or sounds.

        `item` is a dictionary in the form that `read_batches` takes, or only token ids. `where` names it in errors,
        such as "calib_dataloader[3]". `self.media.names` are the model's arguments for images and sounds; there are
        none for a model of text. Adds keys that are not read to `self.ignored_keys`.
        """
        others: Mapping[str, Any] = {}  # the whole dictionary, if it is one
        if isinstance(item, Mapping):
            self._check_keys(item, where)
            others = item
            item = item["input_ids"]
        elif isinstance(item, list | tuple) and len(item) == 1 and isinstance(item[0], Tensor):
            item = item[0]  # a batch of a TensorDataset
        ids = self._read_ids(item, where)
        real = _real_tokens(ids, others, where)

        # Real tokens come first: models count positions, and recurrent models keep states, from the first token on. A
        # stable sort by "is padding" (0 or 1) keeps their order.
        order = real.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        held_out = others.get("held_out")  # True, or the name of the text
        source = others.get("source")
        if source is not None and not isinstance(source, str):
            raise ValueError(
                f"{where}: source is a {type(source).__name__}: pass the name of the text that all its sequences are "
                "of, such as 'code.txt'."
            )
        batch = CalibrationBatch(
            input_ids=ids.gather(1, order),
            attention_mask=None if bool(real.all()) else real.gather(1, order),
            held_out=bool(held_out),
            text=held_out if isinstance(held_out, str) else None,
            source=source,
            bytes_per_token=others.get("bytes_per_token"),
        )

        media_of_rows = self.media.read(others, ids, real, where) if self.media.names else []
        if not any(media_of_rows):
            return [batch]
        # a batch for each sequence that has a token
        return [
            replace(row, media=MappingProxyType(media))
            for row, media in zip(batch.sequences_without_padding(), media_of_rows, strict=True)
            if row.num_tokens
        ]

    def _check_keys(self, item: Mapping[str, Any], where: str) -> None:
        """Refuse a batch without ids, or with arguments that would be missed; collect other unread keys.

        `item` is the user's batch, and `where` names it in errors, such as "calib_dataloader[3]". Keys are read if they
        are in `_READ`, or in `self.media.names`, the model's arguments for images and sounds. Others are added to
        `self.ignored_keys`, for a warning.
        """
        self._refuse_changing_keys(item, where)
        if "input_ids" not in item:
            raise ValueError(
                f"{where} has the keys {sorted(item)}: pass 'input_ids' (and 'attention_mask')."
            )
        for key, value in item.items():
            is_read = key in _READ or key in self.media.names
            # types of tokens that are still here are zeros, which change nothing
            are_types = key.endswith("token_type_ids")
            if value is not None and not is_read and not are_types:
                self.ignored_keys.add(key)

    def _refuse_changing_keys(self, item: Mapping[str, Any], where: str) -> None:
        """Refuse arguments that change the output of models for the same tokens, but that are not read.

        `item` is the user's batch, and `where` names it in errors, such as "calib_dataloader[3]". `_CHANGES_OUTPUT` is
        a pattern for the names of such arguments. `self.media.names` are those that are read for this model: images and
        sounds, none for a model of text.
        """
        for key, value in item.items():
            # a string, such as the address of an image, is no argument of a model
            if value is None or isinstance(value, str) or key in self.media.names:
                continue
            if not _CHANGES_OUTPUT.search(key):
                continue
            if key.endswith("token_type_ids") and not torch.as_tensor(value).any():
                continue  # zeros, as if there were none
            names = ", ".join(sorted(self.media.names))
            takes = f"takes only {names} besides" if names else "runs on token ids only"
            raise ValueError(
                f"{where} holds {key!r}, but the model {takes}: pass text without it, as 'input_ids' (and "
                "'attention_mask')."
            )

    def _read_ids(self, values: Any, where: str) -> Tensor:
        """Read token ids [batch, sequence], int64, and check them.

        `values` are the user's ids, a tensor or lists, and `where` names their batch in errors, such as
        "calib_dataloader[3]". Ids must be below `self.vocab_size`, and sequences have at most `self.longest` tokens;
        `None`: any number.
        """
        ids = _as_rows(values, where, "input_ids").to(torch.int64)
        low = int(ids.min())
        high = int(ids.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"{where}: input_ids holds the token id {low if low < 0 else high}, outside the model's vocabulary "
                f"[0, {self.vocab_size}): tokenise with the model's own tokenizer."
            )
        if self.longest is not None and ids.shape[1] > self.longest:
            raise ValueError(
                f"{where} holds sequences of {ids.shape[1]} tokens: pass at most {self.longest}, the model's "
                f"max_position_embeddings (--sequence-length {self.longest})."
            )
        return ids


def _real_tokens(ids: Tensor, others: Mapping[str, Any], where: str) -> Tensor:
    """Find which tokens are real, bool [batch, sequence]; they must be consecutive, one document in every row.

    `ids` are [batch, sequence], and `others` is the user's batch, of which `attention_mask`, `position_ids` and the
    arguments of packed rows (`_PACKING`, such as "seq_idx") count. Several documents in one row are refused: the model
    would read them as one, because it gets no boundaries. `where` names the batch in errors, such as
    "calib_dataloader[3]".
    """
    mask = others.get("attention_mask")
    # `_as_rows` reads integers [batch, sequence], and refuses those of another shape than `ids`.
    numbers = torch.ones_like(ids) if mask is None else _as_rows(mask, where, "attention_mask", ids)
    real = numbers.bool()

    # names of arguments that show several documents in a row
    packing = [key for key in _PACKING if others.get(key) is not None]
    if int(numbers.max()) > 1:  # 1, 1, 2, 2: two documents
        packing.append("attention_mask")
    if others.get("position_ids") is not None:
        positions = _as_rows(others["position_ids"], where, "position_ids", ids)
        # Positions of a document rise by one. Position 0 is at the start of the row, padding included, or at its first
        # real token.
        from_the_row = torch.arange(ids.shape[1]).to(ids).expand_as(ids)
        from_the_first_real_token = real.cumsum(1) - 1
        counts_all = torch.equal(positions[real], from_the_row[real])
        counts_real_tokens = torch.equal(positions[real], from_the_first_real_token[real])
        if not (counts_all or counts_real_tokens):
            packing.append("position_ids")
    if packing:
        raise ValueError(
            f"{where}: {packing[0]} says that a row holds several documents, or begins late: pass every document as a "
            f"sequence of its own, without {packing[0]}."
        )

    # A run of real tokens begins at the first token, or after one that is not real.
    begins = real[:, 1:] & ~real[:, :-1]
    num_runs = begins.sum(1) + real[:, 0]
    if bool((num_runs > 1).any()):
        raise ValueError(
            f"{where}: attention_mask has a hole, zeros between two tokens: pass zeros only before or after all "
            "tokens."
        )
    return real


def _as_rows(values: Any, where: str, key: str, like: Tensor | None = None) -> Tensor:
    """Read integers [batch, sequence]; with `like` (the ids), they must have its shape, and get its dtype and device.

    `values` are the user's, a tensor or lists, for one sequence or for several. `where` and `key` name them in errors,
    such as "calib_dataloader[3]" and "attention_mask".
    """
    rows = as_tensor(values, where, key, "ids [batch, sequence] of equal length")
    if rows.ndim == 1:
        rows = rows.unsqueeze(0)
    is_integer = not (rows.is_floating_point() or rows.is_complex())
    if rows.ndim != 2 or rows.numel() == 0 or not is_integer:
        raise ValueError(
            f"{where}: {key} has shape {tuple(rows.shape)} and dtype {rows.dtype}: pass integers [batch, sequence] or "
            "[sequence], at least one."
        )
    if like is None:
        return rows
    if rows.shape != like.shape:
        raise ValueError(
            f"{where}: {key} has shape {tuple(rows.shape)}, input_ids {tuple(like.shape)}: pass one value a token."
        )
    return rows.to(like)


def cut_batches(
    batches: Sequence[CalibrationBatch], sizes: Sequence[int]
) -> list[CalibrationBatch]:
    """Cut batches into batches of `sizes` sequences; no new batch has sequences of two old ones.

    `sizes` add up to the numbers of sequences of the old batches, one after the other. The old ones are not changed.
    """
    lengths = [batch.input_ids.shape[0] for batch in batches]
    return [batches[number].sequences(start, end) for number, start, end in pieces(lengths, sizes)]


def pieces(lengths: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Cut batches of `lengths` sequences into pieces of `sizes` sequences.

    No piece has sequences of two batches: the sizes must add up to the length of the first batch, then to that of the
    second one, and so on. Yields for each piece the number of its batch, and there the number of its first sequence and
    of the first one after it.
    """
    remaining = iter(sizes)  # one iterator for all batches
    for number, length in enumerate(lengths):
        start = 0
        while start < length:
            end = start + next(remaining)
            yield number, start, end
            start = end

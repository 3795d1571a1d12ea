"""The loss of a model on named texts, in bits per byte: the same number for models with different tokens.

`require_measurable` checks the texts of a run (`--measure`, `--protect`) before it starts, and returns them as
`MeasuredText`s. `losses_of_folder` and `losses_of` then measure one model each, the dense one and the result, and
`compared` joins both to what the report says. A model runs one decoder layer after the other, so that only one layer
has to be in memory.

A *stretch* is a piece of a text. Stretches are cut by characters, and not by tokens: all models are measured on the
same text, whatever their tokens are. A *sequence* is a list of ids that the model runs on alone. It ends at the end of
a character, also if a character is several tokens.
"""

from __future__ import annotations

import hashlib
import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_fista.bars import tqdm
from optimum_fista.model.activations import ActivationStore
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.expert_counts import ExpertCounts, mixture_of
from optimum_fista.model.held_out import LEAST_TOKENS, LOGITS_TOGETHER
from optimum_fista.model.hooks import evaluation_mode
from optimum_fista.model.inputs import LayerCall, record_inputs
from optimum_fista.model.layers import find_decoder_layers, token_limits
from optimum_fista.model.offload import execution_device, onloaded
from optimum_fista.model.precision import choose_products, products_as
from optimum_fista.model.sweep import Sweep
from optimum_fista.public_names import public_name
from optimum_fista.records import LoopCount, TextReport
from optimum_fista.source.loading import load_lazily, require_tokenizer
from optimum_fista.text.loops import count_loops
from optimum_fista.text.windows import first_token

logger = logging.getLogger(__name__)

# Characters of a stretch: about 500 tokens of English.
_STRETCH_CHARACTERS = 2048
# Stretches of a text: with 6 characters in a token, which is much, they have `LEAST_TOKENS` tokens. A text with longer
# tokens has more stretches.
_USUAL_STRETCHES = 12
# Tokens of a sequence, at most.
_LONGEST_SEQUENCE = 1024

# What measuring raises if the memory or the disk is full, a file can't be read, or a text gives NaN. (PyTorch's own
# errors of memory are RuntimeErrors.) The result of a run does not depend on the losses, so it is kept after such an
# error.
MEASURING_ERRORS = (ValueError, RuntimeError, MemoryError, OSError)


@dataclass(frozen=True)
class MeasuredText:
    """A held-out text that the user named, as far as it is measured."""

    name: str  # for the report and the model card: of a path only the last part
    stretches: tuple[str, ...]
    # The limit of `--protect FILE=1.02`: bits per byte after the run, divided by those before it, may be 1.02 at most.
    # None: there is no limit.
    at_most: float | None

    @property
    def sha256(self) -> str:
        """Digest of the stretches: equal for equal text."""
        return hashlib.sha256(
            "\0".join(self.stretches).encode("utf-8", "surrogatepass")
        ).hexdigest()


@dataclass(frozen=True)
class Tokenized:
    """A text in the tokens of one model."""

    sequences: Sequence[Sequence[int]]  # ids, of at least two tokens each
    num_tokens: int  # of the text, without BOS
    # That the predicted tokens stand for. Without BOS, the first token of a sequence is not predicted. If it is only a
    # part of a character, the bytes of that character count all the same.
    num_bytes: int


@dataclass(frozen=True)
class TextLoss:
    """The loss of one model on one text."""

    bits_per_byte: float
    num_tokens: int
    num_bytes: int
    vocabulary: int  # number of tokens that the model knows
    # How many of the tokens, BOS included, reach each expert, by the number of the decoder layer. Empty if
    # that was not counted, or if there are no experts.
    expert_tokens: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    loops: LoopCount | None = None  # if they were counted


def require_measurable(
    texts: Mapping[str, str],
    protect: Mapping[str, float],
    tokenizer: PreTrainedTokenizerBase,
) -> list[MeasuredText]:
    """Check the texts of a run, and cut the stretches out of them that are measured. Changes nothing.

    Args:
        texts: The texts themselves, by name, such as "code.txt". Of a name that is a path, results have the last part.
        protect: Limits by the same names: 1.02 allows 1.02 times the bits per byte that the text has before the run.
        tokenizer: That of the model as it is before the run.

    Raises:
        ValueError: If a text is empty or too short, two texts have one name, or `protect` names no text or has a
            number that is not at least 1.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"measure: {type(tokenizer).__name__} is not a fast tokenizer: pass a model that has a tokenizer.json."
        )
    for name, at_most in protect.items():
        if name not in texts:
            raise ValueError(
                f"protect has {name!r}, which is not among the texts to measure "
                f"({', '.join(map(repr, texts)) or 'there are none'}): pass its text, too."
            )
        # True and False are integers, too.
        is_number = isinstance(at_most, int | float) and not isinstance(at_most, bool)
        if not is_number or not 1 <= at_most < math.inf:
            raise ValueError(
                f"protect has {at_most!r} for {name!r}: pass how many times the bits per byte before the run those "
                "after it may be, such as 1.02."
            )

    measured = list[MeasuredText]()
    for name, text in texts.items():
        public = public_name(name)  # of a path only the last part
        if any(other.name == public for other in measured):
            raise ValueError(
                f"measure has two texts that are called {public!r}: rename one of them."
            )
        if not isinstance(text, str):
            raise ValueError(
                f"measure[{name!r}] is a {type(text).__name__}: pass the text itself, not the path of a file."
            )
        if not text.strip():
            raise ValueError(f"measure: the text {public!r} is empty.")
        stretches = _enough_stretches(text, public, tokenizer)
        measured.append(MeasuredText(public, tuple(stretches), at_most=protect.get(name)))
    return measured


def _enough_stretches(text: str, name: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Cut stretches out of a text, enough to have at least `LEAST_TOKENS` tokens of `tokenizer` together.

    ValueError if all of the text has fewer. `name` is that of the text, for this error.
    """
    most_stretches = _USUAL_STRETCHES
    while True:
        stretches = cut_stretches(text, most_stretches)
        num_tokens = sum(
            len(tokenizer(stretch, add_special_tokens=False, verbose=False)["input_ids"])
            for stretch in stretches
        )
        if num_tokens >= LEAST_TOKENS:
            return stretches

        is_whole_text = len(text) <= most_stretches * _STRETCH_CHARACTERS
        if is_whole_text:
            raise ValueError(
                f"measure: the text {name!r} is too short, it has {num_tokens:,} tokens: pass one of at least "
                f"{LEAST_TOKENS:,} (about {5 * LEAST_TOKENS:,} characters of English)."
            )
        most_stretches *= 2


def cut_stretches(text: str, most_stretches: int = _USUAL_STRETCHES) -> list[str]:
    """Cut at most `most_stretches` (2 or more) stretches out of a text, spread evenly over it.

    Of a short text nothing is left out: it is cut into stretches one after the other, of which the last may be shorter.
    """
    num_characters = most_stretches * _STRETCH_CHARACTERS  # of all stretches together
    if len(text) <= num_characters:
        starts = list(range(0, len(text), _STRETCH_CHARACTERS))
    else:
        # The first stretch begins where the text does, and the last one ends where the text does.
        last_start = len(text) - _STRETCH_CHARACTERS
        step = last_start / (most_stretches - 1)
        starts = [round(number * step) for number in range(most_stretches)]
    return [text[start : start + _STRETCH_CHARACTERS] for start in starts]


def losses_of_folder(
    name: str,
    texts: Sequence[MeasuredText],
    *,
    device: str | None,
    compute_dtype: str,
    progress: bool,
    label: str,
    counts_experts: bool = False,
    counts_loops: bool = False,
) -> list[TextLoss]:
    """Measure a model in files, a folder or a Hub id, on texts; in their order.

    A Hub id is downloaded into the cache. The weights stay in the files, which are only read, until a decoder layer
    runs. Weights that are stored in another form than a model computes with are copied to a temporary folder for that
    time.

    Args:
        name: The model; it has a tokenizer.
        texts: As `require_measurable` makes them.
        device: Where to compute; `None`: the accelerator if there is one.
        compute_dtype: The option of a configuration: in which dtype matrices are multiplied.
        progress: Show a progress bar.
        label: What the bar says, such as "Measuring before".
        counts_experts: Count the tokens that each expert gets, as well.
        counts_loops: Count loops, too, if the weights fit into memory; a logged warning says if they do not.

    Raises:
        ValueError: If the loss is NaN or Inf.
    """
    with tempfile.TemporaryDirectory(prefix="offload-") as offload:
        loaded = load_lazily(name, Path(offload), device=device)
        tokenizer = loaded.tokenizer
        if tokenizer is None:
            tokenizer = require_tokenizer(name)
        return losses_of(
            loaded.model,
            tokenizer,
            texts,
            compute_dtype=compute_dtype,
            progress=progress,
            label=label,
            counts_experts=counts_experts,
            counts_loops=counts_loops,
        )


def losses_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[MeasuredText],
    *,
    compute_dtype: str,
    progress: bool,
    label: str,
    counts_experts: bool = False,
    counts_loops: bool = False,
) -> list[TextLoss]:
    """Measure a loaded model on texts, as `losses_of_folder` does. Afterwards the model is as it was.

    `texts` are those of `require_measurable`; the result has their order. `compute_dtype` is the option of a
    configuration: in which dtype matrices are multiplied. `label` is what the progress bar says. If `counts_experts`,
    the tokens that each expert gets are counted in the same pass. If `counts_loops`, the model also continues prompts.
    """
    vocabulary, num_positions = token_limits(model)  # token ids, and positions (None: no limit)
    longest = longest_sequence(num_positions)
    bos = first_token(tokenizer)
    # `bits_per_byte` takes texts by any keys: here their numbers.
    tokenized = {
        str(number): tokenized_text(text.stretches, tokenizer, bos=bos, longest=longest)
        for number, text in enumerate(texts)
    }
    device = execution_device(model.get_input_embeddings())
    counts = ExpertCounts()
    with products_as(choose_products(compute_dtype, device, model.dtype)):
        # `removed`: no token ids are forbidden in the predictions, because this model has all its tokens.
        bits = bits_per_byte(
            model,
            tokenized,
            removed={},
            progress=progress,
            label=label,
            counts=counts if counts_experts else None,
        )
        loops: Sequence[LoopCount | None] = [None] * len(texts)
        if counts_loops:
            loops = _loops_of(model, tokenizer, texts, progress=progress, label=f"{label}: loops")
    return [
        TextLoss(
            bits_per_byte=bits[number],
            num_tokens=text.num_tokens,
            num_bytes=text.num_bytes,
            vocabulary=vocabulary,
            expert_tokens=counts.of(number),
            loops=loops_of_text,
        )
        for (number, text), loops_of_text in zip(tokenized.items(), loops, strict=True)
    ]


def _loops_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[MeasuredText],
    *,
    progress: bool,
    label: str,
) -> Sequence[LoopCount | None]:
    """Count the loops of a model on each text (`count_loops`); all are `None` if that can't be done.

    A logged warning says why. A loss is known without loops, so no error ends the run: some families can't generate.
    """
    try:
        stretches = [text.stretches for text in texts]
        return count_loops(model, tokenizer, stretches, progress=progress, label=label)
    except Exception as error:  # of any kind: code of each family runs
        logger.warning("loops are not counted: %s", error)
        return [None] * len(texts)


def compared(
    texts: Sequence[MeasuredText], dense: Sequence[TextLoss], pruned: Sequence[TextLoss]
) -> list[TextReport]:
    """Join the losses of the model before a run (`dense`) and of its result (`pruned`) on texts, for the report.

    All three have the order of `texts`. Both models were measured on the same bytes, but in their own tokens: the
    result may have lost some. The report has the size of the vocabulary before the run, and repeats the limit of each
    text (`at_most`). Changes nothing.
    """
    return [
        TextReport(
            name=text.name,
            sha256=text.sha256,
            num_bytes=before.num_bytes,
            num_tokens=before.num_tokens,
            num_tokens_pruned=after.num_tokens,
            dense=before.bits_per_byte,
            pruned=after.bits_per_byte,
            vocabulary=before.vocabulary,
            at_most=text.at_most,
            loops_dense=before.loops,
            loops_pruned=after.loops,
        )
        for text, before, after in zip(texts, dense, pruned, strict=True)
    ]


def longest_sequence(num_positions: int | None) -> int:
    """Tokens of a sequence, at most, for a model that takes `num_positions` tokens; `None`: that is not known."""
    return _LONGEST_SEQUENCE if num_positions is None else min(_LONGEST_SEQUENCE, num_positions)


def tokenized_text(
    stretches: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    bos: int | None,
    longest: int,
    old_ids: Sequence[int] | None = None,
) -> Tokenized:
    """Write stretches of a text in tokens, in sequences of at most `longest` ids. Changes nothing.

    The tokens of a long stretch are cut into several sequences, between two characters. A sequence of one id is left
    out, because nothing is predicted there.

    Args:
        stretches: Pieces of one text.
        tokenizer: A fast one, which knows the place of each token in the text.
        bos: The model's id that every sequence starts with; `None`: sequences start with text.
        longest: Ids of a sequence at most, BOS included.
        old_ids: The model's id of each id of the tokenizer; `None`: they are the same.
    """
    sequences = list[Sequence[int]]()
    num_tokens = 0
    num_bytes = 0
    for stretch in stretches:
        encoded = tokenizer(
            stretch, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = encoded["input_ids"]
        places = encoded["offset_mapping"]  # first and last character (exclusive) of each token
        num_tokens += len(ids)
        per_sequence = longest if bos is None else longest - 1
        for first, next_first in _bounds_of_sequences(places, per_sequence):
            sequence = ids[first:next_first]
            if old_ids is not None:
                sequence = [old_ids[index] for index in sequence]
            begin, end_of_first = places[first]
            _, end = places[next_first - 1]
            # The character of the first token may have more tokens, which are in this sequence, too.
            is_part_of_character = first + 1 < next_first and places[first + 1][0] < end_of_first
            if bos is not None:
                sequence = [bos, *sequence]
            elif not is_part_of_character:
                begin = end_of_first  # nothing predicts the first token
            if len(sequence) > 1:
                sequences.append(sequence)
                predicted = stretch[begin:end]
                # surrogatepass: a text that was made in Python may hold half of a surrogate pair.
                num_bytes += len(predicted.encode("utf-8", "surrogatepass"))
    return Tokenized(sequences, num_tokens, num_bytes)


def _bounds_of_sequences(
    places: Sequence[tuple[int, int]], most_tokens: int
) -> list[tuple[int, int]]:
    """Divide the tokens of a stretch into sequences of at most `most_tokens`, between two characters.

    Otherwise a model would have to predict the rest of a character without its beginning, and the bytes of the
    character would be counted twice. `places` are the first and the last character (exclusive) of each token. Returns
    the number of the first token of each sequence, and of the first one after it.
    """
    bounds = list[tuple[int, int]]()
    first = 0
    while first < len(places):
        longest_end = min(first + most_tokens, len(places))
        end = longest_end
        # All tokens of a character have the same place: the next token then begins before the end of this one.
        while first < end < len(places) and places[end][0] < places[end - 1][1]:
            end -= 1
        # If one character has more tokens than fit into a sequence, it has to be cut.
        if end == first:
            end = longest_end
        bounds.append((first, end))
        first = end
    return bounds


def bits_per_byte(
    model: PreTrainedModel,
    texts: Mapping[str, Tokenized],
    *,
    removed: Mapping[str, Tensor],
    progress: bool,
    label: str = "Measuring",
    counts: ExpertCounts | None = None,
) -> dict[str, float]:
    """Compute the bits per byte of texts, by their keys in `texts`, in one pass over the decoder layers of a model.

    The weights of `model` may stay in its files: one decoder layer at a time is brought to the device. Afterwards, the
    model is as it was. `texts` has the ids of each text (`tokenized_text`). `removed` has ids, int64, that the model
    can't predict in a text, by the text's key; a text without an entry has none. `label` is what the progress bar says.
    `counts` gets the numbers of tokens that reach each expert, by the keys of the texts; `None`: they are not counted.
    ValueError if the loss is NaN or Inf.
    """
    layers = find_decoder_layers(model)
    sweeps = dict[str, Sweep]()  # each runs decoder layers on the sequences of one text
    streams = dict[str, ActivationStore]()  # hidden states that enter the next decoder layer
    calls = dict[str, list[list[LayerCall]]]()  # other arguments, calls[key][layer][sequence]
    with evaluation_mode(model), torch.no_grad():
        for key, text in texts.items():
            batches = [CalibrationBatch(torch.tensor([list(ids)])) for ids in text.sequences]
            # What enters the first decoder layer, and the other arguments of all layers.
            recorded = record_inputs(layers, batches)
            sweeps[key] = Sweep(
                layers,
                range(len(layers)),
                batches,
                storage=None,  # hidden states stay on the device
                returned_besides=recorded.returned_besides,
            )
            streams[key] = recorded.hidden_states
            calls[key] = recorded.calls

        bar = tqdm(layers.modules, desc=label, unit="layer", disable=not progress)
        for index, layer in enumerate(bar):
            with onloaded(layer.modules(), read_only=True):
                mixture = None if counts is None else mixture_of(layer)
                for key, sweep in sweeps.items():
                    counting: AbstractContextManager[None] = nullcontext()
                    if counts is not None:
                        counting = counts.counted(key, index, mixture)
                    with counting:
                        # `run` returns what leaves the layer, in a new store.
                        streams[key] = sweep.run(layer, streams[key], calls[key][index])

        bits = dict[str, float]()
        norm_and_head = [*layers.around, model.get_output_embeddings()]
        with onloaded(norm_and_head, read_only=True):
            for key, sweep in sweeps.items():
                # Nats per token. The logits of `LOGITS_TOGETHER` tokens are in memory at a time.
                loss = sweep.loss(streams[key], LOGITS_TOGETHER, removed.get(key))
                text = texts[key]
                # The first id of a sequence is not predicted.
                num_predicted = sum(len(ids) - 1 for ids in text.sequences)
                # nats per token -> nats -> bits -> bits per byte
                bits[key] = loss * num_predicted / math.log(2) / text.num_bytes
    if not all(map(math.isfinite, bits.values())):
        raise ValueError(
            "the loss of the model on the held-out text is NaN or Inf: look for NaN in its weights, or load it in "
            "float32 (--dtype float32)."
        )
    return bits

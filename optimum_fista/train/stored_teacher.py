"""A teacher whose predictions of a text were computed once, and are read from a folder: it need not be in memory.

A *prediction* is what the teacher says of the next token at one position of a sequence. Of each one, the folder has the
k most likely tokens with the logarithms of their probabilities, and the logarithm of the probability of all other
tokens together. `divergence.TopPredictions` has the formula of the loss.

The folder has a file `teacher.json` with the *settings*: all that the predictions depend on, as texts and numbers by
name. The predictions are in *shards*, files with those of some consecutive sequences:

    predictions-00003.safetensors
        tokens        int32   [sequences, length - 1, k]
        log_of_tokens float16 [sequences, length - 1, k]
        log_of_rest   float16 [sequences, length - 1, 1]

`recovery` calls `require_settings` before it draws a text, and `stored_teacher` after it, which writes the shards that
are missing. A process that is killed loses the shard that it computes. The same settings give the same bytes on the
same machine.
"""

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from optimum_fista.atomic import read_record, write_file, write_record
from optimum_fista.bars import tqdm
from optimum_fista.memory import size_text
from optimum_fista.prune.ranks import Ranks
from optimum_fista.source.loading import load_model
from optimum_fista.train.divergence import LiveTeacher, Predictions, TopPredictions
from optimum_fista.train.recovery_plan import RecoveryPlan

SETTINGS_FILE = "teacher.json"
_SHARDS = "predictions-*.safetensors"
_LOCK = ".lock"  # held while shards are written
_TOKENS_OF_SHARD = 2**14  # at most, unless one sequence has more
# float16 has no larger numbers. An infinite logarithm would give 0 times infinity in the loss.
_LEAST_LOG = torch.finfo(torch.float16).min
# What a setting is called in an error.
_WORDS_OF_SETTINGS = {
    "model": "another teacher",
    "kept_tokens": "a student with other tokens",
    "text": "another text, tokenizer, seed or length of sequences, or other held-out ones",
}
logger = logging.getLogger(__name__)


class StoredTeacher:
    """The teacher of a training, read from a folder in which all predictions of the text are stored."""

    def __init__(self, folder: Path, text: Tensor) -> None:
        """Read nothing yet. `text` has the token ids of all sequences in the folder, int64 [sequences, length]."""
        self._folder = folder
        self._sequences_of_shard = _sequences_of_shard(text.shape[1])
        # The number of a sequence in the folder, by its tokens. Equal sequences have equal predictions.
        self._numbers = {_key(sequence): number for number, sequence in enumerate(text)}

    def predictions(self, ids: Tensor) -> Predictions:
        """Read the predictions of sequences of the text, `ids`, int64 [batch, length], to their device.

        The sequences are found by their tokens (`self._numbers`). Only their part of a shard in `self._folder` is read.
        """
        parts = [self._of_sequence(self._numbers[_key(sequence)]) for sequence in ids.cpu()]
        tokens = torch.cat([part.tokens for part in parts]).to(ids.device)
        log_of_tokens = torch.cat([part.log_of_tokens for part in parts]).to(ids.device)
        log_of_rest = torch.cat([part.log_of_rest for part in parts]).to(ids.device)

        # float16 has rounded the logarithms, so that the probabilities do not quite add up to 1.
        log_of_sum = torch.cat([log_of_tokens, log_of_rest], dim=1).logsumexp(1, keepdim=True)
        top = TopPredictions(
            tokens=tokens,
            log_of_tokens=log_of_tokens - log_of_sum,
            log_of_rest=log_of_rest - log_of_sum,
        )
        return top.part

    def _of_sequence(self, number: int) -> TopPredictions:
        """Read the predictions of a sequence from its shard in `self._folder`; their tensors are [length - 1, ...].

        Logarithms become float32: autocast to bfloat16 refuses to join tensors in float16. A shard has
        `self._sequences_of_shard` sequences.
        """
        shard, index = divmod(number, self._sequences_of_shard)
        with safe_open(_file_of_shard(self._folder, shard), "pt") as file:
            return TopPredictions(
                tokens=file.get_slice("tokens")[index].long(),
                log_of_tokens=file.get_slice("log_of_tokens")[index].float(),
                log_of_rest=file.get_slice("log_of_rest")[index].float(),
            )

    def bytes_beyond_a_chunk(self, num_positions: int, bytes_per_logit: int) -> int:
        """Return 0: no whole logits are in memory, however many positions there are."""
        return 0


def require_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a folder whose predictions were computed with other settings than these; changes nothing.

    `settings` may be some of all settings, as far as they are known yet. An empty or missing folder is right.
    """
    stored = read_record(folder / SETTINGS_FILE)
    if stored is None:
        # The file may be the user's own, of which nothing is overwritten.
        if any(folder.glob(_SHARDS)) or (folder / SETTINGS_FILE).exists():
            raise ValueError(
                f"teacher_logits={str(folder)!r}: its {SETTINGS_FILE} is missing or damaged, so nobody knows what "
                "the folder has predictions of: delete the folder, or pass another one (--teacher-logits)."
            )
        return

    for name, value in settings.items():
        if stored.get(name) != value:
            words = _WORDS_OF_SETTINGS.get(name, f"another {name}")
            raise ValueError(
                f"teacher_logits={str(folder)!r} has the predictions for {words} ({name} was {stored.get(name)}, is "
                f"{value}): pass the same as before, or another folder (--teacher-logits)."
            )


def stored_teacher(
    plan: RecoveryPlan,
    settings: Mapping[str, Any],
    text: Tensor,
    ranks: Ranks,
    *,
    progress: bool,
) -> StoredTeacher:
    """Write the predictions of a text that are missing in `plan.options.teacher_logits`, and return the stored teacher.

    If shards are missing, each process loads the teacher for its share of them, and drops it afterwards. All processes
    must call this.

    Args:
        plan: Names the teacher, the device and the number of tokens of a prediction (`top_k`).
        settings: All settings, which are written into the folder; others that are there already are refused.
        text: The sequences to predict, int64 [sequences, length], on the CPU.
        ranks: The processes that train together.
        progress: Whether rank 0 shows a bar.
    """
    folder = Path(str(plan.options.teacher_logits))
    lock = FileLock(folder / _LOCK)
    try:
        missing = ranks.first(lambda: _begin(folder, lock, settings, text))
        if missing and ranks.index == 0:
            _log_size(plan, folder, text)
        # Processes take turns: the first shard is written by rank 0, the second one by rank 1, ...
        shards = missing[ranks.index :: ranks.count]
        shows_bar = progress and ranks.index == 0
        ranks.each(lambda: _write_shards(plan, folder, text, shards, progress=shows_bar))
    finally:
        lock.release()  # does nothing in a process that has not locked it
    return StoredTeacher(folder, text)


def _begin(
    folder: Path, lock: BaseFileLock, settings: Mapping[str, Any], text: Tensor
) -> list[int]:
    """Return the numbers of the missing shards; if there are some, lock the folder and write the settings first."""
    require_settings(folder, settings)
    if not _missing_shards(folder, text):
        return []
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OSError(
            f"teacher_logits={str(folder)!r} is being filled by another run: wait until that one trains, or pass "
            "another folder (--teacher-logits)."
        ) from error
    require_settings(folder, settings)  # another run may have written them since
    write_record(folder / SETTINGS_FILE, settings)
    return _missing_shards(folder, text)


def _log_size(plan: RecoveryPlan, folder: Path, text: Tensor) -> None:
    """Log where the teacher's predictions of `text`, ids [sequences, length], are written, and how much they take."""
    num_positions = text.shape[0] * (text.shape[1] - 1)
    bytes_of_position = plan.options.top_k * (4 + 2) + 2  # int32 and float16; float16
    logger.info(
        "the teacher's predictions of %s tokens are written to %s once, which takes %s",
        f"{num_positions:,}",
        folder,
        size_text(num_positions * bytes_of_position),
    )


def _write_shards(
    plan: RecoveryPlan, folder: Path, text: Tensor, shards: Sequence[int], *, progress: bool
) -> None:
    """Load the teacher of `plan`, and write the shards of these numbers into `folder`, one after the other.

    Without numbers, nothing is loaded. `text` are token ids, int64 [sequences, length]. Only one sequence is in a pass,
    so that the bytes do not depend on the batch size of the training. The model is local to this function, so its
    memory is free when it returns.
    """
    if not shards:
        return
    model, _ = load_model(plan.teacher, device=str(plan.device), dtype=plan.compute_dtype)
    model.eval().requires_grad_(False)
    in_16_bits = plan.compute_dtype != torch.float32
    products = torch.autocast(plan.device.type, plan.compute_dtype, enabled=in_16_bits)

    with products, torch.no_grad():
        teacher = LiveTeacher(model, plan.kept_tokens)

    size = _sequences_of_shard(text.shape[1])
    parts = {shard: text[shard * size : (shard + 1) * size] for shard in shards}
    total = sum(part.numel() for part in parts.values())
    with tqdm(total=total, desc="Teacher", unit="token", disable=not progress) as bar:
        for shard, part in parts.items():
            tensors_of_sequences = []
            for sequence in part:
                ids = sequence[None].to(plan.device)
                with products, torch.no_grad():
                    tensors_of_sequences.append(_top_predictions(teacher, ids, plan.options.top_k))
                bar.update(ids.numel())

            tensors = {}  # [sequences, length - 1, ...]
            for name in tensors_of_sequences[0]:
                tensors[name] = torch.stack([of_one[name] for of_one in tensors_of_sequences])
            write_file(_file_of_shard(folder, shard), tensors)


def _top_predictions(teacher: LiveTeacher, ids: Tensor, top_k: int) -> dict[str, Tensor]:
    """Predict one sequence, `ids`, int64 [1, length]; returns the tensors of a shard for it, on the CPU.

    A prediction has `top_k` tokens, or all tokens if there are fewer.
    """
    predictions = teacher.predictions(ids)
    chunks: dict[str, list[Tensor]] = {"tokens": [], "log_of_tokens": [], "log_of_rest": []}
    for rows in teacher.chunks(ids.shape[1] - 1):  # slices of positions
        log_p = predictions(rows).logits.float().log_softmax(-1)  # [chunk, vocabulary]
        top = log_p.topk(min(top_k, log_p.shape[1]))
        others = log_p.scatter(1, top.indices, -math.inf)
        chunks["tokens"].append(top.indices.int())
        chunks["log_of_tokens"].append(top.values)
        chunks["log_of_rest"].append(others.logsumexp(-1, keepdim=True))
    # Only now, because autocast to bfloat16 refuses to join tensors in float16.
    return {
        "tokens": torch.cat(chunks["tokens"]).cpu(),
        "log_of_tokens": _in_16_bits(torch.cat(chunks["log_of_tokens"])).cpu(),
        "log_of_rest": _in_16_bits(torch.cat(chunks["log_of_rest"])).cpu(),
    }


def _in_16_bits(logarithms: Tensor) -> Tensor:
    """Return logarithms of probabilities in float16; those that it can't hold become its least number."""
    return logarithms.clamp(min=_LEAST_LOG).half()


def _missing_shards(folder: Path, text: Tensor) -> list[int]:
    """Find the numbers of the shards of `text`, ids [sequences, length], that are not in `folder`, or are cut short."""
    missing = []
    for shard in range(math.ceil(len(text) / _sequences_of_shard(text.shape[1]))):
        try:
            with safe_open(_file_of_shard(folder, shard), "pt"):
                pass  # opening compares the size of the file with what its header says
        except (FileNotFoundError, SafetensorError):
            missing.append(shard)
    return missing


def _sequences_of_shard(length: int) -> int:
    """Count the sequences of `length` tokens in a shard; the last shard may have fewer."""
    return max(1, _TOKENS_OF_SHARD // length)


def _file_of_shard(folder: Path, shard: int) -> Path:
    """Return the file of the shard with this number."""
    return folder / _SHARDS.replace("*", f"{shard:05}")


def _key(sequence: Tensor) -> bytes:
    """Return a digest of the tokens of a sequence, int64 [length] on the CPU."""
    return hashlib.sha256(sequence.numpy().tobytes()).digest()

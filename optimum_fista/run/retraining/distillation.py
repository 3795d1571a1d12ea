"""Distillation: how far predictions are from a teacher's, and a teacher whose predictions are kept on disk."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optimum_fista.run.checkpoints.atomic import errors_of_writing
from optimum_fista.run.checkpoints.output_folder import all_names
from optimum_fista.run.checkpoints.output_lock import locked
from optimum_fista.run.evaluation.perplexity import POSITIONS_PER_CHUNK
from optimum_fista.run.streamed.journal import differences, read_record, write_record

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LargestLogits:
    """A teacher's predictions at some positions, without its small logits.

    Attributes:
        log_probs: The largest log-probabilities, and last the logarithm of the sum of all others, [positions, k + 1].
        ids: The tokens of the first k, [positions, k].
    """

    log_probs: Tensor
    ids: Tensor

    @classmethod
    def of(cls, logits: Tensor, k: int) -> LargestLogits:
        """The `k` largest of logits [positions, vocabulary], float16 and int32, in CPU memory."""
        parts: list[tuple[Tensor, Tensor]] = []
        for rows in logits.split(POSITIONS_PER_CHUNK):
            log_p = rows.float().log_softmax(-1)
            found = log_p.topk(k, dim=-1)
            rest = log_p.scatter_(1, found.indices, float("-inf")).logsumexp(-1, keepdim=True)
            parts.append((torch.cat((found.values, rest), 1).half().cpu(), found.indices.int().cpu()))
        return cls(torch.cat([log_probs for log_probs, _ in parts]), torch.cat([ids for _, ids in parts]))

    def to(self, device: torch.device) -> LargestLogits:
        """The same on a device."""
        return LargestLogits(self.log_probs.to(device), self.ids.to(device))


def divergence(logits: Tensor, teacher: Tensor | LargestLogits, labels: Tensor, label_share: float = 0.0) -> Tensor:
    """How far predictions are from a teacher's and from the text, on average over positions.

    It is `(1 - s) KL(p || q) - s log q(label)`, with `p` of the teacher and `q` of the logits. If of the teacher only
    the largest logits are known, all other tokens count as one: `KL = sum_k p_k log(p_k / q_k) + p_rest log(p_rest /
    q_rest)`, with the sums of the others' probabilities. The gradient is computed with the value, so that
    no float32 copy of all logits is held.

    Args:
        logits: [positions, vocabulary].
        teacher: The teacher's logits [positions, vocabulary], or the largest of them.
        labels: The tokens that follow in the text, [positions].
        label_share: `s`, how much of it the text decides.
    """
    found: Tensor = _Divergence.apply(logits, teacher, labels, label_share)
    return found


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, teacher: Tensor | LargestLogits, labels: Tensor, label_share: float
    ) -> Tensor:
        gradient, positions = torch.empty_like(logits), logits.shape[0]
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        chunk = _POSITIONS_ON_CPU if logits.device.type == "cpu" else POSITIONS_PER_CHUNK
        for start in range(0, positions, chunk):
            rows = slice(start, start + chunk)
            log_q = logits[rows].float().log_softmax(-1)
            q, following = log_q.exp(), labels[rows, None]
            if isinstance(teacher, LargestLogits):
                loss, wanted = _from_largest(log_q, q, LargestLogits(teacher.log_probs[rows], teacher.ids[rows]))
            else:
                log_p = teacher[rows].float().log_softmax(-1)
                wanted = log_p.exp()
                loss = log_p.sub_(log_q).mul_(wanted).sum()
            total += (1 - label_share) * loss
            if label_share:  # the label may be of no probability
                total -= label_share * log_q.gather(1, following).sum()
            slope = q.sub_(wanted, alpha=1 - label_share)  # in the logits
            slope.scatter_add_(1, following, torch.full_like(slope[:, :1], -label_share))
            gradient[rows] = slope.div_(positions)
        ctx.save_for_backward(gradient)
        return total / positions

    @staticmethod
    def backward(ctx: Any, *outward: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.saved_tensors[0] * outward[0], None, None, None


def _from_largest(log_q: Tensor, q: Tensor, teacher: LargestLogits) -> tuple[Tensor, Tensor]:
    """The sum of the divergences with the rest as one token, and the probabilities at which it is smallest."""
    ids = teacher.ids.long()
    log_p = teacher.log_probs.float().log_softmax(-1)  # float16 has rounded them: their sum is 1 again
    rest = log_q.scatter(1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    p = log_p.exp()
    # A rest of no probability adds nothing, also if it is of no probability in q.
    loss = torch.where(p > 0, p * (log_p - torch.cat((log_q.gather(1, ids), rest), 1)), 0).sum()
    # p_k for a token that is known; the others share p_rest as they share q_rest.
    wanted = q * torch.where(p[:, -1:] > 0, (log_p[:, -1:] - rest).exp(), 0)
    return loss, wanted.scatter_(1, ids, p[:, :-1])


def require_cache(folder: Path) -> None:
    """Refuse a folder for a teacher's cache that is a file, or holds something else.

    Raises:
        FileExistsError: If it does.
    """
    foreign = folder.exists() and (not folder.is_dir() or {*all_names(folder)} - {_RECORD_BEGUN, _LOCK})
    if foreign and (not folder.is_dir() or read_record(folder / _RECORD) is None):
        raise FileExistsError(
            f"teacher_cache {str(folder)!r} holds something else: pass a new folder (--teacher-cache DIR)."
        )


@contextmanager
def locked_cache(folder: Path) -> Iterator[None]:
    """Be the only one who fills a teacher's cache; several runs may read one that is full, and need no lock.

    Raises:
        FileExistsError: If the folder holds something else.
        BlockingIOError: If another run fills it.
    """
    require_cache(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / _LOCK, f"teacher_cache {str(folder)!r}"):
        yield


class TeacherCache:
    """A teacher's largest logits on windows of tokens, in files that are mapped into memory.

    What is there of an earlier call with the same windows and teacher is used. Every window takes
    `sequence_length * (6 k + 2)` bytes. Make and fill it in `locked_cache(folder)`.

    Args:
        folder: Where the files are.
        k: Logits kept a position.
        windows: Token ids [windows, sequence_length].
        fingerprint: What the predictions depend on.

    Raises:
        ValueError: If it holds other predictions, such as those of another teacher; the message names what differs.
    """

    def __init__(self, folder: Path, k: int, windows: Tensor, fingerprint: Mapping[str, Any]) -> None:
        self._count = len(windows)
        self._record = folder / _RECORD
        self._of = json.loads(json.dumps({**fingerprint, "k": k, "shape": list(windows.shape)}))
        found = read_record(self._record)
        if found is not None and found["of"] != self._of:
            different = "; ".join(itertools.islice(differences(found["of"], self._of), 3))
            raise ValueError(
                f"teacher_cache {str(folder)!r} holds other predictions ({different}): delete it, or pass another "
                "folder (--teacher-cache DIR)."
            )
        sizes: list[tuple[type, int]] = [(np.float16, k + 1), (np.int32, k)]
        files = [(folder / file, dtype, (*windows.shape, n)) for file, (dtype, n) in zip(_FILES, sizes, strict=True)]
        self.finished = found["finished"] if found is not None else 0
        if self.finished and not all(_is_whole(*file) for file in files):
            logger.warning("teacher_cache %r is damaged and not used: the teacher predicts anew", str(folder))
            self.finished = 0
        if not self.finished:  # first the record: files without one are somebody's
            write_record(self._record, {"of": self._of, "finished": 0})
        self._files = [
            np.lib.format.open_memmap(file[0], "r+") if self.finished else _mapped_file(*file) for file in files
        ]

    def fill(self, predict: Callable[[int], Sequence[LargestLogits]], progress: Callable[[], object]) -> None:
        """Have a teacher predict what is not there yet: a window by its index, and as many after it as it likes."""
        while self.finished < self._count:
            for found in predict(self.finished)[: self._count - self.finished]:
                for file, part in zip(self._files, (found.log_probs, found.ids), strict=True):
                    file[self.finished] = part.numpy()
                self.finished += 1
                if self.finished % _NOTED_EVERY == 0 or self.finished == self._count:
                    self._note()
                progress()

    def read(self, first: int, last: int) -> LargestLogits:
        """The predictions on windows `first` to `last - 1`, but for the last position of each."""
        log_probs, ids = (torch.from_numpy(np.array(file[first:last, :-1])) for file in self._files)
        return LargestLogits(log_probs.flatten(0, 1), ids.flatten(0, 1))

    def _note(self) -> None:
        for file in self._files:
            file.flush()
        write_record(self._record, {"of": self._of, "finished": self.finished})


def _is_whole(path: Path, dtype: type, shape: tuple[int, ...]) -> bool:
    """Whether a file is there and as long as such an array; opened to write, a short one would get zeros."""
    try:
        found = np.lib.format.open_memmap(path, "r")
    except (OSError, ValueError):
        return False
    return found.dtype == dtype and found.shape == shape


def _mapped_file(path: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap:
    """A new file that is mapped into memory, with all its place on the disk.

    Raises:
        OSError: If the disk has not enough; a later write to the memory would kill the process.
    """
    path.unlink(missing_ok=True)  # a run may read it
    file = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with errors_of_writing(path), path.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, path.stat().st_size)
    return file


_FILES = ("log_probs.npy", "ids.npy")
_RECORD, _LOCK = "teacher.json", "lock"
_RECORD_BEGUN = f".{_RECORD}.partial"  # what a process leaves that was killed while it began the record
_POSITIONS_ON_CPU = 16
"""Positions a chunk of the loss on a CPU: as many as its caches hold."""
_NOTED_EVERY = 64
"""Windows after which the files are brought to the disk."""

"""Sparsity of operators and of their rows, read from the masks of a pruned folder, one mask in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from optimum_fista.packed.format import unpack_mask
from optimum_fista.run.checkpoints.checkpoint import MASKS_FILE, require_files
from optimum_fista.run.checkpoints.stored_names import split_index
from optimum_fista.run.packed_folders.unpacking import PackedFiles, is_packed
from optimum_fista.run.reports.operator_grid import layer_and_kind
from optimum_fista.run.reports.report import OperatorReport, PruningReport
from optimum_fista.solve.bitmask import count_kept

_BINS, _BARS = 1000, 50


@dataclass
class RowSparsities:
    """Sparsities of the rows (outputs) of all operators of a kind.

    Attributes:
        counts: Rows by thousandths of zeros, int64 [1000].
        low: The smallest.
        high: The largest.
    """

    counts: np.ndarray = field(default_factory=lambda: np.zeros(_BINS, dtype=np.int64))
    low: float = 1.0
    high: float = 0.0

    def add(self, sparsities: np.ndarray) -> None:
        """Count rows of one operator, float64 [out]."""
        bins = np.minimum((sparsities * _BINS).astype(np.int64), _BINS - 1)
        self.counts += np.bincount(bins, minlength=_BINS)
        self.low, self.high = min(self.low, float(sparsities.min())), max(self.high, float(sparsities.max()))

    @property
    def median(self) -> float:
        """The median, to a thousandth."""
        if self.low == self.high:
            return self.low
        return (int(np.searchsorted(self.counts.cumsum(), self.counts.sum() / 2)) + 0.5) / _BINS

    @property
    def bars(self) -> list[int]:
        """Rows by fiftieths of zeros."""
        return list(self.counts.reshape(_BARS, -1).sum(1).tolist())


@dataclass(frozen=True)
class MaskSparsities:
    """Fractions of zeros: of operators by their name in the report, and of rows by kind of operator."""

    operators: Mapping[str, float]
    rows: Mapping[str, RowSparsities]


def read_sparsities(
    folder: Path, report: PruningReport, progress: Callable[[str], None] = lambda _: None
) -> MaskSparsities:
    """Read all masks of a pruned folder, packed or not."""
    operators: dict[str, float] = {}
    rows: dict[str, RowSparsities] = {}
    for operator, kept in (_of_packed if is_packed(folder) else _of_masks)(folder, report):
        sparsities = 1 - kept.numpy() / operator.shape[1]
        operators[operator.name] = float(sparsities.mean())
        rows.setdefault(layer_and_kind(operator.name)[1], RowSparsities()).add(sparsities)
        progress(operator.name)
    return MaskSparsities(operators, rows)


def _of_masks(folder: Path, report: PruningReport) -> Iterator[tuple[OperatorReport, Tensor]]:
    """Every operator with the number of weights that each of its rows keeps, int64 [out]."""
    require_files(folder, MASKS_FILE)
    with safe_open(folder / MASKS_FILE, "pt") as masks:
        names = set(masks.keys())
        for operator in report.operators:
            _require(operator.name, names)
            dim = 1 if operator.stored_transposed else 0
            yield operator, count_kept(masks.get_tensor(operator.name), operator.stored_shape, dim)


def _of_packed(folder: Path, report: PruningReport) -> Iterator[tuple[OperatorReport, Tensor]]:
    """The same from a packed folder, whose weights bring their masks; experts may share a tensor."""
    reader = PackedFiles.of_folder(folder)
    name, mask, names = "", torch.empty(0), set(reader.names)
    for operator in report.operators:
        tensor, index = split_index(operator.name)
        _require(tensor, names)
        if tensor != name:
            name, mask = tensor, unpack_mask(reader.read(tensor))
        yield operator, mask[index].sum(0 if operator.stored_transposed else 1)


def _require(name: str, names: set[str]) -> None:
    if name not in names:
        raise ValueError(f"{name} is in the report and has no mask: `optimum-fista verify` tells what is wrong.")

"""Two model folders beside each other: the weights that they keep, and by how much their tensors differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from optimum_fista.folder.checkpoint import checkpoint_files, read_report, read_tensors
from optimum_fista.folder.stored_names import split_index
from optimum_fista.folder.unpacking import PackedFiles, is_packed
from optimum_fista.packed.format import unpack
from optimum_fista.packed.validation import SUFFIXES


@dataclass
class FolderDifference:
    """By how much two model folders differ."""

    num_tensors: int  # in either folder
    different: list[str]  # in values, dtype or shape, or in one folder only
    same_masks: float = 1.0  # share of the pruned weights that are zero in both folders or in none
    largest: float = 0.0  # difference of two values; `inf` if a tensor has another shape or one folder lacks it
    where: str = ""  # the tensor with this difference

    def __str__(self) -> str:
        """A line for people."""
        if not self.different:
            return f"all {self.num_tensors} tensors are equal, and so are the masks"
        return (
            f"{len(self.different)} of {self.num_tensors} tensors differ, by at most {self.largest:.3g} "
            f"({self.where}); the masks agree in {self.same_masks:.4%} of the pruned weights"
        )


def compare_folders(folder: Path, other: Path, progress: Callable[[str], None] = lambda _: None) -> FolderDifference:
    """Compare the tensors of two model folders, packed or not, two tensors in memory at a time."""
    sides = [_Tensors(Path(side)) for side in (folder, other)]
    names, same, total = sorted(sides[0].names | sides[1].names), 0, 0
    result = FolderDifference(len(names), [])
    for name in names:
        one, two = (side.read(name) for side in sides)
        alike = one.shape == two.shape
        if any(name in side.pruned for side in sides):
            total, same = total + one.numel(), same + (int(((one == 0) == (two == 0)).sum()) if alike else 0)
        if one.dtype != two.dtype or not torch.equal(one, two):
            largest = float((one.float() - two.float()).abs().max().nan_to_num(torch.inf)) if alike else torch.inf
            result.different.append(name)
            if largest >= result.largest:
                result.largest, result.where = largest, name
        progress(name)
    result.same_masks = same / total if total else 1.0
    return result


class _Tensors:
    """The tensors of a model folder under their dense names."""

    def __init__(self, folder: Path) -> None:
        self.pruned = {split_index(operator.name)[0] for operator in read_report(folder).operators}
        self._packed = PackedFiles.of_folder(folder) if is_packed(folder) else None
        self._files = checkpoint_files(folder) if self._packed is None else dict(self._packed.files)
        self.names = {*self._files} if self._packed is None else {*self._packed.names}
        self.names |= {name for name in self._files if not name.endswith(SUFFIXES)}

    def read(self, name: str) -> Tensor:
        """A tensor, dense; without elements if there is none of this name."""
        if self._packed is not None and name in self._packed.names:
            return unpack(self._packed.read(name))
        return next(read_tensors(self._files, [name]))[1] if name in self.names else torch.empty(0)

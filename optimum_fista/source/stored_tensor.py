"""Tensors as the files of a model store them: their bytes are copied from file to file, and no model is made.

`read_stored` reads the headers of a folder's weight files, so it has names, dtypes and shapes of all tensors. The bytes
of a `StoredTensor` are read when it is written (`write_stored`), a piece at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors.torch import load, save
from torch import Tensor

from optimum_fista.atomic import digest_of, write_file
from optimum_fista.source.model_folder import checkpoint_files, read_json

DENSE = {"F64", "F32", "F16", "BF16"}
"""Dtypes of safetensors whose values need no scales."""
ACTIVATION_SCALE = re.compile(r"\.(input|output|q|k|v)_(scale|global_scale|zero_point)$")
"""Names of scales of activations that were quantized, too: a model in 16 bits has none."""
_PIECE = 2**24  # bytes that are copied at a time


@dataclass(frozen=True)
class StoredTensor:
    """A tensor whose bytes stay where they are until they are written.

    Attributes:
        dtype: As safetensors writes it, such as "BF16" or "F8_E4M3".
        shape: Its shape.
        num_bytes: Bytes of its values.
        pieces: Reads the bytes of the values, row by row, in pieces of any size.
    """

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    pieces: Callable[[], Iterator[bytes | memoryview]]

    @classmethod
    def of(cls, tensor: Tensor, read: Callable[[], Tensor] | None = None) -> StoredTensor:
        """Describe a tensor in memory; or one on the meta device, which `read` reads each time it is asked for."""

        def pieces() -> Iterator[bytes | memoryview]:
            """Read the bytes of the whole tensor as one piece."""
            values = tensor if read is None else read()
            yield values.cpu().contiguous().view(-1).view(torch.uint8).numpy().data

        # safetensors names the dtype of an empty tensor in the header of its file, after 8 bytes of length.
        empty_file = save({"": tensor.new_empty(0, device="cpu")})
        dtype = json.loads(empty_file[8:])[""]["dtype"]
        return cls(dtype, tuple(tensor.shape), tensor.nbytes, pieces)

    def tensor(self) -> Tensor:
        """Read it into memory."""
        return load(b"".join(_file_of({"": self})))[""]

    def selected(self, axis: int, entries: Tensor) -> StoredTensor:
        """Describe the tensor with only these `entries` (int64) of an axis; it is read whole when it is written."""
        shape = (*self.shape[:axis], len(entries), *self.shape[axis + 1 :])

        def pieces() -> Iterator[bytes | memoryview]:
            """Read the bytes of the entries as one piece."""
            whole = torch.frombuffer(bytearray().join(self.pieces()), dtype=torch.uint8)
            values = whole.view(*self.shape, -1)  # [..., bytes of a value]
            yield values.index_select(axis, entries).view(-1).numpy().data

        return replace(
            self,
            shape=shape,
            num_bytes=self.num_bytes // self.shape[axis] * len(entries),
            pieces=pieces,
        )

    def holding(self, value: Tensor) -> StoredTensor:
        """Describe a new value in this tensor's dtype; if the old one is rounded to it, nothing has changed."""
        new = StoredTensor.of(value)
        both_are_dense = self.dtype in DENSE and new.dtype in DENSE
        if self.dtype == new.dtype or not both_are_dense:
            return new

        old = self.tensor()
        if self.shape == new.shape and torch.equal(old.to(value.dtype), value):
            return self
        return StoredTensor.of(value.to(old.dtype))

    def equals(self, other: StoredTensor) -> bool:
        """Compare dtypes, shapes and all bytes."""
        return self._digest() == other._digest()

    def _digest(self) -> str:
        """SHA-256 of dtype, shape and bytes."""
        digest = hashlib.sha256(f"{self.dtype} {self.shape}".encode())
        for piece in self.pieces():
            digest.update(piece)
        return digest.hexdigest()


def read_stored(source: Path) -> dict[str, StoredTensor]:
    """Describe all tensors in the weight files of a model folder, packed or not; of a GGUF file none.

    Only headers are read. Raises ValueError if two files hold different values of one name.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(weight_files(source)):
        read = _read_binary if file.suffix == ".bin" else _read_safetensors
        for name, tensor in read(file):
            if name in tensors and not tensor.equals(tensors[name]):
                raise ValueError(
                    f"model={str(source)!r} holds {name} twice, with different values: {file.name} is the second file "
                    "with it. Delete the wrong one from its file."
                )
            tensors[name] = tensor
    return tensors


def weight_files(source: Path) -> set[Path]:
    """Return the weight files of a model folder that Transformers loads, or those of a packed folder."""
    for stem in ("model", "packed"):
        with suppress(FileNotFoundError):
            return set(checkpoint_files(source, stem).values())

    binary = source / "pytorch_model.bin"
    if binary.exists():
        return {binary}
    index = source / "pytorch_model.bin.index.json"
    if index.exists():
        return {source / name for name in read_json(index)["weight_map"].values()}
    return set()


def write_stored(path: Path, tensors: Mapping[str, StoredTensor]) -> str:
    """Write a safetensors file, with a piece of one tensor in memory at a time, and return its digest."""
    write_file(path, _file_of(tensors))
    return digest_of(path)


def in_dtypes_of(file: Path, known: Mapping[str, StoredTensor]) -> None:
    """Write a safetensors file again if tensors in it have other dtypes than those with their names in `known`.

    Each of these then has the dtype of the known one (`StoredTensor.holding`).
    """
    saved = dict(_read_safetensors(file))
    changed: dict[str, StoredTensor] = {}
    for name, tensor in saved.items():
        if name not in known or known[name].dtype == tensor.dtype:
            continue
        if known[name].dtype in DENSE and tensor.dtype in DENSE:
            changed[name] = known[name].holding(tensor.tensor())
    if changed:
        write_file(file, _file_of(saved | changed))


def _file_of(tensors: Mapping[str, StoredTensor]) -> Iterator[bytes | memoryview]:
    """Yield the pieces of a safetensors file: length of the header, header, tensors, those of the widest type first."""

    def order(name: str) -> tuple[int, str]:
        """Sort by the bytes of a value, and then by name, as safetensors does."""
        num_values = max(1, math.prod(tensors[name].shape))
        return -(tensors[name].num_bytes // num_values), name

    names = sorted(tensors, key=order)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start = end
        end = start + tensor.num_bytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned

    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield from tensors[name].pieces()


def _read_safetensors(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Yield names and tensors of a safetensors file, whose header alone is read."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError(
                f"{str(file)!r} is damaged, or a pointer of Git LFS: download it again (git lfs pull)."
            )
        header = json.loads(opened.read(length))

    state = _state_of(file)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        start = 8 + length + first
        end = 8 + length + last
        pieces = partial(_pieces_of, file, state, start, end)
        yield name, StoredTensor(entry["dtype"], tuple(entry["shape"]), end - start, pieces)


def _state_of(file: Path) -> tuple[int, int]:
    """Return size and time of a file, which are others if it has changed."""
    return file.stat().st_size, file.stat().st_mtime_ns


def _pieces_of(file: Path, state: tuple[int, int], start: int, end: int) -> Iterator[bytes]:
    """Read the bytes from `start` to `end` of a file; ValueError if its `state` has changed.

    A model in memory may be saved long after its files were read.
    """
    if not file.exists() or _state_of(file) != state:
        raise ValueError(
            f"{str(file)!r} changed or went during the run or after it: restore the old file and start again with it, "
            "or save the model without the tensors that its class does not load (model.save_pretrained)."
        )
    with file.open("rb") as opened:
        opened.seek(start)
        for position in range(start, end, _PIECE):
            yield opened.read(min(_PIECE, end - position))


def _read_binary(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Yield names and tensors of a file of `torch.save`; those of PyTorch before 1.6, no zip files, can't be mapped.

    ValueError if the file holds anything but tensors, or is damaged; no code of it runs.
    """
    read = partial(torch.load, file, weights_only=True, mmap=is_zipfile(file))
    try:
        tensors = read(map_location="meta")
    except OSError:
        raise
    except Exception as error:  # PyTorch's reader raises many kinds
        raise ValueError(
            f"{str(file)!r} can't be read as tensors alone ({type(error).__name__}): it is damaged, a pointer of Git "
            "LFS, or holds other objects, whose code would run. Download it again, or save the model as safetensors "
            "(model.save_pretrained)."
        ) from error
    if not isinstance(tensors, Mapping):
        raise ValueError(
            f"{str(file)!r} holds a {type(tensors).__name__}, not tensors by name: save the model as safetensors "
            "(model.save_pretrained)."
        )

    def read_one(name: str) -> Tensor:
        """Read one of the tensors; without a zip file, all are read for it."""
        tensor: Tensor = read(map_location="cpu")[name]
        return tensor

    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            yield name, StoredTensor.of(tensor, partial(read_one, name))

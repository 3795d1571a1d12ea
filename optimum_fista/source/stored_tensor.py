"""Tensors as the files of a model store them: their bytes are copied from file to file, and no model is made.

`read_stored` reads the headers of a folder's weight files (safetensors, or `pytorch_model.bin`), so it has names,
dtypes and shapes of all tensors. The bytes of a `StoredTensor` are read when it is written (`write_stored`), a piece at
a time. Dtypes are named as in safetensors, such as "BF16" or "F8_E4M3". *Plain floats* have 16 bits or more and need no
scales (`PLAIN_FLOATS`). The bytes of a tensor are those of its values, row by row, without the header of a file.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors.torch import load, save
from torch import Tensor

from optimum_fista.atomic import digest_of, write_file
from optimum_fista.model.digests import bytes_of_values
from optimum_fista.source.model_folder import weight_files

PLAIN_FLOATS = {"F64", "F32", "F16", "BF16"}
"""Dtypes whose values are weights as they stand; others are quantized, or integers."""
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
        pieces: A function that reads the bytes of the values, row by row, and yields them in pieces of any size. It
            reads anew at each call.
    """

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    pieces: Callable[[], Iterator[bytes | memoryview]]

    @classmethod
    def of(cls, tensor: Tensor, read: Callable[[], Tensor] | None = None) -> StoredTensor:
        """Describe a tensor in memory, or, with `read`, one whose values are not there yet.

        Args:
            tensor: A tensor of any dtype; with `read` it may be on the meta device. It is kept, not copied.
            read: Makes the tensor each time its bytes are asked for. `None`: the values are those of `tensor`.
        """

        def pieces() -> Iterator[bytes | memoryview]:
            """Yield the bytes of the whole tensor as one piece: of what `read` makes, or of `tensor` without `read`."""
            values = tensor if read is None else read()
            yield bytes_of_values(values)

        return cls(name_of_dtype(tensor.dtype), tuple(tensor.shape), tensor.nbytes, pieces)

    def tensor(self) -> Tensor:
        """Read the values into memory and return them as a tensor on the CPU."""
        file = b"".join(_file_of({"": self}))
        return load(file)[""]

    def selected(self, axis: int, entries: Tensor) -> StoredTensor:
        """Describe this tensor with only some slices along an axis, such as some rows. Nothing is read now.

        `axis` is the number of the axis, and `entries` are the indices of the slices that stay, int64, in the order
        that they get. The whole tensor is read when the result is written. A value has whole bytes (not FP4).
        """
        shape = list(self.shape)
        shape[axis] = len(entries)
        pieces_of_whole = self.pieces

        def pieces_of_entries() -> Iterator[bytes | memoryview]:
            """Read the whole tensor (`pieces_of_whole`), and yield the slices `entries` along `axis` as one piece.

            `self.shape` is the shape of the whole tensor.
            """
            # PyTorch wants memory that may be written to, so this is no `bytes`.
            buffer = bytearray().join(pieces_of_whole())
            whole = torch.frombuffer(buffer, dtype=torch.uint8)
            values = whole.view(*self.shape, -1)  # one more axis: the bytes of a value
            yield bytes_of_values(values.index_select(axis, entries))

        bytes_of_a_slice = self.num_bytes // self.shape[axis]
        return replace(
            self,
            shape=tuple(shape),
            num_bytes=bytes_of_a_slice * len(entries),
            pieces=pieces_of_entries,
        )

    def changed(self, change: Callable[[Tensor], Tensor]) -> StoredTensor:
        """Describe this tensor with other values, which `change` makes of its own when it is written.

        `change` gets the tensor on the CPU, and returns one of the same shape and dtype. Nothing is read now.
        """

        def pieces_of_changed() -> Iterator[bytes | memoryview]:
            """Read the whole tensor (`self`), and yield what `change` makes of it as one piece."""
            yield bytes_of_values(change(self.tensor()))

        return replace(self, pieces=pieces_of_changed)

    def with_value(self, value: Tensor) -> StoredTensor:
        """Return what to write for this tensor if the model has `value` under its name now. This one does not change.

        There are three cases:

        - The dtypes are equal, or one of them is no plain float, so that `value` can't be converted. Then `value` is
          returned in its own dtype.
        - `value` is only the old value, rounded to the dtype of the model. Then this tensor itself is returned, so that
          nothing is lost by rounding.
        - `value` is another value. Then it is returned in this tensor's dtype.

        The file of this tensor is read in the last two cases.
        """
        new = StoredTensor.of(value)
        can_be_converted = self.dtype in PLAIN_FLOATS and new.dtype in PLAIN_FLOATS
        if self.dtype == new.dtype or not can_be_converted:
            return new

        old = self.tensor()
        is_old_value_rounded = self.shape == new.shape and torch.equal(old.to(value.dtype), value)
        if is_old_value_rounded:
            return self
        return StoredTensor.of(value.to(old.dtype))

    def equals(self, other: StoredTensor) -> bool:
        """Tell whether dtypes, shapes and all bytes are equal; reads both tensors."""
        return self._digest() == other._digest()

    def _digest(self) -> str:
        """Return the SHA-256 of dtype, shape and bytes (`self.pieces` reads them a piece at a time)."""
        digest = hashlib.sha256(f"{self.dtype} {self.shape}".encode())
        for piece in self.pieces():
            digest.update(piece)
        return digest.hexdigest()


def read_stored(source: Path) -> dict[str, StoredTensor]:
    """Describe all tensors in the weight files of a model folder, by name; a folder with a GGUF file has none.

    `source` is the folder of a model, or a packed folder. Only headers are read. If two files have a tensor of one
    name, the values of both are read, too, to compare them.

    Raises:
        ValueError: If two files hold different values of one name, or a file is damaged.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(weight_files(source)):
        tensors_of_file = _read_binary(file) if file.suffix == ".bin" else _read_safetensors(file)
        for name, tensor in tensors_of_file:
            if name in tensors and not tensor.equals(tensors[name]):
                raise ValueError(
                    f"model={str(source)!r} holds {name} twice, with different values: {file.name} is the second file "
                    "with it. Delete the wrong one from its file."
                )
            tensors[name] = tensor
    return tensors


def write_stored(path: Path, tensors: Mapping[str, StoredTensor]) -> str:
    """Write the safetensors file `path`, with a piece of one tensor in memory at a time; return its SHA-256.

    `tensors` are by the names that they get in the file.
    """
    write_file(path, _file_of(tensors))
    return digest_of(path)


def restore_dtypes(file: Path, originals: Mapping[str, StoredTensor]) -> None:
    """Write a safetensors file again if tensors in it have other dtypes than the `originals` with their names.

    Each of these tensors then has the dtype of its original. If its value is only that of the original, rounded, it
    also gets the original's value (`with_value`). Only plain floats change.

    Args:
        file: A file that `save_pretrained` has written. It is replaced.
        originals: The tensors in the files from which the model was loaded, by their names there.
    """
    saved = dict(_read_safetensors(file))
    changed: dict[str, StoredTensor] = {}
    for name, tensor in saved.items():
        original = originals.get(name)
        if original is None or original.dtype == tensor.dtype:
            continue
        both_are_plain_floats = original.dtype in PLAIN_FLOATS and tensor.dtype in PLAIN_FLOATS
        if both_are_plain_floats:
            changed[name] = original.with_value(tensor.tensor())
    if changed:
        write_file(file, _file_of(saved | changed))


def _file_of(tensors: Mapping[str, StoredTensor]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file in pieces: the length of the header, the header, then each tensor.

    `tensors` are by the names that they get in the file. Each is read when its turn comes.
    """

    def sort_key(name: str) -> tuple[int, str]:
        """Put the widest dtype first, and tensors of one width in the order of their names, as safetensors does.

        `name` is a key of `tensors`.
        """
        num_values = max(1, math.prod(tensors[name].shape))  # an empty tensor has none
        bytes_of_a_value = tensors[name].num_bytes // num_values
        return -bytes_of_a_value, name

    names = sorted(tensors, key=sort_key)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0  # bytes of the tensors so far
    for name in names:
        tensor = tensors[name]
        start = end
        end = start + tensor.num_bytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # Spaces up to the next multiple of 8 bytes, so that the tensors are aligned.
    padding = -len(text) % 8
    text += b" " * padding

    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield from tensors[name].pieces()


def name_of_dtype(dtype: torch.dtype) -> str:
    """Return the name that safetensors gives a dtype, such as "BF16"."""
    # It stands in the header of a file with an empty tensor, after 8 bytes of length.
    empty_file = save({"": torch.empty(0, dtype=dtype, device="cpu")})
    name: str = json.loads(empty_file[8:])[""]["dtype"]
    return name


def _read_safetensors(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Yield each tensor of a safetensors file with its name. Only the header is read now.

    ValueError if the file is too short for its header.
    """
    with file.open("rb") as opened:
        # The file begins with the length of its header, 8 bytes, and the header. Then come the values of all tensors.
        length = int.from_bytes(opened.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError(
                f"{str(file)!r} is damaged, or a pointer of Git LFS: download it again (git lfs pull)."
            )
        header = json.loads(opened.read(length))

    # By this a change of the file is noticed when the tensors are read.
    state = _size_and_time(file)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]  # places of the first byte, and after the last one
        start = 8 + length + first
        end = 8 + length + last
        pieces = partial(_pieces_of, file, state, start, end)
        yield name, StoredTensor(entry["dtype"], tuple(entry["shape"]), end - start, pieces)


def _size_and_time(file: Path) -> tuple[int, int]:
    """Return a file's size and the time of its last change: if one differs later, the file has changed."""
    return file.stat().st_size, file.stat().st_mtime_ns


def _pieces_of(file: Path, state: tuple[int, int], start: int, end: int) -> Iterator[bytes]:
    """Yield the bytes of a file from position `start` to `end`, up to `_PIECE` of them at a time.

    `state` is what `_size_and_time` has returned for the file when its header was read. A model in memory may be saved
    long after that, so a file that has changed since or is gone gives ValueError.
    """
    if not file.exists() or _size_and_time(file) != state:
        raise ValueError(
            f"{str(file)!r} changed or went during the run or after it: restore the old file and start again with it, "
            "or save the model without the tensors that its class does not load (model.save_pretrained)."
        )
    with file.open("rb") as opened:
        opened.seek(start)
        for position in range(start, end, _PIECE):
            yield opened.read(min(_PIECE, end - position))


def _read_binary(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Yield each tensor of a file of `torch.save` with its name. Values are read later, and no code of the file runs.

    Raises:
        ValueError: If the file holds anything but tensors by name, or is damaged.
    """
    # Files of PyTorch before 1.6 are no zip files, and only these can be mapped into memory.
    can_be_mapped = is_zipfile(file)
    read = partial(torch.load, file, weights_only=True, mmap=can_be_mapped)
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
        """Read the tensor of this name. If the file can't be mapped, all others are read with it, and dropped."""
        tensor: Tensor = read(map_location="cpu")[name]
        return tensor

    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            yield name, StoredTensor.of(tensor, partial(read_one, name))

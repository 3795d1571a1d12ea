"""Weight files of a model folder: joined into files of the usual size, and the index that says where each tensor is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from optimum_fista.run.checkpoints.atomic import write_atomically, write_text

FILE_BYTES = 5 * 10**9
"""Bytes of the tensors in a joined file, at most."""
_PIECE = 2**20  # bytes that are copied at a time


def groups_to_join(parts: Sequence[Path]) -> list[list[Path]]:
    """Consecutive weight files whose tensors fit into one file; one that is larger alone stays alone."""
    groups: list[list[Path]] = []
    room = 0
    for part in parts:
        size = _tensor_bytes(part)
        if size > room:
            groups.append([])
            room = FILE_BYTES
        groups[-1].append(part)
        room -= size
    return groups


def join(parts: Sequence[Path], whole: Path) -> None:
    """Write the tensors of weight files into one file, in the order in which safetensors would write them.

    A small piece of a tensor is in memory at a time.

    Raises:
        OSError: If the disk is full, or can't be written to; there is no such file then.
    """
    found = []
    for part in parts:
        tensors, start = read_header(part)
        found += [(name, entry, part, start + entry["data_offsets"][0]) for name, entry in tensors.items()]
    # Wide types come first, so that every tensor lies where a number of its type may.
    found.sort(key=lambda tensor: (-_bits(tensor[1]["dtype"]), tensor[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry, *_ in found:
        start, end = end, end + _num_bytes(entry)
        header[name] = entry | {"data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, entry, part, start in found:
                with part.open("rb") as source:
                    source.seek(start)
                    _copy(source, file, _num_bytes(entry))

    write_atomically(whole, write)


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Dtype, shape and place of every tensor in a safetensors file, and where in the file the first one begins."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def write_index(folder: Path, stem: str, weight_map: Mapping[str, str], metadata: Mapping[str, Any]) -> str:
    """Write which of a folder's weight files holds which tensor, and the bytes of all tensors.

    Returns:
        The name of the index, or of the only file if it has the name of one that needs no index.
    """
    files = {*weight_map.values()}
    if files == {f"{stem}.safetensors"}:
        return f"{stem}.safetensors"
    total = sum(_tensor_bytes(folder / file) for file in files)
    index = {"metadata": {**metadata, "total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    name = f"{stem}.safetensors.index.json"
    write_text(folder / name, json.dumps(index, indent=2) + "\n")
    return name


def _copy(source: BinaryIO, file: BinaryIO, left: int) -> None:
    while left:
        piece = source.read(min(left, _PIECE))
        if not piece:
            raise OSError(f"{source.name!r} ends too early: it was changed while it was read.")
        left -= file.write(piece)


def _tensor_bytes(file: Path) -> int:
    return file.stat().st_size - read_header(file)[1]


def _num_bytes(entry: Mapping[str, Any]) -> int:
    start, end = entry["data_offsets"]
    return int(end - start)


def _bits(dtype: str) -> int:
    """Bits of a number, by safetensors' name of its type."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8

"""Weight files that are joined: the bytes that safetensors would write at once."""

import errno
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_fista.run.checkpoints import atomic, shards

TENSORS = {
    "b.mask": torch.arange(5, dtype=torch.uint8),
    "b.values": torch.arange(7).bfloat16(),
    "b.layout": torch.arange(6),
    "a.weight": torch.arange(6.0).view(2, 3),
    "ä.bias": torch.tensor(3.0),
    "a.empty": torch.empty(0, 3, dtype=torch.bfloat16),
}


@pytest.fixture
def parts(tmp_path):
    names = list(TENSORS)
    paths = [tmp_path / f"part-{number}.safetensors" for number in range(3)]
    for path, some in zip(paths, (names[:3], names[3:4], names[4:]), strict=True):
        save_file({name: TENSORS[name] for name in some}, path, metadata={"format": "pt"})
    return paths


@pytest.mark.parametrize("piece", [1 << 20, 3])
def test_a_joined_file_is_what_safetensors_writes(parts, piece, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_PIECE", piece)
    shards.join(parts, tmp_path / "joined.safetensors")
    save_file(TENSORS, tmp_path / "expected.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "joined.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
    assert all(torch.equal(load_file(tmp_path / "joined.safetensors")[name], t) for name, t in TENSORS.items())


def test_consecutive_files_that_fit_are_joined(parts, monkeypatch):
    sizes = [sum(tensor.nbytes for tensor in load_file(part).values()) for part in parts]
    groups = {}
    for limit in (sum(sizes), sum(sizes) - 1, sizes[1] + sizes[2], 1):
        monkeypatch.setattr(shards, "FILE_BYTES", limit)
        groups[limit] = [len(group) for group in shards.groups_to_join(parts)]
    assert list(groups.values()) == [[3], [2, 1], [1, 2], [1, 1, 1]]


def test_a_full_disk_leaves_the_parts_and_no_joined_file(parts, tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic, "flush", full)
    with pytest.raises(OSError, match=r"No space left on device.*joined\.safetensors"):
        shards.join(parts, tmp_path / "joined.safetensors")
    assert sorted(tmp_path.iterdir()) == parts


def test_a_part_that_became_shorter_is_refused(parts, tmp_path, monkeypatch):
    header = shards.read_header
    monkeypatch.setattr(shards, "read_header", lambda file: (header(file)[0], header(file)[1] + 1))
    with pytest.raises(OSError, match=r"part-\d\.safetensors' ends too early"):
        shards.join(parts, tmp_path / "joined.safetensors")


def test_only_several_files_have_an_index(tmp_path, parts):
    assert shards.write_index(tmp_path, "model", {"a": "model.safetensors"}, {}) == "model.safetensors"
    assert sorted(tmp_path.iterdir()) == parts
    weight_map = {name: part.name for part in parts for name in load_file(part)}
    name = shards.write_index(tmp_path, "model", weight_map, {"more": 1})
    index = json.loads((tmp_path / name).read_text())
    assert index["weight_map"] == weight_map
    assert index["metadata"] == {"more": 1, "total_size": sum(tensor.nbytes for tensor in TENSORS.values())}

"""Encodings of masks, against bits that are written one after another as docs/formats.md says."""

import pytest
import torch

from optimum_fista.packed.masks import BITS, GroupMask

GROUPS = [(2, 4), (1, 4), (1, 2), (3, 16), (1, 3), (7, 256)]


def mask_of(rows, columns, n_of_m):
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0))
    if n_of_m is None:
        return scores < 0.5
    n, m = n_of_m
    groups = scores.view(-1, m)
    return (groups >= groups.topk(n).values[:, -1:]).view(rows, columns)


def bits_of(row, n_of_m):
    """The bits of one row, in order."""
    if n_of_m is None:
        return [int(kept) for kept in row]
    m = n_of_m[1]
    places = [column % m for column, kept in enumerate(row) if kept]
    return [place >> digit & 1 for place in places for digit in range((m - 1).bit_length())]


@pytest.mark.parametrize("n_of_m", [None, *GROUPS])
def test_written_and_read(n_of_m):
    columns = 70 if n_of_m is None else 5 * n_of_m[1]
    kept, written = mask_of(3, columns, n_of_m), GroupMask(*n_of_m) if n_of_m else BITS
    mask = torch.zeros(3, written.row_bytes(columns), dtype=torch.uint8)
    written.write(kept, mask)
    for row, found in zip(kept.tolist(), mask.tolist(), strict=True):
        bits = bits_of(row, n_of_m)
        assert written.used_bits(columns) == len(bits) <= 8 * len(found)
        assert int.from_bytes(bytes(found), "little") == sum(bit << place for place, bit in enumerate(bits))
    assert written.row_bytes(columns) % 8 == 0
    assert torch.equal(written.read(mask, columns), kept)
    assert written.num_kept(mask, columns) == int(kept.sum())
    assert written.defect(mask, columns) is None

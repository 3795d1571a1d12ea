"""Masks, against bits that are written one after another as docs/formats.md says."""

import torch

from optimum_fista.packed.masks import count_bits, pack_bits, row_bytes, unpack_bits


def test_written_and_read():
    kept = torch.rand(3, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = torch.zeros(3, row_bytes(70), dtype=torch.uint8)
    pack_bits(kept, mask)
    for bits, found in zip(kept.tolist(), mask.tolist(), strict=True):
        assert len(found) == 16
        assert int.from_bytes(bytes(found), "little") == sum(
            bit << place for place, bit in enumerate(bits)
        )
    assert torch.equal(unpack_bits(mask, 70), kept)
    assert torch.equal(count_bits(mask), kept.sum(1))

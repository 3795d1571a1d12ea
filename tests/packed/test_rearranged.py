"""Packed tensors cut, joined and transposed are those of the dense tensors cut, joined and transposed."""

import pytest
import torch

from optimum_fista.packed.format import (
    check,
    matrices_of,
    pack,
    stacked_rows,
    transposed,
    unpack,
    unpack_mask,
    with_bits,
)


def sparse(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator)
    mask = (torch.arange(shape[-1]) % 4 < 2).expand(shape)
    weight = weight.masked_fill(~mask, 0)
    weight[..., 0, 0] = 0  # kept all the same
    return weight, mask


def same(packed, weight, mask):
    check(packed)
    assert packed.n_of_m is None
    assert torch.equal(unpack(packed), weight)
    assert torch.equal(unpack_mask(packed), mask)


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_rearranged(pattern):
    weight, mask = sparse(3, 10, 132)
    packed = pack(weight, mask, pattern)
    assert packed.n_of_m == pattern
    same(with_bits(packed), weight, mask)
    for found, w, m in zip(matrices_of(packed), weight, mask, strict=True):
        same(found, w, m)
    parts = [pack(weight[i], mask[i], pattern if i else None) for i in range(3)]
    same(stacked_rows(parts), weight.flatten(0, 1), mask.flatten(0, 1))
    same(stacked_rows(parts[:1]), weight[0], mask[0])
    for part, w, m in zip(parts, weight, mask, strict=True):
        same(transposed(part), w.T, m.T)


def test_matrices_share_the_tensors():
    weight, mask = sparse(3, 10, 128)
    packed = pack(weight, mask)
    found = matrices_of(packed)
    assert found[0].values.data_ptr() == packed.values.data_ptr()
    assert found[2].mask.untyped_storage().data_ptr() == packed.mask.untyped_storage().data_ptr()
    plain = packed.without_checksum()
    assert with_bits(plain) is plain
    assert stacked_rows([found[1]]) is found[1]

import pytest
import torch

from optimum_fista.solve.pattern import pack_mask, unpack_mask


@pytest.mark.parametrize("shape", [(1,), (8,), (9,), (3, 5), (4, 16), (2, 3, 7), (64, 33)])
def test_round_trip_is_bit_for_bit(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(len(shape))) < 0.5
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    assert packed.numel() == (mask.numel() + 7) // 8
    restored = unpack_mask(packed, shape)
    assert restored.dtype == torch.bool
    assert torch.equal(restored, mask)


def test_layout_is_row_major_with_the_lowest_bit_first():
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 1, 1]]).bool()
    assert pack_mask(mask).tolist() == [0b00001101, 0b00000011]


def test_masks_that_are_not_contiguous_are_packed_as_they_look():
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    assert torch.equal(unpack_mask(pack_mask(mask.T), (5, 6)), mask.T)


@pytest.mark.parametrize(("size", "dtype"), [(2, torch.uint8), (4, torch.uint8), (3, torch.int64)])
def test_number_of_bytes_must_fit_the_shape(size, dtype):
    with pytest.raises(ValueError, match=rf"packed has {size} values of {dtype}: .* needs 3 of torch.uint8"):
        unpack_mask(torch.zeros(size, dtype=dtype), (3, 8))

"""The packed format: bit for bit both ways, as small as promised, and laid out as docs/formats.md says."""

import math
import tracemalloc
import zlib

import pytest
import torch

from optimum_fista.packed.format import PackedFormatError, check, pack, packed_names, unpack, unpack_mask, with_bits
from optimum_fista.packed.masks import BITS

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_bits(shape, dtype, seed=0):
    """Every bit pattern there is: NaN with payloads, infinities, subnormals, both zeros."""
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (math.prod(shape) * size,), generator=generator(seed), dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def raw(tensor):
    return tensor.contiguous().view(WORDS[tensor.element_size()])


def grouped_mask(rows, columns, n, m, seed=0):
    scores = torch.rand(rows * columns // m, m, generator=generator(seed))
    return torch.zeros_like(scores).bool().scatter_(1, scores.topk(n).indices, True).view(rows, columns)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 64), (5, 65), (2, 3, 130), (4, 1), (257, 33), (3000, 1500)])
def test_round_trip_is_bit_for_bit(shape, dtype):
    weight = random_bits(shape, dtype)
    mask = torch.rand(shape, generator=generator(1)) < 0.4
    raw(weight).masked_fill_(~mask, 0)
    for packed in (pack(weight, mask), pack(weight)):
        check(packed)
        restored = unpack(packed)
        assert restored.dtype == dtype
        assert torch.equal(raw(restored), raw(weight))
    assert torch.equal(unpack_mask(pack(weight, mask)), mask)
    assert pack(weight, mask).values.numel() == int(mask.sum())


@pytest.mark.parametrize(
    "pattern", [(2, 4), (1, 4), (1, 2), (2, 8), (1, 8), (4, 16), (3, 16), (1, 3), (1, 5), (8, 256)]
)
def test_groups_are_stored_by_places_where_that_is_no_larger(pattern):
    n, m = pattern
    mask = grouped_mask(9, 15 * m, n, m)
    weight = random_bits(tuple(mask.shape), torch.bfloat16)
    raw(weight).masked_fill_(~mask, 0)
    packed = pack(weight, mask, pattern)
    width = math.ceil(math.log2(m))
    assert packed.mask.shape == (9, math.ceil(15 * n * width / 64) * 8)
    assert packed.encoding.numbers == pattern
    assert packed.mask.numel() <= pack(weight, mask).mask.numel()
    check(packed)
    assert torch.equal(raw(unpack(packed)), raw(weight))
    assert torch.equal(unpack_mask(packed), mask)


@pytest.mark.parametrize(
    ("pattern", "mask"),
    [
        ((4, 8), grouped_mask(4, 64, 4, 8)),
        ((2, 4), torch.rand(4, 64, generator=generator()) < 0.5),
        ((2, 4), grouped_mask(4, 64, 1, 4)),
        ((3, 5), torch.ones(4, 64).bool()),
    ],
    ids=["larger by places", "not grouped", "other groups", "m does not divide the row"],
)
def test_one_bit_a_weight_is_the_way_of_all_others(pattern, mask):
    weight = torch.rand(mask.shape) * mask + mask
    packed = pack(weight, mask, pattern)
    assert packed.encoding is BITS
    assert torch.equal(unpack(packed), weight)


def test_bytes_of_both_kinds_are_as_documented():
    weight = torch.tensor([[0, 1.5, 0, -2, 0, 0, 0, 0, 3], [4, 0, 0, 0, 0, 0, 0, 5, 0]], dtype=torch.float16)
    packed = pack(weight)
    assert packed.values.tolist() == [1.5, -2, 3, 4, 5]
    assert packed.mask.tolist() == [[0b1010, 1, 0, 0, 0, 0, 0, 0], [0b10000001, 0, 0, 0, 0, 0, 0, 0]]
    checksum = zlib.crc32(
        b"".join(t.numpy().tobytes() for t in (packed.layout[[0, 1, 2, 4, 5]], packed.mask, packed.values))
    )
    assert packed.layout.tolist() == [2, 0, 0, checksum, 2, 9]
    grouped = torch.tensor([[0, 1, 0, 2, 3, 4, 0, 0]], dtype=torch.float32)
    packed = pack(grouped, pattern=(2, 4))
    assert packed.values.tolist() == [1, 2, 3, 4]
    assert packed.mask.tolist() == [[0b01_00_11_01, 0, 0, 0, 0, 0, 0, 0]]
    assert packed.layout.tolist()[:3] + packed.layout.tolist()[4:] == [2, 2, 4, 1, 8]
    assert packed.layout.dtype == torch.int64


def test_a_mask_keeps_zeros_and_drops_the_sign_of_zeros_outside():
    weight = torch.tensor([[0.0, -0.0, 2.0, -0.0]])
    packed = pack(weight, torch.tensor([[True, True, True, False]]))
    assert packed.values.numel() == 3
    assert torch.signbit(unpack(packed)).tolist() == [[False, True, False, False]]
    assert torch.signbit(unpack(pack(weight))).tolist() == [[False, True, False, True]]


@pytest.mark.parametrize(("pattern", "numbers"), [(None, (0, 0)), ((2, 4), (2, 4))])
def test_tensors_may_have_any_strides(pattern, numbers):
    mask = (torch.arange(64) % 4 < 2).expand(40, 64)
    weight = torch.randn(64, 40).T.masked_fill(~mask, 0)
    for given in (weight, weight.T.contiguous().T, weight[:, :]):
        assert torch.equal(unpack(pack(given, mask, pattern)), weight)
        assert pack(given, mask, pattern).encoding.numbers == pack(given, None, pattern).encoding.numbers == numbers


def test_wrong_weights_and_masks_are_refused():
    weight = torch.ones(2, 8)
    with pytest.raises(ValueError, match=r"weight is torch\.int64 of shape"):
        pack(weight.long())
    with pytest.raises(ValueError, match="at least one weight"):
        pack(weight[:0])
    with pytest.raises(ValueError, match=r"mask is torch\.bool of shape \(8, 2\)"):
        pack(weight, weight.T.bool())
    with pytest.raises(ValueError, match=r"mask is torch\.float32"):
        pack(weight, weight)
    with pytest.raises(ValueError, match="other than zero outside of mask"):
        pack(weight, torch.zeros(2, 8).bool())


def test_incomplete_files_are_refused():
    assert packed_names(["a", "w_values", "w_mask", "w_layout", "attention_mask"]) == ["w"]
    for rest, missing in (
        (("_mask", "_layout"), "_values"),
        (("_values", "_layout"), "_mask"),
        (("_values", "_mask"), "_layout"),
    ):
        with pytest.raises(PackedFormatError, match=f"w is packed, but w{missing} is missing"):
            packed_names("w" + suffix for suffix in rest)
    with pytest.raises(PackedFormatError, match="w is there both packed and dense"):
        packed_names(["w", "w_values", "w_mask", "w_layout"])


def test_packing_and_unpacking_need_little_memory_besides_their_result():
    weight = torch.zeros(4096, 8192, dtype=torch.bfloat16)
    weight[:, ::2] = 1
    packed = pack(weight)
    for function, argument, result in ((pack, weight, packed.num_bytes), (unpack, packed, packed.dense_bytes)):
        tracemalloc.start()
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            function(argument)
        arrays = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        live = peak = 0
        for event in sorted(profile.kineto_results.events(), key=lambda e: e.start_ns()):
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
        assert result <= peak + arrays < result + 60_000_000


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_one_bit_a_weight_shares_the_values(pattern):
    mask = (torch.arange(132) % 4 < 2).expand(10, 132)
    weight = torch.randn(10, 132, generator=generator()).masked_fill(~mask, 0)
    weight[0, 0] = 0  # kept all the same
    packed = pack(weight, mask, pattern)
    found = with_bits(packed)
    check(found, checksum=False)
    assert (packed.encoding is BITS, found.encoding is BITS) == (pattern is None, True)
    assert found.values.data_ptr() == packed.values.data_ptr()
    assert torch.equal(unpack(found), weight)
    assert torch.equal(unpack_mask(found), mask)
    assert with_bits(found) is found

"""The packed format: bit for bit both ways, as small as promised, and laid out as docs/formats.md says."""

import math
import tracemalloc
import zlib

import pytest
import torch

from optimum_fista.packed.format import (
    PackedFormatError,
    check,
    pack,
    packed_names,
    unpack,
    unpack_mask,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_bits(shape, dtype, seed=0):
    """Every bit pattern there is: NaN with payloads, infinities, subnormals, both zeros."""
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(
        0, 256, (math.prod(shape) * size,), generator=generator(seed), dtype=torch.uint8
    )
    return raw.view(dtype).view(shape)


def raw(tensor):
    return tensor.contiguous().view(WORDS[tensor.element_size()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1,), (7,), (3, 64), (5, 65), (2, 3, 130), (4, 1), (257, 33), (3000, 1500)]
)
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


def test_bytes_are_as_documented():
    weight = torch.tensor(
        [[0, 1.5, 0, -2, 0, 0, 0, 0, 3], [4, 0, 0, 0, 0, 0, 0, 5, 0]], dtype=torch.float16
    )
    packed = pack(weight)
    assert packed.values.tolist() == [1.5, -2, 3, 4, 5]
    assert packed.mask.tolist() == [
        [0b1010, 1, 0, 0, 0, 0, 0, 0],
        [0b10000001, 0, 0, 0, 0, 0, 0, 0],
    ]
    checksum = zlib.crc32(
        b"".join(
            t.numpy().tobytes()
            for t in (packed.layout[[0, 1, 2, 4, 5]], packed.mask, packed.values)
        )
    )
    assert packed.layout.tolist() == [2, 0, 0, checksum, 2, 9]
    assert packed.layout.dtype == torch.int64


def test_a_mask_keeps_zeros_and_drops_the_sign_of_zeros_outside():
    weight = torch.tensor([[0.0, -0.0, 2.0, -0.0]])
    packed = pack(weight, torch.tensor([[True, True, True, False]]))
    assert packed.values.numel() == 3
    assert torch.signbit(unpack(packed)).tolist() == [[False, True, False, False]]
    assert torch.signbit(unpack(pack(weight))).tolist() == [[False, True, False, True]]


def test_tensors_may_have_any_strides():
    mask = (torch.arange(64) % 4 < 2).expand(40, 64)
    weight = torch.randn(64, 40).T.masked_fill(~mask, 0)
    for given in (weight, weight.T.contiguous().T, weight[:, :]):
        assert torch.equal(unpack(pack(given, mask)), weight)


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
    for function, argument, result in (
        (pack, weight, packed.num_bytes),
        (unpack, packed, packed.dense_bytes),
    ):
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

"""Malformed packed tensors give one clear error before their values are read, whatever they say of their size."""

import dataclasses

import pytest
import torch

from optimum_fista.packed.format import PackedFormatError, PackedTensor, check, pack, unpack


def packed_bits():
    mask = torch.rand(6, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    return pack(torch.ones(6, 70) * mask, mask)


def broken(packed, **changes):
    return dataclasses.replace(packed, **changes)


def with_layout(packed, *numbers):
    return broken(packed, layout=torch.tensor(numbers))


HUGE = 2**62
CASES = {
    "version": (
        with_layout(packed_bits(), 2, 2, 4, 0, 6, 70),
        r"version \[2, 2, 4\] of the format; .* pack the",
    ),
    "checksum": (
        with_layout(packed_bits(), 2, 0, 0, 5, 6, 70),
        "weight has another checksum than its layout says",
    ),
    "negative": (
        with_layout(packed_bits(), 2, 0, 0, 0, -6, -70),
        "every dimension must be positive",
    ),
    "other rows": (
        with_layout(packed_bits(), 2, 0, 0, 0, 7, 70),
        r"needs torch.uint8 of shape \(7, 16\)",
    ),
    "overflow": (
        with_layout(packed_bits(), 2, 0, 0, 0, HUGE, HUGE, HUGE, 70),
        "needs torch.uint8 of shape",
    ),
    "overflow to the right size": (
        with_layout(packed_bits(), 2, 0, 0, 0, 2**63 - 1, 2, 3, 70),
        "needs torch.uint8",
    ),
    "huge columns": (with_layout(packed_bits(), 2, 0, 0, 0, 6, HUGE), "needs torch.uint8 of shape"),
    "long layout": (with_layout(packed_bits(), 2, 0, 0, 0, *[1] * 10), "5 to 12 numbers"),
    "no dimensions": (with_layout(packed_bits(), 2, 0, 0, 6), "5 to 12 numbers"),
    "layout dtype": (
        broken(packed_bits(), layout=packed_bits().layout.int()),
        "weight_layout is torch.int32",
    ),
    "mask dtype": (
        broken(packed_bits(), mask=packed_bits().mask.view(torch.int8)),
        "weight_mask is torch.int8",
    ),
    "mask shape": (
        broken(packed_bits(), mask=packed_bits().mask.view(-1)),
        r"weight_mask is .* of shape \(96,\)",
    ),
    "strided mask": (
        broken(packed_bits(), mask=packed_bits().mask.T.contiguous().T),
        "must be contiguous",
    ),
    "values dtype": (
        broken(packed_bits(), values=packed_bits().values.int()),
        "weight_values is torch.int32",
    ),
    "values shape": (broken(packed_bits(), values=packed_bits().values[None]), "one dimension"),
    "values cut": (
        broken(packed_bits(), values=packed_bits().values[:-1]),
        r"holds 2\d\d weights, but the mask keeps",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_said(case):
    packed, message = CASES[case]
    with pytest.raises(PackedFormatError, match=message):
        check(packed)
    if case != "checksum":
        with pytest.raises(ValueError, match=message):
            unpack(packed)


def test_every_changed_value_is_found_by_the_checksum():
    packed = packed_bits()
    for place in (0, len(packed.values) // 2, -1):
        changed = packed.values.clone()
        changed.view(torch.int32)[place] ^= 1
        with pytest.raises(
            PackedFormatError, match=r"a\.weight has another checksum than its layout says"
        ):
            check(broken(packed, values=changed), "a.weight")
        check(broken(packed, values=changed), checksum=False)


@pytest.mark.parametrize("bit", [70, 71, 72, 100, 127])
def test_padding_bits_must_be_zero(bit):
    packed = packed_bits()
    packed.mask[3, bit // 8] |= 1 << bit % 8
    with pytest.raises(PackedFormatError, match="bits set after the 70 that a row has"):
        check(packed)


def checks(packed: PackedTensor) -> bool:
    try:
        check(packed, checksum=False)
    except PackedFormatError:
        return False
    return True


@pytest.mark.parametrize("seed", range(300))
def test_random_damage_is_refused_or_harmless(seed):
    """Flipped bits, extreme numbers, cut tensors: one error, or a tensor that comes back as the same bytes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high):
        return int(torch.randint(0, high, (1,), generator=generator))

    packed = packed_bits()
    values, mask, layout = packed.values.clone(), packed.mask.clone(), packed.layout.clone()
    for _ in range(1 + draw(3)):
        kind, place = draw(5), draw(len(layout))
        if kind == 0:
            layout[place] ^= (1 << draw(63)) if draw(2) else -(2**63)
        elif kind == 1:
            layout[place] = [-1, 0, 1, 2**31, 2**32, HUGE, 2**63 - 1, -(2**63)][draw(8)]
        elif kind == 2 and mask.numel():
            mask.view(-1)[draw(mask.numel())] ^= 1 << draw(8)
        elif kind == 3:
            values = values[: draw(len(values) + 1)]
        else:
            mask = mask[: draw(mask.shape[0] + 1)]
    damaged = PackedTensor(values, mask, layout)
    if checks(damaged):
        dense = unpack(damaged)
        again = pack(dense)
        assert torch.equal(again.values, values)
        assert torch.equal(again.mask, mask)
    else:
        with pytest.raises(PackedFormatError):
            unpack(damaged)


def test_hostile_sizes_cost_nothing():
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        for case in ("overflow", "huge columns", "overflow to the right size"):
            assert not checks(CASES[case][0])
    assert max(event.cpu_memory_usage for event in profile.function_events) < 10_000

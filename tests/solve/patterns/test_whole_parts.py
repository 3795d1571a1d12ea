import re

import pytest
import torch

from optimum_fista.solve.patterns import WholeParts, parse_pattern
from optimum_fista.solve.patterns.whole_parts import PartShare


@pytest.mark.parametrize(
    "text",
    [
        "channels:0.25",
        "heads:0.5",
        "channels:0.3/32+heads:0.25",
        "channels:1e-06",
        "channels:0.5+expert_channels:0.25/16",
    ],
)
def test_parse_is_the_inverse_of_text(text):
    pattern = parse_pattern(text)

    assert isinstance(pattern, WholeParts)
    assert str(pattern) == text
    assert parse_pattern(text, pattern.sparsity) == pattern


@pytest.mark.parametrize(
    ("kind", "share", "multiple", "number", "kept"),
    [
        ("channels", 0.25, None, 1536, 1152),
        ("channels", 0.24, None, 1536, 1152),  # to a multiple of 128
        ("channels", 0.25, None, 4864, 3584),  # 3648 is no multiple of 128
        ("channels", 0.3, None, 1536, 1088),  # a multiple of 128 would be a tenth away, so of 64
        ("channels", 0.25, None, 256, 192),
        ("channels", 0.25, 64, 4864, 3648),
        ("channels", 0.24, 1, 1536, 1167),
        ("channels", 0.25, None, 48, 36),  # 48 is no multiple of 64
        ("channels", 0.5, 32, 192, 96),
        ("expert_channels", 0.24, None, 768, 576),  # to a multiple of 64, because 128 is too far
        ("expert_channels", 0.24, 16, 768, 576),
        ("expert_channels", 0.24, 8, 768, 584),
        ("heads", 0.34, None, 3, 2),
        ("heads", 0.55, None, 2, 1),  # the nearest number is a tenth away
    ],
)
def test_as_many_parts_are_kept_as_the_share_says_in_whole_steps(
    kind, share, multiple, number, kept
):
    assert PartShare(kind, share, multiple).num_kept(number) == kept


@pytest.mark.parametrize(
    ("part", "number", "message"),
    [
        (
            PartShare("heads", 0.9),
            3,
            r"'heads:0.9': 0 of 3 heads would stay .*; pass a share for which 1 to 2 stay",
        ),
        (PartShare("heads", 0.1), 3, "3 of 3 heads would stay"),
        (
            PartShare("channels", 0.01),
            1536,
            "1536 of 1536 channels would stay .a multiple of 64.; .* 64 to 1472 stay",
        ),
        (PartShare("heads", 0.5), 1, "none can go in steps of 1"),
        (PartShare("channels", 0.5, 100), 48, "none can go in steps of 100"),
    ],
)
def test_shares_that_leave_no_part_or_all_are_refused(part, number, message):
    with pytest.raises(ValueError, match=message):
        part.num_kept(number)


@pytest.mark.parametrize(
    ("part", "number", "message"),
    [
        (
            PartShare("heads", 0.3),
            2,
            r"^pattern='heads:0.3': only whole numbers of heads can be removed, in steps of 1. Of 2, the nearest is 1 "
            r"\(50.00%\). Pass a possible share: 0.5 \(1 of 2\).$",
        ),
        (PartShare("heads", 0.56), 2, r"Pass a possible share: 0.5 \(1 of 2\).$"),
        (
            PartShare("layers", 0.1),
            16,
            r"the nearest is 2 \(12.50%\). .* 0.06 \(1 of 16\), 0.12 \(2 of 16\), .* \(8 of 16\), ...",
        ),
        (
            PartShare("channels", 0.1),
            1536,
            r"in steps of 64. Of 1536, the nearest is 128 \(8.33%\). .* 0.08 \(128 of 1536\), 0.12 \(192 of 1536\)",
        ),
        (PartShare("experts", 0.3), 4, r"0.25 \(1 of 4\), 0.5 \(2 of 4\), 0.75 \(3 of 4\)"),
        (PartShare("channels", 0.5, 32), 96, r"0.33 \(32 of 96\), 0.67 \(64 of 96\)"),
    ],
)
def test_a_share_that_would_be_rounded_by_more_than_a_tenth_is_refused(part, number, message):
    with pytest.raises(ValueError, match=message):
        part.num_kept(number)


@pytest.mark.parametrize(
    ("kind", "number", "multiple"),
    [("heads", 3, None), ("layers", 61, None), ("channels", 1536, None), ("channels", 96, 32)],
)
def test_the_shares_that_a_refusal_offers_are_accepted_and_remove_what_it_says(
    kind, number, multiple
):
    with pytest.raises(ValueError, match="would stay") as raised:
        PartShare(kind, 1e-6, multiple).num_kept(number)

    possible = re.findall(r"([\d.]+) \((\d+) of", str(raised.value).rpartition("stay: ")[2])

    assert possible
    for share, removed in possible:
        kept = PartShare(kind, float(share), multiple).num_kept(number)
        assert number - kept == int(removed)


def test_a_refusal_offers_no_multiple_of_64_that_every_share_rounds_to_one_of_128():
    with pytest.raises(ValueError, match="would stay") as raised:
        PartShare("channels", 0.999).num_kept(1536)

    removed = [int(number) for number in re.findall(r"\((\d+) of", str(raised.value))]

    assert 1408 in removed
    assert 1344 not in removed  # 1280 and 1408 are multiples of 128


@pytest.mark.parametrize(
    ("kept", "number", "expected"),
    [
        (1088, 1536, 1088),  # 64 of the 448 channels that go are more than a tenth
        (832, 1536, 768),
        (768, 1536, 768),
        (64, 1536, 64),
        (128, 192, 128),  # 192 is no multiple of 128
    ],
)
def test_a_largest_number_of_channels_becomes_the_multiple_of_128_below_it_if_that_is_near(
    kept, number, expected
):
    assert PartShare.fewer_channels(kept, number) == expected

    share = PartShare.keeping("channels", expected, number)
    assert share.num_kept(number) == expected


def test_experts_and_their_channels_are_refused_in_one_run():
    with pytest.raises(ValueError, match="one run removes either experts or their channels"):
        parse_pattern("expert_channels:0.25+experts:0.25")


@pytest.mark.parametrize("text", ["channels:0", "channels:1", "heads:1.5", "channels:0.5/0"])
def test_texts_with_an_impossible_share_or_step_are_refused(text):
    with pytest.raises(ValueError, match=r"pass a share of the .* in \(0, 1\)"):
        parse_pattern(text)


def test_a_pattern_of_whole_parts_is_refused_for_a_single_matrix():
    pattern = parse_pattern("channels:0.25")

    with pytest.raises(
        ValueError, match=r"pass pattern='columns:0\.25' for whole columns of a matrix"
    ):
        pattern.require_shape((4, 8))
    for use in (lambda: pattern.num_kept((4, 8)), lambda: pattern.mask(torch.ones(4, 8))):
        with pytest.raises(ValueError, match="parts of a whole model"):
            use()


@pytest.mark.parametrize(
    ("share", "divisor", "number", "kept"),
    [
        (0.25, 8, 64, 48),
        (0.25, 8, 60, 48),  # 45 would be nearest to the share: a fifth goes instead of a quarter
        (0.5, 16, 60, 32),
        (0.3, 1, 10, 7),
        (0.9, 8, 64, 8),
        (0.97, 8, 64, 8),  # the nearest multiple is 0, but a token is sent to 4 experts
    ],
)
def test_a_number_of_experts_is_kept_that_the_divisor_divides(share, divisor, number, kept):
    part = PartShare("experts", share, divisible_by=divisor)

    assert part.num_kept(number, at_least=4) == kept
    assert str(part) == f"experts:{share}"


def test_a_divisor_is_joined_with_what_the_groups_of_a_router_need():
    assert PartShare("experts", 0.25, divisible_by=8).num_kept(96, num_router_groups=6) == 72
    assert PartShare("experts", 0.25, divisible_by=8).num_kept(120, num_router_groups=6) == 96
    assert PartShare("experts", 0.25, multiple_of=8).num_kept(96, num_router_groups=6) == 72


@pytest.mark.parametrize(
    ("share", "divisor", "number", "groups", "message"),
    [
        (
            0.05,
            8,
            64,
            1,
            r"keep_divisible=8 .*'experts:0.05': 64 is the multiple of 8 .* none of 64 ",
        ),
        (
            0.25,
            8,
            8,
            1,
            r"keep_divisible=8 .*: from 4 to 7 of 8 experts may stay, and no multiple of 8 is",
        ),
        (
            0.25,
            8,
            24,
            6,
            r"no multiple of 24 \(each of 6 groups of the router keeps equally many\)",
        ),
    ],
)
def test_a_divisor_that_leaves_no_choice_is_refused(share, divisor, number, groups, message):
    part = PartShare("experts", share, divisible_by=divisor)

    with pytest.raises(ValueError, match=message):
        part.num_kept(number, groups, at_least=4)


def test_the_share_that_a_refusal_of_a_divisor_offers_is_accepted():
    with pytest.raises(ValueError, match="pass a larger share, such as ") as raised:
        PartShare("experts", 0.05, divisible_by=8).num_kept(64)

    offered = float(str(raised.value).rpartition("such as ")[2].rstrip("."))

    assert PartShare("experts", offered, divisible_by=8).num_kept(64) == 56

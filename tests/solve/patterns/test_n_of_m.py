import itertools

import pytest
import torch

from optimum_fista.solve.patterns import parse_pattern
from optimum_fista.solve.patterns.n_of_m import best_order

PAIRS = parse_pattern("4:8-pairs")
CHOICES = [
    [index in kept for index in range(4) for _ in "ab"]
    for kept in itertools.combinations(range(4), 2)
]
"""All masks of a group."""


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("text", ["1:2", "2:4", "1:4", "3:4", "1:3", "5:8", "16:32", "4:8-pairs"])
def test_parse_is_the_inverse_of_text(text):
    n, m = (int(number) for number in text.removesuffix("-pairs").split(":"))

    pattern = parse_pattern(text)

    assert (pattern.num_kept((1, m)), pattern.num_kept((3, 5 * m))) == (n, 15 * n)
    assert pattern.sparsity == pytest.approx(1 - n / m)
    assert str(pattern) == text
    assert parse_pattern(text, 1 - n / m) == pattern


def test_a_pattern_of_pairs_is_not_equal_to_that_of_single_weights():
    assert parse_pattern("4:8") != PAIRS


@pytest.mark.parametrize("text", ["4:2", "4:4", "0:4", "0:0"])
def test_pattern_that_keeps_all_or_nothing_is_refused(text):
    with pytest.raises(
        ValueError, match=rf"pattern='{text}' keeps {text[0]} of every {text[2]} weights"
    ):
        parse_pattern(text)


@pytest.mark.parametrize(
    ("text", "columns"), [("2:4", 6), ("1:2", 9), ("5:8", 12), ("4:8-pairs", 12)]
)
def test_m_that_does_not_divide_the_rows_is_refused(text, columns):
    pattern = parse_pattern(text)

    with pytest.raises(
        ValueError, match=f"layers.0.fc1 has rows of {columns} inputs, which {text} does not divide"
    ):
        pattern.require_shape((3, columns), "layers.0.fc1")
    with pytest.raises(ValueError, match=f"rows of {columns} inputs"):
        pattern.mask(torch.rand(3, columns))


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8"])
def test_the_best_order_of_inputs_keeps_more(text):
    pattern = parse_pattern(text)
    scores = torch.rand(12, 64, generator=torch.Generator().manual_seed(0)) ** 4

    def kept_in(order: torch.Tensor) -> float:
        """The sum of the scores that the pattern keeps in an order."""
        ordered = scores[:, order]
        return float((ordered * pattern.mask(ordered)).sum())

    order = best_order(scores, pattern)

    random_orders = [
        torch.randperm(64, generator=torch.Generator().manual_seed(seed)) for seed in range(50)
    ]
    assert sorted(order.tolist()) == list(range(64))
    assert kept_in(order) > 1.02 * max(kept_in(other) for other in random_orders)


def test_keeps_the_pairs_with_the_largest_sums_of_scores():
    scores = random(6, 24).square()
    choices = torch.tensor(CHOICES)

    best = (scores.view(-1, 8) @ choices.T.float()).argmax(1)  # of all masks of a group

    assert torch.equal(PAIRS.mask(scores, squared=True), choices[best].view(6, 24))
    assert torch.equal(PAIRS.mask(scores.sqrt()), choices[best].view(6, 24))
    assert int(PAIRS.mask(torch.ones(6, 24)).sum()) == 72


def test_pairs_are_compared_by_sums_of_squares_and_not_of_magnitudes():
    # By sums of squares, 9, 9.68, 4 and 7.22, the first two pairs win.
    # By sums of magnitudes, 3, 4.4, 2 and 3.8, the second and the last would.
    row = torch.tensor([[3.0, 0.0, 2.2, 2.2, 2.0, 0.0, 1.9, 1.9]])

    assert PAIRS.mask(row).tolist() == [[True, True, True, True, False, False, False, False]]


def test_violation_names_the_pair_that_is_torn():
    first, last = CHOICES[0], CHOICES[5]
    mask = torch.tensor([first + last])
    torn = mask.clone()
    torn[0, 8:12] = torch.tensor([True, False, True, False])
    torn[0, 12:] = torch.tensor([True, True, False, False])
    two_more = torch.tensor([first + [True] * 6 + [False] * 2])

    assert PAIRS.violation(mask) is None
    assert PAIRS.violation(torn) == "row 0, column 9 differs from the first weight of its group"
    assert PAIRS.violation(two_more).startswith("keeps 10 weights, but")

import pytest
import torch
from layer_problems import example

from optimum_fista.solve.methods import METHODS, create_method
from optimum_fista.solve.patterns import Columns, PartShare, parse_pattern

TAKING = [name for name, method in METHODS.items() if method.takes_columns]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("columns:0.25", Columns(0.25)),
        ("columns:0.25x64", Columns(0.25, width=64)),
        ("columns:7of9x64", Columns.keeping(7, 9, 64)),
        ("columns:1000of1536", Columns.keeping(1000, 1536)),
        ("columns:1e-05", Columns(1e-5)),
    ],
)
def test_parse_is_the_inverse_of_text(text, pattern):
    assert parse_pattern(text) == pattern
    assert str(pattern) == text


@pytest.mark.parametrize("groups", [1, 9, 1536])
def test_a_count_of_columns_is_kept_exactly_and_survives_its_text(groups):
    for kept in range(1, groups + 1, max(1, groups // 50)):
        pattern = Columns.keeping(kept, groups, 2)
        assert pattern.num_kept((3, 2 * groups)) == 3 * 2 * kept
        assert parse_pattern(str(pattern)) == pattern


def test_halves_are_rounded_to_even_numbers_as_those_of_channels():
    assert [Columns(0.5).num_kept((1, n)) for n in (9, 11)] == [4, 6]
    assert [PartShare("channels", 0.5).num_kept(n) for n in (21, 23)] == [10, 12]


@pytest.mark.parametrize("levels", [None, 2, 1])
@pytest.mark.parametrize(
    "pattern", [Columns(0.5), Columns(0.4, width=3), Columns.keeping(1, 4, 6)], ids=str
)
def test_keeps_the_groups_with_the_largest_sums(pattern, levels):
    scores = random(5, 24).square()
    if levels is not None:  # many ties
        scores = torch.arange(120).remainder(levels).view(5, 24).float()
    sums = scores.sum(0).view(-1, pattern.width).sum(1).tolist()
    order = sorted(range(len(sums)), key=lambda group: (-sums[group], group))  # ties by position
    best = sorted(order[: pattern.num_kept((1, 24)) // pattern.width])

    of_squares = pattern.mask(scores, squared=True)
    of_roots = pattern.mask(scores.sqrt())

    for mask in (of_squares, of_roots):
        assert pattern.violation(mask) is None
        assert mask[0, :: pattern.width].nonzero().flatten().tolist() == best
        assert (mask == mask[:1]).all()


def test_the_mask_of_a_large_matrix_agrees_with_sums_over_all_rows():
    matrix = random(4000, 300)
    pattern = Columns(0.5)

    assert torch.equal(pattern.mask(matrix), pattern.mask(matrix.double().square(), squared=True))


def test_violation_names_the_group_that_is_torn():
    pattern = Columns(0.5, width=2)
    mask = pattern.mask(torch.arange(24.0).view(3, 8))
    moved = mask.clone()
    moved[1, 5] = False
    moved[1, 0] = True
    one_more = mask.clone()
    one_more[1, 0] = True
    in_all_rows = torch.tensor([[True, False, True, False]] * 2)

    assert pattern.violation(mask) is None
    assert pattern.violation(moved) == "row 1, column 0 differs from the first weight of its group"
    assert (
        pattern.violation(one_more)
        == "keeps 13 weights, but columns:0.5x2 of (3, 8) keeps exactly 12"
    )
    assert pattern.violation(in_all_rows).startswith("row 0, column 1")


REFUSED = [
    (
        Columns(0.5, width=64),
        100,
        "down has rows of 100 inputs, which columns:0.5x64 does not divide: choose a",
    ),
    (
        Columns(0.9, width=64),
        256,
        "down has 4 groups of 64 columns, and columns:0.9x64 keeps none: pass a share of at ",
    ),
    (
        Columns.keeping(7, 9, 64),
        512,
        "down has 8 groups of 64 columns, not 9 as columns:7of9x64 has",
    ),
]


@pytest.mark.parametrize(("pattern", "columns", "message"), REFUSED)
def test_a_pattern_of_columns_that_does_not_fit_a_matrix_is_refused(pattern, columns, message):
    with pytest.raises(ValueError) as refused:
        pattern.require_shape((3, columns), "down")

    assert str(refused.value).startswith(message)
    with pytest.raises(ValueError, match=f"{columns // pattern.width} groups|does not divide"):
        pattern.mask(random(3, columns))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("columns:1.0", r"pattern='columns:1.0': sparsity=1.0: pass the share"),
        (
            "columns:9of7",
            r"pattern='columns:9of7': kept=9 of 7 groups: pass a whole number from 1 to 7",
        ),
        ("columns:0of7", "kept=0 of 7 groups"),
        ("columns:0.5x0", "width=0: pass a whole number of at least 1"),
        ("columns:0.5.5", "pattern='columns:0.5.5': "),
    ],
)
def test_texts_that_make_no_sense_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_pattern(text)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("name", TAKING)
def test_methods_that_compensate_are_near_the_best_weights_of_the_columns(name, width, corrected):
    made = example(11, 24, corrected=corrected, correlation=2.0)
    pattern = Columns(0.5, width=width)
    by_wanda = create_method("wanda").prune(made.problem, pattern)

    pruned = create_method(name).prune(made.problem, pattern)

    inputs = made.inputs[:, pruned.mask[0]]
    rest = made.outputs - inputs @ torch.linalg.lstsq(inputs, made.outputs).solution
    best = float(rest.norm() / made.outputs.norm())
    assert best <= pruned.fit_error * (1 + 1e-5)
    is_unchanged = torch.equal(pruned.weight, made.weight * pruned.mask)
    compensates_for_means_only = name == "flap"
    if not (is_unchanged or compensates_for_means_only):
        assert pruned.fit_error < by_wanda.fit_error


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(TAKING)))
def test_methods_that_decide_row_by_row_say_what_to_take(name):
    with pytest.raises(
        ValueError, match=rf"method '{name}' can't remove whole columns.* take one of .*'obs_admm'"
    ):
        create_method(name).prune(example(4, 8).problem, Columns(0.5))


@pytest.mark.parametrize("name", TAKING)
def test_columns_of_inputs_that_are_zero_are_removed_without_an_error(name):
    made = example(6, 24, dtype=torch.float32)
    dead = torch.tensor([1, 2, 7, 12, 20, 23])
    inputs = made.inputs.index_fill(1, dead, 0.0)
    weight = made.weight.index_fill(1, dead, 1e-3) if name == "magnitude" else made.weight
    statistics = type(made.problem.statistics)(inputs.T @ inputs, len(inputs), inputs.mean(0))
    problem = type(made.problem)(weight, statistics)

    pruned = create_method(name).prune(problem, Columns(0.25))

    assert not pruned.mask[:, dead].any()
    assert torch.allclose(pruned.weight[pruned.mask], weight[pruned.mask], atol=1e-4)
    assert pruned.fit_error < 1e-5

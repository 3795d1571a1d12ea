import itertools
import re
from dataclasses import dataclass

import pytest
import torch
from layer_problems import example

from optimum_fista.solve.methods import METHODS, create_method
from optimum_fista.solve.pattern import SparsityPattern, pack_mask, unpack_mask
from optimum_fista.solve.patterns import Unstructured, parse_pattern

SHAPES = [(1, 1), (3, 7), (16, 24), (7, 33)]
SPARSITIES = [0.0, 1 / 3, 0.5, 0.99]


def random_scores(shape: tuple[int, int], levels: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape[0] * 100 + shape[1])
    if levels is None:
        return torch.rand(shape, generator=generator)
    return torch.randint(levels, shape, generator=generator).float()


def one_more(mask: torch.Tensor) -> torch.Tensor:
    """A copy of a mask that keeps its first removed weight, too."""
    changed = mask.clone()
    first_removed = int((~mask).view(-1).int().argmax())
    changed.view(-1)[first_removed] = True
    return changed


def test_unstructured_defaults_and_text():
    assert parse_pattern() == Unstructured(0.5, "matrix")
    assert parse_pattern(sparsity=0.625, scope="row") == Unstructured(0.625, "row")
    assert str(Unstructured(0.625)) == "unstructured"
    assert parse_pattern(sparsity=0).sparsity == 0


NO_PATTERNS = [
    "abc",
    "",
    "2:",
    ":4",
    "2:4:8",
    "-2:4",
    "2 : 4",
    "2.0:4",
    "Unstructured",
    None,
    "rows:0.5",
    "channels",
]
NO_PATTERNS += ["channels:0.5+2:4", "channels:-0.5", "columns:half", "columns:0.5/64"]
REFUSED = [({"text": text}, "pass 'unstructured', '2:4' or") for text in NO_PATTERNS]
REFUSED += [
    ({"sparsity": s}, r"sparsity=.* is outside \[0, 1\)") for s in (-0.1, 1, 50, float("nan"), True)
]
REFUSED += [
    ({"text": "2of4"}, "pass '2:4'"),
    ({"text": 0.5}, r"pass sparsity=0.5 \(--sparsity 0.5\)"),
    ({"text": "2:4", "sparsity": 0.6}, "sparsity=0.6 and pattern='2:4' disagree"),
    ({"text": "columns:0.25", "sparsity": 0.0}, "sparsity=0.0 and pattern='columns:0.25' disagree"),
    (
        {"text": "channels:0.25,2:4"},
        "Prune with 'channels:0.25', and then prune the smaller model with '2:4'",
    ),
    ({"text": "heads:0.5+heads:0.25"}, "name each kind once"),
    ({"scope": "column"}, "scope='column': pass 'matrix' or 'row'"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_texts_sparsities_and_scopes_that_are_no_pattern_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        parse_pattern(**given)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("levels", [None, 3, 1])
def test_unstructured_counts_are_exact_with_and_without_ties(shape, sparsity, levels):
    scores = random_scores(shape, levels)
    pattern = parse_pattern(sparsity=sparsity)

    zeros = int((~pattern.mask(scores)).sum())

    assert abs(zeros - sparsity * scores.numel()) <= 0.5
    assert pattern.num_kept(shape) == scores.numel() - zeros


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("levels", [None, 3, 1])
def test_counts_by_row_are_exact_with_and_without_ties(shape, sparsity, levels):
    scores = random_scores(shape, levels)
    pattern = parse_pattern(sparsity=sparsity, scope="row")

    zeros_of_rows = (~pattern.mask(scores)).sum(1)

    assert (zeros_of_rows - sparsity * shape[1]).abs().max() <= 0.5
    assert int(zeros_of_rows.max()) == int(zeros_of_rows.min())
    assert pattern.num_kept(shape) == scores.numel() - int(zeros_of_rows.sum())


@pytest.mark.parametrize(
    "pattern", [parse_pattern("2:4"), Unstructured(0.5), Unstructured(0.5, "row")], ids=repr
)
def test_violation_is_none_for_its_own_masks_only(pattern):
    mask = pattern.mask(random_scores((4, 8)))
    stored_transposed = mask.T.contiguous().T

    assert pattern.violation(mask) is None
    assert pattern.violation(stored_transposed) is None
    assert (
        pattern.violation(one_more(mask))
        == f"keeps 17 weights, but {pattern} of (4, 8) keeps exactly 16"
    )


def test_violation_names_the_group_or_row_whose_count_is_wrong():
    mask = torch.tensor(
        [[1, 1, 0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1, 1, 0], [1, 1, 0, 0, 1, 0, 0, 0]]
    ).bool()

    assert parse_pattern("2:4").violation(mask) == "row 1, group 1 keeps 3 of 4 weights"
    assert Unstructured(0.5, "row").violation(mask) == "row 1 keeps 5 of 8 weights"
    assert Unstructured(0.5).violation(mask) is None


def test_masks_of_parts_of_a_matrix_keep_as_many_weights_together_as_that_of_the_whole():
    scores = random_scores((5, 13))
    pattern = Unstructured(0.3)

    masks = [
        pattern.mask(scores[:, left:right], within=(left, 13))
        for left, right in itertools.pairwise((0, 4, 5, 13))
    ]

    assert sum(int(mask.sum()) for mask in masks) == pattern.num_kept((5, 13))


@dataclass(frozen=True)
class Runs(SparsityPattern):
    """A pattern of a user: runs of weights beside each other, anywhere in the matrix."""

    fixed = False

    @classmethod
    def read(cls, text, sparsity, scope):
        match = re.fullmatch(r"runs of (\d)", text)
        if match is None:
            return None
        return cls(0.5 if sparsity is None else sparsity, scope, width=int(match[1]))

    def __str__(self):
        return f"runs of {self.width}"


@pytest.mark.parametrize("scope", ["matrix", "row"])
def test_a_subclass_is_parsed_by_its_text_and_keeps_the_groups_with_the_largest_squares(scope):
    matrix = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    squares_of_runs = matrix.square().unflatten(1, (-1, 3)).sum(-1)  # [6, 8]
    competing = squares_of_runs if scope == "row" else squares_of_runs.view(1, -1)
    threshold = competing.sort(1).values[:, [competing.shape[1] // 4]]

    pattern = parse_pattern("runs of 3", 0.25, scope)

    assert pattern == Runs(0.25, scope, width=3)
    expected = (competing >= threshold).view(6, 8).repeat_interleave(3, dim=1)
    assert torch.equal(pattern.mask(matrix), expected)


@pytest.mark.parametrize("scope", ["matrix", "row"])
def test_a_subclass_finds_torn_groups_and_refuses_rows_that_do_not_fit(scope):
    pattern = Runs(0.25, scope, width=3)
    matrix = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    torn = pattern.mask(matrix)
    torn[0, :3] = torch.tensor([True, False, False])

    assert pattern.violation(torn) is not None
    with pytest.raises(ValueError, match="rows of 16 inputs, which runs of 3 does not divide"):
        pattern.mask(matrix[:, :16])


METHODS_AND_SCOPES = [
    (name, scope)
    for name, scope in itertools.product(METHODS, ("matrix", "row"))
    if name != "dsnot" or scope == "row"  # it swaps within rows
]


@pytest.mark.parametrize(("name", "scope"), METHODS_AND_SCOPES)
def test_every_method_prunes_to_the_pattern_of_a_subclass(name, scope):
    pattern = Runs(0.25, scope, width=3)
    options = {"block_size": 8} if name == "sparsegpt" else {}

    pruned = create_method(name, **options).prune(example(6, 24).problem, pattern)

    assert pattern.violation(pruned.mask) is None


@pytest.mark.parametrize("shape", [(1,), (8,), (9,), (3, 5), (2, 3, 7), (64, 33)])
def test_unpack_mask_is_the_inverse_of_pack_mask(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(len(shape))) < 0.5

    packed = pack_mask(mask)

    assert packed.dtype == torch.uint8
    assert packed.numel() == (mask.numel() + 7) // 8
    assert torch.equal(unpack_mask(packed, shape), mask)


def test_masks_are_packed_row_by_row_with_the_lowest_bit_first():
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 1, 1]]).bool()

    assert pack_mask(mask).tolist() == [0b00001101, 0b00000011]
    assert pack_mask(mask.T).tolist() == pack_mask(mask.T.contiguous()).tolist()


@pytest.mark.parametrize(("size", "dtype"), [(2, torch.uint8), (4, torch.uint8), (3, torch.int64)])
def test_packed_masks_of_another_size_or_dtype_are_refused(size, dtype):
    with pytest.raises(
        ValueError, match=rf"packed has {size} values of {dtype}: .* needs 3 values of torch.uint8"
    ):
        unpack_mask(torch.zeros(size, dtype=dtype), (3, 8))

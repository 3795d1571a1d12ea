import pytest
import torch

from optimum_fista.solve.pattern import pack_mask, unpack_mask
from optimum_fista.solve.patterns import Unstructured, parse_pattern

SHAPES = [(1, 1), (3, 7), (16, 24), (7, 33)]
SPARSITIES = [0.0, 0.05, 1 / 3, 0.5, 0.99]


def random_scores(shape: tuple[int, int], levels: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape[0] * 100 + shape[1])
    if levels is None:
        return torch.rand(shape, generator=generator)
    return torch.randint(levels, shape, generator=generator).float()


@pytest.mark.parametrize("text", ["1:2", "2:4", "1:4", "3:4", "4:8", "5:8", "16:32"])
def test_parse_is_the_inverse_of_text(text):
    n, m = (int(number) for number in text.split(":"))
    pattern = parse_pattern(text)
    assert pattern.n_of_m == (n, m)
    assert pattern.sparsity == pytest.approx(1 - n / m)
    assert pattern.text == str(pattern) == text
    assert parse_pattern(text, 1 - n / m) == pattern


def test_unstructured_defaults_and_text():
    assert parse_pattern() == Unstructured(0.5, "matrix")
    pattern = parse_pattern(sparsity=0.625, scope="row")
    assert pattern == Unstructured(0.625, "row")
    assert (pattern.text, str(pattern)) == ("unstructured", "62.5% unstructured")
    assert parse_pattern(sparsity=0).sparsity == 0


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.0, 1.5, 50, float("nan"), True])
def test_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(ValueError, match=r"sparsity=.* is outside \[0, 1\)"):
        parse_pattern(sparsity=sparsity)


@pytest.mark.parametrize("text", ["4:2", "4:4", "0:4", "0:0"])
def test_pattern_that_keeps_all_or_nothing_is_refused(text):
    with pytest.raises(ValueError, match=rf"pattern='{text}' keeps {text[0]} of every {text[2]} weights"):
        parse_pattern(text)


@pytest.mark.parametrize("text", ["abc", "", "2:", ":4", "2:4:8", "-2:4", "2 : 4", "2.0:4", "Unstructured", None])
def test_text_that_is_no_pattern_is_refused(text):
    with pytest.raises(ValueError, match="pass 'unstructured', '2:4' or"):
        parse_pattern(text)


@pytest.mark.parametrize(("text", "meant"), [("2of4", "pass '2:4'"), (0.5, r"pass sparsity=0.5 \(--sparsity 0.5\)")])
def test_what_was_meant_is_said(text, meant):
    with pytest.raises(ValueError, match=meant):
        parse_pattern(text)


@pytest.mark.parametrize(("text", "sparsity"), [("2:4", 0.6), ("1:4", 0.25), ("4:8", 0.0)])
def test_sparsity_and_pattern_that_disagree_are_refused(text, sparsity):
    with pytest.raises(ValueError, match=f"sparsity={sparsity} and pattern='{text}' disagree"):
        parse_pattern(text, sparsity)


def test_parts_and_zeros_are_two_runs():
    with pytest.raises(ValueError, match=r"Prune with 'channels:0.25', and then prune the smaller model with '2:4'"):
        parse_pattern("channels:0.25,2:4")


def test_unknown_scope_is_refused():
    with pytest.raises(ValueError, match="scope='column': pass 'matrix' or 'row'"):
        parse_pattern(scope="column")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("levels", [None, 3, 1])
def test_unstructured_counts_are_exact_with_and_without_ties(shape, sparsity, levels):
    scores = random_scores(shape, levels)
    matrix = parse_pattern(sparsity=sparsity)
    zeros = int((~matrix.mask(scores)).sum())
    assert abs(zeros - sparsity * scores.numel()) <= 0.5
    assert matrix.num_kept(shape) == scores.numel() - zeros

    row = parse_pattern(sparsity=sparsity, scope="row")
    row_zeros = (~row.mask(scores)).sum(1)
    assert (row_zeros - sparsity * shape[1]).abs().max() <= 0.5
    assert int(row_zeros.max()) == int(row_zeros.min())
    assert row.num_kept(shape) == scores.numel() - int(row_zeros.sum())


@pytest.mark.parametrize(("text", "columns"), [("2:4", 6), ("2:4", 7), ("1:2", 9), ("5:8", 12)])
def test_m_that_does_not_divide_the_rows_is_refused(text, columns):
    pattern = parse_pattern(text)
    with pytest.raises(ValueError, match=f"layers.0.fc1 has rows of {columns} inputs, which {text} does not divide"):
        pattern.require_shape((3, columns), "layers.0.fc1")
    with pytest.raises(ValueError, match=f"rows of {columns} inputs"):
        pattern.mask(torch.rand(3, columns))


@pytest.mark.parametrize("pattern", [parse_pattern("2:4"), Unstructured(0.5), Unstructured(0.5, "row")])
def test_violation_is_none_for_its_own_masks_only(pattern):
    mask = pattern.mask(random_scores((4, 8)))
    assert pattern.violation(mask) is None
    one_more = mask.clone()
    one_more.view(-1)[int((~mask).view(-1).int().argmax())] = True
    assert pattern.violation(one_more) == f"keeps 17 weights, but {pattern} of (4, 8) keeps exactly 16"


def test_violation_names_the_group_or_row_whose_count_is_wrong():
    pattern = parse_pattern("2:4")
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1, 1, 0], [1, 1, 0, 0, 1, 0, 0, 0]]).bool()
    assert pattern.violation(mask) == "row 1, group 1 keeps 3 of 4 weights"
    row = parse_pattern(sparsity=0.5, scope="row")
    assert row.violation(mask) == "row 1 keeps 5 weights, not 4"
    assert parse_pattern(sparsity=0.5).violation(mask) is None


@pytest.mark.parametrize("text", ["unstructured", "row", "2:4"])
def test_masks_of_magnitudes(text):
    matrix = torch.randn(3000, 400, generator=torch.Generator().manual_seed(0))
    pattern = Unstructured(0.3, scope="row") if text == "row" else parse_pattern(text)
    assert torch.equal(pattern.mask_of(matrix), pattern.mask(matrix.abs()))


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8"])
def test_the_best_order_of_inputs_keeps_more(text):
    pattern, scores = parse_pattern(text), random_scores((12, 64)) ** 4
    order = pattern.best_order(scores)
    assert sorted(order.tolist()) == list(range(64))

    def kept(order: torch.Tensor) -> float:
        return float((scores[:, order] * pattern.mask(scores[:, order])).sum())

    others = [kept(torch.randperm(64, generator=torch.Generator().manual_seed(seed))) for seed in range(50)]
    assert kept(order) > 1.02 * max(others)


def test_the_order_of_inputs_is_theirs_where_it_does_not_matter():
    assert parse_pattern(sparsity=0.5).best_order(random_scores((2, 5))).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("shape", [(1,), (8,), (9,), (3, 5), (4, 16), (2, 3, 7), (64, 33)])
def test_masks_as_bits_come_back(shape):
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

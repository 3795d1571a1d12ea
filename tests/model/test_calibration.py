"""Batches in every form are read as the same ids and masks; what would be missed is refused or named."""

import pytest
import torch
from tiny_llama import tiny_llama
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import BatchEncoding, DataCollatorWithFlattening

from optimum_fista import FistaPruner
from optimum_fista.model.calibration import (
    CalibrationBatch,
    equal_shares,
    hold_out,
    read_batches,
    sources_of,
    tokens_sha256,
)

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0]])
ROWS = [{"input_ids": ids} for ids in IDS]
DATA_SET = [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(IDS, MASK, strict=True)]

LOADERS = {
    "one tensor": IDS,
    "list of batches": [IDS[:2], IDS[2:]],
    "lists of ids": IDS.tolist(),
    "list of arrays": [IDS.numpy()[:1], IDS.numpy()[1:]],
    "dicts of sequences": ROWS,
    "dicts with other keys": [{"input_ids": IDS, "labels": IDS, "text": "x"}],
    "tokenizer output": [
        BatchEncoding({"input_ids": IDS.tolist(), "attention_mask": [[1] * 4] * 3})
    ],
    "generator": (row for row in ROWS),
    "DataLoader of dicts": DataLoader(ROWS, batch_size=2),
    "DataLoader of a TensorDataset": DataLoader(TensorDataset(IDS), batch_size=2),
    "TensorDataset": TensorDataset(IDS),
}


@pytest.mark.parametrize("form", LOADERS)
def test_every_form_gives_the_same_ids(form):
    batches = read_batches(LOADERS[form], 16)

    assert {batch.input_ids.ndim for batch in batches} == {2}
    assert {batch.input_ids.dtype for batch in batches} == {torch.int64}
    assert torch.equal(torch.cat([batch.input_ids for batch in batches]), IDS)
    assert all(batch.attention_mask is None for batch in batches)
    assert sum(batch.num_tokens for batch in batches) == 12


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_masks_are_booleans_where_anything_is_masked_and_padding_is_at_the_end(batch_size):
    batches = read_batches(DataLoader(DATA_SET, batch_size=batch_size), 16)

    rows = [row for batch in batches for row in batch.sequences_without_padding()]
    assert [row.input_ids[0].tolist() for row in rows] == [[1, 2, 3, 4], [6, 7, 8], [9, 10]]
    assert sum(batch.num_tokens for batch in batches) == 9
    assert (batches[0].attention_mask is None) is (batch_size == 1)
    masks = [batch.attention_mask for batch in batches if batch.attention_mask is not None]
    assert all(mask.dtype == torch.bool for mask in masks)
    assert all(mask[:, 0].all() for mask in masks)


class Unguarded(Dataset):
    """A data set with a length, whose index is not checked."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Tensor:
        assert index == 0, "read beyond its end"
        return torch.tensor([3, 1, 2])


@pytest.mark.parametrize("loader", [[3, 1, 2], (3, 1, 2), torch.tensor([3, 1, 2]), Unguarded()])
def test_a_single_sequence_is_read_as_a_batch_of_one_row(loader):
    (batch,) = read_batches(loader, 4)

    assert batch.input_ids.tolist() == [[3, 1, 2]]


def test_hash_does_not_depend_on_the_batch_size_or_the_padding():
    loaders = [DataLoader(DATA_SET, batch_size=size) for size in (1, 2, 3)]
    unpadded = [[1, 2, 3, 4], [6, 7, 8], [9, 10]]
    other_padding = {"input_ids": torch.where(MASK.bool(), IDS, 15), "attention_mask": MASK}

    hashes = {
        tokens_sha256(read_batches(loader, 16)) for loader in [*loaders, unpadded, [other_padding]]
    }

    assert len(hashes) == 1


def test_hash_tells_tokens_order_and_boundaries_apart():
    loaders = [
        [[1, 2], [3, 4]],
        [[3, 4], [1, 2]],
        [[1, 2, 3, 4]],
        [[1], [2, 3, 4]],
        [[1, 2], [3, 5]],
        [[1, 2]],
    ]

    hashes = {tokens_sha256(read_batches(loader, 16)) for loader in loaders}

    assert len(hashes) == len(loaders)


@pytest.mark.parametrize(
    "loader", [{"input_ids": IDS}, BatchEncoding({"input_ids": IDS}), "a text", 5, None]
)
def test_what_is_no_iterable_of_batches_is_refused(loader):
    with pytest.raises(
        ValueError,
        match=f"calib_dataloader is a {type(loader).__name__}: pass an iterable of batches",
    ):
        read_batches(loader, 16)


@pytest.mark.parametrize(
    "loader", [[], iter([]), DataLoader([]), torch.empty(0, 4, dtype=torch.int64)]
)
def test_a_loader_without_a_batch_is_refused(loader):
    with pytest.raises(ValueError, match="gave no batch: pass at least one batch"):
        read_batches(loader, 16)


@pytest.mark.parametrize(
    "other",
    [
        {"position_ids": torch.arange(4).expand(3, 4)},
        {"position_ids": torch.tensor([[0, 1, 2, 3], [1, 0, 1, 2], [0, 1, 1, 1]])},
        {"token_type_ids": torch.zeros(3, 4), "labels": IDS, "pixel_values": None},
    ],
)
def test_positions_and_types_that_follow_from_the_ids_change_nothing(other):
    item = {"input_ids": IDS, "attention_mask": MASK}

    (batch,) = read_batches([item | other], 16)

    (plain,) = read_batches([item], 16)
    assert torch.equal(batch.input_ids, plain.input_ids)
    assert torch.equal(batch.attention_mask, plain.attention_mask)


def test_keys_that_are_not_read_are_named_once():
    item = {"input_ids": IDS, "labels": IDS, "idx": IDS[:, 0], "text": ["a", "b", "c"]}

    with pytest.warns(UserWarning, match="are not read") as warned:
        report = FistaPruner(progress=False).prune(tiny_llama(), [item, item])

    message = "calib_dataloader holds 'idx' and 'text', which are not read"
    assert [message in str(warning.message) for warning in warned].count(True) == 1
    assert [message in warning for warning in report.warnings].count(True) == 1


def test_sequences_longer_than_the_positions_are_refused():
    with pytest.raises(
        ValueError,
        match=r"calib_dataloader\[1\] holds sequences of 65 tokens: pass at most 64, the",
    ):
        FistaPruner(progress=False).prune(tiny_llama(), [IDS, torch.zeros(1, 65, dtype=torch.long)])


BAD_ITEMS = {
    "no ids": ({"ids": IDS, "mask": MASK}, r"has the keys \['ids', 'mask'\]: pass 'input_ids'"),
    "negative id": (
        torch.tensor([[3, -1]]),
        r"token id -1, outside the model's vocabulary \[0, 16\)",
    ),
    "id beyond the vocabulary": (
        torch.tensor([[3, 16]]),
        r"token id 16, outside the model's vocabulary \[0, 16\)",
    ),
    "ragged": ([[1, 2], [3]], "input_ids can't be read as a tensor"),
    "complex": (torch.tensor([[1j, 2.0]]), r"dtype torch\.complex64: pass integers"),
    "a number": (torch.tensor(3), r"input_ids has shape \(\)"),
    "no token": (torch.empty(1, 0, dtype=torch.int64), r"input_ids has shape \(1, 0\)"),
    "mask of another shape": (
        {"input_ids": IDS, "attention_mask": MASK[:, :3]},
        r"attention_mask has shape \(3, 3\), input_ids \(3, 4\)",
    ),
    "images": (
        {"input_ids": IDS, "pixel_values": torch.ones(3, 3, 4, 4)},
        "holds 'pixel_values', but the model runs on",
    ),
    "types": ({"input_ids": IDS, "token_type_ids": IDS > 3}, "holds 'token_type_ids'"),
    "a hole": (
        {"input_ids": IDS, "attention_mask": [[1, 0, 1, 1]] * 3},
        "attention_mask has a hole",
    ),
    "numbers of documents": (
        {"input_ids": IDS, "attention_mask": [[1, 1, 2, 2]] * 3},
        "attention_mask says that a row",
    ),
    "positions that restart": (
        {"input_ids": IDS, "position_ids": [[0, 1, 0, 1]] * 3},
        "position_ids says that a row",
    ),
    "positions that begin late": (
        {"input_ids": IDS, "position_ids": IDS + 4},
        "position_ids says .* begins late: pass",
    ),
    "collated documents": (
        DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(
            [{"input_ids": ids} for ids in IDS.tolist()]
        ),
        "seq_idx says .* holds several documents.*: pass every document as a sequence of its own, without seq_idx",
    ),
    "additive mask": (
        {"input_ids": IDS, "attention_mask": torch.zeros(3, 4)},
        r"attention_mask has shape \(3, 4\) and dtype torch\.float32",
    ),
}


@pytest.mark.parametrize("fault", BAD_ITEMS)
def test_bad_items_are_refused_with_their_index(fault):
    item, message = BAD_ITEMS[fault]

    with pytest.raises(ValueError, match=rf"calib_dataloader\[1\].*{message}"):
        read_batches([IDS, item], 16)


def test_masks_that_leave_no_token_at_all_are_refused():
    masked = {"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}

    with pytest.raises(ValueError, match="no real token: every attention_mask is zero"):
        read_batches([masked, masked], 16)


def test_a_batch_without_a_real_token_may_be_among_others():
    masked = {"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}

    batches = read_batches([masked, {"input_ids": IDS}], 16)

    assert [batch.num_tokens for batch in batches] == [0, 12]


@pytest.mark.parametrize("held_out", [1, 2, 3, 4])
def test_sequences_are_held_out_from_the_end(held_out):
    batches = read_batches([IDS, {"input_ids": IDS[:2], "attention_mask": MASK[:2]}], 13)

    marked = hold_out(batches, held_out)

    flags = [batch.held_out for batch in marked]
    assert flags == sorted(flags), "the last ones are held out"
    ids = torch.cat([batch.input_ids for batch in marked])
    assert torch.equal(ids, torch.cat([batch.input_ids for batch in batches]))
    assert sum(len(batch.input_ids) for batch in marked if batch.held_out) == held_out
    num_batches = 2 if held_out == 2 else 3  # two of them end where the second batch begins
    assert len(marked) == num_batches
    assert sum(batch.num_tokens for batch in marked) == sum(batch.num_tokens for batch in batches)


def test_cut_batches_have_a_mask_only_where_they_need_one():
    first, second = hold_out([CalibrationBatch(IDS, MASK.bool())], 2)

    assert first.attention_mask is None
    assert torch.equal(second.attention_mask, MASK[1:].bool())


@pytest.mark.parametrize(("row", "name"), [(0, "other"), (1, "held-out")])
def test_held_out_and_other_sequences_without_a_real_token_are_refused(row, name):
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[row] = False

    with pytest.raises(ValueError, match=f"held_out=1: the {name} sequences hold no real token"):
        hold_out([CalibrationBatch(IDS[:2], mask)], 1)


def of_texts(*names):
    """Batches of two sequences, one of each text that is named; all sequences differ."""
    ids = torch.arange(8 * len(names)).view(len(names), 2, 4)
    return [{"input_ids": rows, "source": name} for rows, name in zip(ids, names, strict=True)]


def test_sequences_of_every_text_are_held_out_in_equal_shares():
    batches = read_batches(of_texts("a", "b", "a", "b", "b"), 40)

    marked = hold_out(batches, 3)

    assert [(batch.source, batch.held_out) for batch in marked] == [
        ("a", False),
        ("b", False),
        ("b", False),
        ("b", False),
        ("a", True),
        ("b", True),
    ]
    held_out = [batch.input_ids[:, 0].tolist() for batch in marked if batch.held_out]
    assert held_out == [[16, 20], [36]]  # the last two sequences of a, and the last one of b
    fitted = [batch.input_ids[:, 0].tolist() for batch in marked if not batch.held_out]
    assert fitted == [[0, 4], [8, 12], [24, 28], [32]]


def test_texts_that_can_not_all_be_held_out_are_refused():
    batches = read_batches(of_texts("a", "b", "a"), 40)

    with pytest.raises(ValueError, match=r"held_out=1 .*the calibration has 2 texts.* at least 2"):
        hold_out(batches, 1)
    with pytest.raises(ValueError, match=r"of the text 'b', held_out=2: .* none is left"):
        hold_out(batches, 4)


def test_batches_of_one_named_text_are_held_out_as_without_a_name():
    named = read_batches(of_texts("a", "a"), 40)
    unnamed = read_batches([batch["input_ids"] for batch in of_texts("a", "a")], 40)

    for with_name, without in zip(hold_out(named, 1), hold_out(unnamed, 1), strict=True):
        assert torch.equal(with_name.input_ids, without.input_ids)
        assert with_name.held_out == without.held_out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": 3}, r"calib_dataloader\[1\]: source is a int: pass the name of the text"),
        ({"source": None}, "have a 'source', such as 'a', and others have none"),
    ],
)
def test_a_source_that_is_no_name_or_is_missing_is_refused(change, message):
    first, second = of_texts("a", "b")

    with pytest.raises(ValueError, match=message):
        read_batches([first, second | change], 40)


def test_two_sources_with_the_same_sequences_are_refused():
    ids = torch.arange(12).view(4, 3)
    batches = [{"input_ids": ids[:2], "source": "sea"}, {"input_ids": ids[2:], "source": "sea"}]
    copies = [{"input_ids": ids[[3, 0, 2, 1]], "source": "copy"}]

    read_batches([*batches, {"input_ids": ids[1:], "source": "other"}], 64)
    with pytest.raises(ValueError, match="same sequences for the 'source' 'sea' as for 'copy'"):
        read_batches(batches + copies, 64)


def test_a_batch_that_only_measures_needs_no_source():
    first, second = of_texts("a", "b")
    measured = {"input_ids": IDS, "held_out": "c"}

    batches = read_batches([first, second, measured], 40)

    assert sources_of(batches) == ["a", "b", None]


@pytest.mark.parametrize(
    ("number", "shares"),
    [
        (7, [3, 2, 2]),
        (8, [3, 3, 2]),
        (9, [3, 3, 3]),
        (2, [1, 1, 0]),
    ],
)
def test_the_first_shares_get_the_remainder(number, shares):
    assert equal_shares(number, 3) == shares

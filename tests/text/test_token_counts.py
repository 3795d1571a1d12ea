"""Tokens are counted on all of a text but what is held out of it."""

from itertools import pairwise
from pydoc_data.topics import topics

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from optimum_fista.text.token_counts import HeldOutText, count_tokens

WORDS = " ".join(topics[name] for name in sorted(topics))


def words_of(num_characters: int) -> str:
    """English text of a given length."""
    return (WORDS * (1 + num_characters // len(WORDS)))[:num_characters]


def held_out_of(documents: list[str]) -> tuple[HeldOutText, list[str]]:
    """What is held out of documents, and the parts that are left."""
    held_out = HeldOutText()
    parts = list(held_out.counted(iter(documents)))
    return held_out, parts


def test_text_without_borders_of_words_is_cut():
    text = "木" * 300_000

    held_out, parts = held_out_of([text])

    assert "".join(held_out.pieces) + "".join(parts) == text
    assert max(map(len, parts)) <= 2 * 8192
    assert 4096 <= max(map(len, held_out.pieces)) <= 2 * 4096


@pytest.mark.parametrize(
    "documents",
    [[words_of(50_000)], [words_of(2000)] * 60, [words_of(900_000)]],
    ids=["one of 50,000 characters", "many short ones", "a long one"],
)
def test_at_most_a_tenth_is_held_out_and_all_else_is_counted(documents):
    held_out, parts = held_out_of(documents)

    num_held_out = sum(map(len, held_out.pieces))
    total = sum(map(len, documents))
    assert held_out.num_characters == total
    assert 4096 <= num_held_out <= min(0.1 * total, 66_000)
    assert num_held_out + sum(map(len, parts)) == total


def test_what_is_held_out_comes_from_all_of_a_long_text():
    document = "\n".join(f"line {number} of a text that goes on" for number in range(40_000))

    held_out, _ = held_out_of([document])

    places = [document.index(piece) / len(document) for piece in held_out.pieces]
    assert places == sorted(places)
    assert places[0] < 0.2
    assert places[-1] > 0.8
    assert all(later - earlier < 0.2 for earlier, later in pairwise(places))


@pytest.mark.parametrize("documents", [[], [""], [words_of(30_000)], [words_of(100)] * 20])
def test_a_short_text_is_counted_whole(documents):
    held_out, parts = held_out_of(documents)

    assert held_out.pieces == []
    assert "".join(parts) == "".join(documents)


def test_counts_are_those_of_whole_documents_and_nearly_so_in_small_parts(monkeypatch):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=800, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([words_of(20_000)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.to_str()))
    documents = [words_of(9000), "", "a" * 3000, *words_of(20_000).split("\n\n")]
    ids = [index for document in documents for index in fast(document)["input_ids"]]

    whole = count_tokens(fast, documents, 2000)  # in parts that are longer than most documents
    monkeypatch.setattr("optimum_fista.text.token_counts._PART_CHARACTERS", 500)
    in_parts = count_tokens(fast, iter(documents), 2000)

    assert torch.equal(whole, torch.bincount(torch.tensor(ids), minlength=2000))
    assert (in_parts - whole).abs().sum() < 0.002 * whole.sum()


def test_a_tokenizer_with_more_ids_than_rows_is_refused():
    content = {"a": 0, "b": 5}
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(content, "a")))

    with pytest.raises(ValueError, match=r"size=3, but the tokenizer has the id 5"):
        count_tokens(fast, ["b"], 3)


def test_a_tokenizer_that_is_not_fast_is_refused():
    with pytest.raises(ValueError, match="is not a fast one"):
        count_tokens(object(), ["b"], 3)

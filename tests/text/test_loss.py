"""Texts to measure are cut into stretches with enough tokens, and stretches into sequences, between characters."""

import pytest
from rare_tokens import RARE, bpe_tokenizer, text_of

from optimum_fista.text.loss import require_measurable, tokenized_text
from optimum_fista.verdict import LEAST_TOKENS


def tokens_of(text) -> int:
    """Number of tokens of the stretches that are measured of a text."""
    tokenizer = bpe_tokenizer()
    return sum(len(tokenizer(stretch)["input_ids"]) for stretch in text.stretches)


def test_a_text_of_long_tokens_is_read_until_it_has_enough():
    text = text_of(RARE, 6000)  # 8 characters a token, with the space before it

    (measured,) = require_measurable({"zoo": text}, {}, bpe_tokenizer())

    assert len(measured.stretches) > 12  # the usual number
    assert tokens_of(measured) >= LEAST_TOKENS


def test_a_text_of_usual_tokens_is_measured_in_12_stretches():
    text = "the ship " * 20_000

    (measured,) = require_measurable({"sea": text}, {}, bpe_tokenizer())

    assert len(measured.stretches) == 12


def test_a_text_that_is_too_short_is_refused_with_the_number_of_all_its_tokens():
    text = text_of(RARE, 3500)

    with pytest.raises(ValueError, match=r"'zoo' is too short, it has 3,5.. tokens"):
        require_measurable({"zoo": text}, {}, bpe_tokenizer())


@pytest.mark.parametrize("longest", [10, 11, 12])
def test_a_sequence_ends_at_the_end_of_a_character(longest):
    tokenizer = bpe_tokenizer()
    text = "東京の海" * 20  # each character is three tokens, a byte each

    tokenized = tokenized_text([text], tokenizer, bos=1, longest=longest)

    sequences = [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokenized.sequences]
    assert "".join(sequences) == text
    assert max(map(len, tokenized.sequences)) <= longest
    assert tokenized.num_bytes == len(text.encode())


@pytest.mark.parametrize("longest", [6, 200])
def test_the_first_character_counts_if_some_of_its_tokens_are_predicted(longest):
    text = "東京の海" * 4

    tokenized = tokenized_text([text], bpe_tokenizer(), bos=None, longest=longest)

    # Only the first of its three tokens is not predicted.
    assert tokenized.num_bytes == len(text.encode())


def test_a_first_letter_of_one_token_does_not_count():
    tokenized = tokenized_text(["abc"], bpe_tokenizer(), bos=None, longest=200)

    assert [len(ids) for ids in tokenized.sequences] == [3]
    assert tokenized.num_bytes == 2


def test_a_character_that_does_not_fit_into_a_sequence_is_cut():
    text = "東京"

    tokenized = tokenized_text([text], bpe_tokenizer(), bos=1, longest=3)

    # Each sequence begins with BOS, and the three tokens of a character don't fit beside it.
    assert [len(ids) for ids in tokenized.sequences] == [3, 2, 3, 2]

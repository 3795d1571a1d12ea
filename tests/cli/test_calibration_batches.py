"""How many bytes the tokens of the sequences stand for that a perplexity is measured on."""

import torch
from rare_tokens import bpe_tokenizer

from optimum_fista.cli.calibration_batches import _bytes_per_token


def test_a_part_of_a_character_at_an_end_of_a_sequence_has_no_bytes():
    tokenizer = bpe_tokenizer()
    ids = torch.tensor(tokenizer("東京の海")["input_ids"])  # three tokens a character

    begins_and_ends_inside = ids[None, 1:11]

    # Two of the four characters, of three bytes each, are whole in these ten tokens.
    assert _bytes_per_token(tokenizer, begins_and_ends_inside) == 6 / 10
    assert _bytes_per_token(tokenizer, ids[None]) == 1

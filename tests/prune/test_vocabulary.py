"""Models that lose tokens: rows of the embedding and the head, the tokenizer, and every id in the files."""

import json

import pytest

from optimum_fista.folder.checkpoint import VOCABULARY_FILE, kept_tokens


def test_the_table_of_kept_tokens_is_read_and_damage_is_named(tmp_path):
    assert kept_tokens(tmp_path) is None
    file = tmp_path / VOCABULARY_FILE
    file.parent.mkdir()
    file.write_text(json.dumps({"kept": [0, 2, 5], "num_tokens": 6}))
    assert kept_tokens(tmp_path).tolist() == [0, 2, 5]
    for damaged in ({"kept": [0, 2, 2], "num_tokens": 6}, {"kept": [0, 6], "num_tokens": 6}, {"kept": []}, {}):
        file.write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=r"vocabulary.json' is damaged"):
            kept_tokens(tmp_path)

"""What may be written into files that anybody reads, and onto a terminal."""

import pytest

from optimum_fista.plain_text import spell_out_controls
from optimum_fista.public_names import public_name


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("random tokens, half 1/2", "random tokens, half 1/2"),
        ("models/tiny/", "tiny"),
        ("~/gone/tiny", "tiny"),
        ("/gone/texts/sea.txt", "sea.txt"),
        ("models/tiny/..", "models"),
        ("x" * 5000, "x" * 5000),
        ("evil\x1bname", r"evil\x1bname"),
    ],
)
def test_only_the_last_part_of_a_path_is_public(name, shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)

    assert public_name(name) == shown


def test_ordinary_text_stays_as_it_is():
    assert spell_out_controls("first\n\tsecond é 海 🌊") == "first\n\tsecond é 海 🌊"

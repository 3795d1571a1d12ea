"""Every family of Transformers with a causal language model, against the table of docs/architectures.md."""

import pytest
from architectures import COMMAND, PAGE, format_table, read_table
from families import FAMILIES, Outcome, try_family

TABLE = read_table()


@pytest.mark.parametrize("family", FAMILIES)
def test_family_does_as_the_table_says(family, tmp_path):
    outcome = try_family(family, tmp_path / "model")
    promised = TABLE.get(family)
    if promised is None:
        pytest.skip(f"not in docs/architectures.md ({outcome.status}: {outcome.reason}); run {COMMAND}")
    assert (outcome.model_class, outcome.status) == (promised.model_class, promised.status), outcome.reason
    assert outcome.dense == promised.dense
    if outcome.status != "not built":  # those are words of Transformers, which may change
        assert outcome.reason == promised.reason


def test_at_least_forty_decoder_only_families_work():
    works = [o for o in TABLE.values() if o.kind == "decoder-only" and o.status == "works"]
    assert len({o.model_class for o in works}) >= 40


def test_table_is_read_as_it_is_written(tmp_path):
    outcomes = [
        Outcome("a", "decoder-only", "AForCausalLM", "works", ("x.up: a | b", "y: c")),
        Outcome("b", "encoder", "", "not built", reason="c | d"),
    ]
    page = tmp_path / "page.md"
    page.write_text(format_table(outcomes))
    assert read_table(page) == {outcome.family: outcome for outcome in outcomes}


def test_readme_and_page_count_what_the_table_holds():
    works = sum(outcome.status == "works" for outcome in TABLE.values())
    readme = " ".join((PAGE.parents[1] / "README.md").read_text().split())
    assert f"of the {len(TABLE)} families of causal language models in Transformers" in readme
    assert f", {works} work, in tiny" in readme
    assert format_table(TABLE.values()).partition(": ")[2] in PAGE.read_text()

"""Every family of Transformers with a causal language model, against what docs/architectures.md promises."""

import pytest
from architectures import COMMAND, PAGE, format_page, read_outcomes, write_outcomes
from families import FAMILIES, Outcome, try_family, what_can_go

TABLE = read_outcomes()
pytestmark = pytest.mark.usefixtures("one_picture")


@pytest.mark.parametrize("family", FAMILIES)
def test_family_does_as_the_page_says(family, tmp_path):
    outcome = try_family(family, tmp_path / "model")
    promised = TABLE.get(family)
    if promised is None:
        pytest.skip(f"not in docs/architectures.md ({outcome.status}: {outcome.reason}); run {COMMAND}")
    assert (outcome.model_class, outcome.status) == (promised.model_class, promised.status), outcome.reason
    assert outcome.dense == promised.dense
    if outcome.status != "not built":  # those are words of Transformers, which may change
        assert outcome.reason == promised.reason


@pytest.mark.parametrize("family", [*FAMILIES[::24], "opt", "mixtral", "gemma3n_text"])
def test_whole_parts_of_a_family_can_go_as_the_page_says(family):
    if family in TABLE and TABLE[family].status == "works":
        assert what_can_go(family) == TABLE[family].smaller


def test_at_least_forty_decoder_only_families_work():
    works = [o for o in TABLE.values() if o.kind == "decoder-only" and o.status == "works"]
    assert len({o.model_class for o in works}) >= 40


def test_outcomes_are_read_as_they_are_written(tmp_path):
    outcomes = [
        Outcome("a", "decoder-only", "AForCausalLM", "works", ("x.up: a | b", "y: c"), smaller=("heads",)),
        Outcome("b", "encoder", "", "not built", reason="c | d"),
    ]
    file = tmp_path / "outcomes.jsonl"
    write_outcomes(outcomes, file)
    assert read_outcomes(file) == {outcome.family: outcome for outcome in outcomes}


def test_families_that_fail_or_stay_dense_alike_share_a_row():
    page = format_page(
        [
            Outcome("b", "encoder", "B", "works", ("up: router",), smaller=("channels", "heads")),
            Outcome("a", "encoder", "A", "works", ("up: router",)),
            Outcome("c", "encoder", "C", "refused", reason="C can't be pruned: no | layers"),
            Outcome("d", "decoder-only", "D", "refused", reason="D can't be pruned: no | layers"),
            Outcome("e", "unknown", "", "not built", reason="words of Transformers"),
        ]
    )
    assert "| Decoder-only language models | 0 of 1 |\n" in page
    assert "they are refused | 2 of 3 |\n" in page
    assert "| up: router | `a`, `b` |\n" in page
    assert "can go: channels in 1, heads in 1, and experts in 0 families." in page
    assert "| channels, heads | `b` |\n| nothing | `a` |\n" in page
    assert "| refused: no \\| layers | `c`, `d` |\n" in page
    assert "| not built | `e` |\n" in page


def test_readme_and_page_count_what_was_found():
    works = sum(outcome.status == "works" for outcome in TABLE.values())
    readme = " ".join((PAGE.parents[1] / "README.md").read_text().split())
    assert f"{works} of the {len(TABLE)} families of causal language models" in readme
    assert format_page(TABLE.values()).partition(": ")[2] in PAGE.read_text()

import dataclasses
from types import SimpleNamespace

import pytest
from pruning import prune
from tiny_llama import tiny_llama, tiny_tokens

from optimum_fista.folder.checkpoint import mark_retrained
from optimum_fista.headlines import headlines
from optimum_fista.origin import MeasuredPerplexity, OriginReport, StepReport, read_origin

pytestmark = pytest.mark.filterwarnings("ignore:the model was pruned before")


def measured(**changes) -> MeasuredPerplexity:
    values = {"perplexity": 9.0, "num_tokens": 100, "text": "sea", "vocabulary": 64, "sha256": "ab"}
    return MeasuredPerplexity(**values | changes)


def test_runs_on_a_model_in_memory_know_the_first_model():
    model = tiny_llama()
    tokens = tiny_tokens().split(4)
    first = prune(model, tokens, pattern="layers:0.5", method="wanda")
    second = prune(model, tokens, pattern="channels:0.25/4", method="wanda")
    third = prune(model, tokens, pattern="2:4", method="wanda")

    assert first.origin is None
    assert third.origin.num_parameters == tiny_llama().num_parameters()
    assert third.origin.sha256 == first.model["sha256"]
    assert [step.pattern for step in third.steps] == ["layers:0.5", "channels:0.25/4", "2:4"]
    assert [step.num_parameters for step in third.origin.steps] == [
        first.model["num_parameters"],
        second.model["num_parameters"],
    ]


def test_a_training_between_two_runs_is_noted():
    model = tiny_llama()
    tokens = tiny_tokens().split(4)
    prune(model, tokens, pattern="2:4", method="wanda")
    mark_retrained(model)
    second = prune(model, tokens, pattern="layers:0.5", method="wanda")

    assert [step.retrained for step in second.steps] == [True, False]


@pytest.fixture(scope="module")
def grown():
    """Reports of two runs: one removes a decoder layer, and one channels after many tokens were added."""
    model = tiny_llama()
    tokens = tiny_tokens().split(4)
    first = prune(model, tokens, pattern="layers:0.5", method="wanda")
    model.resize_token_embeddings(model.config.vocab_size + 1000)
    with pytest.warns(UserWarning, match="the model was pruned before"):
        second = prune(model, tokens, pattern="channels:0.25/4", method="wanda")
    return first, second


def test_a_model_that_grew_between_two_runs_has_lost_what_both_runs_removed(grown):
    first, second = grown
    removed = first.totals["num_removed"] + second.totals["num_removed"]
    before = tiny_llama().num_parameters()
    added = second.num_parameters_given - first.model["num_parameters"]

    headline = next(one for one in headlines(second) if one.name == "Removed")

    assert first.totals["num_removed"] < added
    assert second.removed == (
        f"{removed:,} of {before:,} parameters removed ({removed / before:.2%}, {second.totals['num_removed']:,} of "
        f"them by this run), {second.model['num_parameters']:,} left; between the runs the model grew by {added:,} "
        "parameters"
    )
    assert headline.value == f"{removed / before:.2%}"
    assert headline.remark.endswith(f"; between the runs the model grew by {added:,} parameters")


def test_a_run_that_sets_zeros_says_what_earlier_runs_removed_of_a_model_that_grew(grown):
    first, second = grown
    removed = first.totals["num_removed"]
    before = tiny_llama().num_parameters()
    added = second.num_parameters_given - first.model["num_parameters"]
    # as if it had removed nothing
    model = second.model | {"num_parameters": second.num_parameters_given}
    zeros = dataclasses.replace(second, model=model)

    assert zeros.removed == ""
    assert zeros.removed_before == (
        f"earlier runs removed {removed:,} of {before:,} parameters ({removed / before:.2%}); between the runs the "
        f"model grew by {added:,} parameters"
    )


def test_after_a_training_the_text_of_a_perplexity_may_have_been_seen():
    model = tiny_llama()
    tokens = tiny_tokens().split(4)
    first = prune(model, tokens, pattern="2:4", method="wanda")
    mark_retrained(model)
    second = prune(model, tokens, pattern="layers:0.5", method="wanda")

    for report in (first, second):
        report.perplexity = {"num_tokens": 10, "text": "sea.txt"}
    assert first.measured_on == "10 tokens of sea.txt that no weight was fitted to"
    assert "an earlier training may have seen them" in second.measured_on


@pytest.mark.parametrize("entry", [None, {}, "text", {"method": "wanda"}])
def test_a_model_that_was_never_pruned_has_no_origin(entry):
    assert read_origin(SimpleNamespace(fista_pruning=entry)) is None


@pytest.mark.parametrize(
    "origin",
    [
        {"name": 3},
        {"steps": [{}]},
        {"steps": []},
        "text",
        {"surprise": 1},
        {"num_parameters": 0, "steps": [{"pattern": "2:4"}]},
    ],
)
def test_an_origin_that_can_not_be_read_counts_as_unknown(origin):
    entry = {"pattern": "2:4", "pruned_before": ["layers:0.5"], "origin": origin}

    found = read_origin(SimpleNamespace(fista_pruning=entry))

    assert found == OriginReport(steps=[StepReport("layers:0.5"), StepReport("2:4")])


@pytest.mark.parametrize("pruned_before", [None, "layers:0.5", 3])
def test_earlier_runs_that_can_not_be_read_are_left_out(pruned_before):
    entry = {"pattern": "2:4", "pruned_before": pruned_before, "retrained": True}

    found = read_origin(SimpleNamespace(fista_pruning=entry))

    assert found == OriginReport(steps=[StepReport("2:4", retrained=True)])


@pytest.mark.parametrize(
    ("changes", "is_comparable"),
    [
        ({}, True),
        ({"perplexity": 12.0}, True),
        ({"sha256": "cd"}, False),
        ({"sha256": None}, False),
        ({"vocabulary": 32}, False),
    ],
)
def test_perplexities_are_comparable_on_the_same_tokens_of_the_same_vocabulary(
    changes, is_comparable
):
    assert measured().is_comparable_with(measured(**changes)) is is_comparable


def test_perplexities_on_unknown_tokens_are_not_comparable():
    assert not measured(sha256=None).is_comparable_with(measured(sha256=None))


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"num_removed": 1200}, "1,200 parameters"),
        ({"num_zeros": 7, "num_removed": 0}, "7 weights became zero"),
        ({"num_removed": 64, "num_tokens_removed": 2}, "2 tokens, 64 parameters"),
        ({}, "not known"),
    ],
)
def test_the_parts_that_a_step_removed_are_put_in_words(numbers, words):
    assert StepReport("2:4", **numbers).removal == words

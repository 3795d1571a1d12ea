import pytest
from pruning import prune
from tiny_llama import tiny_llama, tiny_tokens

from optimum_fista.prune.notes import _short_list

BATCHES = tiny_tokens().split(4)


def test_a_run_after_one_that_removed_parts_does_not_speak_of_zeros():
    model = tiny_llama()
    prune(model, BATCHES, pattern="layers:0.5", method="wanda")

    with pytest.warns(UserWarning, match="the model was pruned before") as warned:
        prune(model, BATCHES, pattern="2:4", method="wanda")

    messages = [str(warning.message) for warning in warned]
    assert messages == [
        "the model was pruned before (wanda, layers:0.5): errors are measured against it as it is."
    ]


def test_a_run_after_one_that_set_zeros_says_how_many_and_that_they_may_be_overwritten():
    model = tiny_llama()
    prune(model, BATCHES, pattern="2:4", method="wanda")

    with pytest.warns(UserWarning, match="the model was pruned before") as warned:
        prune(model, BATCHES, pattern="2:4", method="wanda")

    messages = [str(warning.message) for warning in warned]
    assert messages == [
        "the model was pruned before (wanda, 2:4, 7680 zeros): errors are measured against it as it is, "
        "and zeros outside of the new pattern may be overwritten."
    ]


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([3], "3"),
        ([3, 4], "3-4"),
        ([0, 4, 5, 6, 9], "0, 4-6, 9"),
        (range(0, 14, 2), "0, 2, 4, 6, 8, 10, ..."),
        (range(200), "0-199"),
    ],
)
def test_many_numbers_are_written_in_few_words(numbers, words):
    assert _short_list([*numbers]) == words

import pytest

from optimum_fista.verdict import verdict

ENOUGH = {"num_tokens": 4096, "text": "sea.txt", "vocabulary": 64}


@pytest.mark.parametrize(
    ("pruned", "words"),
    [
        (11.0, "close to the dense model"),
        (15.0, "usable as it is"),
        (30.0, "clearly worse, training would help"),
        (30.1, "broken: prune less"),
    ],
)
def test_the_ratio_of_two_perplexities_decides(pruned, words):
    assert verdict(dense=10.0, pruned=pruned, **ENOUGH) == words


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_tokens": 4095}, "fewer than 4,096 tokens"),
        ({"text": "self"}, "text of its own"),
        ({"dense": None}, "the perplexity of the dense model is not known on this text"),
        ({"dense": 33.0}, "the dense model is no better than chance"),
    ],
)
def test_there_is_no_verdict_if_the_numbers_say_little(changes, reason):
    words = verdict(**{"dense": 10.0, "pruned": 11.0, **ENOUGH, **changes})

    assert words.startswith("no verdict")
    assert words.endswith(reason)

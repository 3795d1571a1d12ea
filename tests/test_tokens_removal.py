"""The request to remove tokens: read from the pattern of a configuration, which it is not."""

import pytest

from optimum_fista import FistaPruningConfig
from optimum_fista.solve.patterns import parse_pattern
from optimum_fista.tokens_removal import TokensRemoval


@pytest.mark.parametrize(
    ("text", "request_"),
    [
        ("vocab:0.35", TokensRemoval(0.35)),
        ("vocab:unused", TokensRemoval(None)),
        ("vocab:0.35/128", TokensRemoval(0.35, 128)),
        ("vocab:unused/1", TokensRemoval(None, 1)),
    ],
)
def test_a_request_for_fewer_tokens_is_read_and_written(text, request_):
    assert TokensRemoval.read(text) == request_
    assert str(request_) == text
    assert FistaPruningConfig(pattern=text).tokens_removal == request_


@pytest.mark.parametrize("text", ["2:4", "channels:0.25", "unstructured"])
def test_patterns_of_other_kinds_are_not_read_as_requests(text):
    assert TokensRemoval.read(text) is None
    assert FistaPruningConfig(pattern=text).tokens_removal is None


def test_a_request_is_refused_as_a_pattern_of_weights():
    with pytest.raises(ValueError, match=r"pattern='vocab:0\.35': pass 'unstructured'"):
        parse_pattern("vocab:0.35")


@pytest.mark.parametrize("text", ["vocab:0", "vocab:1", "vocab:1.5", "vocab:0.5/0", "vocab:x"])
def test_shares_that_make_no_sense_are_refused(text):
    with pytest.raises(ValueError, match=r"pass a share of the tokens in \(0, 1\)"):
        FistaPruningConfig(pattern=text)


def test_tokens_and_other_parts_need_two_runs():
    with pytest.raises(ValueError, match="remove tokens first, in a run of its own"):
        FistaPruningConfig(pattern="channels:0.25+vocab:0.1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.5}, "sparsity=0.5 and pattern='vocab:0.35' disagree"),
        ({"include": ["*.q_proj"]}, r"include=\('\*.q_proj',\) has no meaning"),
        ({"expert_refit": False}, "expert_refit=False has no meaning"),
        ({"keep_divisible": 8}, "keep_divisible=8 has no meaning"),
        ({"held_out": 8}, "held_out=8 has no meaning"),
        ({"method": "wanda"}, "method='wanda' has no meaning"),
        ({"method_options": {"rho": 0.1}}, r"method_options=\{'rho': 0.1\} has no meaning"),
        ({"max_iterations": 9}, "max_iterations=9 has no meaning"),
        ({"tolerance": 0.1}, "tolerance=0.1 has no meaning"),
        ({"warm_start": "wanda"}, "warm_start='wanda' has no meaning"),
        ({"error_correction": "full"}, "error_correction='full' has no meaning"),
        ({"residual_correction": 1.0}, "residual_correction=1.0 has no meaning"),
        ({"allocation": "uniform"}, "allocation='uniform' has no meaning"),
        ({"allocation_tokens": 64}, "allocation_tokens=64 has no meaning"),
    ],
)
def test_options_of_weights_have_no_meaning_for_tokens(options, message):
    with pytest.raises(ValueError, match=message):
        FistaPruningConfig(pattern="vocab:0.35", **options)


def test_a_recipe_that_sets_an_option_of_the_method_is_named_in_the_refusal():
    with pytest.raises(ValueError, match=r"error_correction='none' .* or the recipe that sets it"):
        FistaPruningConfig.recipe("fast", pattern="vocab:0.35")


def test_a_report_with_the_choices_of_the_method_can_be_read_again():
    config = FistaPruningConfig(pattern="vocab:0.35", compute_dtype="float32", seed=3).resolved()
    assert config.error_correction is not None

    assert FistaPruningConfig.from_dict(config.to_dict()) == config


def test_a_report_of_an_older_version_can_be_read_again():
    """It has the 2048 tokens for gradients that all runs had."""
    values = FistaPruningConfig(pattern="vocab:0.35").resolved().to_dict()

    config = FistaPruningConfig.from_dict(values | {"allocation_tokens": 2048})

    assert config.tokens_removal is not None


def test_a_configuration_of_tokens_survives_json():
    config = FistaPruningConfig(pattern="vocab:0.35/128", keep_tokens=["zebra", 7])

    again = FistaPruningConfig.from_dict(config.to_dict())

    assert again == config
    assert again.tokens_removal == TokensRemoval(0.35, 128, ("zebra", 7))
    assert again.resolved().tokens_removal == again.tokens_removal


@pytest.mark.parametrize(
    ("share", "multiple", "number", "num_kept"),
    [(0.35, None, 49_152, 31_936), (0.35, 1, 49_152, 31_949), (0.5, None, 60, 30)],
)
def test_a_share_is_rounded_to_the_nearest_multiple(share, multiple, number, num_kept):
    assert TokensRemoval(share, multiple).num_kept(number) == num_kept


def test_a_share_that_leaves_none_or_all_is_refused():
    with pytest.raises(ValueError, match=r"0 of 100 tokens would stay .* for which 64 to 64 stay"):
        TokensRemoval(0.9).num_kept(100)

    with pytest.raises(ValueError, match=r"128 of 128 tokens would stay"):
        TokensRemoval(0.01).num_kept(128)


@pytest.mark.parametrize("num_kept", [31_936, 64, 49_088])
def test_a_request_for_a_number_of_tokens_keeps_this_number(num_kept):
    request = TokensRemoval.keeping(num_kept, 49_152)

    assert request.num_kept(49_152) == num_kept


def test_a_request_for_a_number_of_tokens_is_written_in_few_digits():
    assert str(TokensRemoval.keeping(31_936, 49_152)) == "vocab:0.35"

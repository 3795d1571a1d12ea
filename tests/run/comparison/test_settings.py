import pytest

from optimum_fista import FistaPruningConfig
from optimum_fista.run.comparison.settings import candidates, parse_config


@pytest.mark.parametrize(
    ("method", "pattern", "expected"),
    [
        ("default", "0.6", FistaPruningConfig(sparsity=0.6, seed=3)),
        ("wanda", "2:4", FistaPruningConfig(pattern="2:4", method="wanda", seed=3)),
        ("alps:error_correction=intra", "0.5", FistaPruningConfig(method="alps", error_correction="intra", seed=3)),
        ("default:error_correction=0.25", "0.5", FistaPruningConfig(error_correction=0.25, seed=3)),
        ("default:ridge=0.1", "0.5", FistaPruningConfig(method_options={"ridge": 0.1}, seed=3)),
        ("paper:warm_start=dense", "0.5", FistaPruningConfig.paper(warm_start="dense", seed=3)),
        ("fast", "2:4", FistaPruningConfig.recipe("fast", pattern="2:4", seed=3)),
        ("wanda:seed=7", "0.5", FistaPruningConfig(method="wanda", seed=7)),
    ],
)
def test_methods_with_options(method, pattern, expected):
    assert parse_config(method, pattern, seed=3) == expected


def test_the_papers_own_options_can_be_changed_one_by_one():
    options = parse_config("paper:patience=5", "0.5").method_options
    assert options == {**FistaPruningConfig.paper().method_options, "patience": 5}


@pytest.mark.parametrize(
    ("method", "pattern", "message"),
    [
        ("wnada", "0.5", "wnada"),
        ("wanda", "24", "sparsity=24.0 is outside"),
        ("wanda", "half", "pattern='half': pass 'unstructured' or 'n:m'"),
        ("wanda:scope", "0.5", "'scope' is no option; pass name:option=value"),
        ("wanda:nothing=1", "0.5", "nothing"),
    ],
)
def test_useless_methods_and_patterns(method, pattern, message):
    with pytest.raises(ValueError, match=message):
        parse_config(method, pattern)
    with pytest.raises(ValueError, match=message):
        candidates(["magnitude", method], ["0.4", pattern], [0])


def test_a_method_that_lacks_one_pattern_is_a_row_with_an_error():
    found = candidates(["wanda", "wanda:scope=row"], ["0.5", "2:4"], [0, 1])
    assert [(c.method, c.pattern, c.seed) for c in found[:2]] == [("wanda", "0.5", 0), ("wanda:scope=row", "0.5", 0)]
    assert [c.seed for c in found] == [0] * 4 + [1] * 4
    failed = [c for c in found if c.config is None]
    assert [(c.method, c.pattern) for c in failed] == [("wanda:scope=row", "2:4")] * 2
    assert "scope='row' has no meaning for pattern='2:4'" in failed[0].error


def test_all_hold_out_the_same_windows():
    found = candidates(["wanda", "default"], ["0.5"], [0], held_out=3)
    assert [candidate.config.held_out for candidate in found] == [3, 3]
    with pytest.raises(ValueError, match="held_out is the same for all methods; pass --held-out N instead"):
        parse_config("wanda:held_out=2", "0.5")

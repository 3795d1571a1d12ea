import contextlib
import dataclasses
import json

import pytest

from optimum_fista.config import RECIPES, FistaPruningConfig
from optimum_fista.solve.methods import METHODS, method_class
from optimum_fista.solve.patterns import Unstructured, parse_pattern

DOWN = "model.layers.3.mlp.down_proj"
QUERY = "model.layers.3.self_attn.q_proj"


def through_json(config: FistaPruningConfig) -> FistaPruningConfig:
    return FistaPruningConfig.from_dict(json.loads(json.dumps(config.to_dict())))


def test_the_scope_is_that_of_the_method_unless_given():
    assert FistaPruningConfig(method="wanda").pattern_for(DOWN).scope == "row"
    assert FistaPruningConfig(method="wanda", scope="matrix").pattern_for(DOWN).scope == "matrix"
    assert FistaPruningConfig(method="magnitude", scope="row").pattern_for(DOWN).scope == "row"
    assert (
        FistaPruningConfig(method="wanda", overrides={"*": 0.25}).pattern_for(DOWN).scope == "row"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity=1\.0 is outside \[0, 1\)"),
        ({"overrides": {"*": {"*": 1}}}, "pass a dictionary of text to a number or text"),
        ({"include": 3}, "include=3: pass a tuple of text"),
        ({"method": "obd"}, "method='obd': pass one of .*'fista'"),
        (
            {"error_correction": "inter"},
            r"error_correction='inter': pass 'none', 'after_attention', 'intra', 'full' or a number from 0 to 1",
        ),
        ({"allocation": "owl"}, "allocation='owl': pass 'uniform' or 'fisher'"),
        ({"allocation_tokens": 1}, "allocation_tokens=1: pass a whole number of at least 2"),
        ({"method": "fista", "warm_start": "random"}, "warm_start='random': pass one of"),
        ({"method": "wanda", "max_iterations": 3}, "method 'wanda' has no option 'max_iterations'"),
        ({"method": "fista", "max_iterations": 0}, "max_iterations=0"),
        ({"seed": -1}, "seed=-1: pass a whole number from 0 to 18446744073709551615"),
        ({"expert_refit": False}, "expert_refit=False has no meaning for pattern='unstructured'"),
        (
            {"keep_divisible": 8, "pattern": "channels:0.25"},
            "keep_divisible=8 has no meaning for pattern='channels:0.25': leave it out, or pass a",
        ),
        (
            {"keep_divisible": 8, "pattern": "experts:0.25/4"},
            "keep_divisible=8 has no meaning for pattern='experts:0.25/4': pass only one of them",
        ),
        ({"keep_divisible": 0, "pattern": "experts:0.25"}, "keep_divisible=0: pass a whole number"),
        (
            {"reorder_channels": True},
            "reorder_channels=True has no meaning for pattern='unstructured'",
        ),
        (
            {"pattern": "channels:0.5", "include": "*.0.*"},
            "include=.* has no meaning for pattern='channels:0.5'",
        ),
        ({"overrides": {"*q_proj": "5:4"}}, r"overrides\['\*q_proj'\]: pattern='5:4'"),
    ],
)
def test_options_are_checked_when_constructed(options, message):
    with pytest.raises(ValueError, match=message):
        FistaPruningConfig(**options)


@pytest.mark.parametrize("option", [f.name for f in dataclasses.fields(FistaPruningConfig)])
@pytest.mark.parametrize("value", [{"a": []}, [3], "", "word", 3, 2.5, True, None])
def test_a_value_of_any_type_is_kept_through_json_or_refused(option, value):
    with contextlib.suppress(ValueError):
        config = FistaPruningConfig.from_dict({"method": "fista"} | {option: value})
        assert through_json(config) == config


def test_options_of_methods_of_a_wrong_type_are_refused():
    for name, value in (("patience", "3"), ("rounding_share", None), ("warm_start", 3)):
        with pytest.raises(ValueError, match=f"{name}|method_options"):
            FistaPruningConfig(method="fista", method_options={name: value})


def test_a_method_of_others_is_known_by_the_name_it_is_registered_under(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Louder(METHODS["wanda"]):
        share: float = 0.5

    monkeypatch.setitem(METHODS, "louder", Louder)

    config = FistaPruningConfig(method="louder", method_options={"share": 0.25})

    assert config.create_method("") == Louder(0.25)
    assert config.resolved().scope == "row"  # a subclass inherits the defaults of Wanda


def test_options_are_frozen_and_detached_from_the_callers():
    overrides = {"*q_proj": 0.25}

    config = FistaPruningConfig(overrides=overrides)
    overrides["*q_proj"] = 0.75

    assert config.pattern_for(QUERY).sparsity == 0.25

    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sparsity = 0.1


def test_the_first_override_that_matches_decides():
    config = FistaPruningConfig(
        0.6, overrides={"*.3.*.down_proj": "1:4", "*.down_proj": 0.25, "*.q_proj": 0}
    )

    assert config.pattern_for(DOWN) == parse_pattern("1:4")
    assert config.pattern_for("model.layers.4.mlp.down_proj") == Unstructured(0.25)
    assert config.pattern_for("model.layers.4.mlp.up_proj") == Unstructured(0.6)
    assert config.reason_left_dense(QUERY) == "sparsity 0"
    assert config.reason_left_dense(DOWN) is None


@pytest.mark.parametrize("name", METHODS)
def test_options_left_open_take_the_defaults_of_the_method(name):
    method = method_class(name)
    defaults = method.defaults_up_to_half or method.defaults

    resolved = FistaPruningConfig(method=name).resolved()

    for field in dataclasses.fields(defaults):
        assert getattr(resolved, field.name) == getattr(defaults, field.name)

    chosen = FistaPruningConfig(
        method=name,
        error_correction="full",
        residual_correction=0.25,
        allocation="uniform",
        allocation_tokens=64,
    )

    assert chosen.resolved() == dataclasses.replace(chosen, scope=defaults.scope)
    assert resolved.resolved() == resolved


@pytest.mark.parametrize(
    ("pattern", "count"), [("unstructured", 1024), ("2:4", 1024), ("layers:0.1", 2048)]
)
def test_whole_parts_take_the_loss_of_more_tokens(pattern, count):
    assert FistaPruningConfig(pattern=pattern).resolved().allocation_tokens == count
    chosen = FistaPruningConfig(pattern=pattern, allocation_tokens=64)
    assert chosen.resolved().allocation_tokens == 64


def test_operators_share_the_zeros_only_if_method_pattern_and_overrides_allow_it():
    config = FistaPruningConfig(overrides={"*.q_proj": 0.25, "*.k_proj": "2:4"})

    assert config.shares_budget(DOWN)
    assert not config.shares_budget(QUERY)
    assert not config.shares_budget("model.layers.3.self_attn.k_proj")

    assert not FistaPruningConfig(pattern="2:4").shares_budget(DOWN)
    assert not FistaPruningConfig(method="alps").shares_budget(DOWN)
    assert FistaPruningConfig(method="alps", allocation="fisher").shares_budget(DOWN)


def test_include_and_exclude_decide_which_operators_stay_dense():
    config = FistaPruningConfig(include="*.mlp.*", exclude=["*.0.*"])

    assert config.include == ("*.mlp.*",)
    assert config.exclude == ("*.0.*",)
    assert config.reason_left_dense(DOWN) is None
    assert config.reason_left_dense(QUERY) == "not in include"
    assert config.reason_left_dense("model.layers.0.mlp.down_proj") == "exclude"

    assert FistaPruningConfig().reason_left_dense("model.layers.0.mlp.down_proj") is None


@pytest.mark.parametrize(
    "config",
    [
        FistaPruningConfig(),
        FistaPruningConfig(
            0.7, scope="row", include=("*.mlp.*",), overrides={"*up*": "2:4", "*gate*": 0.1}
        ),
        FistaPruningConfig(
            method="fista", max_iterations=5, tolerance=0.0, method_options={"patience": 2}
        ),
    ],
)
def test_a_configuration_is_the_same_after_writing_and_reading_json(config, tmp_path):
    assert through_json(config) == config

    config.save_pretrained(tmp_path / "saved")
    saved = FistaPruningConfig.from_pretrained(tmp_path / "saved")

    assert saved == config
    assert [*saved.overrides] == [*config.overrides]  # the first match counts
    assert set(json.loads((tmp_path / "saved" / "pruning_config.json").read_text())) == {
        f.name for f in dataclasses.fields(config)
    }


def test_a_pruned_folder_has_its_configuration(tmp_path):
    config = FistaPruningConfig(0.25, method="wanda", exclude=("*.o_proj",))
    (tmp_path / "fista").mkdir()
    (tmp_path / "fista" / "report.json").write_text(
        json.dumps({"config": config.to_dict(), "operators": []})
    )

    assert FistaPruningConfig.from_pretrained(tmp_path) == config


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()

    with pytest.raises(
        FileNotFoundError, match=r"empty' holds neither fista/report.json nor pruning_config.json"
    ):
        FistaPruningConfig.from_pretrained(tmp_path / "empty")


def test_json_that_is_no_configuration_is_refused(tmp_path):
    file = tmp_path / "half.json"
    file.write_text("{")

    with pytest.raises(ValueError, match=r"config '.*half\.json' is not JSON: Expecting"):
        FistaPruningConfig.from_pretrained(file)

    file.write_text("0.5")

    with pytest.raises(
        ValueError, match=r"half\.json' holds a JSON float: pass an object of options"
    ):
        FistaPruningConfig.from_pretrained(file)


def test_unknown_options_are_refused_by_name():
    with pytest.raises(
        ValueError, match=r"unknown options 'sparcity', 'zeros': pass some of sparsity, pattern"
    ):
        FistaPruningConfig.from_dict({"sparcity": 0.5, "zeros": 1, "seed": 0})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "after_attention"),
        ({"sparsity": 0.51}, "intra"),
        ({"pattern": "2:4"}, "intra"),
        ({"pattern": "channels:0.25"}, 0.5),
        ({"sparsity": 0.3, "error_correction": "full"}, "full"),
        ({"sparsity": 0.3, "residual_correction": 1.0}, "intra"),
        ({"sparsity": 0.3, "method": "fista"}, "intra"),
        ({"sparsity": 0.3, "method": "wanda"}, 0.0),
    ],
)
def test_the_error_correction_that_the_method_chooses_depends_on_the_pattern(options, expected):
    assert FistaPruningConfig(**options).resolved().error_correction == expected


def test_the_paper_configuration_has_the_settings_of_the_paper():
    config = FistaPruningConfig.paper(0.5)

    assert config.method == "fista"
    assert config.resolved().error_correction == "intra"
    assert (config.resolved().allocation, config.resolved().residual_correction) == ("uniform", 0)
    assert config.sparsity == 0.5
    for model_type, warm_start in (
        ("opt", "sparsegpt"),
        ("llama", "wanda"),
        ("gpt2", "wanda"),
        ("", "wanda"),
    ):
        method = config.create_method(model_type)
        assert type(method) is METHODS["fista"]
        assert method.warm_start == warm_start
        assert method.max_iterations == 20
        assert method.patience == 3
        assert method.rounding_share == 0.3
        assert method.refit_iterations == 0


def test_a_recipe_holds_only_what_differs_from_the_defaults():
    of_zeros = FistaPruningConfig().resolved().to_dict()
    of_parts = FistaPruningConfig(pattern="channels:0.25").resolved().to_dict()
    for name, settings in RECIPES.items():
        for key, value in settings.items():
            assert value != of_zeros[key] or value != of_parts[key]
        assert FistaPruningConfig.recipe(name) == FistaPruningConfig.from_dict(settings)
    assert FistaPruningConfig.recipe("default") == FistaPruningConfig()

    assert FistaPruningConfig.recipe("paper", sparsity=0.6) == FistaPruningConfig.paper(0.6)

    with pytest.raises(ValueError, match="recipe='slow': pass one of 'default', 'fast', 'paper'"):
        FistaPruningConfig.recipe("slow")


def test_options_win_over_a_recipe():
    config = FistaPruningConfig.recipe(
        "fast", pattern="2:4", residual_correction=0.5, error_correction="full"
    )

    assert config == FistaPruningConfig(
        pattern="2:4", residual_correction=0.5, error_correction="full"
    )

    config = FistaPruningConfig.recipe("paper", method="wanda", seed=3)

    assert config == FistaPruningConfig(method="wanda", seed=3)  # without the options of FISTA

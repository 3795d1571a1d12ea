import json
import math
import weakref
from dataclasses import replace

import pytest
from tiny_llama import TEXT, save_tiny_folder

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.run.checkpoints.loading import load_model
from optimum_fista.run.comparison import compare as module
from optimum_fista.run.comparison.compare import compare
from optimum_fista.run.comparison.settings import ComparisonSettings
from optimum_fista.run.evaluation.perplexity import evaluate_perplexity
from optimum_fista.run.texts.text import load_text
from optimum_fista.run.texts.windows import calibration_windows, evaluation_windows


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    (folder / "sea.txt").write_text(TEXT)
    (folder / "calm.txt").write_text(TEXT[::-1])
    save_tiny_folder(folder / "model")
    return folder


@pytest.fixture
def whole(places):
    """Settings of a comparison with everything around it."""
    return ComparisonSettings(
        str(places / "model"),
        methods=("magnitude", "wanda"),
        patterns=("0.5", "2:4"),
        texts=(str(places / "sea.txt"),),
        calibration=str(places / "calm.txt"),
        num_samples=6,
        sequence_length=32,
        max_windows=3,
        device="cpu",
    )


@pytest.fixture
def settings(whole, monkeypatch):
    """The same without pictures and without searching for garbage, which take longer than everything else."""
    monkeypatch.setattr(module.Comparison, "write_plots", lambda self, folder: [])
    monkeypatch.setattr(module, "release_free_memory", lambda **options: None)
    return whole


@pytest.fixture
def pruned(monkeypatch):
    """Configurations of the models that were really pruned."""
    configs = []
    prune = FistaPruner.prune

    def counted(self, *arguments, **options):
        configs.append(self.config)
        return prune(self, *arguments, **options)

    monkeypatch.setattr(module.FistaPruner, "prune", counted)
    return configs


def test_rows_are_what_pruning_and_measuring_give(whole, tmp_path):
    settings = whole
    comparison = compare(settings, tmp_path, progress=False)
    assert [(r.method, r.pattern) for r in comparison.rows] == [
        ("dense", "-"),
        ("magnitude", "0.5"),
        ("wanda", "0.5"),
        ("magnitude", "2:4"),
        ("wanda", "2:4"),
    ]
    model, tokenizer = load_model(settings.model, device="cpu")
    windows = evaluation_windows(tokenizer, load_text(settings.texts[0], "test"), 32, 3)
    assert comparison.rows[0].perplexity == {"sea": evaluate_perplexity(model, windows).perplexity}
    tokens = calibration_windows(tokenizer, load_text(settings.calibration, "calibration"), 6, 32, 0)
    report = FistaPruner(FistaPruningConfig(pattern="2:4", method="wanda"), progress=False).prune(
        model, tokens.split(1)
    )
    last = comparison.rows[-1]
    assert last.perplexity == {"sea": evaluate_perplexity(model, windows).perplexity}
    assert last.totals["mean_fit_error"] == report.totals["mean_fit_error"]
    assert last.calibration["sha256"] == report.calibration["sha256"]
    assert {"table.md", "table.csv", "table.json"} <= {path.name for path in tmp_path.iterdir()}


def test_the_recipe_says_how_it_was_measured(settings, tmp_path):
    recipe = compare(replace(settings, methods=("magnitude",), patterns=("0.5",)), tmp_path, progress=False).recipe
    assert recipe[0].startswith("Perplexity on sea: file sea.txt (sha256 ")
    assert "the first 3 of 115 windows of 32 tokens, no overlap, no BOS" in recipe[0]
    assert recipe[1].startswith("Calibration, seed 0: 6 random windows of 32 tokens of file calm.txt")
    every = replace(settings, methods=("magnitude",), patterns=("0.5",), bos="every")
    assert all("BOS at the start of every window" in line for line in compare(every, tmp_path, progress=False).recipe)


def test_an_interrupted_run_goes_on_and_finished_rows_stay(settings, tmp_path, pruned, monkeypatch):
    measure = module.measure_row

    def interrupted(method, pattern, *arguments, **options):
        if pattern == "2:4":
            raise KeyboardInterrupt
        return measure(method, pattern, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "measure_row", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(settings, tmp_path, progress=False)
    assert len(json.loads((tmp_path / "table.json").read_text())["rows"]) == 3
    assert [c.method for c in pruned] == ["magnitude", "wanda", "magnitude"]
    comparison = compare(settings, tmp_path, progress=False)
    assert [(c.method, c.pattern) for c in pruned[3:]] == [("magnitude", "2:4"), ("wanda", "2:4")]
    assert compare(settings, tmp_path, progress=False) == comparison
    assert len(pruned) == 5


def test_what_a_row_depends_on_makes_it_new(settings, places, tmp_path, pruned):
    one = replace(settings, methods=("wanda",), patterns=("0.5",))
    compare(one, tmp_path, progress=False)
    compare(replace(settings, methods=("wanda",), patterns=("0.5", "2:4")), tmp_path, progress=False)
    assert len(pruned) == 2
    for changes in (
        {"num_samples": 5},
        {"texts": (str(places / "calm.txt"),)},
        {"methods": ("wanda:error_correction=intra",)},
        {"seeds": (1,)},
    ):
        before = len(pruned)
        compare(replace(one, **changes), tmp_path, progress=False)
        assert len(pruned) == before + 1, changes


def test_rows_of_other_weights_are_new(settings, tmp_path, pruned):
    one = replace(settings, model=str(tmp_path / "model"), methods=("magnitude",), patterns=("0.5",))
    save_tiny_folder(tmp_path / "model")
    before = compare(one, tmp_path / "out", progress=False)
    model, _ = load_model(one.model, device="cpu")
    model.model.layers[0].mlp.up_proj.weight.data.mul_(2)
    model.save_pretrained(one.model)
    after = compare(one, tmp_path / "out", progress=False)
    assert len(pruned) == 2
    assert all(a.perplexity != b.perplexity for a, b in zip(before.rows, after.rows, strict=True))


def test_a_row_that_fails_is_recorded_and_tried_again(settings, tmp_path, pruned):
    odd = replace(settings, patterns=("0.5", "3:5"), methods=("wanda",))
    comparison = compare(odd, tmp_path, progress=False)
    assert [r.error is None for r in comparison.rows] == [True, True, False]
    (failure,) = comparison.failures
    assert failure.startswith("wanda, 3:5, seed 0: ValueError: ")
    assert "rows of 32 inputs" in failure
    assert "\n" not in failure
    compare(odd, tmp_path, progress=False)
    assert [c.pattern for c in pruned] == ["unstructured", "3:5", "3:5"]


def test_a_dense_model_that_can_not_be_measured_ends_the_run(settings, tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise ValueError("model gives NaN logits")

    monkeypatch.setattr(module, "measure_row", broken)
    with pytest.raises(ValueError, match="NaN logits"):
        compare(settings, tmp_path, progress=False)


def test_seeds_draw_tokens_of_their_own(settings, tmp_path):
    several = replace(settings, methods=("wanda",), patterns=("0.5",), seeds=(0, 1), held_out=2)
    comparison = compare(several, tmp_path, progress=False)
    assert [(r.method, r.seed) for r in comparison.rows] == [("dense", 0), ("dense", 1), ("wanda", 0), ("wanda", 1)]
    assert [sorted(r.perplexity) for r in comparison.rows] == [
        ["calibrated", "held-out", "sea"],
        ["calibrated", "held-out"],
        ["calibrated", "held-out", "sea"],
        ["calibrated", "held-out", "sea"],
    ]
    assert comparison.rows[2].calibration["sha256"] != comparison.rows[3].calibration["sha256"]
    assert comparison.rows[2].config["seed"] == 0
    assert " ± " in comparison.table().splitlines()[-1]


def test_held_out_windows_are_not_calibrated_on(settings, tmp_path):
    both = replace(settings, methods=("wanda",), patterns=("0.5",), held_out=2, texts=(), batch_size=4)
    dense, wanda = compare(both, tmp_path, progress=False).rows
    model, tokenizer = load_model(settings.model, device="cpu")
    windows = calibration_windows(tokenizer, load_text(settings.calibration, "calibration"), 8, 32, 0)
    assert dense.perplexity["held-out"] == evaluate_perplexity(model, windows[6:]).perplexity
    assert dense.perplexity["calibrated"] == evaluate_perplexity(model, windows[:2]).perplexity
    pruner = FistaPruner(FistaPruningConfig(method="wanda", held_out=2), progress=False)
    report = pruner.prune(model, [windows[:4], windows[4:6], windows[6:]])
    assert wanda.totals["mean_fit_error"] == report.totals["mean_fit_error"]
    assert wanda.totals["mean_held_out_fit_error"] == report.totals["mean_held_out_fit_error"] > 0
    assert wanda.calibration["num_sequences"] == 6


def test_text_that_the_model_samples_is_kept(settings, tmp_path, monkeypatch, capsys):
    own = replace(settings, methods=("wanda",), patterns=("0.5",), calibration="self")
    first = compare(own, tmp_path, progress=False)
    assert "Self-sampling" not in capsys.readouterr().err
    monkeypatch.setattr("optimum_fista.run.texts.calibration_source.sample_text_from_model", None)
    assert compare(own, tmp_path, progress=False) == first
    assert "samples itself" in first.recipe[1]


def test_a_device_map_loads_the_same_model(settings, tmp_path):
    one = replace(settings, methods=("wanda",), patterns=("0.5",))
    plain = compare(one, tmp_path / "a", progress=False)
    mapped = compare(replace(one, device_map="cpu"), tmp_path / "b", progress=False)
    for a, b in zip(plain.rows, mapped.rows, strict=True):
        assert math.isclose(a.perplexity["sea"], b.perplexity["sea"], rel_tol=1e-5)


def test_one_model_at_a_time(whole, tmp_path, monkeypatch):
    alive = []
    load = module.load_model

    def counted(*arguments, **options):
        assert not [model for model in alive if model() is not None]
        loaded = load(*arguments, **options)
        alive.append(weakref.ref(loaded[0]))
        return loaded

    monkeypatch.setattr(module, "load_model", counted)
    compare(replace(whole, patterns=("0.5", "3:5"), methods=("wanda",)), tmp_path, progress=False)
    assert len(alive) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": "wanda"}, "methods='wanda' is one text: pass a list"),
        ({"methods": ()}, "methods is empty"),
        ({"seeds": (0, 0)}, r"seeds=\[0, 0\] names something twice"),
        ({"texts": ()}, "texts, tasks and held_out are empty"),
        ({"num_samples": 0}, "num_samples=0: pass 1 or more"),
        ({"bos": "never"}, "bos='never': pass one of 'auto'"),
        ({"methods": ("wnada",)}, "method 'wnada'"),
    ],
)
def test_settings_are_checked_at_once(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(settings, **changes)


def test_two_texts_of_one_name(settings, places, tmp_path):
    (tmp_path / "sea.txt").write_text(TEXT)
    with pytest.raises(ValueError, match="two are called 'sea'"):
        compare(replace(settings, texts=(*settings.texts, str(tmp_path / "sea.txt"))), tmp_path, progress=False)

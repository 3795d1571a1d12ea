import dataclasses
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from doc_pages import ROOT
from layer_problems import example

from optimum_fista.options import PruningOptions
from optimum_fista.solve import methods
from optimum_fista.solve.method import MemoryFactors, PruningMethod, register
from optimum_fista.solve.methods import METHODS, create_method, largest_memory_factors
from optimum_fista.solve.patterns import Columns, Unstructured, parse_pattern
from optimum_fista.solve.problem import LayerProblem

PATTERNS = [
    Unstructured(0.5),
    Unstructured(0.37),
    Unstructured(0.6, "row"),
    parse_pattern("2:4"),
    parse_pattern("4:8-pairs"),
    Columns(0.5),
    Columns(0.5, width=4),
]
CASES = [
    (name, pattern)
    for name, method in METHODS.items()
    for pattern in PATTERNS
    if method.takes_columns or not pattern.whole_columns
]


def test_every_file_of_the_folder_registers_its_method():
    files = {path.stem for path in Path(methods.__file__).parent.glob("*.py")} - {"__init__"}

    assert {method.__module__.rpartition(".")[2] for method in METHODS.values()} == files
    assert {"fista", "magnitude", "sparsegpt", "wanda"} <= set(METHODS)
    assert all(method.name == name for name, method in METHODS.items())


def test_the_help_and_the_documentation_name_every_method():
    options = {
        option.name: option.metadata["help"] for option in dataclasses.fields(PruningOptions)
    }
    table = (ROOT / "docs" / "method.md").read_text()
    for name in METHODS:
        assert re.search(rf"\b{name}\b", options["method"]), (
            f"name {name!r} in the help of `method` in options.py"
        )
        assert f"\n| `{name}`" in table, f"add a row for {name!r} to docs/method.md"


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("alps", {"max_iterations": 0}, "max_iterations=0: pass a whole number of at least 1"),
        ("alps", {"period": 0}, "period=0: pass a whole number of at least 1"),
        ("alps", {"first_rho": 0.0}, "first_rho=0.0: pass a positive number"),
        ("alps", {"damping": -0.1}, "damping=-0.1: pass a share of the mean Gram diagonal"),
        ("admm", {"max_iterations": 0}, "max_iterations=0: pass a whole number of at least 1"),
        ("admm", {"rho": -1.0}, "rho=-1.0: pass a positive number"),
        ("admm", {"damping": math.nan}, "damping=nan: pass a share of the mean Gram diagonal"),
        ("sparsegpt", {"block_size": 0}, "block_size=0: pass a whole number of at least 1"),
        ("sparsegpt", {"damping": -1.0}, "damping=-1.0: pass a share of the mean Gram diagonal"),
        ("fista", {"max_trials": 0}, "max_trials=0: pass a whole number of at least 1"),
        ("obs_admm", {"stages": 0}, "stages=0: pass a whole number of at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(method, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        create_method(method, **options)


@dataclasses.dataclass(frozen=True)
class Quieter(METHODS["wanda"]):
    """A subclass of a subclass."""

    share: float = 0.5
    name = "quieter"


def test_register_makes_a_class_known_by_its_name_and_defining_it_does_not(monkeypatch):
    monkeypatch.setattr("optimum_fista.solve.method.METHODS", METHODS.copy())
    known = sys.modules["optimum_fista.solve.method"].METHODS

    assert "quieter" not in known
    assert register(Quieter) is Quieter
    assert known["quieter"] is Quieter
    assert register(Quieter) is Quieter, "a notebook's cell that runs again"


def test_a_method_without_a_name_or_with_that_of_another_is_refused():
    class Impostor(Quieter):
        name = "wanda"

    class Nameless(PruningMethod):
        pass

    with pytest.raises(
        ValueError, match=r"name='wanda' of .*Impostor is that of Wanda: choose another"
    ):
        register(Impostor)
    with pytest.raises(ValueError, match=r"Nameless\.name=None: give the class a name"):
        register(Nameless)
    assert METHODS["wanda"].__name__ == "Wanda"


def test_an_unknown_option_is_refused_with_a_list_of_the_known_ones():
    with pytest.raises(ValueError) as refused:
        create_method("sparsegpt", damping=0.1, blocksize=4, actorder=True)

    assert str(refused.value) == (
        "method 'sparsegpt' has no option 'actorder', 'blocksize': it takes damping, block_size."
    )
    with pytest.raises(
        ValueError, match="method 'magnitude' has no option 'damping': it takes none"
    ):
        create_method("magnitude", damping=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(("name", "pattern"), CASES, ids=str)
def test_every_method_keeps_the_pattern_and_tells_its_error(name, pattern, corrected, dtype):
    made = example(11, 16, corrected=corrected, dtype=dtype)
    problem = made.problem
    tensors = (problem.weight, problem.gram, problem.target, problem.statistics.mean)
    before = [tensor.clone() for tensor in tensors]

    pruned = create_method(name).prune(problem, pattern)

    assert pattern.violation(pruned.mask) is None
    assert pruned.weight.dtype == dtype
    assert pruned.mask.dtype == torch.bool
    assert (pruned.weight[~pruned.mask] == 0).all()
    assert torch.isfinite(pruned.weight).all()
    expected = math.sqrt(made.squared_error(pruned.weight)) / float(made.outputs.norm())
    assert pruned.fit_error == pytest.approx(expected, rel=1e-3)
    assert all(map(torch.equal, tensors, before)), "the problem must not change"


SHARING = [(name, [Unstructured(0.5), parse_pattern("2:4")]) for name in METHODS]
SHARING += [("obs_admm", [Columns(0.5), Columns(0.5, width=4), Unstructured(0.5)])]


@pytest.mark.parametrize(("name", "patterns"), SHARING)
def test_operators_that_share_inputs_are_pruned_as_they_are_alone(name, patterns):
    made = example(6, 16)
    problems = [
        made.problem,
        LayerProblem(torch.randn(9, 16).double(), made.problem.statistics),
        made.problem,
    ]

    together = create_method(name).prune_sharing(problems[: len(patterns)], patterns)

    for problem, pattern, pruned in zip(problems, patterns, together, strict=False):
        alone = create_method(name).prune(problem, pattern)
        assert torch.equal(pruned.mask, alone.mask)
        assert torch.allclose(pruned.weight, alone.weight)
        assert pruned.fit_error == pytest.approx(alone.fit_error)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_of_the_package_states_what_memory_it_takes(name):
    assert isinstance(vars(METHODS[name]).get("memory_factors"), MemoryFactors), (
        f"give {name!r} memory_factors of its own; CONTRIBUTING.md says how they are found"
    )


def test_the_largest_memory_factors_are_the_largest_of_all_methods_that_state_them(monkeypatch):
    small = MemoryFactors(gram_matrices=9.0, weight_matrices=0.5)
    large = MemoryFactors(gram_matrices=0.5, weight_matrices=9.0, row_blocks=9.0)
    monkeypatch.setattr(METHODS["wanda"], "memory_factors", small)
    monkeypatch.setattr(METHODS["fista"], "memory_factors", large)
    monkeypatch.setattr(METHODS["alps"], "memory_factors", None)

    assert largest_memory_factors() == MemoryFactors(
        gram_matrices=9.0, weight_matrices=9.0, row_blocks=9.0
    )

"""Every method solves on a device as on the CPU, and hardly ever makes the host wait for the device."""

import pytest
import torch
from layer_problems import example
from simulated_device.backend import counted

from optimum_fista.solve.linalg import damped_inverse
from optimum_fista.solve.methods import METHODS, create_method
from optimum_fista.solve.patterns import Columns, Unstructured, parse_pattern
from optimum_fista.solve.problem import InputStatistics, LayerProblem
from optimum_fista.solve.selection import (
    keep_largest,
    keep_largest_in_groups,
    keep_largest_in_rows,
    kth_smallest_magnitude,
)

PATTERNS = [Unstructured(0.5), Unstructured(0.5, "row"), parse_pattern("2:4")]
CASES = [  # method, pattern, whether targets are of another network, number of dead inputs
    (method, pattern, corrected, num_dead)
    for method in METHODS
    for pattern in PATTERNS
    for corrected, num_dead in ((False, 0), (True, 12))
]
CASES += [
    (method, Columns(0.5, width=width), True, 4)
    for method in ("obs_admm", "flap")
    for width in (1, 4)
]
WAITS = {  # an operator of any size and pattern: two for its error, one for the statistics, one a factorisation
    "magnitude": 2,
    "wanda": 2,
    "flap": 3,
    "sparsegpt": 5,
    "admm": 4,
    "dsnot": 5,
    "obs_admm": 6,
    "alps": 8,
    "fista": 15,
}
WAITS_IN_LOOPS = [  # method, options of a short and of a long loop, waits that the second has more at most
    ("sparsegpt", {"block_size": 128}, {"block_size": 4}, 0),
    ("admm", {"max_iterations": 20}, {"max_iterations": 60}, 0),
    # every ten cycles
    (
        "dsnot",
        {"threshold": 0.0, "max_cycles": 10},
        {"threshold": 0.0, "max_cycles": 20},
        1,
    ),
    ("obs_admm", {"iterations": 4}, {"iterations": 20}, 0),
    ("obs_admm", {"refit_iterations": 11}, {"refit_iterations": 31}, 2),  # every ten steps
    # every three: rho grows by what the support changed
    (
        "alps",
        {"max_iterations": 6},
        {"max_iterations": 18},
        4,
    ),
    ("fista", {"max_trials": 1}, {"max_trials": 1, "max_iterations": 60}, 4),  # every ten steps
    # two a trial besides
    (
        "fista",
        {"max_trials": 1, "patience": 9},
        {"max_trials": 5, "patience": 9},
        4 * 4,
    ),
]


def on(device, problem):
    """The same problem on a device."""
    statistics = InputStatistics(
        problem.statistics.gram.to(device),
        problem.statistics.num_tokens,
        problem.statistics.mean.to(device),
    )
    if not problem.corrected:
        return LayerProblem(problem.weight.to(device), statistics)
    return LayerProblem(
        problem.weight.to(device),
        statistics,
        target=problem.target.to(device),
        output_energies=problem.output_energies.to(device),
    )


@pytest.fixture
def _deterministic():
    """PyTorch's deterministic algorithms, for the time of a test."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize(("name", "pattern", "corrected", "dead"), CASES, ids=str)
def test_results_are_those_of_the_cpu(name, pattern, corrected, dead):
    drawn = example(24, 32, corrected=corrected, dtype=torch.float32).problem
    for matrix in (drawn.gram, drawn.gram.mT, drawn.target):
        matrix[:, :dead] = 0
    on_cpu = on("cpu", drawn)  # made again, because what follows from the matrices has changed
    on_device = on("simulated:1", on_cpu)

    expected = create_method(name).prune(on_cpu, pattern)
    with counted() as counts:
        pruned = create_method(name).prune(on_device, pattern)

    assert pruned.weight.device == torch.device("simulated:1")
    assert torch.equal(pruned.mask.cpu(), expected.mask)
    assert torch.allclose(pruned.weight.cpu(), expected.weight, atol=1e-4)
    assert pruned.fit_error == pytest.approx(expected.fit_error, abs=1e-4)
    assert (pruned.iterations, pruned.converged) == (expected.iterations, expected.converged)
    assert "kthvalue" not in counts.runs
    waits_in_loops = {
        "alps": pruned.iterations // 3,
        "fista": 4 * (2 + 2) + 30 // 10,  # power iteration: every ten products
    }
    # which columns are kept, two factorisations and errors
    waits_of_refit = 5 if pattern.whole_columns else 0
    assert name in WAITS, (
        f"{name!r} waits {counts.waits.total()} times here: add its waits to WAITS"
    )
    assert counts.waits.total() <= WAITS[name] + waits_of_refit + waits_in_loops.get(name, 0)


@pytest.mark.parametrize("pattern", PATTERNS, ids=["matrix", "row", "2:4"])
@pytest.mark.parametrize(("name", "short", "long", "more"), WAITS_IN_LOOPS)
def test_loops_do_not_wait(name, short, long, more, pattern):
    problem = on("simulated:0", example(24, 32, corrected=True, dtype=torch.float32).problem)
    float(problem.statistics.lipschitz)  # computed once and kept, so its waits do not count

    with counted() as counts_of_short_loop:
        create_method(name, **short).prune(problem, pattern)
    with counted() as counts_of_long_loop:
        create_method(name, **long).prune(problem, pattern)

    assert counts_of_long_loop.waits.total() - counts_of_short_loop.waits.total() <= more


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_selection_is_exact_and_never_waits(levels, dtype):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-levels, levels, (40, 60), generator=generator).to(dtype) / 4
    on_device = scores.to("simulated:0")
    ascending = scores.abs().flatten().sort().values

    for count in (0, 7, 60, 1200, 2400):
        k = max(1, count)
        with counted() as counts:
            largest = keep_largest(on_device, count)
            largest_in_rows = keep_largest_in_rows(on_device, count)
            largest_in_groups = keep_largest_in_groups(on_device, 2, 4)
            smallest = kth_smallest_magnitude(on_device, k)

        assert counts.waits.total() == 0
        assert "kthvalue" not in counts.runs
        assert torch.equal(largest.cpu(), keep_largest(scores, count))
        assert torch.equal(largest_in_rows.cpu(), keep_largest_in_rows(scores, count))
        assert torch.equal(largest_in_groups.cpu(), keep_largest_in_groups(scores, 2, 4))
        assert float(smallest) == float(ascending[k - 1])


def test_an_inverse_that_fails_is_nan_without_a_wait_for_the_device():
    grams = torch.stack([torch.eye(4), -torch.eye(4)]).to("simulated:0")

    with counted() as counts:
        inverses = damped_inverse(grams, 0.5)

    assert counts.waits.total() == 0
    assert torch.allclose(inverses[0].cpu(), torch.eye(4) / 1.5)
    assert inverses[1].cpu().isnan().all()

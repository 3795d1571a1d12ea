import pytest
import torch
from layer_problems import example

from optimum_fista.model.probe import Meter
from optimum_fista.run.config import method_defaults
from optimum_fista.solve import selection
from optimum_fista.solve.cost import SolveCost
from optimum_fista.solve.methods import METHODS, create_method
from optimum_fista.solve.patterns import Unstructured

SHAPES = [(256, 128), (64, 256), (192, 192)]


@pytest.fixture
def ties(monkeypatch):
    """Thresholds that tie, as they do in matrices of millions of weights."""

    class Torch:
        def __getattr__(self, name):
            return (lambda *_: torch.zeros(())) if name == "count_nonzero" else getattr(torch, name)

    monkeypatch.setattr(selection, "torch", Torch())


def problem(rows, columns):
    return example(rows, columns, corrected=True, dtype=torch.float32).problem


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_working_set_is_the_one_foretold(name, shape, ties):
    method = create_method(name)
    given = problem(*shape)
    with Meter() as meter:
        method.prune(given, Unstructured(0.5, method_defaults(method.name).scope))
    assert method.cost().working_bytes(*shape) == pytest.approx(meter.take_peak(), rel=0.25)


@pytest.mark.parametrize("name", METHODS)
def test_products_are_those_foretold(name):
    rows, columns = 128, 256
    method = create_method(name)
    given = problem(rows, columns)
    with Meter() as meter:
        pruned = method.prune(given, Unstructured(0.5, method_defaults(method.name).scope))
    cost = method.cost()
    counted = meter.work.products
    if name == "alps":  # its iterations depend on the problem
        cost = create_method(name, max_iterations=9).cost()
        with Meter() as meter:
            pruned = create_method(name, max_iterations=9).prune(given, Unstructured(0.5))
        counted = meter.work.products - 3 * 2 * columns**3  # an inverse a period, counted as a factor
        assert pruned.iterations == 9 + 10
    assert counted == pytest.approx(cost.product_operations(rows, columns), rel=0.2)


def test_operators_and_gram_matrices_are_counted_in_their_own_units():
    cost = SolveCost(products=3, factor=1, working=((2, 3), (4, 0)))
    assert cost.working_bytes(10, 20) == 4 * max(2 * 200 + 3 * 400, 4 * 200)
    assert cost.working_bytes(1000, 20) == 4 * 4 * 20000
    assert cost.product_operations(10, 20) == 3 * 2 * 10 * 400
    assert cost.factor_operations(20) == 8000


def test_options_change_the_cost():
    assert create_method("obs_admm", iterations=8).cost().products == 3 * 8 + 5 + 2
    assert create_method("fista", warm_start="wanda").cost().factor == 0
    assert create_method("fista").cost().factor == create_method("sparsegpt").cost().factor > 0

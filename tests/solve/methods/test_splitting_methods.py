"""ADMM, ALPS and OBS-ADMM: what all splitting methods promise."""

import itertools
import weakref

import pytest
import torch
from layer_problems import example
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from optimum_fista.solve.linalg import damped_inverse
from optimum_fista.solve.methods import create_method
from optimum_fista.solve.methods.admm import SplitState, unit_diagonal
from optimum_fista.solve.methods.obs_admm import _Surgeon
from optimum_fista.solve.patterns import Unstructured, parse_pattern
from optimum_fista.solve.problem import InputStatistics, LayerProblem

SPLITTING = ("admm", "alps", "obs_admm")


@pytest.mark.parametrize("name", SPLITTING)
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_errors_beat_sparsegpts(name, corrected, pattern):
    wins = 0
    for seed in range(6):
        made = example(24, 32, corrected=corrected, seed=seed, dtype=torch.float32, correlation=2.0)
        wanted = parse_pattern(pattern)
        pruned = create_method(name).prune(made.problem, wanted)
        wins += pruned.fit_error < create_method("sparsegpt").prune(made.problem, wanted).fit_error
    assert wins >= 5


@pytest.mark.parametrize("name", SPLITTING)
def test_close_to_the_best_subset_of_a_tiny_problem(name):
    ratios = []
    for seed in range(10):
        made = example(1, 8, seed=seed, correlation=2.0)
        best = min(
            made.problem.squared_error(_refitted(made.problem, kept))
            for kept in itertools.combinations(range(8), 4)
        )
        options = {"ridge": 1e-3} if name == "obs_admm" else {}
        pruned = create_method(name, **options).prune(made.problem, Unstructured(0.5))
        ratio = made.problem.squared_error(pruned.weight) / best
        assert ratio >= 1 - 1e-9
        ratios.append(ratio)
    assert sorted(ratios)[4] < (1.7 if name == "admm" else 1.35)


def _refitted(problem, kept):
    index = list(kept)
    weight = torch.zeros_like(problem.weight)
    weight[0, index] = torch.linalg.solve(problem.gram[index][:, index], problem.target[0, index])
    return weight


@pytest.mark.parametrize("name", SPLITTING)
def test_scaling_an_input_and_its_weights_changes_nothing_but_damping(name):
    options = {"ridge": 1e-6} if name == "obs_admm" else {"damping": 1e-8}
    made = example(8, 12, correlation=2.0)
    scale = torch.logspace(-1, 1, 12, dtype=torch.float64)
    gram = made.problem.gram * scale * scale[:, None]
    scaled = LayerProblem(made.weight / scale, InputStatistics(gram, 48))
    method = create_method(name, **options)
    one, other = (method.prune(p, Unstructured(0.5)) for p in (made.problem, scaled))
    assert torch.equal(one.mask, other.mask)
    assert one.fit_error == pytest.approx(other.fit_error, rel=1e-4)


def test_alps_settles_and_says_when_it_does_not():
    made = example(16, 24, correlation=2.0)
    assert create_method("alps").prune(made.problem, Unstructured(0.5)).converged
    hurried = create_method("alps", max_iterations=6).prune(made.problem, Unstructured(0.5))
    assert not hurried.converged
    assert "max_iterations=6" in hurried.message


@pytest.mark.parametrize(("tokens", "ridge"), [(1500, 0.012), (100_000, 0.003), (12, 0.5)])
def test_obs_admm_ridge_follows_the_tokens(tokens, ridge):
    made = example(6, 12)
    problem = LayerProblem(made.weight, InputStatistics(made.problem.gram, tokens))
    found, given = (
        create_method("obs_admm", **o).prune(problem, Unstructured(0.5))
        for o in ({}, {"ridge": ridge})
    )
    assert torch.allclose(found.weight, given.weight)


def test_a_strong_ridge_keeps_the_dense_weights():
    made = example(6, 12)
    pruned = create_method("obs_admm", ridge=1e6).prune(made.problem, Unstructured(0.5))
    assert torch.allclose(pruned.weight[pruned.mask], made.weight[pruned.mask], rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"stages": 0}, "stages=0"),
        ({"ridge": -1.0}, "ridge=-1.0"),
        ({"first_rho": 3.0, "last_rho": 1.0}, "first_rho=3.0"),
    ],
)
def test_obs_admm_refuses_bad_options(options, names):
    with pytest.raises(ValueError, match=names):
        create_method("obs_admm", **options)


def large_problem(rows: int, columns: int) -> LayerProblem:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(columns, 3 * columns, generator=generator)
    weight = torch.randn(rows, columns, generator=generator)
    gram = inputs @ inputs.T
    energies = torch.full((rows,), 1e6, dtype=torch.float64)
    return LayerProblem(weight, InputStatistics(gram, 3 * columns), 0.99 * weight @ gram, energies)


class LiveMemory(TorchDispatchMode):
    """As a context: the largest number of bytes that tensors made inside held at a time, and the operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.operations: list[str] = []
        self._held: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tree_flatten((args, kwargs))[0]:
            if isinstance(tensor, torch.Tensor):
                self._held.setdefault(tensor.untyped_storage()._cdata, 0)  # made outside
        output = function(*args, **(kwargs or {}))
        self.operations.append(function.overloadpacket.__name__)
        for tensor in tree_flatten(output)[0]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._held:
                    self._held[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._held.pop, storage._cdata, None)
                    self.peak = max(self.peak, sum(self._held.values()))
        return output


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_obs_admm_keeps_to_its_working_set(pattern):
    pattern = parse_pattern(pattern)
    for rows, columns, matrices in (
        (32768, 128, 2.5),
        (128, 1024, 5.5),
    ):  # four blocks of rows, one
        problem = large_problem(rows, columns)
        with torch.no_grad(), LiveMemory() as memory:
            create_method("obs_admm").prune(problem, pattern)
        assert memory.peak <= 4 * (matrices * rows * columns + 1.03 * columns**2)
        algebra = [
            name for name in memory.operations if "linalg" in name and "check_errors" not in name
        ]
        assert set(algebra) <= {"linalg_cholesky_ex", "linalg_vecdot", "linalg_vector_norm"}
        assert 1 < algebra.count("linalg_cholesky_ex") <= 8


@pytest.mark.parametrize("width", [1, 3])
def test_norms_in_surgeon_coordinates_are_what_removing_a_group_costs(width):
    made = example(5, 12, correlation=4.0)
    gram, target = made.problem.gram, made.problem.target
    surgeon, message = _Surgeon.of(gram, torch.zeros(12).double(), width)
    assert message == ""
    inside = surgeon.weight(made.weight)
    assert torch.allclose(
        surgeon.times_blocks(inside, transposed=True) * surgeon.scale, made.weight
    )
    scaled_gram, scaled_target = surgeon.gram(gram), surgeon.target(made.problem, slice(None))
    assert torch.allclose(
        (inside @ scaled_gram * inside).sum(), (made.weight @ gram * made.weight).sum()
    )
    assert torch.allclose((inside * scaled_target).sum(), (made.weight * target).sum())
    blocks = torch.linalg.inv(scaled_gram).unflatten(0, (-1, width)).unflatten(2, (-1, width))
    assert torch.allclose(
        blocks.diagonal(dim1=0, dim2=2), torch.eye(width).double()[..., None], atol=1e-9
    )
    for group, part in enumerate(inside.split(width, dim=1)):
        others = torch.arange(12) // width != group
        inputs = made.inputs[:, others]
        error = made.outputs - inputs @ torch.linalg.lstsq(inputs, made.outputs).solution
        assert float(part.square().sum()) == pytest.approx(float(error.square().sum()), rel=1e-9)


def test_iterations_by_hand():
    made = example(4, 8)
    gram, target = made.problem.gram, made.problem.target
    pattern = Unstructured(0.5)
    state = SplitState(target.__getitem__, made.weight.clone())
    sparse, dual = made.weight.clone(), torch.zeros_like(target)
    for rho in (2.0, 2.0, 5.0, 3.0):
        inverse = damped_inverse(gram.clone(), rho)
        weight = (target - dual + rho * sparse) @ torch.linalg.inv(
            gram + rho * torch.eye(8, dtype=gram.dtype)
        )
        moved = weight + dual / rho
        mask = pattern.mask(moved)
        sparse, dual = moved * mask, dual + rho * (weight - moved * mask)
        state.iterate(inverse, rho, pattern)
        assert torch.equal(state.mask, mask)
        assert torch.allclose(state.point * mask, sparse)
        assert torch.allclose(rho * state.point * ~mask, dual)


def test_the_scaled_problem_has_the_same_minimizer():
    made = example(3, 8, corrected=True)
    gram, target, scale = unit_diagonal(made.problem, 0.05)
    assert torch.allclose(gram.diagonal(), torch.ones(8, dtype=gram.dtype))
    amount = 0.05 * made.problem.gram.diagonal().mean()
    damped = made.problem.gram + amount * torch.eye(8, dtype=gram.dtype)
    expected = torch.linalg.solve(damped, (made.problem.target + amount * made.weight).T).T
    assert torch.allclose(torch.linalg.solve(gram, target.T).T * scale, expected)

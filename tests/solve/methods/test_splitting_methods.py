"""ADMM, ALPS and OBS-ADMM: what all splitting methods promise."""

import itertools
import weakref
from collections import Counter

import pytest
import torch
from layer_problems import example
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from optimum_fista.solve.linalg import damped_inverse, products_rounded_to
from optimum_fista.solve.method import PrunedOperator
from optimum_fista.solve.methods import create_method
from optimum_fista.solve.methods.admm import SplitState, unit_diagonal
from optimum_fista.solve.methods.obs_admm import ObsAdmm, _RoundedInverses, _Surgeon
from optimum_fista.solve.patterns import Unstructured, parse_pattern
from optimum_fista.solve.problem import InputStatistics, LayerProblem
from optimum_fista.solve.refit import refit_stack

SPLITTING = ("admm", "alps", "obs_admm")


@pytest.mark.parametrize("name", SPLITTING)
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_splitting_methods_nearly_always_have_smaller_errors_than_sparsegpt(
    name, corrected, pattern
):
    pattern = parse_pattern(pattern)

    wins = 0
    for seed in range(6):
        made = example(24, 32, corrected=corrected, seed=seed, dtype=torch.float32, correlation=2.0)
        pruned = create_method(name).prune(made.problem, pattern)
        by_sparsegpt = create_method("sparsegpt").prune(made.problem, pattern)
        wins += pruned.fit_error < by_sparsegpt.fit_error

    assert wins >= 5  # of 6


@pytest.mark.parametrize("name", SPLITTING)
def test_splitting_methods_come_close_to_the_best_subset_of_a_tiny_problem(name):
    options = {"ridge": 1e-3} if name == "obs_admm" else {}
    method = create_method(name, **options)

    ratios = []
    for seed in range(10):
        problem = example(1, 8, seed=seed, correlation=2.0).problem
        pruned = method.prune(problem, Unstructured(0.5))
        best = min(
            problem.squared_error(_refitted(problem, kept))
            for kept in itertools.combinations(range(8), 4)
        )
        ratios.append(problem.squared_error(pruned.weight) / best)

    median = sorted(ratios)[4]
    assert min(ratios) >= 1 - 1e-9
    assert median < (1.7 if name == "admm" else 1.35)


def _refitted(problem, kept):
    """The least-squares weights of a problem of one row that uses the inputs `kept` alone."""
    index = list(kept)
    weight = torch.zeros_like(problem.weight)
    weight[0, index] = torch.linalg.solve(problem.gram[index][:, index], problem.target[0, index])
    return weight


@pytest.mark.parametrize("name", SPLITTING)
def test_scaling_an_input_and_its_weights_changes_nothing_but_damping(name):
    options = {"ridge": 1e-6} if name == "obs_admm" else {"damping": 1e-8}
    method = create_method(name, **options)
    made = example(8, 12, correlation=2.0)
    scale = torch.logspace(-1, 1, 12, dtype=torch.float64)
    gram = made.problem.gram * scale * scale[:, None]
    scaled = LayerProblem(made.weight / scale, InputStatistics(gram, 48))

    pruned = method.prune(made.problem, Unstructured(0.5))
    pruned_scaled = method.prune(scaled, Unstructured(0.5))

    assert torch.equal(pruned.mask, pruned_scaled.mask)
    assert pruned.fit_error == pytest.approx(pruned_scaled.fit_error, rel=1e-4)


def test_alps_converges_and_says_if_an_iteration_limit_ended_it():
    problem = example(16, 24, correlation=2.0).problem

    settled = create_method("alps").prune(problem, Unstructured(0.5))
    hurried = create_method("alps", max_iterations=6).prune(problem, Unstructured(0.5))

    assert settled.converged
    assert not hurried.converged
    assert "max_iterations=6" in hurried.message


def test_alps_takes_no_more_iterations_than_it_may():
    problem = example(16, 24, correlation=2.0).problem

    hurried = create_method("alps", max_iterations=7, period=3, refit_iterations=0).prune(
        problem, Unstructured(0.5)
    )

    assert hurried.iterations == 7


@pytest.mark.parametrize(("tokens", "ridge"), [(1500, 0.012), (100_000, 0.003), (12, 0.5)])
def test_the_ridge_of_obs_admm_shrinks_with_the_number_of_tokens(tokens, ridge):
    made = example(6, 12)
    problem = LayerProblem(made.weight, InputStatistics(made.problem.gram, tokens))

    pruned = create_method("obs_admm").prune(problem, Unstructured(0.5))

    expected = create_method("obs_admm", ridge=ridge).prune(problem, Unstructured(0.5))
    assert torch.allclose(pruned.weight, expected.weight)


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
    """A corrected problem in float32, whose matrices are large enough to count their bytes."""
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
                self._hold(tensor, 0)  # made outside, if it is not known
        output = function(*args, **(kwargs or {}))
        self.operations.append(function.overloadpacket.__name__)
        for tensor in tree_flatten(output)[0]:
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor, tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, sum(self._held.values()))
        return output

    def _hold(self, tensor: torch.Tensor, num_bytes: int) -> None:
        """Count the bytes of a tensor's memory until it is freed, unless they are counted already."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._held:
            self._held[storage._cdata] = num_bytes
            # A later tensor may get the same address.
            weakref.finalize(storage, self._held.pop, storage._cdata, None)


@pytest.mark.parametrize(("rows", "columns", "matrices"), [(32768, 128, 2.5), (128, 1024, 5.5)])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_obs_admm_takes_no_more_memory_than_its_working_set(pattern, rows, columns, matrices):
    problem = large_problem(rows, columns)

    with torch.no_grad(), LiveMemory() as memory:
        create_method("obs_admm").prune(problem, parse_pattern(pattern))

    assert memory.peak <= 4 * (matrices * rows * columns + 1.03 * columns**2)

    with products_rounded_to(torch.bfloat16), torch.no_grad(), LiveMemory() as rounded:
        create_method("obs_admm").prune(problem, parse_pattern(pattern))

    # A matrix of two bytes a weight besides, and a block of rows, of the weights or of the Gram matrix.
    values_in_block = 2**19
    assert rounded.peak <= memory.peak + 2 * rows * columns + 4 * values_in_block
    algebra = [
        name for name in memory.operations if "linalg" in name and "check_errors" not in name
    ]
    assert set(algebra) <= {"linalg_cholesky_ex", "linalg_vecdot", "linalg_vector_norm"}
    assert 1 < algebra.count("linalg_cholesky_ex") <= 8


@pytest.fixture(params=[1, 3])
def surgeon_of(request):
    """A problem, the coordinates of its groups of 1 or 3 columns, and this width."""
    made = example(5, 12, correlation=4.0)
    no_ridge = torch.zeros(1, 12).double()
    surgeon, messages = _Surgeon.of(made.problem.gram[None], no_ridge, request.param)
    assert messages == [""]
    return made, surgeon, request.param


def test_surgeon_coordinates_can_be_undone(surgeon_of):
    made, surgeon, _ = surgeon_of

    (inside,) = surgeon.scaled_weight(made.weight[None])

    (outside,) = surgeon.times_blocks(inside[None], transposed=True) * surgeon.scale
    assert torch.allclose(outside, made.weight)


def test_the_objective_in_surgeon_coordinates_is_the_same(surgeon_of):
    made, surgeon, _ = surgeon_of
    gram = made.problem.gram
    target = made.problem.target
    (inside,) = surgeon.scaled_weight(made.weight[None])

    (gram_with_ridge,) = surgeon.gram_with_ridge(gram[None])
    (target_with_ridge,) = surgeon.target_with_ridge(
        target[None], made.weight[None], rows=slice(None)
    )

    energy = (made.weight @ gram * made.weight).sum()
    assert torch.allclose((inside @ gram_with_ridge * inside).sum(), energy)
    assert torch.allclose((inside * target_with_ridge).sum(), (made.weight * target).sum())


def test_the_inverse_in_surgeon_coordinates_has_identities_along_its_diagonal(surgeon_of):
    made, surgeon, width = surgeon_of

    (inverse,) = torch.linalg.inv(surgeon.gram_with_ridge(made.problem.gram[None]))

    blocks = inverse.unflatten(0, (-1, width)).unflatten(2, (-1, width))
    identity = torch.eye(width).double()[..., None]
    assert torch.allclose(blocks.diagonal(dim1=0, dim2=2), identity, atol=1e-9)


def test_norms_in_surgeon_coordinates_are_what_removing_a_group_costs(surgeon_of):
    made, surgeon, width = surgeon_of

    (inside,) = surgeon.scaled_weight(made.weight[None])

    for group, part in enumerate(inside.split(width, dim=1)):
        others = torch.arange(12) // width != group
        inputs = made.inputs[:, others]
        error = made.outputs - inputs @ torch.linalg.lstsq(inputs, made.outputs).solution
        assert float(part.square().sum()) == pytest.approx(float(error.square().sum()), rel=1e-9)


@pytest.mark.parametrize("is_rounded", [False, True])
def test_iterations_agree_with_the_equations_written_out(is_rounded):
    made = example(4, 8, corrected=True)  # otherwise the first change of the dense weights is zero
    gram = made.problem.gram
    target = made.problem.target
    pattern = Unstructured(0.5)
    # stacks of one operator
    state = SplitState(lambda rows: target[None, rows], made.weight.clone()[None])

    def dense(rows):
        return made.weight[None, rows].clone()

    sparse = made.weight.clone()
    dual = torch.zeros_like(target)
    for rho in (2.0, 2.0, 5.0, 3.0):  # equal, rising and falling penalties
        damped = gram + rho * torch.eye(8, dtype=gram.dtype)
        weight = (target - dual + rho * sparse) @ torch.linalg.inv(damped)
        point = weight + dual / rho
        mask = pattern.mask(point)
        sparse = point * mask
        dual = dual + rho * (weight - sparse)

        inverse = damped_inverse(gram.clone()[None], rho)
        if is_rounded and state.rounded is None:
            # a dtype in which nothing is rounded
            state.round_products(dense, inverse, rho, torch.float64)
        state.iterate(inverse, rho, [pattern])

        assert torch.equal(state.mask[0], mask)
        assert torch.allclose(state.point[0] * mask, sparse)
        assert torch.allclose(rho * state.point[0] * ~mask, dual)


def problem_with_strong_inputs(*, error_of_common: float = 0.0) -> LayerProblem:
    """A corrected problem in float32: inputs are correlated, of sizes from 1 to 100, and one is far larger.

    `error_of_common` is the error of what all inputs have in common, as a share of it.
    """
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(1000, 1, generator=generator)
    sizes = torch.logspace(0, 2, 96)[torch.randperm(96, generator=generator)]
    dense_inputs = (torch.randn(1000, 96, generator=generator) + 2 * common) * sizes
    dense_inputs[:, 7] = 3000 * common[:, 0]
    inputs = dense_inputs + 0.2 * sizes * torch.randn(1000, 96, generator=generator)
    inputs -= 2 * error_of_common * common * sizes
    weight = torch.randn(64, 96, generator=generator) / sizes
    outputs = dense_inputs @ weight.T
    return LayerProblem(
        weight,
        InputStatistics(inputs.T @ inputs, 1000),
        target=outputs.T @ inputs,
        output_energies=outputs.double().square().sum(0),
    )


def error_in_float64(problem: LayerProblem, pruned: PrunedOperator) -> float:
    """The relative error of a result, computed in float64: errors are tiny beside the outputs of a strong input."""
    return LayerProblem(
        problem.weight.double(),
        InputStatistics(problem.gram.double(), problem.statistics.num_tokens),
        target=problem.target.double(),
        output_energies=problem.output_energies,
    ).fit_error(pruned.weight.double())


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("error_of_common", [0.0, 0.1])
def test_rounded_products_hardly_change_a_result(pattern, error_of_common):
    problem = problem_with_strong_inputs(error_of_common=error_of_common)
    pattern = parse_pattern(pattern)
    method = create_method("obs_admm")

    exact = method.prune(problem, pattern)
    with products_rounded_to(torch.bfloat16):
        rounded = method.prune(problem, pattern)

    assert rounded.weight.dtype == torch.float32
    assert not torch.equal(rounded.mask, exact.mask), "nothing was rounded"
    assert float((rounded.mask != exact.mask).float().mean()) < 0.01
    error_of_exact = error_in_float64(problem, exact)
    assert error_in_float64(problem, rounded) == pytest.approx(error_of_exact, rel=5e-4)


def test_a_gram_matrix_that_is_a_transposed_view_may_be_rounded():
    problem = problem_with_strong_inputs()
    view = InputStatistics(problem.gram.T, 1000)
    transposed = LayerProblem(problem.weight, view, problem.target, problem.output_energies)
    method = create_method("obs_admm")

    with products_rounded_to(torch.bfloat16):
        expected = method.prune(problem, Unstructured(0.5))
        result = method.prune(transposed, Unstructured(0.5))

    expected_error = error_in_float64(problem, expected)
    assert error_in_float64(problem, result) == pytest.approx(expected_error, rel=1e-3)


@pytest.mark.parametrize(("inputs", "mean", "sparsity"), [(64, 30, 0.8), (256, 10, 0.5)])
def test_no_row_takes_a_huge_step_if_inputs_have_much_in_common(inputs, mean, sparsity):
    generator = torch.Generator().manual_seed(0)
    common_inputs = torch.randn(4096, inputs, generator=generator) + mean
    weight = torch.randn(256, inputs, generator=generator)
    changed_inputs = common_inputs + 0.2 * torch.randn(4096, inputs, generator=generator)
    outputs = common_inputs @ weight.T
    problem = LayerProblem(
        weight,
        InputStatistics(changed_inputs.T @ changed_inputs, 600 * inputs),
        target=outputs.T @ changed_inputs,
        output_energies=outputs.double().square().sum(0),
    )
    method = create_method("obs_admm")
    pattern = Unstructured(sparsity)

    exact = method.prune(problem, pattern)
    with products_rounded_to(torch.bfloat16):
        rounded = method.prune(problem, pattern)

    error_of_exact = error_in_float64(problem, exact)
    assert error_in_float64(problem, rounded) == pytest.approx(error_of_exact, rel=2e-3)


class DtypesOfProducts(TorchDispatchMode):
    """As a context: counts the products of stacks of matrices by their dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if "bmm" in function.overloadpacket.__name__:
            self.counts[output.dtype] += 1
        return output


def test_of_the_products_with_large_terms_two_are_exact_and_all_others_are_rounded():
    method = create_method("obs_admm", stages=2, iterations=3, refit_iterations=4)
    problem = problem_with_strong_inputs()

    with products_rounded_to(torch.bfloat16), DtypesOfProducts() as products:
        method.prune(problem, Unstructured(0.5))

    # those of the first change of the dense weights, and of the start of the refit
    assert products.counts[torch.float32] == 2
    # of the iterations, and of the steps of the refit; the inverse of the second stage takes products of other kinds
    assert products.counts[torch.bfloat16] == 2 * 3 + 4


@pytest.mark.parametrize(
    ("options", "factorizations"),
    [
        ({"last_rho": 1.5}, 1),
        ({"last_rho": 2.0}, 1),
        ({"last_rho": 2.1}, 3),
        ({"stages": 1, "first_rho": 0.5}, 1),
        ({"stages": 10}, 1),
        ({"stages": 11}, 11),
    ],
)
def test_inverses_of_few_stages_with_near_penalties_take_one_factorization_if_products_are_rounded(
    options, factorizations
):
    method = create_method("obs_admm", **options)

    with products_rounded_to(torch.bfloat16), LiveMemory() as memory:
        method.prune(problem_with_strong_inputs(), Unstructured(0.5))

    of_coordinates = 1
    assert memory.operations.count("linalg_cholesky_ex") == of_coordinates + factorizations


@pytest.mark.parametrize("rhos", [[1.0, 1.2, 1.5], torch.linspace(1.0, 1.5, 10).tolist()])
@pytest.mark.parametrize("groups", [1, 2])
def test_rounded_inverses_of_all_stages_are_near_the_exact_ones(groups, rhos):
    grams = torch.stack([example(seed, 64).problem.gram.float() for seed in range(groups)])
    grams /= grams.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    identity = torch.eye(64)

    inverses = _RoundedInverses.of(damped_inverse(grams.clone(), 1.0), 1.0, torch.bfloat16)

    for rho in rhos:
        inverse = inverses.begin_stage(rho)
        assert inverse.dtype == torch.bfloat16
        error = inverse.float() - torch.linalg.inv(grams + rho * identity)
        assert float(torch.linalg.matrix_norm(error, 2).max()) < 0.01


@pytest.mark.parametrize("sparsity", [0.8, 0.9])
def test_a_refit_by_rounded_steps_goes_as_far_as_an_exact_one(sparsity, monkeypatch):
    problem = problem_with_strong_inputs()
    pattern = Unstructured(sparsity)
    errors = {}
    for steps in (0, 5):
        method = create_method("obs_admm", refit_iterations=steps)
        with products_rounded_to(torch.bfloat16):
            pruned = method.prune(problem, pattern)
        errors[steps] = error_in_float64(problem, pruned)

    def refit_exactly(method, states, grams, dtype):
        """Refit as a run does that rounds nothing; the masks are those of rounded iterations."""
        (state,) = states
        weights, steps = refit_stack(
            grams, state.target(slice(None)), state.point, state.mask, max_iterations=5
        )
        state.point.copy_(weights)
        return steps.tolist()

    monkeypatch.setattr(ObsAdmm, "_refit_by_rounded_steps", refit_exactly)
    with products_rounded_to(torch.bfloat16):
        exact = create_method("obs_admm").prune(problem, pattern)

    error_of_exact = error_in_float64(problem, exact)
    assert error_of_exact < errors[0]
    assert errors[0] - errors[5] == pytest.approx(errors[0] - error_of_exact, rel=0.05)


def test_the_scaled_problem_has_the_same_minimizer():
    made = example(3, 8, corrected=True)
    amount = 0.05 * made.problem.gram.diagonal().mean()
    damped = made.problem.gram + amount * torch.eye(8, dtype=torch.float64)
    expected = torch.linalg.solve(damped, (made.problem.target + amount * made.weight).T).T

    gram, target, scale = unit_diagonal(made.problem, 0.05)

    assert torch.allclose(gram.diagonal(), torch.ones(8, dtype=gram.dtype))
    assert torch.allclose(torch.linalg.solve(gram, target.T).T * scale, expected)

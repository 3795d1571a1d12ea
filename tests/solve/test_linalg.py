import pytest
import torch
from layer_problems import example

from optimum_fista.solve import linalg
from optimum_fista.solve.linalg import (
    as_factors,
    damped_cholesky,
    damped_choleskys,
    damped_inverse,
    line_to_other_rho,
    matrices_in_stack,
    rounded_in_place,
    stacked,
)


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.5])
def test_factor_reproduces_the_damped_matrix(damping):
    gram = example(2, 10).problem.gram
    copied = gram.clone()
    damped = gram + damping * gram.diagonal().mean() * torch.eye(10, dtype=torch.float64)

    factor, message = damped_cholesky(gram.clone, damping)

    assert torch.allclose(factor @ factor.T, damped, rtol=1e-10)
    assert torch.equal(factor, factor.tril())
    assert message == ""
    assert torch.equal(gram, copied)


def test_a_message_tells_that_damping_had_to_be_raised():
    # Eigenvalues -0.005 and 2.005: only damping above 0.005 makes it positive definite.
    gram = torch.tensor([[1.0, 1.005], [1.005, 1.0]], dtype=torch.float64)

    factor, message = damped_cholesky(gram.clone, 1e-4)

    assert message == "the Gram matrix needed damping 0.01 instead of 0.0001"
    assert torch.allclose(factor @ factor.T, gram + 0.01 * torch.eye(2))


def test_a_message_tells_that_a_singular_matrix_was_damped_without_being_asked():
    factor, message = damped_cholesky(torch.ones(3, 3, dtype=torch.float64).clone, 0.0)

    assert message == "the Gram matrix needed damping 0.0001 instead of 0"
    assert torch.allclose(factor @ factor.T, torch.ones(3, 3).double() + 1e-4 * torch.eye(3))


def test_a_matrix_of_zeros_is_damped_by_one_times_the_damping():
    factor, message = damped_cholesky(torch.zeros(3, 3).clone, 0.01)

    assert torch.allclose(factor, 0.1 * torch.eye(3))
    assert message == ""


def test_matrix_that_is_not_positive_semidefinite_is_refused():
    gram = torch.tensor([[1.0, 0.0], [0.0, -200.0]])

    with pytest.raises(
        torch.linalg.LinAlgError, match=r"2 inputs is not positive semidefinite.*damping up to 100"
    ):
        damped_cholesky(gram.clone, 0.01)


def test_damped_inverse_is_the_inverse():
    gram = example(2, 12).problem.gram

    inverse = damped_inverse(gram.clone(), 0.7)

    assert torch.allclose(
        inverse @ (gram + 0.7 * torch.eye(12, dtype=gram.dtype)), torch.eye(12, dtype=gram.dtype)
    )


@pytest.mark.parametrize(
    ("factor", "largest_error", "error_of_smallest"),
    [
        (1.0, 0.0, 0.0),
        (1.22, 0.0014, 0.016),
        (1.5, 0.005, 0.06),
        (2.0, 0.012, 0.15),
    ],
)
@pytest.mark.parametrize("rho", [1.0, 30.0])
def test_an_inverse_with_another_rho_is_nearly_a_line_in_the_first(
    rho, factor, largest_error, error_of_smallest
):
    zero = torch.zeros(1).double()
    positive = torch.logspace(-4, 6, 1000).double()
    eigenvalues = rho * torch.cat([zero, positive])
    first = 1 / (eigenvalues + rho)  # the inverse of a diagonal matrix
    wanted = 1 / (eigenvalues + factor * rho)

    a, b = line_to_other_rho(rho, factor * rho)

    errors = (a * first + b * first**2 - wanted).abs()
    assert rho * float(errors.max()) == pytest.approx(largest_error, rel=0.05, abs=1e-12)
    assert float(errors[-1] / wanted[-1]) == pytest.approx(error_of_smallest, rel=0.05, abs=1e-9)


@pytest.mark.parametrize("other_rho", [0.8, 1.22, 1.5])
def test_hardly_any_line_has_a_smaller_error(other_rho):
    eigenvalues = torch.logspace(-4, 6, 1000).double()
    first = 1 / (eigenvalues + 1)
    wanted = 1 / (eigenvalues + other_rho)
    a, b = line_to_other_rho(1.0, other_rho)

    def largest_error(a, b):
        return float((a * first + b * first**2 - wanted).abs().max())

    others = [
        largest_error(a + da, b + db)
        for da in torch.linspace(-0.02, 0.02, 41).tolist()
        for db in torch.linspace(-0.02, 0.02, 41).tolist()
    ]
    assert min(others) > 0.7 * largest_error(a, b)


def test_the_inverse_of_a_negative_matrix_is_an_error():
    with pytest.raises(torch.linalg.LinAlgError):
        damped_inverse(-torch.eye(4), 0.5)


@pytest.mark.parametrize("damping", [0.0, 1e-4])
def test_only_matrices_of_a_stack_that_need_it_get_more_damping(damping):
    singular = torch.ones(10, 10)
    # Eigenvalues -0.005 and 2.005: only damping above 0.005 makes it positive definite.
    indefinite = torch.eye(10)
    indefinite[0, 1] = 1.005
    indefinite[1, 0] = 1.005
    regular = [example(2, 10, seed=seed).problem.gram.float() for seed in range(2)]
    grams = torch.stack([regular[0], singular, regular[1], indefinite])

    factors, messages = damped_choleskys(grams.clone, damping)

    for gram, factor, message in zip(grams, factors, messages, strict=True):
        factor_alone, message_alone = damped_cholesky(gram.clone, damping)
        assert torch.equal(factor, factor_alone)
        assert message == message_alone
    assert (messages[0], messages[2]) == ("", "")
    assert messages[3].startswith("the Gram matrix needed damping 0.01 instead of")


def test_a_stack_with_a_matrix_that_is_not_positive_semidefinite_is_refused():
    definite = torch.eye(2)
    indefinite = torch.diag(torch.tensor([1.0, -200.0]))
    grams = torch.stack([definite, indefinite])

    with pytest.raises(torch.linalg.LinAlgError, match="damping up to 100"):
        damped_choleskys(grams.clone, 0.01)


def test_inverses_of_a_stack_are_those_of_its_matrices():
    grams = torch.stack([example(2, 12, seed=seed).problem.gram for seed in range(3)])

    inverses = damped_inverse(grams.clone(), 0.7)

    for gram, inverse in zip(grams, inverses, strict=True):
        assert torch.equal(inverse, damped_inverse(gram.clone(), 0.7))


def test_a_stack_of_one_matrix_is_no_copy():
    matrix = torch.randn(3, 4)

    assert stacked([matrix]).data_ptr() == matrix.data_ptr()
    assert torch.equal(stacked([matrix, 2 * matrix]), torch.stack([matrix, 2 * matrix]))


def test_a_stack_has_many_small_matrices_or_one_large():
    assert matrices_in_stack(64 * 64, on_cpu=True) == 256
    assert matrices_in_stack(256 * 256, on_cpu=True) == 16
    assert matrices_in_stack(4096 * 4096, on_cpu=True) == 1
    assert matrices_in_stack(2048 * 2048, on_cpu=False) == 4


def test_a_matrix_is_rounded_in_its_own_memory(monkeypatch):
    monkeypatch.setattr(linalg, "_VALUES", 100)  # several blocks, the last of which is shorter
    matrices = torch.randn(3, 17, 13)
    expected = matrices.bfloat16()

    rounded = rounded_in_place(matrices, torch.bfloat16)

    assert torch.equal(rounded, expected)
    assert rounded.data_ptr() == matrices.data_ptr()


def test_a_product_with_factors_is_that_with_the_mask():
    values = torch.randn(5, 7)
    mask = torch.rand(5, 7) > 0.5

    assert torch.equal(as_factors(mask, values.dtype) * values, values * mask)

import pytest
import torch

from optimum_fista.train.distillation import divergence

POSITIONS, VOCABULARY = 300, 40


def example():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(POSITIONS, VOCABULARY, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(VOCABULARY, (POSITIONS,), generator=generator)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_divergence_and_its_gradient_are_those_of_pytorch(share):
    student, teacher, labels = example()
    divergence(student, teacher, labels, share).mul(2).backward()
    again = student.detach().clone().requires_grad_()
    log_q, log_p = again.log_softmax(-1), teacher.log_softmax(-1)
    expected = (1 - share) * torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    expected = expected + share * torch.nn.functional.nll_loss(log_q, labels)
    expected.mul(2).backward()
    torch.testing.assert_close(divergence(student, teacher, labels, share), expected)
    torch.testing.assert_close(student.grad, again.grad, rtol=1e-4, atol=1e-7)

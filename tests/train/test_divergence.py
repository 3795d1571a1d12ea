"""The loss of a recovery, a few positions at a time, is that of whole logits."""

import pytest
import torch
from families import family_model

from optimum_fista.model.predictor import Predictor
from optimum_fista.train.divergence import divergence, text_loss

# a head with a bias, soft-capping, a factor, a divisor, a decoder inside another module; and one that can't be cut
FAMILIES = {
    "phi": True,
    "gemma2": True,
    "cohere": True,
    "granite": True,
    "opt": True,
    "llama4_text": False,
}


def models(family):
    """A student and a teacher of a family with other weights; heads are not trained."""
    student = family_model(family, 0)
    teacher = family_model(family, 1)
    student.get_output_embeddings().requires_grad_(False)
    teacher.requires_grad_(False)
    return student, teacher


def of_whole_logits(student, teacher, ids, share, kept_tokens=None):
    """The divergence and the loss of the text by PyTorch; `kept_tokens` are the teacher's of the student's."""
    log_q = student(input_ids=ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    if kept_tokens is None:
        teachers_logits = teacher(input_ids=ids).logits
    else:
        teachers_logits = teacher(input_ids=kept_tokens[ids]).logits[..., kept_tokens]
    log_p = teachers_logits[:, :-1].flatten(0, 1).log_softmax(-1).detach()

    text = torch.nn.functional.nll_loss(log_q, ids[:, 1:].flatten())
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return (1 - share) * kl + share * text, text


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_divergence_and_its_gradient_are_those_of_pytorch(family, share, monkeypatch):
    student, teacher = models(family)
    vocabulary = student.config.get_text_config().vocab_size
    monkeypatch.setattr("optimum_fista.model.predictor.LOGITS_PER_CHUNK", 7 * vocabulary)
    for module in ("model.predictor", "train.divergence"):
        monkeypatch.setattr(f"optimum_fista.{module}.POSITIONS_ON_CPU", 3)
    predictors = [Predictor(model) for model in (student, teacher)]
    ids = torch.randint(5, 30, (3, 9), generator=torch.Generator().manual_seed(0))
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]

    loss = divergence(*predictors, ids, share)
    gradients = torch.autograd.grad(2 * loss, trained, allow_unused=True)

    is_cut = [predictor.is_cut for predictor in predictors]
    assert is_cut == [FAMILIES[family]] * 2
    expected, expected_text = of_whole_logits(student, teacher, ids, share)
    expected_gradients = torch.autograd.grad(2 * expected, trained, allow_unused=True)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(text_loss(predictors[0], ids), expected_text)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5)


def test_a_teacher_with_more_tokens_is_compared_on_the_kept_ones():
    student, teacher = models("llama")
    generator = torch.Generator().manual_seed(0)
    kept_tokens = torch.randperm(student.config.vocab_size, generator=generator)[:40].sort().values
    student.resize_token_embeddings(40)
    student.requires_grad_(False)
    ids = torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(0))

    loss = divergence(Predictor(student), Predictor(teacher, kept_tokens), ids)

    expected, _ = of_whole_logits(student, teacher, ids, 0.0, kept_tokens)
    torch.testing.assert_close(loss, expected)

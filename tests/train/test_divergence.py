"""The loss of a recovery, a few positions at a time, is that of whole logits."""

import pytest
import torch
from families import family_model

from optimum_fista.model.predictor import Predictor
from optimum_fista.train.divergence import (
    LiveTeacher,
    TextAlone,
    TopPredictions,
    divergence,
    text_loss,
)

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
    predictors = [Predictor(student), LiveTeacher(teacher)]
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


def test_the_text_alone_is_the_loss_with_any_teacher_whose_predictions_have_no_share(ids):
    student, teacher = models("llama")
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    predictor = Predictor(student)

    expected = divergence(predictor, LiveTeacher(teacher), ids, 1.0)
    expected_gradients = torch.autograd.grad(expected, trained, allow_unused=True)
    loss = divergence(predictor, TextAlone(), ids, 1.0)
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)

    assert torch.equal(loss, expected)
    assert loss > 0
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(gradient, expected_gradient)


def test_a_teacher_with_more_tokens_is_compared_on_the_kept_ones():
    student, teacher = models("llama")
    generator = torch.Generator().manual_seed(0)
    kept_tokens = torch.randperm(student.config.vocab_size, generator=generator)[:40].sort().values
    student.resize_token_embeddings(40)
    student.requires_grad_(False)
    ids = torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(0))

    loss = divergence(Predictor(student), LiveTeacher(teacher, kept_tokens), ids)

    expected, _ = of_whole_logits(student, teacher, ids, 0.0, kept_tokens)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("family", ["llama", "llama4_text"])
def test_only_tokens_that_count_are_in_the_losses_and_the_gradient(family, monkeypatch):
    student, teacher = models(family)
    vocabulary = student.config.get_text_config().vocab_size
    monkeypatch.setattr("optimum_fista.model.predictor.LOGITS_PER_CHUNK", 4 * vocabulary)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 30, (3, 9), generator=generator)
    counted = torch.rand(3, 9, generator=generator) < 0.4
    places = counted[:, 1:].flatten()  # a token is predicted at the position before it
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    student_predictor = Predictor(student)

    loss = divergence(student_predictor, LiveTeacher(teacher), ids, 0.3, counted=counted)
    of_text = text_loss(student_predictor, ids, counted=counted)

    log_q = student(input_ids=ids).logits[:, :-1].flatten(0, 1)[places].log_softmax(-1)
    log_p = teacher(input_ids=ids).logits[:, :-1].flatten(0, 1)[places].log_softmax(-1)
    expected_text = torch.nn.functional.nll_loss(log_q, ids[:, 1:].flatten()[places])
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    expected = 0.7 * kl + 0.3 * expected_text
    torch.testing.assert_close(of_text, expected_text)
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    expected_gradients = torch.autograd.grad(expected, trained, allow_unused=True)
    assert_same((loss, gradients), (expected, expected_gradients))


def test_a_divisor_takes_the_place_of_the_number_of_tokens(ids):
    student, teacher = models("llama")
    predictors = [Predictor(student), LiveTeacher(teacher)]
    counted = torch.zeros(ids.shape, dtype=torch.bool)
    counted[0, 2:5] = True

    mean = divergence(*predictors, ids, counted=counted)
    half = divergence(*predictors, ids, counted=counted, divisor=6.0)

    torch.testing.assert_close(half, mean / 2)
    halved_text = text_loss(predictors[0], ids, counted=counted, divisor=6.0)
    torch.testing.assert_close(halved_text, text_loss(predictors[0], ids, counted=counted) / 2)


@pytest.mark.parametrize("divisor", [None, 4.0])
def test_a_batch_in_which_no_token_counts_has_a_loss_of_zero(ids, divisor):
    student, teacher = models("llama")
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    options = {"counted": torch.zeros(ids.shape, dtype=torch.bool), "divisor": divisor}

    loss = divergence(Predictor(student), LiveTeacher(teacher), ids, **options)

    gradients = torch.autograd.grad(loss, trained)
    assert loss.item() == text_loss(Predictor(student), ids, **options).item() == 0.0
    assert all(int(gradient.count_nonzero()) == 0 for gradient in gradients)


class TopTeacher:
    """The `top_k` most likely tokens of a model, in float32."""

    def __init__(self, model, top_k):
        self.model = model
        self.top_k = top_k

    def predictions(self, ids):
        log_p = self.model(input_ids=ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
        top = log_p.topk(self.top_k)
        rest = log_p.scatter(1, top.indices, -torch.inf).logsumexp(-1, keepdim=True)
        return TopPredictions(top.indices, top.values, rest).part


def loss_and_gradients(student, teacher, ids, share=0.3):
    """The divergence, and its gradients by the parameters of the student that are trained."""
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    loss = divergence(Predictor(student), teacher, ids, share)
    return loss, torch.autograd.grad(loss, trained, allow_unused=True)


def assert_same(found, expected):
    """Compare two losses with their gradients."""
    loss, gradients = found
    expected_loss, expected_gradients = expected
    torch.testing.assert_close(loss, expected_loss)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5)


@pytest.fixture
def ids():
    return torch.randint(5, 30, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "llama4_text"])
def test_the_divergence_from_all_tokens_is_that_from_the_logits(family, ids):
    student, teacher = models(family)
    vocabulary = student.config.get_text_config().vocab_size

    found = loss_and_gradients(student, TopTeacher(teacher, vocabulary), ids)

    assert_same(found, loss_and_gradients(student, LiveTeacher(teacher), ids))


@pytest.mark.parametrize("top_k", [1, 5])
def test_the_other_tokens_count_as_one_token_in_the_value_and_its_gradient(top_k, ids):
    student, teacher = models("llama")
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]

    found = loss_and_gradients(student, TopTeacher(teacher, top_k), ids, share=0.0)

    q = student(input_ids=ids).logits[:, :-1].flatten(0, 1).softmax(-1)
    p = teacher(input_ids=ids).logits[:, :-1].flatten(0, 1).softmax(-1).detach()
    top = p.topk(top_k)
    p_of_rest = 1 - top.values.sum(-1)
    q_of_top = q.gather(1, top.indices)
    q_of_rest = 1 - q_of_top.sum(-1)
    of_tokens = (top.values * (top.values / q_of_top).log()).sum(-1)
    expected = (of_tokens + p_of_rest * (p_of_rest / q_of_rest).log()).mean()
    assert_same(found, (expected, torch.autograd.grad(expected, trained, allow_unused=True)))


def test_the_divergence_from_more_tokens_is_never_smaller(ids):
    student, teacher = models("llama")
    vocabulary = student.config.vocab_size

    values = [
        divergence(Predictor(student), TopTeacher(teacher, top_k), ids).item()
        for top_k in (1, 2, 4, 8, 16, vocabulary)
    ]

    assert values == sorted(values)
    assert values[0] < values[-1]


def test_the_other_tokens_add_nothing_if_the_student_has_their_proportions():
    """Then the divergence from few tokens is that from all."""
    generator = torch.Generator().manual_seed(0)
    log_p = torch.randn(6, 40, generator=generator).log_softmax(-1)
    top = log_p.topk(4)
    others = log_p.scatter(1, top.indices, -torch.inf).logsumexp(-1, keepdim=True)
    of_student = log_p.scatter_add(1, top.indices, torch.randn(6, 4, generator=generator))
    log_q = of_student.log_softmax(-1)

    predictions = TopPredictions(top.indices, top.values, others)
    distance, p = predictions.divergence_and_probabilities(log_q, log_q.exp())

    torch.testing.assert_close(p, log_p.exp())
    torch.testing.assert_close(distance, (log_p.exp() * (log_p - log_q)).sum())


def test_a_student_that_is_sure_of_the_top_tokens_gets_a_finite_loss():
    log_q = torch.full((1, 8), -200.0)
    log_q[0, 0] = 0.0
    predictions = TopPredictions(
        tokens=torch.tensor([[0]]),
        log_of_tokens=torch.tensor([[0.9]]).log(),
        log_of_rest=torch.tensor([[0.1]]).log(),
    )

    distance, p = predictions.divergence_and_probabilities(log_q, log_q.exp())

    assert distance.isfinite()
    assert p.isfinite().all()

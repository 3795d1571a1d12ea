"""The loss of a recovery, a few positions at a time, is that of whole logits."""

import pytest
import torch
from families import family_model

from optimum_fista.train.divergence import Predictor, divergence, text_loss

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
    student, teacher = (family_model(family, seed) for seed in (0, 1))
    for model in (student, teacher):
        model.get_output_embeddings().requires_grad_(False)
    return student, teacher


def whole(student, teacher, ids, share, columns=slice(None)):
    """The divergence and the loss of the text by PyTorch, of whole logits."""
    log_q = student(input_ids=ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    teachers = ids if isinstance(columns, slice) else columns[ids]
    log_p = (
        teacher(input_ids=teachers)
        .logits[:, :-1]
        .flatten(0, 1)[:, columns]
        .log_softmax(-1)
        .detach()
    )
    text = torch.nn.functional.nll_loss(log_q, ids[:, 1:].flatten())
    return (1 - share) * (log_p.exp() * (log_p - log_q)).sum(-1).mean() + share * text, text


@pytest.mark.parametrize("family", FAMILIES)
def test_the_divergence_and_its_gradient_are_those_of_pytorch(family, monkeypatch):
    student, teacher = models(family)
    monkeypatch.setattr(
        "optimum_fista.train.divergence.LOGITS_PER_CHUNK",
        7 * student.config.get_text_config().vocab_size,
    )
    monkeypatch.setattr("optimum_fista.train.divergence._POSITIONS_ON_CPU", 3)
    cut = [Predictor(model) for model in (student, teacher)]
    assert [predictor._output_class is not None for predictor in cut] == [FAMILIES[family]] * 2
    ids = torch.randint(5, 30, (3, 9), generator=torch.Generator().manual_seed(0))
    for share in (0.0, 0.3):
        expected, text = whole(student, teacher, ids, share)
        trained = [p for p in student.parameters() if p.requires_grad]
        slopes = torch.autograd.grad(2 * expected, trained, allow_unused=True)
        found = divergence(*cut, ids, share)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(text_loss(cut[0], ids), text)
        for slope, wanted in zip(
            torch.autograd.grad(2 * found, trained, allow_unused=True), slopes, strict=True
        ):
            torch.testing.assert_close(slope, wanted, rtol=1e-3, atol=1e-5)


def test_a_teacher_with_more_tokens_is_asked_for_those_that_stay():
    student, teacher = models("llama")
    kept = (
        torch.randperm(student.config.vocab_size, generator=torch.Generator().manual_seed(0))[:40]
        .sort()
        .values
    )
    student.resize_token_embeddings(40)
    student.requires_grad_(False)
    ids = torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(0))
    found = divergence(Predictor(student), Predictor(teacher, kept), ids)
    torch.testing.assert_close(found, whole(student, teacher, ids, 0.0, kept)[0])

import math

import pytest
import torch
from tiny_llama import TEXT, tiny_llama, tiny_tokenizer
from tiny_models import VOCAB_SIZE, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM
from untouched import Untouched

from optimum_fista.evaluate import perplexity
from optimum_fista.evaluate.perplexity import evaluate_perplexity
from optimum_fista.text.text_source import TextSource
from optimum_fista.text.windows import evaluation_windows

VOCABULARY = 50


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "vocab_size": VOCABULARY,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, attention_dropout=0.5))
    with torch.no_grad():
        model.lm_head.weight *= 20  # a model with opinions
    return model


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(VOCABULARY, (5, 20), generator=torch.Generator().manual_seed(1))


def oracle(model, windows) -> float:
    """exp of the mean negative log-likelihood, one token after the other, with log_softmax in float64."""
    total, count = 0.0, 0
    with torch.no_grad():
        for window in windows:
            logits = model.eval()(window[None]).logits[0].double()
            for t in range(1, len(window)):
                total -= torch.log_softmax(logits[t - 1], dim=0)[window[t]].item()
                count += 1
    return math.exp(total / count)


@pytest.mark.parametrize(("batch_size", "positions"), [(1, 7), (2, 1), (5, 19), (64, 256)])
def test_perplexity_is_the_oracles(model, windows, batch_size, positions, monkeypatch):
    monkeypatch.setattr(perplexity, "POSITIONS_PER_CHUNK", positions)

    result = evaluate_perplexity(model.train(), windows, batch_size=batch_size, progress=False)

    assert result.perplexity == pytest.approx(oracle(model, windows), rel=1e-5)
    assert (result.num_windows, result.num_tokens, result.sequence_length) == (5, 95, 20)
    assert result.seconds > 0


def test_bits_per_byte_are_the_bits_of_the_text_over_its_bytes():
    text, model, tokenizer = TextSource("sea", (TEXT,)), tiny_llama(), tiny_tokenizer()
    windows = evaluation_windows(tokenizer, text, 16, 3)

    result = evaluate_perplexity(model, windows, progress=False, text=text, tokenizer=tokenizer)

    num_predicted = 3 * 15  # a token is a letter
    assert result.num_bytes == num_predicted
    bits = num_predicted * math.log2(oracle(model, windows))
    assert result.bits_per_byte == pytest.approx(bits / num_predicted, rel=1e-5)


def test_bits_per_byte_are_not_known_without_a_tokenizer():
    text, model = TextSource("sea", (TEXT,)), tiny_llama()
    windows = evaluation_windows(tiny_tokenizer(), text, 16, 3)

    result = evaluate_perplexity(model, windows, progress=False, text=text)

    assert result.bits_per_byte is None


def test_log_likelihoods_of_a_half_precision_model_are_float32(model, windows):
    model.to(torch.bfloat16)

    result = evaluate_perplexity(model, windows, progress=False)

    assert result.perplexity == pytest.approx(oracle(model, windows), rel=1e-5)


def test_the_model_is_left_as_it_was(model, windows):
    model.train()
    model.model.layers[1].eval()
    untouched = Untouched(model)
    seen = []

    def record(module, args, kwargs) -> None:
        seen.append((module.training, kwargs["use_cache"], torch.is_grad_enabled()))

    hook = model.register_forward_pre_hook(record, with_kwargs=True)

    evaluate_perplexity(model, windows, progress=False)
    hook.remove()

    assert seen == [(False, False, False)] * 5
    untouched.check()


def test_nan_logits_are_located(model, windows):
    windows[:, :] = 3
    windows[3, 4] = 7
    model.model.embed_tokens.weight.data[7] = torch.nan

    with pytest.raises(
        ValueError, match="NaN logits in windows 2 to 3: look for NaN in its weights"
    ):
        evaluate_perplexity(model, windows, batch_size=2, progress=False)


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(5, 1, dtype=torch.int64), torch.zeros(5, 9), torch.zeros(9, dtype=torch.int64)],
    ids=["too short", "no integers", "no matrix"],
)
def test_windows_of_a_wrong_shape_or_dtype_are_refused(model, bad):
    with pytest.raises(ValueError, match=r"windows has shape .* pass integer token ids"):
        evaluate_perplexity(model, bad, progress=False)


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_ids_outside_the_vocabulary_are_refused(model, windows, token):
    windows[2, 3] = token

    with pytest.raises(
        ValueError, match=rf"token ids from .*{token}.*the model knows 0 to {VOCABULARY - 1}"
    ):
        evaluate_perplexity(model, windows, progress=False)


def random_windows(length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (2, length), generator=torch.Generator().manual_seed(0))


def test_windows_that_are_longer_than_a_table_of_positions_are_refused():
    message = (
        r"windows holds sequences of 65 tokens, .* pass at most 64, its max_position_embeddings"
    )
    with pytest.raises(ValueError, match=message):
        evaluate_perplexity(tiny_model("opt"), random_windows(65), progress=False)


def test_a_model_without_a_table_of_positions_takes_longer_windows():
    result = evaluate_perplexity(tiny_model("llama"), random_windows(65), progress=False)

    assert result.sequence_length == 65

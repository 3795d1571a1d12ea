import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from optimum_fista.text import self_sampling
from optimum_fista.text.calibration_tokens import calibration_tokens_by_name
from optimum_fista.text.model_writer import ModelWriter
from optimum_fista.text.self_sampling import sample_text_from_model

VOCABULARY = 40
BOS, EOS = 0, 1
ORDINARY = VOCABULARY - 2


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """BOS, EOS and 38 ordinary tokens."""
    names = ["<s>", "</s>", *(f"word{i}" for i in range(2, VOCABULARY))]
    backend = Tokenizer(
        models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="word2")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def model() -> LlamaForCausalLM:
    """A model with more rows than the tokenizer has tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=VOCABULARY + 8,
        max_position_embeddings=64,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


def set_distribution(model: LlamaForCausalLM, logits: torch.Tensor) -> None:
    """Make the model predict the same next-token logits (the rest -1000) whatever it has read."""
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.ones_like(model.model.embed_tokens.weight))
        hidden = model.model(input_ids=torch.tensor([[BOS]])).last_hidden_state[0, 0]
        num_other_rows = len(model.lm_head.weight) - len(logits)
        padded = torch.cat([logits, torch.full((num_other_rows,), -1000.0)])
        model.lm_head.weight.copy_(torch.outer(padded, hidden / hidden.dot(hidden)))


def sample(model, tokenizer, num_samples=6, sequence_length=24, seed=0, **options) -> torch.Tensor:
    """Self-sampled tokens, with numbers that most tests share."""
    return sample_text_from_model(model, tokenizer, num_samples, sequence_length, seed, **options)


@pytest.mark.parametrize(
    ("together", "sequence_length", "length"), [(1, 2, 2), (4, 7, 7), (4, 8, 2), (32, 26, 7)]
)
def test_texts_start_with_bos_and_differ_from_the_next_token_on(
    model, tokenizer, monkeypatch, together, sequence_length, length
):
    monkeypatch.setattr(self_sampling, "SAMPLED_TOGETHER", together)

    samples = sample(model, tokenizer, 6, sequence_length)

    assert samples.shape == (6, sequence_length)
    assert samples.dtype == torch.int64
    assert (samples[:, ::length] == BOS).all()
    second = samples[:, 1::length]
    assert second.unique().numel() == second.numel()
    assert second.min() > EOS
    assert second.max() < VOCABULARY  # the head has more rows than the tokenizer has tokens


def test_texts_start_with_eos_if_there_is_no_bos(model, tokenizer):
    tokenizer.bos_token = None

    samples = sample(model, tokenizer)

    assert (samples[:, 0] == EOS).all()


def test_texts_start_with_different_ordinary_tokens_if_there_is_neither_bos_nor_eos(
    model, tokenizer
):
    tokenizer.bos_token = None
    tokenizer.eos_token = None

    first = sample(model, tokenizer, num_samples=9)[:, ::6]
    with_other_seed = sample(model, tokenizer, num_samples=9, seed=1)[:, ::6]

    assert first.unique().numel() == 36  # each of the 9 samples has 4 texts
    assert not torch.equal(first, with_other_seed)


def test_a_model_that_is_sure_of_the_beginning_still_starts_differently(model, tokenizer):
    logits = torch.zeros(VOCABULARY)
    logits[5] = 2000.0  # so every other token has a probability of 0 in float32
    set_distribution(model, logits)

    samples = sample(model, tokenizer, num_samples=ORDINARY, sequence_length=7)

    assert sorted(samples[:, 1].tolist()) == list(range(2, VOCABULARY))
    assert (samples[:, 2:] == 5).all()


def test_there_may_be_more_samples_than_ordinary_tokens(model, tokenizer):
    samples = sample(model, tokenizer, num_samples=ORDINARY + 1, sequence_length=4)

    assert samples.shape == (ORDINARY + 1, 4)
    assert samples[:, 1].min() > EOS


def test_the_rest_comes_from_the_whole_distribution_at_temperature_1(model, tokenizer):
    probabilities = torch.full((VOCABULARY,), 0.1 / (VOCABULARY - 2))
    probabilities[[20, 30]] = torch.tensor([0.6, 0.3])
    set_distribution(model, probabilities.log())

    texts = sample(model, tokenizer, num_samples=32, sequence_length=64).reshape(-1, 16)

    rest = texts[:, 2:]
    # 1,792 draws: standard errors of 0.012 and 0.011
    assert (rest == 20).double().mean().item() == pytest.approx(0.6, abs=0.045)
    assert (rest == 30).double().mean().item() == pytest.approx(0.3, abs=0.045)
    assert rest.unique().numel() > 20


def test_eos_does_not_end_a_sample(model, tokenizer):
    logits = torch.full((VOCABULARY,), -1000.0)
    logits[[EOS, 7]] = 0.0
    set_distribution(model, logits)
    model.generation_config.eos_token_id = EOS

    rest = sample(model, tokenizer, sequence_length=64).reshape(-1, 16)[:, 2:]

    assert rest.unique().tolist() == [EOS, 7]
    assert 0.3 < (rest == EOS).double().mean() < 0.7  # both tokens are equally probable


def test_the_generation_config_is_neither_obeyed_nor_changed(model, tokenizer):
    expected = sample(model, tokenizer)
    config = model.generation_config
    config.suppress_tokens = list(range(2, 30))
    config.repetition_penalty = 5.0
    config.max_length = 10
    before = config.to_dict()

    samples = sample(model, tokenizer)

    assert torch.equal(samples, expected)
    assert model.generation_config is config
    assert config.to_dict() == before


def test_the_seed_decides_and_the_global_state_neither_matters_nor_changes(model, tokenizer):
    torch.manual_seed(1)
    first = sample(model, tokenizer)
    torch.manual_seed(2)
    state = torch.get_rng_state()

    again = sample(model, tokenizer)
    other = sample(model, tokenizer, seed=1)

    assert torch.equal(again, first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(other[:, 1], first[:, 1])
    assert not torch.equal(other[:, 2:], first[:, 2:])


def test_a_model_whose_logits_become_nan_writes_no_text(model, tokenizer):
    with torch.no_grad():
        # Not those of BOS, with which a text begins.
        model.model.embed_tokens.weight[5:] = torch.nan

    with pytest.raises(ValueError, match="logits are NaN or Inf"):
        sample(model, tokenizer)


def test_sequences_that_are_longer_than_the_model_reads_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="sequence_length=65: pass at most 64"):
        sample(model, tokenizer, sequence_length=65)


def test_a_number_of_zero_samples_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="num_samples=0; pass"):
        sample(model, tokenizer, num_samples=0)


def test_progress_counts_the_new_tokens(model, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr(self_sampling, "SAMPLED_TOGETHER", 2)

    sample(model, tokenizer, 5, 12)  # 20 texts of 3 tokens, the first two of which are drawn before

    assert "20/20" in capsys.readouterr().err


def test_without_progress_nothing_is_shown(model, tokenizer, capsys):
    sample(model, tokenizer, 5, 12, progress=False)

    assert not capsys.readouterr().err


def stop_after(batches, monkeypatch):
    """Have `batches` batches be written, and an interrupt in the next one."""
    write = ModelWriter.write
    written = []

    def write_or_stop(*given):
        if len(written) == batches:
            raise KeyboardInterrupt
        written.append(given)
        return write(*given)

    monkeypatch.setattr(ModelWriter, "write", write_or_stop)
    return written


def test_a_text_that_was_interrupted_resumes_with_the_same_tokens(
    model, tokenizer, monkeypatch, tmp_path
):
    monkeypatch.setattr(self_sampling, "SAMPLED_TOGETHER", 2)
    expected = sample(model, tokenizer)
    file = tmp_path / "folder" / "text.safetensors"

    for _ in range(2):
        with monkeypatch.context() as patched:
            stop_after(1, patched)
            with pytest.raises(KeyboardInterrupt):
                sample(model, tokenizer, kept_file=file)
    with monkeypatch.context() as patched:
        written = stop_after(3, patched)
        resumed = sample(model, tokenizer, kept_file=file)

    assert len(written) == 1  # the last of three batches
    assert resumed.equal(expected)


@pytest.mark.parametrize("damage", ["other seed", "cut short"])
def test_a_kept_text_of_other_settings_or_that_is_damaged_is_not_used(
    damage, model, tokenizer, monkeypatch, tmp_path
):
    monkeypatch.setattr(self_sampling, "SAMPLED_TOGETHER", 2)
    expected = sample(model, tokenizer)
    file = tmp_path / "text.safetensors"
    sample(model, tokenizer, seed=1, kept_file=file)
    if damage == "cut short":
        file.write_bytes(file.read_bytes()[:-5])

    assert sample(model, tokenizer, kept_file=file).equal(expected)


def test_the_text_of_a_model_by_name_resumes_and_leaves_one_file(
    tiny_folder, monkeypatch, tmp_path
):
    monkeypatch.setattr(self_sampling, "SAMPLED_TOGETHER", 2)
    arguments = (str(tiny_folder), "self", 6, 16, 0)
    options = {"held_out": 2, "device": "cpu", "progress": False}
    expected = calibration_tokens_by_name(*arguments, **options, keep_in=tmp_path / "whole")

    with monkeypatch.context() as patched:
        stop_after(2, patched)
        with pytest.raises(KeyboardInterrupt):
            calibration_tokens_by_name(*arguments, **options, keep_in=tmp_path / "kept")
    with monkeypatch.context() as patched:
        written = stop_after(9, patched)
        resumed = calibration_tokens_by_name(*arguments, **options, keep_in=tmp_path / "kept")

    assert len(written) == 1  # of one batch of held-out sequences, and two of the others
    assert resumed.equal(expected)
    assert len(list((tmp_path / "kept").iterdir())) == 1

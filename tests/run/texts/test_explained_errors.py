import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_model

from optimum_fista.run.evaluation.perplexity import evaluate_perplexity
from optimum_fista.run.texts.explained_errors import explained_length

LONG = torch.randint(0, VOCAB_SIZE, (2, 65), generator=torch.Generator().manual_seed(0))
ADVICE = r"holds sequences of 65 tokens, .* pass at most 64, its max_position_embeddings \(--sequence-length 64\)"


def test_perplexity_says_that_windows_are_too_long():
    with pytest.raises(ValueError, match=f"windows {ADVICE}"):
        evaluate_perplexity(tiny_model("opt"), LONG, progress=False)


def test_a_model_without_a_table_of_positions_runs_on_longer_sequences():
    assert evaluate_perplexity(tiny_model("llama"), LONG, progress=False).sequence_length == 65


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), RuntimeError("allocate memory")])
def test_no_memory_is_no_matter_of_length(error):
    with pytest.raises(type(error), match="memory"), explained_length(tiny_model("gpt2"), 65, "windows"):
        raise error


def test_other_errors_on_short_sequences_stay_as_they_are():
    with pytest.raises(IndexError, match="another"), explained_length(tiny_model("gpt2"), 64, "windows"):
        raise IndexError("another")

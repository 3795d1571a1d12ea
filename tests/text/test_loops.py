"""Loops of greedy continuations: what is one, and how many there are."""

import pytest
import torch
from tiny_llama import TEXT, tiny_llama, tiny_tokenizer
from torch import nn

from optimum_fista.cli.main import main
from optimum_fista.text import loops
from optimum_fista.text.loops import count_loops, ends_in_loop, require_memory

START = list(range(100, 160))


@pytest.mark.parametrize(
    "tokens",
    [
        [*START, *[7] * 16],
        [*START, *[1, 2] * 8],
        [*START, *[1, 2, 3, 4, 5, 6] * 3],
        [*START, *[1, 2, 3, 4, 5, 6] * 3, 1, 2],  # it ends within a repetition
        [*range(42)] * 3,
        [*range(64)] * 3,
    ],
)
def test_a_cycle_that_is_repeated_to_the_end_is_a_loop(tokens):
    assert ends_in_loop(tokens)


@pytest.mark.parametrize(
    "tokens",
    [
        [],
        [7] * 15,  # too short
        START,
        [*START, 7, 7, 7],  # three dots
        [*START, *[1, 2, 3, 4, 5, 6] * 2],  # twice only
        [*START, *[1, 2, 3, 4, 5, 6] * 2, 1, 2, 3, 4, 5, 9],
        [*[7] * 30, *START],  # not at the end
        [*range(65)] * 3,  # too long a cycle
    ],
)
def test_what_repeats_a_little_or_elsewhere_is_no_loop(tokens):
    assert not ends_in_loop(tokens)


def model_that_repeats(token):
    """A model that continues every text by one token, whatever it was."""
    model = tiny_llama()
    bias = torch.zeros(model.config.vocab_size)
    bias[token] = 1e4
    head = nn.Linear(model.config.hidden_size, model.config.vocab_size)
    head.weight = model.lm_head.weight
    head.bias = nn.Parameter(bias)
    model.lm_head = head
    return model


def test_a_model_that_repeats_one_token_loops_on_each_prompt_of_each_text():
    model = model_that_repeats(token=9)
    settings = model.generation_config
    model.train()

    sea, sky = count_loops(
        model, tiny_tokenizer(), [[TEXT[:2000]] * 3, [TEXT[:2000]]], progress=False
    )

    assert (sea.num_prompts, sea.num_loops) == (sky.num_prompts, sky.num_loops) == (32, 32)
    # of 64 positions, 32 are taken by the prompt, which has no BOS
    assert sea.num_new_tokens == 32
    assert model.generation_config is settings
    assert model.training


def test_a_continuation_that_ends_by_itself_is_no_loop():
    model = model_that_repeats(token=tiny_llama().config.eos_token_id)

    (sea,) = count_loops(model, tiny_tokenizer(), [[TEXT]], progress=False)

    assert (sea.num_prompts, sea.num_loops) == (64, 0)


def test_the_count_is_that_of_transformers_own_greedy_continuations(monkeypatch):
    monkeypatch.setattr(loops, "NUM_PROMPTS", 4)
    model = tiny_llama(max_position_embeddings=256)
    tokenizer = tiny_tokenizer()
    stretches = [TEXT[:1500], TEXT[1500:3000]]

    (sea,) = count_loops(model, tokenizer, [stretches], progress=False)

    num_loops = 0
    for stretch in stretches:
        for start in (0, 750):
            prompt = tokenizer(stretch[start : start + 32], return_tensors="pt").input_ids
            written = model.generate(prompt, do_sample=False, max_new_tokens=128)[0, 32:].tolist()
            num_loops += 2 not in written and ends_in_loop(written)
    assert sea.num_new_tokens == 128
    assert sea.num_loops == num_loops


def test_what_cant_be_continued_is_refused():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="the text has no piece of 32 tokens"):
        count_loops(tiny_llama(), tokenizer, [["short"]], progress=False)
    with pytest.raises(ValueError, match="the model takes 40 tokens, which are too few"):
        count_loops(tiny_llama(max_position_embeddings=40), tokenizer, [[TEXT]], progress=False)


def test_weights_in_files_that_do_not_fit_into_memory_are_refused(tmp_path, monkeypatch):
    from optimum_fista.source.loading import load_lazily

    tiny_llama().save_pretrained(tmp_path / "model")
    model = load_lazily(str(tmp_path / "model"), tmp_path / "offload", device="cpu").model
    require_memory(model)
    monkeypatch.setattr(loops, "available_bytes", lambda device: 1000)

    with pytest.raises(ValueError, match=r"the weights take .*, and 0.98kiB of memory are free"):
        require_memory(model)
    require_memory(tiny_llama())  # it is in memory


def test_evaluate_prints_loops_if_asked(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "sea.txt").write_text(TEXT)
    command = ["evaluate", str(tmp_path / "model"), "--text", str(tmp_path / "sea.txt")]
    command += ["--sequence-length", "32", "--max-windows", "2", "--device", "cpu"]

    assert main(command) == 0
    assert "continuations" not in capsys.readouterr().out

    assert main([*command, "--loops"]) == 0
    assert "greedy continuations of 32 tokens (" in capsys.readouterr().out

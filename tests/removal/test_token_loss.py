"""Bits per byte before and after tokens are removed: measured on text that was held out, by one model for both."""

import math
from pathlib import Path

import pytest
import torch
from rare_tokens import COMMON, RARE, bpe_tokenizer, save, text_of
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.cli.main import main
from optimum_fista.folder.checkpoint import kept_tokens, read_report
from optimum_fista.removal import tokens
from optimum_fista.removal.token_loss import measure_bits_per_byte

pytestmark = pytest.mark.filterwarnings("ignore:.*(tokens that stay|belong to no token)")
# Long enough to hold some of it out.
LONG_TEXT = "\n".join([text_of(COMMON)] * 60)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A dense model; do not write to it."""
    return save(tmp_path_factory.mktemp("token_loss") / "dense")


@pytest.fixture(scope="module")
def smaller(dense) -> Path:
    """The dense model with the tokens of `COMMON`; do not write to it."""
    folder = dense.with_name("smaller")
    with pytest.warns(UserWarning, match="bits per byte are not measured: the text is too short"):
        prune_tokens(dense, folder, [text_of(COMMON)])
    return folder


def prune_tokens(folder: Path, output: Path, texts: list, pattern: str = "vocab:unused"):
    """Remove tokens from the model in `folder`, and return the report."""
    pruner = FistaPruner(FistaPruningConfig(pattern=pattern), progress=False)
    return pruner.prune(folder, texts, output_dir=output, calibration_source="sea.txt")


def bits_of(folder: Path, texts: list[str], bos: bool) -> tuple[float, int]:
    """Bits per byte of texts and their number of tokens, by the model and tokenizer in a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    nats = 0.0
    num_bytes = 0
    num_tokens = 0
    for text in texts:
        encoded = tokenizer(text, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        num_tokens += len(ids)
        predicted = text if bos else text[encoded["offset_mapping"][0][1] :]
        num_bytes += len(predicted.encode())

        sequence = torch.tensor([1, *ids] if bos else ids)
        with torch.no_grad():
            (logits,) = model(sequence.unsqueeze(0)).logits
        nats += float(cross_entropy(logits[:-1], sequence[1:], reduction="sum"))
    return nats / math.log(2) / num_bytes, num_tokens


@pytest.mark.parametrize("bos", [None, 1], ids=["text begins", "BOS begins"])
def test_one_model_measures_what_the_dense_and_the_smaller_model_lose(
    dense, smaller, tmp_path, bos
):
    texts = ["the sea is deep", "zebras yodel at the sky", "größe 東"]

    numbers = measure_bits_per_byte(
        str(dense),
        texts,
        dense_tokenizer=Tokenizer.from_file(str(dense / "tokenizer.json")),
        smaller_tokenizer=Tokenizer.from_file(str(smaller / "tokenizer.json")),
        kept=kept_tokens(smaller),
        bos=bos,
        offload_folder=tmp_path,
        device="cpu",
        compute_dtype="auto",
        progress=False,
    )

    bits, num_tokens = bits_of(dense, texts, bos is not None)
    bits_pruned, num_tokens_pruned = bits_of(smaller, texts, bos is not None)
    assert numbers["dense"] == pytest.approx(bits, rel=1e-5)
    assert numbers["pruned"] == pytest.approx(bits_pruned, rel=1e-5)
    assert numbers["num_tokens"] == num_tokens
    assert numbers["num_tokens_pruned"] == num_tokens_pruned
    assert num_tokens_pruned > num_tokens


def test_a_run_measures_on_text_that_it_did_not_count(dense, tmp_path):
    report = prune_tokens(dense, tmp_path / "smaller", [LONG_TEXT], "vocab:0.18")

    num_counted = report.calibration["num_tokens"]
    num_tokens = len(bpe_tokenizer()(LONG_TEXT)["input_ids"])
    assert 0.9 * num_tokens < num_counted < num_tokens
    numbers = read_report(tmp_path / "smaller").bits_per_byte
    assert numbers == report.bits_per_byte
    assert numbers["text"] == "sea.txt"
    assert numbers["num_bytes"] > 0
    assert numbers["num_tokens_pruned"] >= numbers["num_tokens"] > 0
    assert report.perplexity is None


def test_a_batch_that_the_caller_holds_out_is_measured_on(dense, tmp_path):
    ids = bpe_tokenizer()(text_of(RARE, 8), return_tensors="pt")["input_ids"]
    held_out = {"input_ids": ids, "held_out": True}

    report = prune_tokens(dense, tmp_path / "smaller", [text_of(COMMON), held_out])

    assert report.bits_per_byte["num_tokens"] == ids.numel()
    assert report.bits_per_byte["num_tokens_pruned"] > 2 * ids.numel()


def test_a_run_whose_text_cant_be_measured_is_finished_and_says_so(dense, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokens, "measure_bits_per_byte", fail)
    with pytest.warns(UserWarning, match="bits per byte are not measured .OSError.*No space left"):
        prune_tokens(dense, tmp_path / "smaller", [LONG_TEXT], "vocab:0.18")

    assert read_report(tmp_path / "smaller").bits_per_byte is None
    AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")


def test_the_command_says_what_the_removal_costs_and_promises_nothing(dense, tmp_path, capsys):
    (tmp_path / "sea.txt").write_text(LONG_TEXT)
    command = ["prune", str(dense), "-o", str(tmp_path / "smaller"), "--pattern", "vocab:0.18"]

    assert main([*command, "--calibration", str(tmp_path / "sea.txt")]) == 0

    said = capsys.readouterr().out
    numbers = read_report(tmp_path / "smaller").bits_per_byte
    assert f"{numbers['dense']:.3f} bits per byte before and {numbers['pruned']:.3f} after" in said
    assert "no verdict on fewer than 4,096 tokens" in said
    assert (
        f"take {numbers['num_tokens_pruned']:,} tokens instead of {numbers['num_tokens']:,}" in said
    )
    assert "other languages, code and names, takes more tokens" in said
    assert "run it on the dense model too, and compare these" in said
    assert "perplexity" not in said

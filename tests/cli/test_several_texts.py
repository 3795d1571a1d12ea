"""`optimum-fista prune` with several texts to calibrate on."""

import json

import pytest
import torch
from PIL import Image
from tiny_llama import TEXT, save_tiny_folder, tiny_tokenizer

from optimum_fista.cli.calibration_batches import calibration_batches
from optimum_fista.cli.main import build_parser, main
from optimum_fista.cli.prune_request import PruneRequest
from optimum_fista.folder.checkpoint import read_report

SIZES = ["--sequence-length", "16", "--device", "cpu"]
DIGITS = "0123456789 " * 400


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with a model, and texts that can be told apart by their letters."""
    folder = tmp_path_factory.mktemp("texts")
    save_tiny_folder(folder / "model")
    (folder / "sea.txt").write_text(TEXT)
    (folder / "digits.txt").write_text(DIGITS)
    (folder / "short.txt").write_text("0123456789" * 3)
    (folder / "copy.txt").write_text(TEXT)
    Image.new("RGB", (2, 2)).save(folder / "image.png")
    line = {"text": "a picture", "image": "image.png"}
    (folder / "images.jsonl").write_text(json.dumps(line) + "\n")
    return folder


@pytest.fixture
def command(texts, tmp_path):
    """`command("sea.txt", flags=[...])` are the words of `prune` on these texts; it writes `tmp_path / "out"`."""

    def words(*names, flags=()):
        sources = []
        for name in names:
            is_file = name.endswith((".txt", ".jsonl"))
            source = str(texts / name) if is_file else name
            sources += ["--calibration", source]
        usual = ["prune", str(texts / "model"), "--output", str(tmp_path / "out"), *sources]
        removes_tokens = "vocab:unused" in flags  # which takes no method, and whole texts
        if not removes_tokens:
            usual += ["--method", "wanda", *SIZES]
        return [*usual, *flags]

    return words


def batches_of(words):
    """The batches that a command draws."""
    request = PruneRequest.of(build_parser().parse_args(words))
    return calibration_batches(request, "cpu", request.output)


def digits_in(batch):
    """Whether each sequence of a batch is of digits.txt, not of sea.txt."""
    return ["5" in text for text in tiny_tokenizer().batch_decode(batch["input_ids"])]


def test_batches_of_the_texts_take_turns_and_a_remainder_goes_to_the_first(command, texts):
    flags = ["--num-samples", "5", "--held-out", "2", "--batch-size", "2"]

    batches = batches_of(command("digits.txt", "sea.txt", flags=flags))

    names = [(batch["source"].rpartition("/")[2], len(batch["input_ids"])) for batch in batches]
    assert names == [("digits.txt", 2), ("sea.txt", 2), ("digits.txt", 2), ("sea.txt", 1)]
    for batch in batches:
        assert set(digits_in(batch)) == {batch["source"].endswith("digits.txt")}


def test_the_perplexity_is_measured_on_as_many_further_sequences_of_each_text(command):
    flags = ["--num-samples", "4", "--batch-size", "4"]

    *batches, measured = batches_of(command("digits.txt", "sea.txt", flags=flags))

    assert len(batches) == 2
    assert measured["held_out"] == "digits.txt, sea.txt"
    assert digits_in(measured) == [True, False] * (4096 // 16 // 2)


def test_a_seed_draws_the_same_sequences_again(command):
    flags = ["--num-samples", "4", "--batch-size", "1"]
    words = command("digits.txt", "sea.txt", flags=flags)

    first = batches_of(words)
    again = batches_of(words)
    other = batches_of([*words, "--seed", "1"])

    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True)
    )
    assert not all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, other, strict=True)
    )


def test_report_card_and_command_name_all_texts(command, tmp_path, capsys):
    flags = ["--num-samples", "5", "--held-out", "3", "--batch-size", "2"]

    assert main(command("digits.txt", "sea.txt", flags=flags)) == 0

    assert "8 x 16 tokens (3 held out) of " in capsys.readouterr().err
    report = read_report(tmp_path / "out")
    assert report.calibration["source"] == "digits.txt, sea.txt"
    # Four of each text are drawn; two of the first and one of the second are held out.
    assert report.calibration["sources"] == [
        {"source": "digits.txt", "num_sequences": 2, "num_tokens": 32},
        {"source": "sea.txt", "num_sequences": 3, "num_tokens": 48},
    ]
    assert report.calibration["held_out"]["num_sequences"] == 3
    assert report.perplexity["text"] == "digits.txt, sea.txt"
    assert "--calibration digits.txt --calibration sea.txt" in report.command()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| calibration | 80 tokens in 5 sequences of digits.txt, sea.txt |" in card
    assert "| of sea.txt | 48 tokens in 3 sequences |" in card
    assert str(tmp_path.parent) not in (tmp_path / "out" / "fista" / "report.json").read_text()


@pytest.mark.parametrize("pattern", ["channels:0.25", "layers:0.5", "2:4"])
def test_patterns_of_every_kind_take_several_texts(command, tmp_path, pattern):
    flags = ["--num-samples", "4", "--pattern", pattern]

    assert main(command("sea.txt", "digits.txt", flags=flags)) == 0

    assert len(read_report(tmp_path / "out").calibration["sources"]) == 2


def test_a_dry_run_names_all_texts_and_their_shares(command, texts, capsys):
    words = command("sea.txt", "digits.txt", flags=["--num-samples", "4", "--dry-run"])

    assert main(words) == 0

    of_texts = f"of {texts / 'sea.txt'}, {texts / 'digits.txt'} in equal shares, batches of 1"
    assert f"4 x 16 tokens {of_texts}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "flags", "message"),
    [
        (["sea.txt", "self"], [], "--calibration self with other sources"),
        (["sea.txt", "digits.txt", "sea.txt"], [], "sea.txt' twice: pass it once"),
        (["owner/name", "owner/name:train"], [], "'owner/name:train' twice: pass it once"),
        (["owner/name:train", "owner/name"], [], "'owner/name' twice: pass it once"),
        (["digits.txt", "sea.txt", "copy.txt"], [], "copy.txt has the same text as "),
        (["sea.txt", "sea.txt"], ["--pattern", "vocab:unused"], "sea.txt' twice: pass it once"),
        (["sea.txt", "copy.txt"], ["--pattern", "vocab:unused"], "copy.txt has the same text as "),
        (["sea.txt", "copy.txt"], ["--target-size", "0.9"], "copy.txt has the same text as "),
        (["sea.txt", "images.jsonl"], [], "images.jsonl has images, and there are other sources"),
        (["sea.txt", "digits.txt"], ["--num-samples", "1"], "pass at least 2, one for each source"),
        (["sea.txt", "digits.txt"], ["--held-out", "1"], "pass at least 2, one for each source"),
        (["sea.txt", "short.txt"], [], "short.txt gives 64 of 128 sequences: text 'short.txt' has"),
    ],
)
def test_texts_that_do_not_go_together_are_refused(
    command, tmp_path, capsys, names, flags, message
):
    assert main(command(*names, flags=flags)) == 1

    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()

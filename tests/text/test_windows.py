"""Windows for calibration are drawn at random and do not overlap; those for perplexity follow one another.

The tokenizers here have numbered words (or letters), so that a window of text is a run of numbers.
"""

from dataclasses import replace

import pytest
import torch
from rare_tokens import bpe_tokenizer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from optimum_fista.text.text_source import TextSource
from optimum_fista.text.windows import calibration_windows, count_bytes, evaluation_windows

WORDS = 3000
BOS, EOS = WORDS + 1, WORDS + 2


def word(i: int) -> str:
    """Word number i."""
    return f"word{i}"


def letter(i: int) -> str:
    """Letter number i, which needs no spaces around it."""
    return chr(0x4E00 + i)


class CountingTokenizer(PreTrainedTokenizerFast):
    """Keeps the number of characters it tokenised, and the length of the longest text."""

    characters = 0
    longest = 0

    def __call__(self, text, **kwargs):
        self.characters += len(text)
        self.longest = max(self.longest, len(text))
        return super().__call__(text, **kwargs)


def tokenizer(unit=word, kind=CountingTokenizer, special=False, **kwargs) -> CountingTokenizer:
    """Word (or letter) number i is token i. `special`: BOS and EOS are added unless they are refused."""
    vocabulary = {unit(i): i for i in range(WORDS)} | {"<unk>": WORDS, "<s>": BOS, "</s>": EOS}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pattern = Regex(r"\S") if unit is letter else Regex(r"\S+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(pattern, "isolated")]
    )
    result = kind(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **kwargs
    )
    if special:
        result.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    return result


def source(*documents: range, unit=word, separator: str = "\n\n") -> TextSource:
    """Documents of the words (or letters) with these numbers."""
    between = "" if unit is letter else " "
    texts = [between.join(map(unit, document)) for document in documents]
    return TextSource("numbers", tuple(texts), separator)


def assert_disjoint_runs(windows: torch.Tensor) -> None:
    """Every window is a run i, i + 1, i + 2, ...; no token is in two windows."""
    assert (windows.diff(dim=1) == 1).all()
    assert windows.unique().numel() == windows.numel()


@pytest.mark.parametrize("unit", [word, letter])
@pytest.mark.parametrize("num_samples", [1, 60, 99])
def test_windows_of_one_document_are_disjoint_runs(unit, num_samples):
    text = source(range(WORDS), unit=unit)

    windows = calibration_windows(tokenizer(unit), text, num_samples, 30, seed=0)

    assert windows.shape == (num_samples, 30)
    assert windows.dtype == torch.int64
    assert_disjoint_runs(windows)


@pytest.mark.parametrize(
    "documents", [[range(WORDS)], [range(i, i + 10) for i in range(0, WORDS, 10)]]
)
def test_the_held_out_windows_are_the_same_for_any_number_of_others(documents):
    draws = [
        calibration_windows(tokenizer(), source(*documents), num_samples, 30, 0, held_out=5)
        for num_samples in (6, 20, 80)
    ]

    held_out = draws[0][:5]
    for draw in draws:
        others = draw[5:]
        assert torch.equal(draw[:5], held_out)
        assert not torch.isin(others[others != EOS], held_out).any()
    starts = held_out[:, 0]
    assert starts.max() - starts.min() > WORDS / 6  # not side by side


@pytest.mark.parametrize(
    "documents", [[range(200)], [range(i, i + 10) for i in range(0, 200, 10)]], ids=["one", "many"]
)
def test_held_out_windows_that_a_text_is_too_short_for_are_named(documents):
    with pytest.raises(ValueError, match=r"held_out=3000.*; pass a .*longer text"):
        calibration_windows(tokenizer(), source(*documents), 3010, 30, 0, held_out=3000)


@pytest.mark.parametrize(
    "documents", [[range(800)], [range(400), range(400, 800)]], ids=["one", "many"]
)
@pytest.mark.parametrize("held_out", [-1, 2, 3])
def test_some_windows_are_not_held_out(documents, held_out):
    with pytest.raises(ValueError, match=f"held_out={held_out}; pass 0 to 1, fewer than num_samp"):
        calibration_windows(tokenizer(), source(*documents), 2, 30, 0, held_out=held_out)


def test_windows_are_drawn_from_all_parts_of_one_document():
    """Means of 200 draws, 3 standard errors; a window never starts at a fixed place of a segment."""
    draws = [
        calibration_windows(tokenizer(), source(range(WORDS)), 4, 30, seed) for seed in range(50)
    ]

    starts = torch.cat(draws)[:, 0]
    standard_deviation = WORDS / 12**0.5  # of a uniform distribution
    three_errors = 3 * standard_deviation / 200**0.5
    assert starts.double().mean().item() == pytest.approx(WORDS / 2, abs=three_errors)
    assert starts.unique().numel() > 150


def test_only_what_is_needed_is_tokenised():
    counting = tokenizer()
    document = " ".join(word(i % WORDS) for i in range(300_000))
    text = TextSource("long", (document,))

    calibration_windows(counting, text, 6, 50, seed=0)

    assert counting.characters < len(document) / 100


@pytest.mark.parametrize("documents", [(range(WORDS),), (range(WORDS), range(WORDS))])
def test_a_long_document_is_tokenised_piece_by_piece_into_the_same_windows(documents, monkeypatch):
    text = source(*documents)
    almost_all = len(documents) * WORDS // 30 - 1
    expected = calibration_windows(tokenizer(), text, almost_all, 30, seed=0)
    monkeypatch.setattr("optimum_fista.text.windows._TOKENISED_TOGETHER", 1000)
    counting = tokenizer()

    drawn = calibration_windows(counting, text, almost_all, 30, seed=0)

    assert torch.equal(drawn, expected)
    assert counting.longest <= 2000


def test_documents_follow_each_other_in_random_order_with_eos_between():
    documents = [range(i, i + 7) for i in range(0, 2100, 7)]

    windows = calibration_windows(tokenizer(), source(*documents), 10, 31, seed=3)

    ids = windows.flatten().tolist()
    starts = ids[::8]  # of documents of 7 words and EOS
    expected = list[int]()
    for start in starts:
        expected += [*range(start, start + 7), EOS]
    assert ids == expected[: len(ids)]
    assert len(set(starts)) == len(starts)
    assert starts != sorted(starts)
    assert max(starts) > 1800  # not only the first documents


@pytest.mark.parametrize(
    "documents", [[range(WORDS)], [range(i, i + 10) for i in range(0, WORDS, 10)]]
)
def test_the_seed_decides_and_the_global_state_stays(documents):
    text = source(*documents)
    state = torch.get_rng_state()

    first = calibration_windows(tokenizer(), text, 5, 20, seed=0)
    again = calibration_windows(tokenizer(), text, 5, 20, seed=0)
    other = calibration_windows(tokenizer(), text, 5, 20, seed=1)

    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("documents", "tokens"),
    [([range(399)], 399), ([range(100), range(100, 200)], 202)],
    ids=["one", "several"],
)
def test_a_text_with_too_few_tokens_for_the_windows_is_refused(documents, tokens):
    with pytest.raises(
        ValueError, match=rf"'numbers' has {tokens} tokens, and num_samples=40 .* need 400"
    ):
        calibration_windows(tokenizer(), source(*documents), 40, 10, seed=0)


def test_evaluation_windows_follow_each_other_from_the_start():
    text = source(range(9), range(9, 25), separator=" word2999 ")

    windows = evaluation_windows(tokenizer(), text, 6)

    assert windows.dtype == torch.int64
    assert windows.tolist() == [
        [0, 1, 2, 3, 4, 5],
        [6, 7, 8, 2999, 9, 10],
        [11, 12, 13, 14, 15, 16],
        [17, 18, 19, 20, 21, 22],
    ]


def test_a_text_that_is_shorter_than_a_window_is_refused():
    text = source(range(25))

    with pytest.raises(ValueError, match="'numbers' has 25 tokens, fewer than one window of 26"):
        evaluation_windows(tokenizer(), text, 26)
    assert evaluation_windows(tokenizer(), text, 25).shape == (1, 25)


class GemmaTokenizer(CountingTokenizer):
    """A tokenizer by whose name the model is known to need BOS."""


@pytest.mark.parametrize(
    ("kind", "options", "has_bos"),
    [
        (CountingTokenizer, {}, False),
        (CountingTokenizer, {"add_bos_token": True}, True),
        (CountingTokenizer, {"special": True}, True),
        (GemmaTokenizer, {}, True),
    ],
)
def test_windows_start_with_bos_if_the_tokenizer_adds_it_or_is_gemmas(kind, options, has_bos):
    chosen = tokenizer(kind=kind, **options)

    evaluation = evaluation_windows(chosen, source(range(8)), 4)
    calibration = calibration_windows(chosen, source(range(500)), 5, 20, seed=0)

    with_bos = [[BOS, 0, 1, 2], [BOS, 3, 4, 5]]
    without_bos = [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert evaluation.tolist() == (with_bos if has_bos else without_bos)
    assert calibration.shape == (5, 20)
    assert ((calibration[:, 0] == BOS) == has_bos).all()
    assert_disjoint_runs(calibration[:, 1:])


@pytest.mark.parametrize(("max_windows", "num_windows"), [(None, 3), (2, 2), (5, 3)])
def test_the_limit_of_windows_of_a_text_holds_beside_that_of_the_caller(max_windows, num_windows):
    text = replace(source(range(40)), max_windows=3)

    windows = evaluation_windows(tokenizer(), text, 4, max_windows)

    assert windows.shape == (num_windows, 4)


def test_sizes_out_of_range_are_refused():
    with pytest.raises(ValueError, match="num_samples=0"):
        calibration_windows(tokenizer(), source(range(50)), 0, 10, seed=0)
    with pytest.raises(ValueError, match="max_windows=0"):
        evaluation_windows(tokenizer(), source(range(50)), 5, max_windows=0)
    with pytest.raises(ValueError, match="sequence_length=1"):
        evaluation_windows(tokenizer(), source(range(50)), 1)


@pytest.mark.parametrize("add_bos", [False, True])
def test_bytes_are_those_of_the_text_that_predicted_tokens_stand_for(add_bos):
    """Words in capitals that the tokenizer makes small, with white space that is in no token."""
    words = [("WÖR" if i % 2 == 0 else "WÖRD") + str(i) for i in range(12)]

    def small_word(i: int) -> str:
        """Token number i: the first 12 are the words."""
        return words[i % 12].lower() + "x" * (i // 12)

    lower = tokenizer(small_word, add_bos_token=add_bos)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    text = TextSource("capitals", tuple(words), separator="\n \n")
    windows = evaluation_windows(lower, text, 5, 2)
    assert (windows != WORDS).all()  # no <unk>

    num_bytes = count_bytes(lower, text, windows)

    # 4 predicted words a window; white space is before each but the first word of the text
    predicted = words[:8] if add_bos else words[1:5] + words[6:10]
    num_separators = 7 if add_bos else 8
    bytes_of_words = sum(len(predicted_word.encode()) for predicted_word in predicted)
    assert num_bytes == bytes_of_words + num_separators * len(text.separator)


def test_the_first_character_of_a_window_counts_if_some_of_its_tokens_are_predicted():
    text = TextSource("kanji", ("東京の海" * 4,))
    windows = evaluation_windows(bpe_tokenizer(), text, 6)  # three tokens of each of two characters

    assert (
        count_bytes(bpe_tokenizer(), text, windows) == len(text.joined.encode()) == windows.numel()
    )


def test_bytes_of_windows_of_another_text_are_not_known():
    numbers = tokenizer()
    text = source(range(30))
    windows = evaluation_windows(numbers, text, 5)

    # a space is before each word but the first; the first word of a window is not predicted
    predicted = [word(i) for i in range(30) if i % 5 != 0]
    assert count_bytes(numbers, text, windows) == sum(1 + len(each) for each in predicted)
    assert count_bytes(numbers, text, windows[1:]) is None
    assert count_bytes(numbers, text, torch.cat([windows, windows])) is None


def test_text_after_a_held_out_window_begins_with_a_whole_character():
    tokenizer = bpe_tokenizer()
    text = TextSource("sea", ("東京の海" * 100,))  # three tokens a character
    first_byte_of_u_fffd = tokenizer.convert_tokens_to_ids("ï")

    windows = calibration_windows(tokenizer, text, 20, 10, seed=0, held_out=4)

    assert not (windows == first_byte_of_u_fffd).any()

from dataclasses import replace

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from optimum_fista.text.sources import TextSource
from optimum_fista.text.windows import calibration_windows, count_bytes, evaluation_windows

WORDS = 3000
BOS, EOS = WORDS + 1, WORDS + 2


def word(i: int) -> str:
    return f"word{i}"


def letter(i: int) -> str:
    return chr(0x4E00 + i)


class CountingTokenizer(PreTrainedTokenizerFast):
    """Keeps the number of characters it tokenised."""

    characters = 0

    def __call__(self, text, **kwargs):
        self.characters += len(text)
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
    joint = "" if unit is letter else " "
    texts = tuple(joint.join(unit(i) for i in document) for document in documents)
    return TextSource("numbers", texts, separator)


def assert_disjoint_runs(windows: torch.Tensor) -> None:
    """Every window is a run i, i + 1, i + 2, ...; no token is in two windows."""
    assert (windows.diff(dim=1) == 1).all()
    assert windows.unique().numel() == windows.numel()


@pytest.mark.parametrize("unit", [word, letter])
@pytest.mark.parametrize("num_samples", [1, 60, 99])
def test_windows_of_one_document_are_disjoint_runs(unit, num_samples):
    windows = calibration_windows(
        tokenizer(unit), source(range(WORDS), unit=unit), num_samples, 30, seed=0
    )
    assert windows.shape == (num_samples, 30)
    assert windows.dtype == torch.int64
    assert_disjoint_runs(windows)


@pytest.mark.parametrize(
    "documents", [[range(WORDS)], [range(i, i + 10) for i in range(0, WORDS, 10)]]
)
def test_the_held_out_windows_are_the_same_for_any_number_of_others(documents):
    draws = [
        calibration_windows(tokenizer(), source(*documents), n, 30, 0, held_out=5)
        for n in (6, 20, 80)
    ]
    for draw in draws:
        assert torch.equal(draw[:5], draws[0][:5])
        assert not torch.isin(draw[5:][draw[5:] != EOS], draw[:5]).any()
    assert draws[0][:5, 0].max() - draws[0][:5, 0].min() > WORDS / 6  # not side by side


@pytest.mark.parametrize(
    "documents", [[range(200)], [range(i, i + 10) for i in range(0, 200, 10)]], ids=["one", "many"]
)
def test_held_out_windows_that_a_text_is_too_short_for_are_named(documents):
    with pytest.raises(ValueError, match=r"held_out=3000.*; pass a .*longer text"):
        calibration_windows(tokenizer(), source(*documents), 3010, 30, 0, held_out=3000)


def test_windows_of_one_document_come_from_everywhere():
    """Means of 200 draws, 3 standard errors; a window never starts at a fixed place of a segment."""
    starts = torch.cat(
        [
            calibration_windows(tokenizer(), source(range(WORDS)), 4, 30, seed)[:, 0]
            for seed in range(50)
        ]
    )
    assert starts.double().mean().item() == pytest.approx(
        WORDS / 2, abs=3 * WORDS / 12**0.5 / 200**0.5
    )
    assert starts.unique().numel() > 150


def test_only_what_is_needed_is_tokenised():
    counting, text = (
        tokenizer(),
        TextSource("long", (" ".join(word(i % WORDS) for i in range(300_000)),), "\n"),
    )
    calibration_windows(counting, text, 6, 50, seed=0)
    assert counting.characters < len(text.joined) / 100


def test_documents_follow_each_other_in_random_order_with_eos_between():
    documents = [range(i, i + 7) for i in range(0, 2100, 7)]
    tokens = calibration_windows(tokenizer(), source(*documents), 10, 31, seed=3).flatten().tolist()
    heads = [tokens[i] for i in range(0, len(tokens), 8)]
    expected = [token for head in heads for token in [*range(head, head + 7), EOS]]
    assert tokens == expected[: len(tokens)]
    assert len(set(heads)) == len(heads)
    assert heads != sorted(heads)
    assert max(heads) > 1800  # not only the first documents


@pytest.mark.parametrize(
    "documents", [[range(WORDS)], [range(i, i + 10) for i in range(0, WORDS, 10)]]
)
def test_the_seed_decides_and_the_global_state_stays(documents):
    state = torch.get_rng_state()
    draw = [calibration_windows(tokenizer(), source(*documents), 5, 20, seed) for seed in (0, 0, 1)]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])


@pytest.mark.parametrize(
    ("documents", "tokens"),
    [([range(399)], 399), ([range(100), range(100, 200)], 202)],
    ids=["one", "several"],
)
def test_too_few_tokens(documents, tokens):
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


def test_text_shorter_than_a_window():
    with pytest.raises(ValueError, match="'numbers' has 25 tokens, fewer than one window of 26"):
        evaluation_windows(tokenizer(), source(range(25)), 26)
    assert evaluation_windows(tokenizer(), source(range(25)), 25).shape == (1, 25)


class GemmaTokenizer(CountingTokenizer):
    pass


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        (CountingTokenizer, {}, False),
        (CountingTokenizer, {"add_bos_token": True}, True),
        (CountingTokenizer, {"special": True}, True),
        (GemmaTokenizer, {}, True),
    ],
)
def test_bos(kind, options, expected):
    chosen = tokenizer(kind=kind, **options)
    evaluation = evaluation_windows(chosen, source(range(8)), 4)
    assert evaluation.tolist() == (
        [[BOS, 0, 1, 2], [BOS, 3, 4, 5]] if expected else [[0, 1, 2, 3], [4, 5, 6, 7]]
    )
    calibration = calibration_windows(chosen, source(range(500)), 5, 20, seed=0)
    assert calibration.shape == (5, 20)
    assert ((calibration[:, 0] == BOS) == expected).all()
    assert_disjoint_runs(calibration[:, 1:])


@pytest.mark.parametrize(("asked", "windows"), [(None, 3), (2, 2), (5, 3)])
def test_the_protocol_of_a_text_may_end_it(asked, windows):
    text = replace(source(range(40)), max_windows=3)
    assert evaluation_windows(tokenizer(), text, 4, asked).shape == (windows, 4)


def test_sizes_out_of_range():
    with pytest.raises(ValueError, match="num_samples=0"):
        calibration_windows(tokenizer(), source(range(50)), 0, 10, seed=0)
    with pytest.raises(ValueError, match="max_windows=0"):
        evaluation_windows(tokenizer(), source(range(50)), 5, max_windows=0)
    with pytest.raises(ValueError, match="sequence_length=1"):
        evaluation_windows(tokenizer(), source(range(50)), 1)


@pytest.mark.parametrize("add_bos", [False, True])
def test_bytes_are_those_of_the_text_that_predicted_tokens_stand_for(add_bos):
    """Words of 3 to 6 capitals that the tokenizer makes small, with white space that is in no token."""
    words = [("WÖRD"[: 3 + i % 2]) + str(i % 50) for i in range(12)]
    lower = tokenizer(lambda i: words[i % 12].lower() + "x" * (i // 12), add_bos_token=add_bos)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    text = TextSource("capitals", tuple(words), separator="\n \n")
    windows = evaluation_windows(lower, text, 5, 2)
    assert (windows != WORDS).all()  # no <unk>
    predicted = words[:8] if add_bos else words[1:5] + words[6:10]  # 4 words a window
    spaces = (7 if add_bos else 8) * len(
        text.separator
    )  # before every predicted word but the first of the text
    assert count_bytes(lower, text, windows) == sum(len(w.encode()) for w in predicted) + spaces


def test_bytes_of_other_windows_are_not_known():
    numbers, text = tokenizer(), source(range(30))
    windows = evaluation_windows(numbers, text, 5)
    assert count_bytes(numbers, text, windows) == sum(1 + len(word(i)) for i in range(30) if i % 5)
    assert count_bytes(numbers, text, windows[1:]) is None
    assert count_bytes(numbers, text, torch.cat([windows, windows])) is None

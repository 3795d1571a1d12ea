"""A smaller tokenizer keeps its promises whatever its kind is; tokenizers of many families are trained here."""

import json
import random
from pydoc_data.topics import topics

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from optimum_fista.text.vocabulary import count_tokens, reduce_vocabulary

ENGLISH = [
    line for topic in ("assignment", "compound", "yield", "formatstrings") for line in topics[topic].split("\n\n")
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


def byte_level(split=None, post=None, *, all_merges=False, **options):
    """GPT-2 and its descendants; `all_merges` is how tiktoken's vocabularies are converted."""
    tokenizer = Tokenizer(models.BPE(**options))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    tokenizer.pre_tokenizer = level if split is None else pre_tokenizers.Sequence([*split, level])
    tokenizer.decoder = decoders.ByteLevel()
    return train(
        tokenizer,
        trainers.BpeTrainer,
        post,
        all_merges=all_merges,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )


def byte_fallback(*, metaspace=False, prepend=True, all_merges=True):
    """Llama 2, Mistral and Gemma: characters that are no token become bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    start = [normalizers.Prepend("▁")] if prepend and not metaspace else []
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([*start, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prepend else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = ["<unk>", "<s>", "</s>", *BYTES]
    post = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return train(
        tokenizer, trainers.BpeTrainer, post, all_merges=all_merges, special_tokens=special, max_token_length=9
    )


def unigram(*, fallback=False):
    """T5 and XLM-R."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.normalizer = normalizers.NFKC()
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts) if fallback else decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", *(BYTES if fallback else [])]
    post = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 2)])
    return train(tokenizer, trainers.UnigramTrainer, post, special_tokens=special, unk_token="<unk>", fallback=fallback)


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    post = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return train(tokenizer, trainers.WordPieceTrainer, post, special_tokens=special)


def end_of_word():
    """GPT-1 and CLIP: the last piece of a word is another token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    return train(tokenizer, trainers.BpeTrainer, None, special_tokens=["<unk>"], end_of_word_suffix="</w>")


def train(tokenizer, trainer, post, *, all_merges=False, fallback=False, **options):
    options = {"special_tokens": ["<|endoftext|>", "<s>"], "show_progress": False} | options
    tokenizer.train_from_iterator(ENGLISH + FOREIGN * 3, trainer(vocab_size=1100, **options))
    tokenizer.add_tokens(["<|im_start|>", "  "])
    if post:
        tokenizer.post_processor = post
    content = json.loads(tokenizer.to_str())
    model = content["model"]
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in BYTES]
    if fallback:
        model["byte_fallback"] = True
    if all_merges:  # every two tokens that make a third
        splits = ((token[:at], token[at:], ids) for token, ids in model["vocab"].items() for at in range(1, len(token)))
        found = [(ids, left, right) for left, right, ids in splits if {left, right} <= model["vocab"].keys()]
        model["merges"] = [[left, right] for ids, left, right in sorted(found)]
    return content


def split(pattern, behavior="isolated"):
    return pre_tokenizers.Split(Regex(pattern), behavior)


FAMILIES = {
    "gpt2": lambda: byte_level(post=processors.ByteLevel(trim_offsets=False)),
    "roberta": lambda: byte_level(post=processors.RobertaProcessing(("<s>", 1), ("<|endoftext|>", 0))),
    "qwen": lambda: byte_level([split(WORDS.replace("{1,3}", ""))]),
    "llama3": lambda: byte_level(
        [split(WORDS)],
        processors.Sequence(
            [processors.ByteLevel(), processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])]
        ),
        all_merges=True,
        ignore_merges=True,
    ),
    "deepseek": lambda: byte_level([split(r"[\r\n]"), split(r"\s?\p{L}+"), pre_tokenizers.Digits(True)]),
    "falcon": lambda: byte_level([pre_tokenizers.Punctuation("contiguous"), split(r"[0-9][0-9][0-9]")]),
    "bloom": lambda: byte_level([split(r" ?[^(\s|[.,!?…。、।])]+")]),
    "llama2": lambda: byte_fallback(),
    "mistral": lambda: byte_fallback(metaspace=True),
    "gemma": lambda: byte_fallback(prepend=False, all_merges=False),
    "t5": lambda: unigram(),
    "unigram with bytes": lambda: unigram(fallback=True),
    "bert": word_piece,
    "gpt1": end_of_word,
}


def texts(seed: int) -> list[str]:
    """Random strings of many scripts, and lines that were seen."""
    chance = random.Random(seed)
    ranges = [(0x20, 0x7E), (0x0, 0xFF), (0x370, 0x58F), (0x4E00, 0x4EFF), (0x1F600, 0x1F64F), (0xE000, 0xE010)]
    found = ["", " ", "\n\n  \t", "a" * 40, "<s>", "é e\u0301 ﬁ \u200d\ufeff", *FOREIGN]
    for _ in range(150):
        kinds = chance.choices(ranges, k=3)
        found.append("".join(chr(chance.randint(*chance.choice(kinds))) for _ in range(chance.randint(1, 20))))
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
    assert new.get_vocab() == {token: position[i] for token, i in old.get_vocab().items() if i in position}
    unknown, equal = [i for i in (old.token_to_id("<unk>"), old.token_to_id("[UNK]")) if i is not None], 0
    for text in documents:
        before, after = old.encode(text).ids, new.encode(text).ids
        if position.keys() >= set(before):
            assert after == [position[i] for i in before], text
            equal += 1
        for i in unknown:
            assert i in before or position[i] not in after, text
        if old.decode(old.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text:
            ids = new.encode(text, add_special_tokens=False).ids
            assert new.decode(ids, skip_special_tokens=False) == text
    return equal


@pytest.mark.parametrize("family", FAMILIES)
def test_smaller_tokenizers_of_all_families_keep_texts_and_their_tokens(family):
    content = FAMILIES[family]()
    counts = count(content, ENGLISH[::2])
    used = reduce_vocabulary(content, counts, None)
    assert used.kept.tolist() == sorted({*used.kept.tolist()})
    assert compare(content, used, ENGLISH[::2]) == len(ENGLISH[::2])
    with pytest.raises(ValueError, match=r"num_kept=1; pass (\d+) ") as error:
        reduce_vocabulary(content, counts, 1)
    least = int(str(error.value).split("pass ")[1].split()[0])
    assert least < len(used.kept) < len(counts)
    for number in {least, (least + len(used.kept)) // 2, (len(used.kept) + len(counts)) // 2}:
        smaller = reduce_vocabulary(content, counts, number)
        assert len(smaller.kept) == number
        equal = compare(content, smaller, texts(number) + ENGLISH)
        assert equal > 20

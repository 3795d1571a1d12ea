"""A tiny model with a tokenizer of which a text uses some of the tokens only."""

import random
from pathlib import Path

from tiny_llama import tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

COMMON = "the sea is deep and ships are small so sailors look at sky count days"
RARE = "zebras yodel quietly whenever jazz quartets vex foggy xylophones"


def text_of(words: str, length: int = 300) -> str:
    """Words in random order: each becomes a token, no pair of them does."""
    return " ".join(random.Random(0).choices(words.split(), k=length))


TEXT = text_of(COMMON)


def bpe_tokenizer(words: str = "") -> PreTrainedTokenizerFast:
    """A byte-level BPE: 3 special tokens, 256 bytes, merges for all words, and a token that was added.

    `words` are more words that become tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    settings = {
        "vocab_size": 900 if words else 400,
        "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(),
        "show_progress": False,
    }
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>"], **settings)
    text = [TEXT, text_of(RARE)]
    if words:
        text.append(text_of(words, 3000))
    tokenizer.train_from_iterator(text, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.add_tokens(["<image>"], special_tokens=True)
    return fast


def save(folder: Path, spare: int = 8, words: str = "", **changes) -> Path:
    """A dense model with its tokenizer; `spare` rows of the embedding have no token.

    `words` are more words that become tokens.
    """
    tokenizer = bpe_tokenizer(words)
    tiny_llama(
        **{"vocab_size": len(tokenizer) + spare, "pad_token_id": None, **changes}
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

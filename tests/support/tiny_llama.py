"""A tiny random Llama and a tokenizer of single characters, for tests of whole runs."""

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 64
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
TEXT = (
    "the sea is deep and the ships are small, so the sailors look at the sky and count the days. "
    * 40
)
QUICK = ["--num-samples", "8", "--sequence-length", "16", "--device", "cpu"]  # flags of a command


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """Two decoder layers, 14 linear operators; the same weights in every call with the same `changes`."""
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "initializer_range": 0.2,
    }
    config = LlamaConfig(**settings | changes)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, so that any text gives many different tokens."""
    all_characters = string.ascii_lowercase + string.digits + " \n" + string.punctuation
    characters = all_characters[: VOCABULARY - len(SPECIAL)]
    ids = {token: index for index, token in enumerate([*SPECIAL, *characters])}

    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def tiny_tokens(num_sequences: int = 8, length: int = 16) -> Tensor:
    """Random ordinary token ids [num_sequences, length]; 128 tokens by default, more than any operator's inputs."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(len(SPECIAL), VOCABULARY, (num_sequences, length), generator=generator)


def save_tiny_folder(folder: Path) -> Path:
    """Save the dense model and its tokenizer to a folder, and return the folder."""
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder

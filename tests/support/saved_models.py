"""Models and folders that many tests share: a plugin that tests/conftest.py registers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import tiny_llama, tiny_tokenizer, tiny_tokens
from tiny_models import VOCAB_SIZE, tiny_model
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from optimum_fista import FistaPruner, FistaPruningConfig, PruningReport


@dataclass(frozen=True)
class Saved:
    """A pruned model, and the folder it was saved to; do not write to that, `shutil.copytree` it."""

    model: PreTrainedModel
    pruner: FistaPruner
    report: PruningReport
    folder: Path


@pytest.fixture
def llama() -> LlamaForCausalLM:
    """A dense model of its own for every test."""
    return tiny_llama()


@pytest.fixture
def tokens() -> Tensor:
    return tiny_tokens()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def prune_and_save(model: PreTrainedModel, folder: Path, batches: Any = None, **options) -> Saved:
    """Prune a model in memory, by default on the tiny tokens, and save it with the tiny tokenizer."""
    if batches is None:
        batches = tiny_tokens().split(4)
    pruner = FistaPruner(FistaPruningConfig(**options), progress=False)
    report = pruner.prune(model, batches, calibration_source="random tokens")
    pruner.save_pretrained(model, folder, tiny_tokenizer())
    return Saved(model, pruner, report, folder)


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Saved:
    """Llama, 2:4 by FISTA, its down projections 1:4."""
    folder = tmp_path_factory.mktemp("saved") / "llama-2-4"
    overrides = {"*.down_proj": "1:4"}
    return prune_and_save(tiny_llama(), folder, pattern="2:4", method="fista", overrides=overrides)


@pytest.fixture(scope="session")
def saved_by_rows(tmp_path_factory) -> Saved:
    """A tied Llama in bfloat16 with odd row lengths, 30% of every row by Wanda."""
    model = tiny_llama(tie_word_embeddings=True, intermediate_size=45).bfloat16()
    folder = tmp_path_factory.mktemp("saved") / "llama-30"
    return prune_and_save(model, folder, sparsity=0.3, method="wanda")


@pytest.fixture(scope="session")
def saved_gpt2(tmp_path_factory) -> Saved:
    """GPT-2, whose weights are stored [in, out], 1:4 by Wanda; one shard a tensor or two."""
    config = GPT2Config(
        n_embd=32,
        n_inner=48,
        n_layer=2,
        n_head=4,
        vocab_size=64,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = GPT2LMHeadModel(config)
    save_whole = model.save_pretrained
    model.save_pretrained = lambda folder: save_whole(folder, max_shard_size="20KB")
    folder = tmp_path_factory.mktemp("saved") / "gpt2-1-4"
    return prune_and_save(model, folder, pattern="1:4", method="wanda")


@pytest.fixture(scope="session")
def pruned(tmp_path_factory):
    """`pruned(family, exclude)` is the folder of a pruned model in bfloat16; each is made once."""
    folders: dict[tuple[str, tuple[str, ...]], Path] = {}
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB_SIZE, (4, 24), generator=generator)

    def make(family: str, exclude: tuple[str, ...] = ()) -> Path:
        key = (family, exclude)
        if key not in folders:
            model = tiny_model(family)
            pruner = FistaPruner(FistaPruningConfig(exclude=exclude), progress=False)
            pruner.prune(model, tokens.split(2))
            folders[key] = tmp_path_factory.mktemp("pruned") / family
            pruner.save_pretrained(model.to(torch.bfloat16), folders[key])
        return folders[key]

    return make

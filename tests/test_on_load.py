import json

import pytest
import torch
from pruning import same, weights
from tiny_llama import TEXT, save_tiny_folder, tiny_llama, tiny_tokenizer, tiny_tokens
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from optimum_fista import (
    FistaOnLoadConfig,
    FistaPruner,
    FistaPruningConfig,
    calibration_tokens,
    verify_checkpoint,
)


def loaded_and_pruned(folder, dataset, batches, **options):
    """A model that is pruned as it is loaded, its pruner, and a model that is pruned afterwards."""
    pruner, later = (
        FistaPruner(FistaPruningConfig(method="wanda"), progress=False) for _ in range(2)
    )
    on_load = FistaOnLoadConfig(pruner, dataset, num_samples=4, sequence_length=16)
    loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=on_load, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    later.prune(model, batches(model))
    return loaded, pruner, model


@pytest.mark.parametrize("source", ["self", "texts"])
def test_pruning_on_load_leaves_the_model_that_prune_leaves(tmp_path, source):
    folder = save_tiny_folder(tmp_path)
    tokenizer = tiny_tokenizer()
    texts = [TEXT[:40], TEXT[3:11]]
    dataset, batches = {
        "self": (
            "self",
            lambda model: calibration_tokens("self", model, tokenizer, 4, 16).split(1),
        ),
        "texts": (texts, lambda _: [tokenizer(text)["input_ids"][:16] for text in texts]),
    }[source]

    loaded, pruner, model = loaded_and_pruned(folder, dataset, batches)

    assert same(weights(loaded), weights(model))
    assert loaded.config.to_dict() == model.config.to_dict()
    assert vars(loaded).keys() == vars(model).keys()  # no quantizer is left
    assert pruner.result(loaded)[0].calibration["source"] == ("self" if source == "self" else None)


@pytest.mark.parametrize(
    "family", ["gpt2", "mixtral"]
)  # experts are stored under other names than in memory
def test_a_model_that_is_pruned_on_load_is_saved_as_any_other(tmp_path, family):
    tiny_model(family).save_pretrained(tmp_path / "dense")
    batches = tiny_tokens().split(4)
    options = {"dtype": torch.bfloat16, "device_map": {"": "cpu"}}
    loaded, pruner, model = loaded_and_pruned(
        tmp_path / "dense", batches, lambda _: batches, **options
    )
    loaded.save_pretrained(tmp_path / "plain")

    model.save_pretrained(tmp_path / "later")

    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "later" / name).read_bytes()
    pruner.save_pretrained(loaded, tmp_path / "masks")
    verify_checkpoint(tmp_path / "masks")


def test_what_can_not_be_pruned_on_load_is_refused_before_weights_are_read(tmp_path):
    with pytest.raises(ValueError, match="source='nowhere' is not known"):
        FistaOnLoadConfig(FistaPruner(), "nowhere")

    on_load = FistaOnLoadConfig(FistaPruner())
    config = tiny_llama().config.to_dict() | {"dtype": "float32"}
    (tmp_path / "model.safetensors").write_bytes(b"damaged")  # so reading it would fail otherwise
    method = {"quantization_config": {"quant_method": "fp8"}}
    for values, message in (
        (config, "has no tokenizer"),
        (config | method, "but you are passing a FistaOnLoadConfig"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=on_load)


def test_a_pruner_that_removes_tokens_is_refused_before_the_model_is_loaded():
    pruner = FistaPruner(FistaPruningConfig(pattern="vocab:0.1"), progress=False)

    with pytest.raises(ValueError, match=r"pattern='vocab:0\.1' removes tokens from files"):
        FistaOnLoadConfig(pruner)

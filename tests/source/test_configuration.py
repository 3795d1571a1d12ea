"""`config.json` of a result has the keys of its source, also those that Transformers 5 would write in another form."""

import json
from pathlib import Path

import pytest
import torch
from rare_tokens import TEXT as TEXT_OF_COMMON_WORDS
from rare_tokens import save as save_with_rare_tokens
from tiny_llama import TEXT, save_tiny_folder, tiny_tokens
from transformers import AutoModelForCausalLM, Gemma3Config, GPT2Config, LlamaConfig, Qwen2VLConfig

from optimum_fista import FistaPruner, FistaPruningConfig, recover
from optimum_fista.folder.packed_folder import pack_folder, unpack_folder
from optimum_fista.source.configuration import content_of

OLD_FORM = {
    "rope_theta": 500000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "torch_dtype": "float32",
    "transformers_version": "4.40.0",
    "a_key_of_nobody": {"two": 3},
}


def content(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def in_old_form(folder: Path) -> Path:
    """Rewrite a folder's `config.json` as Transformers 4 does."""
    new = content(folder)
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype")}
    (folder / "config.json").write_text(json.dumps(OLD_FORM | old | OLD_FORM))
    return folder


def changes(source: Path, result: Path) -> dict:
    """Check that all keys of the source are there; the values that are others, without the summary of the run."""
    before = content(source)
    after = content(result)
    after.pop("fista_pruning")
    assert after.keys() == before.keys()
    return {key: value for key, value in after.items() if value != before[key]}


@pytest.mark.parametrize("is_streamed", [True, False], ids=["streamed", "from memory"])
@pytest.mark.parametrize(
    ("pattern", "changed"),
    [
        ("2:4", {}),
        ("channels:0.25", {"intermediate_size": 36}),
        ("heads:0.5", {"num_attention_heads": 2, "num_key_value_heads": 1}),
        ("layers:0.5", {"num_hidden_layers": 1}),
    ],
)
def test_a_result_has_the_keys_of_its_source(tmp_path, pattern, changed, is_streamed):
    source = in_old_form(save_tiny_folder(tmp_path / "source"))
    pruner = FistaPruner(FistaPruningConfig(pattern=pattern, method="wanda"), progress=False)

    if is_streamed:
        pruner.prune(source, tiny_tokens().split(4), output_dir=tmp_path / "out", device="cpu")
    else:
        model = AutoModelForCausalLM.from_pretrained(source)
        pruner.prune(model, tiny_tokens().split(4))
        pruner.save_pretrained(model, tmp_path / "out")

    assert changes(source, tmp_path / "out") == changed
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert config.rope_parameters["rope_theta"] == OLD_FORM["rope_theta"]
    assert config.rope_parameters["factor"] == 2.0


def test_a_result_with_fewer_tokens_has_the_keys_of_its_source(tmp_path):
    source = in_old_form(save_with_rare_tokens(tmp_path / "source"))
    pruner = FistaPruner(FistaPruningConfig(pattern="vocab:unused"), progress=False)

    pruner.prune(source, [TEXT_OF_COMMON_WORDS], output_dir=tmp_path / "out")

    assert changes(source, tmp_path / "out").keys() <= {
        "vocab_size",
        "bos_token_id",
        "eos_token_id",
    }


def test_recovered_packed_and_unpacked_results_have_the_keys_of_their_source(tmp_path):
    source = in_old_form(save_tiny_folder(tmp_path / "source"))
    pruner = FistaPruner(FistaPruningConfig(pattern="2:4", method="wanda"), progress=False)
    pruner.prune(source, tiny_tokens().split(4), output_dir=tmp_path / "out", device="cpu")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)

    recover(
        tmp_path / "out",
        source,
        tmp_path / "recovered",
        calibration=str(text),
        tokens=256,
        sequence_length=16,
        held_out=4,
        device="cpu",
        progress=False,
    )
    pack_folder(tmp_path / "out", tmp_path / "packed")
    unpack_folder(tmp_path / "packed", tmp_path / "unpacked")

    assert changes(source, tmp_path / "recovered") == {}
    assert changes(source, tmp_path / "unpacked") == {}
    only_packed = {"quantization_config", "transformers_weights"}
    assert content(tmp_path / "packed").keys() - content(tmp_path / "out").keys() == only_packed


def test_another_dtype_is_written_under_the_key_of_the_source(tmp_path):
    source = in_old_form(save_tiny_folder(tmp_path / "source"))
    pruner = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)
    batches = tiny_tokens().split(4)

    pruner.prune(source, batches, output_dir=tmp_path / "out", device="cpu", dtype="bfloat16")

    assert changes(source, tmp_path / "out") == {"torch_dtype": "bfloat16"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_a_value_is_changed_under_the_name_that_the_source_gives_it():
    source = {"model_type": "gpt2", "num_hidden_layers": 4, "n_embd": 32, "n_head": 4}
    config = GPT2Config.from_dict(dict(source))

    config.n_layer = 2

    assert content_of(config, source) == source | {"num_hidden_layers": 2}


def test_an_old_multimodal_model_keeps_the_keys_of_its_decoder_at_the_top():
    source = {"model_type": "qwen2_vl", "num_hidden_layers": 4, "vision_config": {"depth": 2}}
    config = Qwen2VLConfig.from_dict(dict(source))

    config.text_config.num_hidden_layers = 2
    config.text_config.layer_types = config.text_config.layer_types[:2]

    assert content_of(config, source) == source | {"num_hidden_layers": 2}


@pytest.mark.parametrize("config_class", [Qwen2VLConfig, Gemma3Config])
def test_keys_of_the_decoder_that_stand_at_the_top_too_get_the_new_values_there(config_class):
    decoder = {"num_hidden_layers": 4, "hidden_size": 64}
    source = {
        "model_type": config_class.model_type,
        **decoder,
        "intermediate_size": 7,  # another value than in the section, so it is not a copy
        "text_config": {
            "model_type": config_class().text_config.model_type,
            **decoder,
            "intermediate_size": 48,
        },
    }
    config = config_class.from_dict(json.loads(json.dumps(source)))

    config.text_config.num_hidden_layers = 2
    config.text_config.layer_types = config.text_config.layer_types[:2]
    config.text_config.intermediate_size = 36

    section = source["text_config"] | {"num_hidden_layers": 2, "intermediate_size": 36}
    assert content_of(config, source) == source | {"num_hidden_layers": 2, "text_config": section}


def test_the_section_of_a_part_gives_its_keys():
    source = {
        "model_type": "qwen2_vl",
        "text_config": {"model_type": "qwen2_vl_text", "hidden_size": 64},
    }
    config = Qwen2VLConfig.from_dict(json.loads(json.dumps(source))).text_config

    config.fista_pruning = {}

    assert content_of(config, source) == source["text_config"] | {"fista_pruning": {}}


def test_without_a_source_transformers_form_is_written():
    config = LlamaConfig(num_hidden_layers=3)

    assert content_of(config, None) == json.loads(config.to_json_string())

"""Files of a saved model: plain Transformers loads them, and a crash leaves none of them half written."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from folder_files import bytes_of
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_llama import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.folder import writing

LOAD = """
    import json, sys
    sys.modules["optimum_fista"] = None  # importing it is an error from here on
    import torch
    from transformers import AutoModelForCausalLM

    for folder, reference in json.loads(sys.argv[1]):
        loaded, expected = AutoModelForCausalLM.from_pretrained(folder).state_dict(), torch.load(reference)
        assert loaded.keys() == expected.keys(), folder
        for name, value in expected.items():
            assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value), (folder, name)
    print("bit-equal")
"""


def pruned_model(tokens, **options):
    """A pruner after its run, and the model that it pruned; `options` are those of the configuration."""
    model = tiny_llama()
    config = FistaPruningConfig(**{"method": "wanda"} | options)
    pruner = FistaPruner(config, progress=False)
    pruner.prune(model, tokens.split(4))
    return pruner, model


def test_plain_transformers_loads_the_same_bits(saved, saved_by_rows, saved_gpt2, tmp_path):
    pairs = []
    for index, example in enumerate((saved, saved_by_rows, saved_gpt2)):
        torch.save(example.model.state_dict(), tmp_path / f"{index}.pt")
        pairs.append((str(example.folder), str(tmp_path / f"{index}.pt")))
    command = [sys.executable, "-c", textwrap.dedent(LOAD), json.dumps(pairs)]

    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    assert process.stdout.strip() == "bit-equal", process.stderr


def test_a_saved_folder_has_only_the_expected_files_and_nothing_is_beside_it(saved, saved_gpt2):
    expected = {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    expected |= {"fista/masks.safetensors", "fista/report.json", "fista/files.json"}

    assert set(bytes_of(saved.folder)) == expected | {"model.safetensors"}
    shards = set(bytes_of(saved_gpt2.folder)) - expected
    assert "model.safetensors.index.json" in shards
    assert len(shards) > 3

    assert saved.folder.stat().st_mode & 0o777 == 0o755
    assert AutoTokenizer.from_pretrained(saved.folder).decode([23, 11, 8]) == "the"
    assert not [path for path in saved.folder.parent.iterdir() if path != saved.folder]


def test_the_key_in_the_configuration_survives_saving_by_plain_transformers(saved, tmp_path):
    entry = json.loads((saved.folder / "config.json").read_text())["fista_pruning"]

    AutoModelForCausalLM.from_pretrained(saved.folder).save_pretrained(tmp_path)

    assert json.loads((tmp_path / "config.json").read_text())["fista_pruning"] == entry


def test_the_key_in_the_configuration_has_the_numbers_of_the_model(saved):
    weights = [value for name, value in saved.model.named_parameters() if "_proj" in name]

    entry = json.loads((saved.folder / "config.json").read_text())["fista_pruning"]

    assert entry["pattern"] == "2:4"
    assert entry["method"] == "fista"
    assert entry["num_operators"] == 14
    assert entry["num_zeros"] == sum(int((weight == 0).sum()) for weight in weights)
    assert (saved.folder / entry["masks"]).is_file()


def test_the_saved_report_is_read_as_it_was(saved):
    report = json.loads((saved.folder / "fista/report.json").read_text())

    assert report == json.loads(saved.report.to_json())
    assert report["config"] == saved.pruner.config.resolved().to_dict()
    for operator in report["operators"]:
        assert operator["shape"] == list(saved.model.state_dict()[operator["name"]].shape)
        # `saved` is pruned 2:4, and its down projections 1:4.
        expected_sparsity = 0.75 if "down_proj" in operator["name"] else 0.5
        assert operator["sparsity"] == expected_sparsity


@pytest.mark.parametrize("name", ["saved", "saved_by_rows", "saved_gpt2"])
def test_masks_have_one_bit_for_each_weight_and_mark_what_was_kept(name, request):
    example = request.getfixturevalue(name)
    weights = example.model.state_dict()

    masks = load_file(example.folder / "fista/masks.safetensors")

    assert sorted(masks) == sorted(o.name for o in example.report.operators)
    for key, packed in masks.items():
        weight = weights[key]
        assert packed.dtype == torch.uint8
        assert packed.shape == ((weight.numel() + 7) // 8,)
        position = np.arange(weight.numel())
        bits = (packed.numpy()[position // 8] >> (position % 8)) & 1
        is_kept = (weight != 0).reshape(-1).numpy()
        assert np.array_equal(bits.astype(bool), is_kept), key
    with safe_open(example.folder / "fista/masks.safetensors", "pt") as file:
        assert file.metadata() == {"format": "bitmask-1"}


@pytest.mark.parametrize("broken", ["model_card", "write_file", "unpack_mask"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_crash_while_saving_leaves_nothing_half_done(
    tokens, tmp_path, monkeypatch, broken, overwrite
):
    def crash(*arguments, **options):
        raise KeyboardInterrupt

    pruner, model = pruned_model(tokens)
    if overwrite:
        pruner.save_pretrained(model, tmp_path / "model")
    before = bytes_of(tmp_path)

    with monkeypatch.context() as patch:
        patch.setattr(writing, broken, crash)
        with pytest.raises(KeyboardInterrupt):
            pruner.save_pretrained(model, tmp_path / "model", overwrite=overwrite)

    assert bytes_of(tmp_path) == before
    expected_names = ["model"] if overwrite else []
    assert [path.name for path in tmp_path.iterdir()] == expected_names
    pruner.save_pretrained(model, tmp_path / "model", overwrite=overwrite)  # a second try works


def test_a_model_changed_after_pruning_is_refused(tokens, tmp_path):
    pruner, model = pruned_model(tokens)
    weight = model.model.layers[1].mlp.up_proj.weight.data
    weight += 1e-3

    message = r"layers\.1\.mlp\.up_proj\.weight is no longer zero outside its mask"
    with pytest.raises(ValueError, match=message):
        pruner.save_pretrained(model, tmp_path / "model")

    assert not list(tmp_path.iterdir())

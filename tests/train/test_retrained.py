import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import tiny_llama, tiny_tokens
from transformers import AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig, masked_training, save_masked
from optimum_fista.evaluate.verification import verify_checkpoint


def train(model, masks=None) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    with masked_training(model, masks):
        for ids in tiny_tokens().split(4):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def record(folder) -> tuple[dict, dict, str]:
    files = [folder / "config.json", folder / "fista" / "report.json", folder / "README.md"]
    return json.loads(files[0].read_text())["fista_pruning"], json.loads(files[1].read_text()), files[2].read_text()


@pytest.mark.parametrize("name", ["saved", "saved_gpt2"])
def test_a_retrained_model_is_saved_with_its_masks_and_says_so(name, request, tokenizer, tmp_path):
    example = request.getfixturevalue(name)
    model = AutoModelForCausalLM.from_pretrained(example.folder)
    train(model, example.folder)
    save_masked(model, tmp_path / "out", example.folder, tokenizer)
    assert verify_checkpoint(tmp_path / "out").num_zeros == example.report.totals["num_zeros"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in model.named_parameters())
    assert (tmp_path / "out" / "tokenizer.json").exists()
    masks = [load_file(folder / "fista/masks.safetensors") for folder in (example.folder, tmp_path / "out")]
    assert masks[0].keys() == masks[1].keys()
    assert all(torch.equal(mask, masks[1][key]) for key, mask in masks[0].items())
    entry, report, card = record(tmp_path / "out")
    before = record(example.folder)
    assert entry == before[0] | {"retrained": True}
    assert report == before[1] | {"retrained": True}
    assert not before[1]["retrained"]
    assert "then retrained under its masks" in card
    assert "| fit error of the operators, before retraining |" in card
    assert "without retraining" in before[2]
    assert "before retraining" not in before[2]


def test_the_pruner_knows_that_its_model_was_retrained(tmp_path):
    model = tiny_llama()
    pruner = FistaPruner(FistaPruningConfig(pattern="2:4", method="wanda"), progress=False)
    pruner.prune(model, tiny_tokens().split(4))
    pruner.save_pretrained(model, tmp_path / "before")
    train(model, pruner)
    pruner.save_pretrained(model, tmp_path / "after")
    assert [record(tmp_path / name)[1]["retrained"] for name in ("before", "after")] == [False, True]
    assert verify_checkpoint(tmp_path / "after").num_operators == 14
    save_masked(model, tmp_path / "again", pruner)
    assert record(tmp_path / "again") == record(tmp_path / "after")


def test_the_folder_may_be_the_source(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved.folder, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    train(model, folder)
    with pytest.raises(FileExistsError, match="already holds a model"):
        save_masked(model, folder, folder)
    save_masked(model, folder, folder, overwrite=True)
    verify_checkpoint(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    train(again, folder)
    save_masked(again, folder, folder, overwrite=True)
    assert record(folder)[1]["retrained"]


def test_lost_zeros_and_other_models_are_refused(saved, saved_gpt2, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved.folder)
    model.model.layers[1].mlp.up_proj.weight.data += 1e-3
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight is no longer zero outside its mask"):
        save_masked(model, tmp_path / "out", saved.folder)
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no such weight"):
        save_masked(saved_gpt2.model, tmp_path / "out", saved.folder)
    with pytest.raises(FileNotFoundError, match=r"holds no fista/report\.json"):
        save_masked(model, tmp_path / "out", tmp_path)
    assert not list(tmp_path.iterdir())

"""Masks of an earlier run stay with their weights when parts or tokens are removed, or the report says otherwise."""

from pathlib import Path

import pytest
import rare_tokens
import torch
from families import family_tokens
from safetensors.torch import load_file
from saved_models import prune_and_save
from tiny_llama import tiny_llama, tiny_tokens
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig, masked_training, verify_checkpoint
from optimum_fista.folder.checkpoint import MASKS_FILE, read_report
from optimum_fista.source.model_folder import read_json

BATCHES = tiny_tokens().split(4)
DOWN = {"model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"}
OUTPUT = {"model.layers.0.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj.weight"}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory) -> Path:
    """The folder of a model with zeros in all 14 operators, 2 of every 4; do not write to it."""
    folder = tmp_path_factory.mktemp("sparse") / "model"
    prune_and_save(tiny_llama(), folder, pattern="2:4", method="wanda")
    return folder


def remove(source: Path, folder: Path, pattern: str, streamed: bool, **options) -> Path:
    """Remove parts of a model, from files to files or in memory, and return the folder of the result."""
    pruner = FistaPruner(FistaPruningConfig(pattern=pattern, **options), progress=False)
    if streamed:
        pruner.prune(source, BATCHES, output_dir=folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(source)
        pruner.prune(model, BATCHES)
        pruner.save_pretrained(model, folder)
    return folder


def zeros_of(model) -> dict[str, int]:
    """How many weights of each linear operator of the decoder layers are zero, by the names of their weights."""
    return {
        name: int((weight == 0).sum())
        for name, weight in model.named_parameters()
        if name.endswith("_proj.weight")
    }


def train_one_step(model, folder: Path) -> None:
    with masked_training(model, folder):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        ids = tiny_tokens()
        model(ids, labels=ids).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    ("pattern", "options", "lost"),
    [
        ("channels:0.25/4", {"method": "wanda"}, set()),
        ("channels:0.25/4", {}, DOWN),
        ("heads:0.5", {"method": "wanda"}, set()),
        ("heads:0.5", {}, DOWN | OUTPUT),
        ("layers:0.5", {"error_correction": "none", "residual_correction": 0.0}, set()),
        ("channels:0.25/4+heads:0.5+layers:0.5", {"method": "wanda"}, set()),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_masks_are_carried_unless_a_refit_wrote_into_the_zeros(
    sparse, tmp_path, pattern, options, lost, streamed
):
    folder = remove(sparse, tmp_path / "smaller", pattern, streamed, **options)

    report = read_report(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    carried = {operator.name for operator in report.carried}
    assert set(report.lost_masks) == lost
    assert carried == zeros_of(model).keys() - lost
    assert set(load_file(folder / MASKS_FILE)) >= carried
    assert verify_checkpoint(folder, dense=sparse).num_equal
    before = zeros_of(model)
    assert read_json(folder / "config.json")["fista_pruning"]["num_zeros"] == sum(
        before[name] for name in carried
    )

    train_one_step(model, folder)

    after = zeros_of(model)
    assert {name: after[name] for name in carried} == {name: before[name] for name in carried}
    assert sum(before[name] for name in carried) > 0


@pytest.mark.filterwarnings("ignore")
def test_a_pattern_that_slices_break_is_called_unstructured(sparse, tmp_path):
    folder = remove(sparse, tmp_path / "smaller", "channels:0.25/4", True, method="wanda")

    patterns = {operator.name: operator.pattern for operator in read_report(folder).carried}

    assert patterns["model.layers.0.mlp.up_proj.weight"] == "2:4"
    assert patterns["model.layers.0.mlp.down_proj.weight"] == "unstructured"


@pytest.mark.filterwarnings("ignore")
def test_masks_are_carried_through_several_runs(sparse, tmp_path):
    first = remove(sparse, tmp_path / "first", "layers:0.5", True, method="wanda")

    second = remove(first, tmp_path / "second", "channels:0.25/4", True, method="wanda")

    model = AutoModelForCausalLM.from_pretrained(second)
    before = zeros_of(model)
    assert len(read_report(second).carried) == len(before) == 7
    train_one_step(model, second)
    assert zeros_of(model) == before


@pytest.mark.filterwarnings("ignore")
def test_masks_stay_when_tokens_are_removed(tmp_path):
    dense = rare_tokens.save(tmp_path / "dense")
    sparse, folder = tmp_path / "sparse", tmp_path / "smaller"
    zeros = FistaPruner(FistaPruningConfig(pattern="2:4", method="wanda"), progress=False)
    zeros.prune(dense, BATCHES, output_dir=sparse)
    tokens = FistaPruner(FistaPruningConfig(pattern="vocab:0.1/1"), progress=False)

    tokens.prune(sparse, [rare_tokens.TEXT], output_dir=folder)

    masks = load_file(sparse / MASKS_FILE)
    carried = load_file(folder / MASKS_FILE)
    assert len(masks) == len(read_report(folder).carried) == 14
    assert carried.keys() == masks.keys()
    assert all(torch.equal(carried[name], mask) for name, mask in masks.items())
    verify_checkpoint(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = zeros_of(model)
    train_one_step(model, folder)
    assert zeros_of(model) == before
    again = remove(folder, tmp_path / "both", "channels:0.25/4", True, method="wanda")
    assert len(read_report(again).carried) == 14


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.usefixtures("enough_tokens")
@pytest.mark.filterwarnings("ignore")
def test_masks_of_experts_get_the_new_numbers_of_the_experts(family, tmp_path):
    source, folder = tmp_path / "sparse", tmp_path / "smaller"
    prune_and_save(tiny_model(family), source, family_tokens(), pattern="2:4", method="wanda")
    config = FistaPruningConfig(pattern="experts:0.5", expert_refit=False)

    FistaPruner(config, progress=False).prune(source, family_tokens(), output_dir=folder)

    report = read_report(folder)
    assert not report.lost_masks
    # 2 of 4 experts in each of two layers, each with three matrices, besides q, k, v and o
    assert len(report.carried) == 2 * (2 * 3 + 4)
    verify_checkpoint(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    train_one_step(model, folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    for name, weight in again.named_parameters():
        if "experts" in name and "bias" not in name:
            assert torch.equal(weight == 0, dict(model.named_parameters())[name] == 0)


def test_a_run_that_does_not_know_the_masks_says_so(tmp_path):
    model = tiny_llama()
    options = {"progress": False}
    FistaPruner(FistaPruningConfig(pattern="2:4", method="wanda"), **options).prune(model, BATCHES)
    pruner = FistaPruner(FistaPruningConfig(pattern="channels:0.25/4", method="wanda"), **options)

    with pytest.warns(match=r"the masks of an earlier run \(2:4, 7,680 zeros\) are not known"):
        pruner.prune(model, BATCHES)

    assert not pruner.result(model)[0].carried


def test_a_run_that_overwrites_zeros_says_so_on_the_card(sparse, tmp_path):
    with pytest.warns(match="weights of 2 operators were fitted anew, which overwrote their zeros"):
        folder = remove(sparse, tmp_path / "smaller", "channels:0.25/4", True)

    card = (folder / "README.md").read_text()
    assert "zeros of earlier runs" in card
    assert "in 2 operators they were overwritten" in card

"""Masks of an earlier run stay with their weights when parts or tokens are removed, or the report says otherwise."""

from pathlib import Path

import pytest
import rare_tokens
import torch
from families import family_tokens
from safetensors.torch import load_file, save_file
from saved_models import prune_and_save
from tiny_llama import tiny_llama, tiny_tokens
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig, masked_training, verify_checkpoint
from optimum_fista.folder.checkpoint import MASKS_FILE, read_report
from optimum_fista.folder.packed_folder import pack_folder, unpack_folder
from optimum_fista.solve.pattern import unpack_mask
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
def test_carried_masks_that_no_longer_fit_their_groups_are_called_unstructured(sparse, tmp_path):
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


def test_tokens_go_without_the_masks_of_weights_that_were_changed_since(tmp_path):
    sparse, folder = tmp_path / "sparse", tmp_path / "smaller"
    dense = rare_tokens.save(tmp_path / "dense")
    zeros = FistaPruner(FistaPruningConfig(pattern="2:4", method="wanda"), progress=False)
    zeros.prune(dense, BATCHES, output_dir=sparse)
    changed = "model.layers.1.mlp.up_proj.weight"
    (file,) = [file for file in sparse.glob("*.safetensors") if changed in load_file(file)]
    tensors = load_file(file)
    tensors[changed][tensors[changed] == 0] = 0.01
    save_file(tensors, file, {"format": "pt"})
    tokens = FistaPruner(FistaPruningConfig(pattern="vocab:0.1/1"), progress=False)

    with pytest.warns(match=rf"weights of 1 operators were changed since .*: {changed}"):
        tokens.prune(sparse, [rare_tokens.TEXT], output_dir=folder)

    report = read_report(folder)
    assert report.lost_masks == [changed]
    assert len(report.carried) == 13
    assert load_file(folder / MASKS_FILE).keys() == load_file(sparse / MASKS_FILE).keys() - {
        changed
    }
    verify_checkpoint(folder)


@pytest.fixture(scope="module")
def halved(tmp_path_factory):
    """The folder of a model with zeros in all 14 operators, half of each row; do not write to it."""
    folder = tmp_path_factory.mktemp("halved") / "model"
    prune_and_save(tiny_llama(), folder, sparsity=0.5, scope="row", method="wanda")
    return folder


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_masks_of_operators_that_a_later_run_leaves_dense_are_carried(halved, tmp_path, streamed):
    excluded = {name for name in zeros_of(tiny_llama()) if name.startswith("model.layers.1.")}
    options = {"exclude": ("model.layers.1.*",)}  # the default method fits all kept weights anew

    folder = remove(halved, tmp_path / "twice", "2:4", streamed, **options)

    report = read_report(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = zeros_of(model)
    zeros = sum(before.values())
    assert {operator.name for operator in report.carried} == excluded
    assert {operator.pattern for operator in report.carried} == {"unstructured"}
    assert report.lost_masks == []
    assert len(load_file(folder / MASKS_FILE)) == 14
    proven = verify_checkpoint(folder, dense=halved)
    assert (proven.num_operators, proven.num_zeros) == (14, zeros) == (14, report.num_zeros)
    assert read_json(folder / "config.json")["fista_pruning"]["num_zeros"] == zeros
    in_all = (
        f"with {zeros // 2:,} zeros that earlier runs left in 7 other operators, {zeros:,} weights are zero "
        f"({zeros / model.num_parameters():.2%} of all parameters)"
    )
    assert in_all in (folder / "README.md").read_text()
    assert in_all in str(report)

    train_one_step(model, folder)

    assert zeros_of(model) == before


@pytest.mark.filterwarnings("ignore")
def test_masks_of_operators_that_a_later_run_leaves_dense_are_packed(halved, tmp_path):
    config = FistaPruningConfig(pattern="2:4", method="wanda", exclude=("model.layers.1.*",))
    pruner = FistaPruner(config, progress=False)

    pruner.prune(halved, BATCHES, output_dir=tmp_path / "packed", packed=True)
    pruner.prune(halved, BATCHES, output_dir=tmp_path / "twice")

    proven = verify_checkpoint(tmp_path / "packed")
    assert proven == verify_checkpoint(tmp_path / "twice")
    assert proven.num_operators == 14
    unpack_folder(tmp_path / "packed", tmp_path / "unpacked")
    masks = load_file(tmp_path / "unpacked" / MASKS_FILE)
    expected = load_file(tmp_path / "twice" / MASKS_FILE)
    assert masks.keys() == expected.keys()
    assert all(torch.equal(masks[name], mask) for name, mask in expected.items())


@pytest.mark.filterwarnings("ignore:the model was pruned before")
def test_masks_of_operators_whose_channels_a_later_run_reorders_are_carried_in_the_new_order(
    tmp_path,
):
    source = tmp_path / "sparse"
    prune_and_save(tiny_llama(), source, sparsity=0.5, method="wanda")
    options = {"exclude": ("*.up_proj", "*.self_attn.*"), "reorder_channels": True}

    folder = remove(source, tmp_path / "twice", "2:4", True, method="wanda", **options)

    report = read_report(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    assert name in {operator.name for operator in report.carried}
    assert len(report.carried) == 10
    assert not report.lost_masks
    verify_checkpoint(folder, dense=source)
    old_mask = load_file(source / MASKS_FILE)[name]
    assert not torch.equal(load_file(folder / MASKS_FILE)[name], old_mask)
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = zeros_of(model)[name]
    with masked_training(model, folder, fill_zeros=True):
        pass
    assert zeros_of(model)[name] == before


@pytest.mark.filterwarnings("ignore:the model was pruned before")
@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("method", ["wanda", "obs_admm"])
def test_zeros_of_operators_that_are_pruned_again_are_counted(halved, tmp_path, streamed, method):
    folder = remove(halved, tmp_path / "twice", "2:4", streamed, method=method)

    report = read_report(folder)
    old = AutoModelForCausalLM.from_pretrained(halved)
    new = AutoModelForCausalLM.from_pretrained(folder)
    masks = load_file(folder / MASKS_FILE)
    filled = 0
    uncovered = 0
    for name in zeros_of(new):
        was_zero = old.get_parameter(name) == 0
        is_zero = new.get_parameter(name) == 0
        new_mask = unpack_mask(masks[name], tuple(is_zero.shape))
        filled += int((was_zero & ~is_zero).sum())
        uncovered += int((was_zero & is_zero & new_mask).sum())
    assert (report.zeros_filled, report.zeros_uncovered) == (filled, uncovered)
    assert filled + uncovered > 0
    assert (filled > 0) == (method == "obs_admm")  # wanda changes no weight that stays
    said = f"{filled:,} were filled, and {uncovered:,} stay zero without a mask"
    assert said in (folder / "README.md").read_text()
    assert any("have other values now" in warning for warning in report.warnings)


@pytest.mark.filterwarnings("ignore:the model was pruned before")
def test_a_run_that_keeps_all_earlier_zeros_says_nothing_of_them(sparse, tmp_path):
    folder = remove(sparse, tmp_path / "twice", "2:4", True, method="wanda")

    report = read_report(folder)
    assert (report.zeros_filled, report.zeros_uncovered) == (0, 0)
    assert report.earlier_zeros == ""


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("pattern", ["2:4", "layers:0.5"])
@pytest.mark.usefixtures("enough_tokens")
@pytest.mark.filterwarnings("ignore:the model was pruned before")
@pytest.mark.filterwarnings("ignore:.*experts")
def test_masks_of_a_packed_folder_are_carried(family, pattern, tmp_path):
    plain = tmp_path / "plain"
    prune_and_save(tiny_model(family), plain, family_tokens(), pattern="2:4", method="wanda")
    pack_folder(plain, tmp_path / "packed")
    options = {"pattern": pattern, "method": "wanda", "residual_correction": 0.0}
    if pattern == "2:4":
        options["exclude"] = ("*.layers.1.*",)

    folders = {}
    for name in ("plain", "packed"):
        folders[name] = tmp_path / f"{name}-twice"
        pruner = FistaPruner(FistaPruningConfig(**options), progress=False)
        pruner.prune(tmp_path / name, family_tokens(), output_dir=folders[name])

    expected = load_file(folders["plain"] / MASKS_FILE)
    masks = load_file(folders["packed"] / MASKS_FILE)
    assert masks.keys() == expected.keys()
    assert all(torch.equal(masks[name], mask) for name, mask in expected.items())
    report = read_report(folders["packed"])
    assert report.carried == read_report(folders["plain"]).carried != []
    assert not any("are not known" in warning for warning in report.warnings)
    verify_checkpoint(folders["packed"])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.usefixtures("enough_tokens")
@pytest.mark.filterwarnings("ignore")
def test_masks_of_experts_that_a_later_run_leaves_dense_are_carried(family, tmp_path):
    source, folder = tmp_path / "sparse", tmp_path / "twice"
    prune_and_save(tiny_model(family), source, family_tokens(), pattern="2:4", method="wanda")
    config = FistaPruningConfig(pattern="2:4", method="wanda", exclude=("*.experts",))

    FistaPruner(config, progress=False).prune(source, family_tokens(), output_dir=folder)

    # 4 experts in each of two layers, each with three matrices
    assert len(read_report(folder).carried) == 2 * 4 * 3
    verify_checkpoint(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: weight == 0 for name, weight in model.named_parameters() if "experts" in name}
    train_one_step(model, folder)
    after = dict(model.named_parameters())
    for name, was_zero in before.items():
        if "bias" not in name:
            assert torch.equal(after[name] == 0, was_zero)


def test_a_run_that_leaves_operators_dense_and_does_not_know_their_masks_says_so(tmp_path):
    model = tiny_llama()
    options = {"progress": False}
    FistaPruner(FistaPruningConfig(pattern="2:4", method="wanda"), **options).prune(model, BATCHES)
    config = FistaPruningConfig(pattern="2:4", method="wanda", exclude=("model.layers.1.*",))

    with pytest.warns(match=r"the masks of an earlier run \(2:4\) are not known, so those of"):
        report = FistaPruner(config, **options).prune(model, BATCHES)

    assert not report.carried


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


def test_a_removal_that_does_not_know_the_earlier_masks_says_so(tmp_path):
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

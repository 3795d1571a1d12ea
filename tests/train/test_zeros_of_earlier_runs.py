"""Training does not fill the zeros of an earlier run without a word if their masks are gone."""

import pytest
import quick_recovery
import torch
from saved_models import prune_and_save
from tiny_llama import TEXT, save_tiny_folder, tiny_llama, tiny_tokens
from transformers import AutoModelForCausalLM

from optimum_fista import (
    FistaPruner,
    FistaPruningConfig,
    MaskedTrainingCallback,
    masked_training,
    recover,
)
from optimum_fista.folder.checkpoint import read_report
from optimum_fista.train.training import find_masks

OPTIONS = quick_recovery.QUICK | {"tokens": 64}
OPERATOR_WEIGHTS = 15360  # of all operators of `tiny_llama`, in its two decoder layers
REFUSAL = r"zeros that no mask covers, .*fill_zeros=True \(--fill-zeros\)"


@pytest.fixture(scope="module")
def twice_pruned(tmp_path_factory):
    """The folder of a model whose operators were pruned 2:4, and then only its first layer to 25%."""
    folder = tmp_path_factory.mktemp("twice")
    first = prune_and_save(tiny_llama(), folder / "first", pattern="2:4", method="wanda")
    model = AutoModelForCausalLM.from_pretrained(first.folder)
    second = prune_and_save(
        model, folder / "second", sparsity=0.25, method="wanda", exclude=("model.layers.1.*",)
    )
    return second.folder


def num_zeros(model) -> int:
    weights = (weight for name, weight in model.named_parameters() if name.endswith("_proj.weight"))
    return sum(int((weight == 0).sum()) for weight in weights)


def train_one_step(model) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = tiny_tokens()
    model(ids, labels=ids).loss.backward()
    optimizer.step()


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "sea.txt"
    file.write_text(TEXT)
    return str(file)


def test_masked_training_refuses_zeros_without_masks(twice_pruned):
    model = AutoModelForCausalLM.from_pretrained(twice_pruned)
    before = num_zeros(model)
    assert before == OPERATOR_WEIGHTS // 2

    with pytest.raises(ValueError, match=REFUSAL), masked_training(model, twice_pruned):
        train_one_step(model)

    assert num_zeros(model) == before


def test_the_callback_of_the_trainer_refuses_zeros_without_masks(twice_pruned):
    callback = MaskedTrainingCallback(twice_pruned)
    arguments = type("Arguments", (), {"deepspeed_plugin": None})()
    model = AutoModelForCausalLM.from_pretrained(twice_pruned)

    with pytest.raises(ValueError, match=REFUSAL):
        callback.on_train_begin(arguments, model=model)


def test_zeros_of_the_dense_model_are_not_those_of_a_run_that_removed_parts(text, tmp_path):
    """Weights that were quantized before have many zeros by chance; a removal of channels has set none of them."""
    dense_folder = save_tiny_folder(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(dense_folder)
    with torch.no_grad():
        dense.model.layers[1].self_attn.q_proj.weight[:, :2] = 0
    dense.save_pretrained(dense_folder)
    first = prune_and_save(dense, tmp_path / "first", pattern="channels:0.5")
    model = AutoModelForCausalLM.from_pretrained(first.folder)
    second = prune_and_save(model, tmp_path / "second", pattern="heads:0.5")
    assert num_zeros(AutoModelForCausalLM.from_pretrained(second.folder)) > 0

    recover(second.folder, dense_folder, tmp_path / "out", calibration=text, **OPTIONS)

    assert read_report(tmp_path / "out").retrained


def test_masked_training_fills_zeros_without_masks_if_told(twice_pruned):
    model = AutoModelForCausalLM.from_pretrained(twice_pruned)
    masks = find_masks(model, twice_pruned, fill_zeros=True)
    of_this_run = sum(int((~mask).sum()) for mask in masks.values())

    with masked_training(model, twice_pruned, fill_zeros=True):
        train_one_step(model)

    assert of_this_run <= num_zeros(model) < OPERATOR_WEIGHTS // 2


def test_the_zeros_that_the_weights_have_now_need_no_masks_of_a_folder(twice_pruned):
    model = AutoModelForCausalLM.from_pretrained(twice_pruned)

    with masked_training(model):
        train_one_step(model)

    assert num_zeros(model) == OPERATOR_WEIGHTS // 2


def test_zeros_that_stayed_when_parts_were_removed_stay_in_a_training_on_the_zeros_of_now():
    model = tiny_llama()
    batches = tiny_tokens().split(4)
    FistaPruner(FistaPruningConfig(pattern="2:4", method="wanda"), progress=False).prune(
        model, batches
    )
    FistaPruner(FistaPruningConfig(pattern="layers:0.5"), progress=False).prune(model, batches)
    before = num_zeros(model)
    assert before == OPERATOR_WEIGHTS // 2 // 2  # of the decoder layer that is left

    with masked_training(model):
        train_one_step(model)

    assert num_zeros(model) == before


def test_recover_refuses_zeros_without_masks_before_any_work(
    twice_pruned, tiny_folder, text, tmp_path
):
    with pytest.raises(ValueError, match=REFUSAL):
        recover(twice_pruned, tiny_folder, tmp_path / "out", calibration=text, **OPTIONS)

    assert [path.name for path in tmp_path.iterdir()] == ["sea.txt"]


def test_recover_fills_zeros_without_masks_if_told(twice_pruned, tiny_folder, text, tmp_path):
    options = OPTIONS | {"calibration": text, "train": "all", "fill_zeros": True}

    recover(twice_pruned, tiny_folder, tmp_path / "out", **options)

    zeros = num_zeros(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    masked = read_report(tmp_path / "out").totals["num_zeros"]
    assert masked <= zeros < OPERATOR_WEIGHTS // 2


def test_recover_of_norms_fills_nothing_and_is_not_refused(
    twice_pruned, tiny_folder, text, tmp_path
):
    options = OPTIONS | {"calibration": text, "train": "norms"}

    recover(twice_pruned, tiny_folder, tmp_path / "out", **options)

    assert (
        num_zeros(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) == OPERATOR_WEIGHTS // 2
    )


@pytest.mark.parametrize("pattern", ["layers:0.5", "channels:0.25/4"])
def test_recover_keeps_the_zeros_of_a_run_before_parts_were_removed(
    pattern, tiny_folder, text, tmp_path
):
    sparse = prune_and_save(tiny_llama(), tmp_path / "sparse", pattern="2:4", method="wanda")
    model = AutoModelForCausalLM.from_pretrained(sparse.folder)
    smaller = prune_and_save(model, tmp_path / "smaller", pattern=pattern, method="wanda")
    before = num_zeros(AutoModelForCausalLM.from_pretrained(smaller.folder))
    options = OPTIONS | {"calibration": text, "train": "all"}

    recover(smaller.folder, tiny_folder, tmp_path / "out", **options)

    after = num_zeros(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert before > 3000  # so there are zeros that could be lost
    assert after == before

import contextlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import tiny_llama, tiny_tokens
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_fista import FistaPruner, FistaPruningConfig, masked_training, save_masked
from optimum_fista.evaluate.verification import verify_checkpoint
from optimum_fista.train.training import find_masks


class Noise(torch.optim.Optimizer):
    """Moves every weight, whatever its gradient."""

    def __init__(self, parameters, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(torch.randn_like(parameter), alpha=group["lr"])


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-1, weight_decay=0.1),
    "noise": lambda p: Noise(p, lr=1e-2),
}


def reload(saved, **options) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(saved.folder, **options).train()


def train(
    model: PreTrainedModel, optimizer, steps: int = 4, accumulate: int = 2, clip: float = 0.5
) -> list[Tensor]:
    """Train a few steps; returns the norms of the gradients."""
    norms = []
    for _ in range(steps):
        for ids in tiny_tokens().split(4)[:accumulate]:
            model(ids, labels=ids).loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def count_strays(model: PreTrainedModel, masks: dict[str, Tensor]) -> int:
    """Weights outside the masks with any bit set, a sign included."""
    integer_by_size = {2: torch.int16, 4: torch.int32}
    count = 0
    for name, mask in masks.items():
        weight = model.get_parameter(name).data
        bits = weight.view(integer_by_size[weight.element_size()])
        count += int(bits[~mask].count_nonzero())
    return count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_stay_zero_bit_for_bit_and_the_rest_is_trained(optimizer, dtype, saved):
    model = reload(saved, dtype=dtype)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    masks = find_masks(model, saved.folder)

    with masked_training(model, saved.folder):
        train(model, OPTIMIZERS[optimizer](model.parameters()))
        assert count_strays(model, masks) == 0

    for name, parameter in model.named_parameters():
        mask = masks.get(name, torch.ones(()).bool().expand_as(parameter))
        share_changed = (parameter != before[name])[mask].float().mean()
        assert bool(torch.isfinite(parameter).all())
        assert share_changed > 0.1, name


def train_by_hand(model: PreTrainedModel, optimizer, masks: dict[str, Tensor]) -> Tensor:
    """One step of `train` whose gradients are masked before they are clipped; returns their norm."""
    for ids in tiny_tokens().split(4)[:2]:
        model(ids, labels=ids).loss.backward()
    for name, mask in masks.items():
        model.get_parameter(name).grad.mul_(mask)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return norm


def test_moments_and_clipping_never_see_pruned_weights(saved):
    name = "model.layers.0.mlp.up_proj.weight"
    masked = reload(saved)
    by_hand = reload(saved)
    masks = find_masks(masked, saved.folder)
    optimizer, optimizer_by_hand = (
        torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, amsgrad=True)
        for model in (masked, by_hand)
    )

    with masked_training(masked, masks):
        (norm,) = train(masked, optimizer, steps=1)
    norm_by_hand = train_by_hand(by_hand, optimizer_by_hand, masks)

    assert torch.equal(norm, norm_by_hand)
    state = optimizer.state[masked.get_parameter(name)]
    state_by_hand = optimizer_by_hand.state[by_hand.get_parameter(name)]
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert torch.equal(state[key], state_by_hand[key])
        assert not bool(state[key][~masks[name]].any())
    for parameter, expected in zip(masked.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_nan_gradients_of_pruned_weights_do_not_spread(saved):
    model = reload(saved)
    name = "model.layers.0.mlp.up_proj.weight"
    masks = find_masks(model)
    factors = torch.where(masks[name], 1.0, float("nan"))

    with masked_training(model):
        weight = model.get_parameter(name)
        (weight * factors).sum().backward()

    assert bool(torch.isfinite(weight.grad).all())


def test_an_error_in_the_loop_ends_the_masking(saved):
    model = reload(saved)
    masks = find_masks(model)
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")

    with contextlib.suppress(KeyboardInterrupt), masked_training(model):
        weight.data.add_(1.0)
        raise KeyboardInterrupt

    assert count_strays(model, masks) == 0
    train(model, OPTIMIZERS["adamw"](model.parameters()), steps=1)
    assert count_strays(model, masks) > 8000  # no hook is left


def test_training_another_model_inside_masked_training_is_not_masked(saved):
    model = reload(saved)
    other = reload(saved)
    masks = find_masks(model)

    with masked_training(model):
        train(other, OPTIMIZERS["adamw"](other.parameters()), steps=1)

    assert count_strays(other, masks) > 8000
    assert "retrained" not in model.config.fista_pruning


def test_frozen_weights_stay_unchanged_under_masked_training(saved):
    model = reload(saved)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weight = model.model.layers[0].mlp.up_proj.weight.clone()
    norm = model.model.norm.weight.clone()

    with masked_training(model):
        train(model, OPTIMIZERS["adamw"](trained))

    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, weight)
    assert not torch.equal(model.model.norm.weight, norm)
    assert model.config.fista_pruning["retrained"]


def retrain(model, masks) -> None:
    with masked_training(model, masks):
        train(model, OPTIMIZERS["adamw"](model.parameters()))


def summary_of(folder) -> dict:
    """What `config.json` says of the pruning."""
    return json.loads((folder / "config.json").read_text())["fista_pruning"]


def report_of(folder) -> dict:
    return json.loads((folder / "fista" / "report.json").read_text())


def card_of(folder) -> str:
    return (folder / "README.md").read_text()


@pytest.mark.parametrize("name", ["saved", "saved_gpt2"])
def test_a_retrained_model_is_saved_with_its_masks(name, request, tokenizer, tmp_path):
    example = request.getfixturevalue(name)
    output = tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(example.folder)
    retrain(model, example.folder)

    save_masked(model, output, example.folder, tokenizer)

    assert verify_checkpoint(output).num_zeros == example.report.totals["num_zeros"]
    assert (output / "tokenizer.json").exists()
    again = AutoModelForCausalLM.from_pretrained(output)
    for parameter_name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(parameter_name)), parameter_name
    masks = load_file(output / "fista" / "masks.safetensors")
    expected = load_file(example.folder / "fista" / "masks.safetensors")
    assert masks.keys() == expected.keys()
    assert all(torch.equal(masks[key], mask) for key, mask in expected.items())


def test_report_summary_and_card_of_a_retrained_model_say_that_it_was_retrained(saved, tmp_path):
    output = tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(saved.folder)
    retrain(model, saved.folder)

    save_masked(model, output, saved.folder)

    assert not report_of(saved.folder)["retrained"]
    assert report_of(output) == report_of(saved.folder) | {"retrained": True}
    assert summary_of(output) == summary_of(saved.folder) | {"retrained": True}
    assert "then retrained under its masks" in card_of(output)
    assert "| fit error of the operators, before retraining |" in card_of(output)
    assert "without retraining" in card_of(saved.folder)
    assert "before retraining" not in card_of(saved.folder)


def test_the_pruner_knows_that_its_model_was_retrained(tmp_path):
    model = tiny_llama()
    pruner = FistaPruner(FistaPruningConfig(pattern="2:4", method="wanda"), progress=False)
    pruner.prune(model, tiny_tokens().split(4))

    pruner.save_pretrained(model, tmp_path / "before")
    retrain(model, pruner)
    pruner.save_pretrained(model, tmp_path / "after")
    save_masked(model, tmp_path / "again", pruner)

    assert not report_of(tmp_path / "before")["retrained"]
    assert report_of(tmp_path / "after")["retrained"]
    assert verify_checkpoint(tmp_path / "after").num_operators == 14
    for read in (summary_of, report_of, card_of):
        assert read(tmp_path / "again") == read(tmp_path / "after")


def test_a_retrained_model_can_replace_the_folder_it_was_loaded_from(saved, tmp_path):
    folder = shutil.copytree(saved.folder, tmp_path / "model")

    for _ in range(2):
        model = AutoModelForCausalLM.from_pretrained(folder)
        retrain(model, folder)
        with pytest.raises(FileExistsError, match="already holds a model"):
            save_masked(model, folder, folder)
        save_masked(model, folder, folder, overwrite=True)

    verify_checkpoint(folder)
    assert report_of(folder)["retrained"]


def test_a_model_that_lost_zeros_is_refused(saved, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved.folder)
    model.model.layers[1].mlp.up_proj.weight.data += 1e-3

    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.up_proj\.weight is no longer zero outside its mask"
    ):
        save_masked(model, tmp_path / "out", saved.folder)

    assert not list(tmp_path.iterdir())


def test_another_model_than_that_of_the_folder_is_refused(saved, saved_gpt2, tmp_path):
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no such weight"):
        save_masked(saved_gpt2.model, tmp_path / "out", saved.folder)
    with pytest.raises(FileNotFoundError, match=r"holds no fista/report\.json"):
        save_masked(saved.model, tmp_path / "out", tmp_path)

    assert not list(tmp_path.iterdir())


def test_saving_changes_only_what_it_says_of_the_configuration(saved, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved.folder)
    model.config.architectures = None
    retrain(model, saved.folder)
    before = model.config.to_dict()
    weights = {name: weight.clone() for name, weight in model.named_parameters()}

    save_masked(model, tmp_path / "out", saved.folder)

    after = model.config.to_dict()
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed == {"architectures"}
    assert all(torch.equal(weights[name], weight) for name, weight in model.named_parameters())


def test_saving_a_model_without_a_summary_gives_it_one(saved, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved.folder)
    del model.config.fista_pruning

    save_masked(model, tmp_path / "out", saved.folder)

    assert model.config.fista_pruning["retrained"]
    documented = save_masked.__doc__
    assert all(f"`{key}`" in documented for key in ("fista_pruning", "architectures", "dtype"))


def test_a_model_with_wrapped_layers_is_trained_and_saved_as_one_without(saved, tmp_path):
    model = reload(saved)
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = checkpoint_wrapper(layer)
    wrapped = [name for name, _ in model.named_parameters()]

    with masked_training(model, saved.folder):
        train(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    save_masked(model, tmp_path / "out", saved.folder)

    assert [name for name, _ in model.named_parameters()] == wrapped
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(
        load_file(saved.folder / "model.safetensors")
    )
    proven = verify_checkpoint(tmp_path / "out")
    assert proven.num_zeros == verify_checkpoint(saved.folder).num_zeros

import contextlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import tiny_llama, tiny_tokens
from torch import Tensor, nn
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
    """Returns the norms of the gradients."""
    norms = []
    for _ in range(steps):
        for ids in tiny_tokens().split(4)[:accumulate]:
            model(ids, labels=ids).loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def strays(model: PreTrainedModel, masks: dict[str, Tensor]) -> int:
    """Weights outside the masks with any bit set, a sign included."""
    kinds = {2: torch.int16, 4: torch.int32}
    weights = {name: model.get_parameter(name).data for name in masks}
    return sum(
        int(w.view(kinds[w.element_size()])[~masks[name]].count_nonzero())
        for name, w in weights.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_stay_zero_bit_for_bit_and_the_rest_is_trained(optimizer, dtype, saved):
    model = reload(saved, dtype=dtype)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    masks = find_masks(model, saved.folder)
    with masked_training(model, saved.folder):
        train(model, OPTIMIZERS[optimizer](model.parameters()))
        assert strays(model, masks) == 0
    for name, parameter in model.named_parameters():
        kept = masks.get(name, torch.ones(()).bool().expand_as(parameter))
        assert bool(torch.isfinite(parameter).all())
        assert (parameter != before[name])[kept].float().mean() > 0.1, name


def test_moments_and_clipping_never_see_pruned_weights(saved):
    models = [reload(saved), reload(saved)]
    masks = find_masks(models[0], saved.folder)
    norms, states = [], []
    for model, is_masked in zip(models, (True, False), strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, amsgrad=True)
        if is_masked:
            with masked_training(model, masks):
                norms.append(train(model, optimizer, steps=1)[0])
        else:  # the same by hand
            for ids in tiny_tokens().split(4)[:2]:
                model(ids, labels=ids).loss.backward()
            for name, mask in masks.items():
                model.get_parameter(name).grad.mul_(mask)
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
            optimizer.step()
        states.append(optimizer.state[model.get_parameter("model.layers.0.mlp.up_proj.weight")])
    assert torch.equal(*norms)
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert torch.equal(states[0][key], states[1][key])
        assert not bool(states[0][key][~masks["model.layers.0.mlp.up_proj.weight"]].any())
    assert all(
        torch.equal(a, b)
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True)
    )


def test_nan_gradients_of_pruned_weights_do_not_spread(saved):
    model = reload(saved)
    name = "model.layers.0.mlp.up_proj.weight"
    masks = find_masks(model)
    with masked_training(model):
        weight = model.get_parameter(name)
        (weight * torch.where(masks[name], 1.0, float("nan"))).sum().backward()
        assert bool(torch.isfinite(weight.grad).all())


def test_an_error_in_the_loop_ends_it(saved):
    model = reload(saved)
    masks = find_masks(model)
    with contextlib.suppress(KeyboardInterrupt), masked_training(model):
        model.get_parameter("model.layers.0.mlp.up_proj.weight").data.add_(1.0)
        raise KeyboardInterrupt
    assert strays(model, masks) == 0
    train(model, OPTIMIZERS["adamw"](model.parameters()), steps=1)
    assert strays(model, masks) > 8000


def test_other_models_are_left_alone(saved):
    model, other = reload(saved), reload(saved)
    masks = find_masks(model)
    with masked_training(model):
        train(other, OPTIMIZERS["adamw"](other.parameters()), steps=1)
    assert strays(other, masks) > 8000
    assert "retrained" not in model.config.fista_pruning


def test_frozen_weights_are_no_trouble(saved):
    model = reload(saved)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    weight = model.model.layers[0].mlp.up_proj.weight.clone()
    norm = model.model.norm.weight.clone()
    with masked_training(model):
        train(model, OPTIMIZERS["adamw"]([p for p in model.parameters() if p.requires_grad]))
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, weight)
    assert not torch.equal(model.model.norm.weight, norm)
    assert model.config.fista_pruning["retrained"]


def retrain(model, masks) -> None:
    with masked_training(model, masks):
        train(model, OPTIMIZERS["adamw"](model.parameters()))


def record(folder) -> tuple[dict, dict, str]:
    files = [folder / "config.json", folder / "fista" / "report.json", folder / "README.md"]
    return (
        json.loads(files[0].read_text())["fista_pruning"],
        json.loads(files[1].read_text()),
        files[2].read_text(),
    )


@pytest.mark.parametrize("name", ["saved", "saved_gpt2"])
def test_a_retrained_model_is_saved_with_its_masks_and_says_so(name, request, tokenizer, tmp_path):
    example = request.getfixturevalue(name)
    model = AutoModelForCausalLM.from_pretrained(example.folder)
    retrain(model, example.folder)
    save_masked(model, tmp_path / "out", example.folder, tokenizer)
    assert verify_checkpoint(tmp_path / "out").num_zeros == example.report.totals["num_zeros"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in model.named_parameters())
    assert (tmp_path / "out" / "tokenizer.json").exists()
    masks = [
        load_file(folder / "fista/masks.safetensors")
        for folder in (example.folder, tmp_path / "out")
    ]
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
    retrain(model, pruner)
    pruner.save_pretrained(model, tmp_path / "after")
    assert [record(tmp_path / name)[1]["retrained"] for name in ("before", "after")] == [
        False,
        True,
    ]
    assert verify_checkpoint(tmp_path / "after").num_operators == 14
    save_masked(model, tmp_path / "again", pruner)
    assert record(tmp_path / "again") == record(tmp_path / "after")


def test_the_folder_may_be_the_source(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved.folder, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    retrain(model, folder)
    with pytest.raises(FileExistsError, match="already holds a model"):
        save_masked(model, folder, folder)
    save_masked(model, folder, folder, overwrite=True)
    verify_checkpoint(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    retrain(again, folder)
    save_masked(again, folder, folder, overwrite=True)
    assert record(folder)[1]["retrained"]


def test_lost_zeros_and_other_models_are_refused(saved, saved_gpt2, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved.folder)
    model.model.layers[1].mlp.up_proj.weight.data += 1e-3
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.up_proj\.weight is no longer zero outside its mask"
    ):
        save_masked(model, tmp_path / "out", saved.folder)
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no such weight"):
        save_masked(saved_gpt2.model, tmp_path / "out", saved.folder)
    with pytest.raises(FileNotFoundError, match=r"holds no fista/report\.json"):
        save_masked(model, tmp_path / "out", tmp_path)
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

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.train.training import find_masks


def zeros_of(model, names) -> dict[str, torch.Tensor]:
    """Masks of the zeros that these parameters have now."""
    return {name: model.get_parameter(name) != 0 for name in names}


def agree(masks, other) -> bool:
    if masks.keys() != other.keys():
        return False
    return all(torch.equal(mask, other[name]) for name, mask in masks.items())


@pytest.mark.parametrize("name", ["saved", "saved_by_rows", "saved_gpt2"])
def test_the_pruner_the_folder_and_the_zeros_give_the_same_masks(name, request):
    example = request.getfixturevalue(name)
    reloaded = AutoModelForCausalLM.from_pretrained(example.folder)

    of_pruner = find_masks(example.model, example.pruner)
    of_folder = find_masks(reloaded, example.folder)
    of_zeros = find_masks(reloaded)

    expected = zeros_of(example.model, [entry.name for entry in example.report.operators])
    assert agree(of_pruner, expected)
    assert agree(of_folder, expected)
    assert agree(of_zeros, expected)
    assert agree(find_masks(reloaded, expected), expected)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_masks_of_experts_are_put_together(family, tokens, tmp_path):
    model = tiny_model(family)
    pruner = FistaPruner(FistaPruningConfig(pattern="2:4", method="wanda"), progress=False)
    report = pruner.prune(model, tokens.split(4))
    pruner.save_pretrained(model, tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    masks = find_masks(reloaded, tmp_path / "out")

    assert agree(masks, find_masks(model, pruner))
    assert agree(masks, zeros_of(model, masks))
    assert sum(int((~mask).sum()) for mask in masks.values()) == report.totals["num_zeros"]
    assert {mask.ndim for mask in masks.values()} == {2, 3}


def test_a_folder_knows_kept_weights_that_are_zero(saved):
    model = AutoModelForCausalLM.from_pretrained(saved.folder)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = model.get_parameter(name).data
    row, column = (weight != 0).nonzero()[0]
    weight[row, column] = 0

    assert find_masks(model, saved.folder)[name][row, column]
    assert not find_masks(model)[name][row, column]


def test_a_dense_model_is_refused(llama):
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM is not pruned, or no longer: 0 of the 15,360 weights"
    ):
        find_masks(llama)


def test_a_model_that_has_lost_zeros_is_refused(saved):
    model = AutoModelForCausalLM.from_pretrained(saved.folder)
    model.model.layers[1].mlp.up_proj.weight.data.fill_(1.0)

    with pytest.raises(
        ValueError, match=r"no longer: [\d,]+ of the 15,360 .* configuration says 8,448\."
    ):
        find_masks(model)
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.up_proj\.weight has 768 weights outside its mask"
    ):
        find_masks(model, saved.folder)


def test_the_folder_of_another_architecture_is_refused(saved, saved_gpt2):
    with pytest.raises(
        ValueError,
        match=r"q_proj\.weight of shape \(32, 32\) has a mask, .* GPT2LMHeadModel has no such",
    ):
        find_masks(saved_gpt2.model, saved.folder)


def test_the_folder_of_a_model_of_other_shapes_is_refused(saved, saved_by_rows):
    with pytest.raises(
        ValueError,
        match=r"gate_proj.* \(45, 32\) has a mask, but LlamaForCausalLM has it in shape \(48",
    ):
        find_masks(saved.model, saved_by_rows.folder)


def test_a_pruner_that_has_not_pruned_the_model_is_refused(saved, llama):
    with pytest.raises(ValueError, match="was not pruned by this FistaPruner"):
        find_masks(llama, saved.pruner)


def test_a_folder_without_a_report_is_refused(saved, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"holds no fista/report\.json: pass a folder or Hub id saved by"
    ):
        find_masks(saved.model, tmp_path)


def test_given_masks_of_a_wrong_shape_or_name_are_refused(saved):
    name = "model.layers.0.mlp.up_proj.weight"

    with pytest.raises(
        ValueError,
        match=r"has shape \(48,\) and dtype torch\.bool: pass torch\.bool of shape \(48, 32\)",
    ):
        find_masks(saved.model, {name: torch.ones(48, dtype=torch.bool)})

    with pytest.raises(
        ValueError, match="masks name 'up_proj', which is no parameter of LlamaForCausalLM"
    ):
        find_masks(saved.model, {"up_proj": torch.ones(48, 32, dtype=torch.bool)})


def test_a_quantized_model_is_refused(saved):
    model = AutoModelForCausalLM.from_pretrained(saved.folder)
    model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)

    with pytest.raises(ValueError, match="model is quantized by 'bitsandbytes'"):
        find_masks(model)


def test_an_offloaded_model_is_refused(saved, tmp_path):
    offloaded = AutoModelForCausalLM.from_pretrained(
        saved.folder, device_map={"": "disk"}, offload_folder=tmp_path / "offload"
    )

    with pytest.raises(
        ValueError, match=r"q_proj\.weight is offloaded, and offloaded weights can't be trained"
    ):
        find_masks(offloaded, saved.folder)

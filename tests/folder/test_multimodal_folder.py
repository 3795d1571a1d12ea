"""Folders of multimodal models: they are pruned whole, with their processors, and stay of the same class."""

import json

import pytest
import torch
from families import ENOUGH_TOKENS, family_model, family_tokens, logits, read_tensors
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMultimodalLM, Llama4Config, T5Config

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.evaluate.verification import verify_checkpoint
from optimum_fista.folder.loading import model_class, read_model

PROCESSOR = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def pruner(pattern="2:4"):
    return FistaPruner(FistaPruningConfig(pattern=pattern, method="magnitude", error_correction="none"), progress=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Makes a saved model of a family, once."""
    place = tmp_path_factory.mktemp("dense")

    def of(family):
        if not (place / family).exists():
            family_model(family, kind=AutoModelForMultimodalLM).save_pretrained(place / family)
            for name in PROCESSOR:
                (place / family / name).write_text("{}")
        return place / family

    return of


def test_the_class_is_the_one_that_the_configuration_names():
    both = Llama4Config()
    assert model_class(both) is AutoModelForCausalLM  # none is named
    both.architectures = ["Llama4ForConditionalGeneration"]
    assert model_class(both) is AutoModelForMultimodalLM
    both.architectures = ["Llama4ForCausalLM"]
    assert model_class(both) is AutoModelForCausalLM
    with pytest.raises(ValueError, match="model_type='t5', of which Transformers has no class that writes text"):
        model_class(T5Config())


def test_offloaded_packed_and_streamed_are_the_same_with_all_files(folders, tmp_path, no_pictures):
    dense, found = folders("qwen3_vl"), {}
    with pytest.warns(UserWarning, match="Qwen3VLForConditionalGeneration saw no image or video"):
        pruner().prune(dense, family_tokens(), output_dir=tmp_path / "streamed", device="cpu")
    pruner().prune(dense, family_tokens(), output_dir=tmp_path / "packed", device="cpu", packed=True)
    verify_checkpoint(tmp_path / "packed")
    model = AutoModelForMultimodalLM.from_pretrained(
        dense, device_map={"": "disk"}, offload_folder=tmp_path / "weights"
    )
    saver = pruner()
    saver.prune(model, family_tokens())
    saver.save_pretrained(model, tmp_path / "offloaded")
    for name in ("streamed", "packed", "offloaded"):
        assert all((tmp_path / name / file).exists() for file in PROCESSOR)
        assert json.loads((tmp_path / name / "config.json").read_text())["architectures"] == [type(model).__name__]
        found[name] = logits(read_model(str(tmp_path / name)))
    tensors, others = read_tensors(tmp_path / "streamed"), read_tensors(tmp_path / "offloaded")
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert torch.equal(found["streamed"], found["packed"])


def test_fused_experts_go_from_files(folders, tmp_path, no_pictures):
    with ENOUGH_TOKENS:
        report = pruner("experts:0.5").prune(
            folders("qwen3_vl_moe"), family_tokens(), output_dir=tmp_path / "out", device="cpu"
        )
    verify_checkpoint(tmp_path / "out")
    model = read_model(str(tmp_path / "out"))
    assert model.config.text_config.num_experts == 2
    assert model.num_parameters() == report.model["num_parameters"]
    assert bool(torch.isfinite(logits(model)).all())


@pytest.mark.skipif("molmo2" not in CONFIG_MAPPING, reason="needs a newer Transformers")
def test_rows_of_several_operators_are_not_packed(folders, tmp_path):
    with pytest.raises(ValueError, match=r"ff_proj.weight\[0:48, :\] is a part of a matrix with other operators"):
        pruner().prune(folders("molmo2"), family_tokens(), output_dir=tmp_path / "out", device="cpu", packed=True)
    assert list(tmp_path.iterdir()) == []

"""Folders of multimodal models: they are pruned whole, with their processors, and stay of the same class."""

import io
import json
import sys

import pytest
import torch
from families import ENOUGH_TOKENS, family_model, family_tokens, logits, read_tensors
from folder_files import bytes_of, files_of
from hub_standin import hub_fixture, run_with_hub  # noqa: F401
from killed import interrupted_after
from media_models import media_batch, save_llava_folder
from tiny_llama import TEXT, tiny_tokenizer
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    Llama4Config,
    T5Config,
)

from optimum_fista import FistaPruner, FistaPruningConfig, recover
from optimum_fista.cli.main import main
from optimum_fista.evaluate.verification import verify_checkpoint
from optimum_fista.source.loading import model_class, read_model

PROCESSOR = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def pruner(pattern="2:4"):
    return FistaPruner(
        FistaPruningConfig(pattern=pattern, method="magnitude", error_correction="none"),
        progress=False,
    )


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
    with pytest.raises(
        ValueError, match="model_type='t5', of which Transformers has no class that writes text"
    ):
        model_class(T5Config())


def test_offloaded_packed_and_streamed_are_the_same_with_all_files(folders, tmp_path):
    dense, found = folders("qwen3_vl"), {}
    with pytest.warns(UserWarning, match="Qwen3VLForConditionalGeneration saw no image or video"):
        pruner().prune(dense, family_tokens(), output_dir=tmp_path / "streamed", device="cpu")
    pruner().prune(
        dense, family_tokens(), output_dir=tmp_path / "packed", device="cpu", packed=True
    )
    verify_checkpoint(tmp_path / "packed")
    model = AutoModelForMultimodalLM.from_pretrained(
        dense, device_map={"": "disk"}, offload_folder=tmp_path / "weights"
    )
    saver = pruner()
    saver.prune(model, family_tokens())
    saver.save_pretrained(model, tmp_path / "offloaded")
    for name in ("streamed", "packed", "offloaded"):
        assert all((tmp_path / name / file).exists() for file in PROCESSOR)
        assert json.loads((tmp_path / name / "config.json").read_text())["architectures"] == [
            type(model).__name__
        ]
        found[name] = logits(read_model(str(tmp_path / name)))
    tensors, others = read_tensors(tmp_path / "streamed"), read_tensors(tmp_path / "offloaded")
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert torch.equal(found["streamed"], found["packed"])


def test_fused_experts_go_from_files(folders, tmp_path):
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
    with pytest.raises(
        ValueError, match=r"ff_proj.weight\[0:48, :\] is a part of a matrix with other operators"
    ):
        pruner().prune(
            folders("molmo2"),
            family_tokens(),
            output_dir=tmp_path / "out",
            device="cpu",
            packed=True,
        )
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return save_llava_folder(tmp_path_factory.mktemp("source") / "llava")


def prune(source, output, pattern, **options):
    config = FistaPruningConfig(pattern=pattern, method="wanda")
    batches = [media_batch("llava", seed=seed) for seed in range(2)]
    places = {"output_dir": output, "device": "cpu"}
    return FistaPruner(config, progress=False).prune(source, batches, **places | options)


def test_decoder_layers_go_and_an_interrupted_run_resumes(llava, tmp_path):
    before = bytes_of(llava)
    prune(llava, tmp_path / "whole", "layers:0.5")
    prune(llava, tmp_path / "out", "2:4")
    with interrupted_after(1), pytest.raises(KeyboardInterrupt):
        prune(llava, tmp_path / "out", "layers:0.5", overwrite=True)
    assert verify_checkpoint(tmp_path / "out").num_zeros  # the old one is still there
    prune(llava, tmp_path / "out", "layers:0.5", overwrite=True)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert verify_checkpoint(tmp_path / "out", dense=llava).num_equal == len(
        read_tensors(tmp_path / "out")
    )
    assert read_model(str(tmp_path / "out")).config.text_config.num_hidden_layers == 2
    with pytest.raises(ValueError, match="lies in the folder that is read"):
        prune(llava, llava / "out", "2:4")
    assert bytes_of(llava) == before


def test_commands_and_recover_take_multimodal_folders(llava, tmp_path, monkeypatch, capsys):
    prune(llava, tmp_path / "pruned", "2:4")
    prune(llava, tmp_path / "packed", "2:4", packed=True)
    assert main(["report", str(tmp_path / "pruned")]) == 0
    assert (
        "LlavaForConditionalGeneration"
        in (tmp_path / "pruned" / "fista" / "report.html").read_text()
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("the sea\n"))
    capsys.readouterr()
    command = ["chat", str(tmp_path / "packed"), "--device", "cpu", "--max-new-tokens", "6"]
    assert main(command) == 0
    ids, model = (
        tiny_tokenizer()("the sea", return_tensors="pt").input_ids,
        read_model(str(tmp_path / "pruned")),
    )
    answer = tiny_tokenizer().decode(
        model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    )
    assert capsys.readouterr().out.strip() == answer.strip()
    (text := tmp_path / "text.txt").write_text(TEXT)
    sizes = {"tokens": 640, "sequence_length": 16, "batch_size": 1, "accumulate": 2, "held_out": 4}
    recover(
        tmp_path / "packed",
        llava,
        tmp_path / "out",
        calibration=str(text),
        **sizes,
        device="cpu",
        progress=False,
    )
    assert verify_checkpoint(tmp_path / "out").num_zeros
    found, dense = read_tensors(tmp_path / "out"), read_tensors(llava)
    assert found.keys() == dense.keys()
    changed = {name for name in dense if not torch.equal(found[name], dense[name])}
    assert changed == {
        name for name in dense if "language_model" in name and ("layers" in name or "norm" in name)
    }
    for name in bytes_of(llava).keys() - {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }:
        assert (tmp_path / "out" / name).read_bytes() == (llava / name).read_bytes()


def test_from_the_hub_to_the_hub(llava, hub, tmp_path):
    code = f"""
        import torch
        from huggingface_hub import HfApi
        from optimum_fista import FistaPruner, FistaPruningConfig
        from optimum_fista.folder.hub import push_folder
        HfApi().create_repo("tester/dense")
        HfApi().upload_folder(repo_id="tester/dense", folder_path={str(llava)!r})
        pruner = FistaPruner(FistaPruningConfig(pattern="2:4", method="wanda"), progress=False)
        pruner.prune("tester/dense", [torch.arange(3, 51).view(3, 16)], output_dir={str(tmp_path / "out")!r})
        push_folder({str(tmp_path / "out")!r}, "tester/pruned")
    """
    done = run_with_hub(hub, code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert hub.files("tester/pruned") == bytes_of(tmp_path / "out")
    assert {*bytes_of(llava)} - {"model.safetensors"} <= hub.files("tester/pruned").keys()
    assert verify_checkpoint(tmp_path / "out", dense=llava).num_equal

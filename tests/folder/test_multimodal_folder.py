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
    """A pruner that is as fast as possible."""
    config = FistaPruningConfig(pattern=pattern, method="magnitude", error_correction="none")
    return FistaPruner(config, progress=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function that returns the folder of a saved model of a family, which is made once."""
    parent = tmp_path_factory.mktemp("dense")

    def folder_of(family):
        folder = parent / family
        if not folder.exists():
            family_model(family, kind=AutoModelForMultimodalLM).save_pretrained(folder)
            for name in PROCESSOR:
                (folder / name).write_text("{}")
        return folder

    return folder_of


@pytest.mark.parametrize(
    ("architectures", "expected"),
    [
        (None, AutoModelForCausalLM),
        (["Llama4ForConditionalGeneration"], AutoModelForMultimodalLM),
        (["Llama4ForCausalLM"], AutoModelForCausalLM),
    ],
)
def test_the_class_is_the_one_that_the_configuration_names(architectures, expected):
    config = Llama4Config(architectures=architectures)

    assert model_class(config) is expected


def test_a_model_without_a_class_that_writes_text_is_refused():
    message = "model_type='t5', of which Transformers has no class that writes text"
    with pytest.raises(ValueError, match=message):
        model_class(T5Config())


def test_offloaded_packed_and_streamed_runs_write_the_same_weights_with_all_files(
    folders, tmp_path
):
    dense = folders("qwen3_vl")
    streamed = tmp_path / "streamed"
    packed = tmp_path / "packed"
    offloaded = tmp_path / "offloaded"
    model = AutoModelForMultimodalLM.from_pretrained(
        dense, device_map={"": "disk"}, offload_folder=tmp_path / "weights"
    )

    with pytest.warns(UserWarning, match="Qwen3VLForConditionalGeneration saw no image or video"):
        pruner().prune(dense, family_tokens(), output_dir=streamed, device="cpu")
    pruner().prune(dense, family_tokens(), output_dir=packed, device="cpu", packed=True)
    saver = pruner()
    saver.prune(model, family_tokens())
    saver.save_pretrained(model, offloaded)

    for folder in (streamed, packed, offloaded):
        assert all((folder / file).exists() for file in PROCESSOR)
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == ["Qwen3VLForConditionalGeneration"]
    verify_checkpoint(packed)
    tensors = read_tensors(streamed)
    others = read_tensors(offloaded)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    logits_of_streamed = logits(read_model(str(streamed)))
    assert torch.equal(logits_of_streamed, logits(read_model(str(packed))))
    assert torch.equal(logits_of_streamed, logits(read_model(str(offloaded))))


def test_half_of_four_fused_experts_are_removed_in_a_run_from_files(folders, tmp_path):
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
    folder = folders("molmo2")

    message = r"ff_proj.weight\[0:48, :\] is a part of a matrix with other operators"
    with pytest.raises(ValueError, match=message):
        pruner().prune(
            folder, family_tokens(), output_dir=tmp_path / "out", device="cpu", packed=True
        )

    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return save_llava_folder(tmp_path_factory.mktemp("source") / "llava")


def prune(source, output, pattern, **options):
    """Prune a folder of LLaVA on images and text; `options` are those of `FistaPruner.prune`."""
    config = FistaPruningConfig(pattern=pattern, method="wanda")
    batches = [media_batch("llava", seed=seed) for seed in range(2)]
    pruner = FistaPruner(config, progress=False)
    return pruner.prune(source, batches, output_dir=output, device="cpu", **options)


def test_an_interrupted_run_that_removes_decoder_layers_resumes(llava, tmp_path):
    before = bytes_of(llava)
    output = tmp_path / "out"
    prune(llava, tmp_path / "whole", "layers:0.5")
    prune(llava, output, "2:4")

    with interrupted_after(1), pytest.raises(KeyboardInterrupt):
        prune(llava, output, "layers:0.5", overwrite=True)
    assert verify_checkpoint(output).num_zeros  # the old one is still there
    prune(llava, output, "layers:0.5", overwrite=True)

    assert files_of(output) == files_of(tmp_path / "whole")
    assert verify_checkpoint(output, dense=llava).num_equal == len(read_tensors(output))
    assert read_model(str(output)).config.text_config.num_hidden_layers == 2
    assert bytes_of(llava) == before


def test_an_output_in_a_multimodal_folder_that_is_read_is_refused(llava):
    before = bytes_of(llava)

    with pytest.raises(ValueError, match="lies in the folder that is read"):
        prune(llava, llava / "out", "2:4")

    assert bytes_of(llava) == before


@pytest.fixture(scope="module")
def pruned_llava(llava, tmp_path_factory):
    """LLaVA with zeros 2:4."""
    folder = tmp_path_factory.mktemp("pruned") / "llava"
    prune(llava, folder, "2:4")
    return folder


@pytest.fixture(scope="module")
def packed_llava(llava, tmp_path_factory):
    """The same model as `pruned_llava`, packed."""
    folder = tmp_path_factory.mktemp("packed") / "llava"
    prune(llava, folder, "2:4", packed=True)
    return folder


def test_report_takes_a_multimodal_folder(pruned_llava, tmp_path):
    page = tmp_path / "page.html"

    code = main(["report", str(pruned_llava), "--output", str(page)])

    assert code == 0
    assert "LlavaForConditionalGeneration" in page.read_text()


def test_chat_takes_a_packed_multimodal_folder(pruned_llava, packed_llava, monkeypatch, capsys):
    tokenizer = tiny_tokenizer()
    ids = tokenizer("the sea", return_tensors="pt").input_ids
    model = read_model(str(pruned_llava))
    written = model.generate(ids, max_new_tokens=6, do_sample=False)[0]
    answer = tokenizer.decode(written[ids.shape[1] :])
    monkeypatch.setattr(sys, "stdin", io.StringIO("the sea\n"))
    capsys.readouterr()

    code = main(["chat", str(packed_llava), "--device", "cpu", "--max-new-tokens", "6"])

    assert code == 0
    assert capsys.readouterr().out.strip() == answer.strip()


def test_recover_trains_the_decoder_layers_of_a_packed_multimodal_folder(
    llava, packed_llava, tmp_path
):
    output = tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text(TEXT)

    recover(
        packed_llava,
        llava,
        output,
        calibration=str(text),
        tokens=640,
        sequence_length=16,
        batch_size=1,
        accumulate=2,
        held_out=4,
        device="cpu",
        progress=False,
    )

    assert verify_checkpoint(output).num_zeros
    trained = read_tensors(output)
    dense = read_tensors(llava)
    assert trained.keys() == dense.keys()
    changed = {name for name in dense if not torch.equal(trained[name], dense[name])}
    of_decoder = [name for name in dense if "language_model" in name]
    assert changed == {name for name in of_decoder if "layers" in name or "norm" in name}
    rewritten = {"config.json", "generation_config.json", "model.safetensors"}
    for name in bytes_of(llava).keys() - rewritten:
        assert (output / name).read_bytes() == (llava / name).read_bytes()


def test_a_model_of_the_hub_is_pruned_by_its_id_and_pushed_with_all_files(llava, hub, tmp_path):
    output = str(tmp_path / "out")
    code = f"""
        import torch
        from huggingface_hub import HfApi
        from optimum_fista import FistaPruner, FistaPruningConfig
        from optimum_fista.folder.hub import push_folder
        HfApi().create_repo("tester/dense")
        HfApi().upload_folder(repo_id="tester/dense", folder_path={str(llava)!r})
        pruner = FistaPruner(FistaPruningConfig(pattern="2:4", method="wanda"), progress=False)
        pruner.prune("tester/dense", [torch.arange(3, 51).view(3, 16)], output_dir={output!r})
        push_folder({output!r}, "tester/pruned")
    """

    done = run_with_hub(hub, code, tmp_path)

    assert done.returncode == 0, done.stderr
    assert hub.files("tester/pruned") == bytes_of(tmp_path / "out")
    assert {*bytes_of(llava)} - {"model.safetensors"} <= hub.files("tester/pruned").keys()
    assert verify_checkpoint(tmp_path / "out", dense=llava).num_equal

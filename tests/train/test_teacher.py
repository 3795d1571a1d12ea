"""The teacher of a recovery is the dense model that the pruned model was made from, unless the user says otherwise."""

import dataclasses
import json
import shutil

import pytest
import torch
from quantized_models import auto_fp8_qwen3_moe, fp8_deepseek, mxfp4_gpt_oss
from saved_models import prune_and_save
from tiny_llama import TEXT, save_tiny_folder, tiny_llama, tiny_tokenizer
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig, recover
from optimum_fista.cli.main import main
from optimum_fista.folder.checkpoint import REPORT_FILE, read_report
from optimum_fista.source.loading import dense_sha256
from optimum_fista.train import recovery, teacher

OPTIONS = {
    "tokens": 64,
    "sequence_length": 16,
    "batch_size": 1,
    "accumulate": 2,
    "held_out": 4,
    "train": "norms",
    "device": "cpu",
    "compute_dtype": "float32",
    "progress": False,
}


@pytest.fixture
def run(saved, tmp_path):
    """`run(teacher=folder)` recovers the saved model briefly; the tests here look at the teacher alone."""
    text = tmp_path / "sea.txt"
    text.write_text(TEXT)

    def recovered(*, source=saved.folder, teacher, **options):
        return recover(
            source,
            teacher,
            tmp_path / "out",
            **OPTIONS | {"calibration": str(text)} | options,
        )

    return recovered


@pytest.fixture
def other_model(tmp_path):
    """The folder of a model of the same shape whose weights are other ones."""
    folder = save_tiny_folder(tmp_path / "other")
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1.0
    model.save_pretrained(folder)
    return folder


def with_model_of_report(source, target, **changes):
    """Copy a pruned folder, with other entries in `model` of its report; `None` removes an entry."""
    shutil.copytree(source, target)
    report = read_report(source)
    entries = report.model | changes
    model = {name: value for name, value in entries.items() if value is not None}
    (target / REPORT_FILE).write_text(dataclasses.replace(report, model=model).to_json())
    return target


def test_another_model_of_the_same_shape_is_refused(run, other_model, tmp_path, monkeypatch):
    monkeypatch.setattr(recovery, "load_model", None)  # nothing is trained or written by it

    with pytest.raises(ValueError, match=r"teacher=.*other'.* is not the dense model") as refused:
        run(teacher=other_model)

    assert "other_teacher=True (--other-teacher)" in str(refused.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.unfinished").exists()


def test_another_model_is_taken_if_the_user_says_so(run, other_model):
    found = run(teacher=other_model, other_teacher=True)

    assert found.teacher == "other"


def test_the_command_has_a_flag_for_another_teacher(saved, other_model, tmp_path, capsys):
    text = tmp_path / "sea.txt"
    text.write_text(TEXT)
    command = ["recover", saved.folder, "--teacher", other_model, "--calibration", text]
    command += ["--output", tmp_path / "out", "--tokens", 64, "--sequence-length", 16]
    command += ["--batch-size", 1, "--accumulate", 2, "--train", "norms", "--device", "cpu"]

    refused = main([*map(str, command)])
    error = capsys.readouterr().err
    taken = main([*map(str, command), "--other-teacher"])

    assert (refused, taken) == (1, 0)
    assert "is not the dense model" in error


def test_the_dense_model_is_compared_in_the_dtype_in_which_it_was_pruned(run, tmp_path):
    dense = tmp_path / "dense"
    tiny_llama().bfloat16().save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    pruned = prune_and_save(
        tiny_llama().bfloat16().float(), tmp_path / "pruned", pattern="2:4", method="wanda"
    )
    assert pruned.report.model["dtype"] == "float32"

    found = run(source=pruned.folder, teacher=dense)

    assert found.teacher == "dense"


def test_a_resumed_run_does_not_read_the_teacher_once_more(run, tiny_folder, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no more of this")

    with monkeypatch.context() as patched:
        patched.setattr(recovery, "write_checkpoint", fail)
        with pytest.raises(RuntimeError, match="no more of this"):
            run(teacher=tiny_folder)
    monkeypatch.setattr(teacher, "dense_sha256", fail)

    run(teacher=tiny_folder)

    assert (tmp_path / "out" / "config.json").exists()


def test_a_report_without_the_digest_says_once_that_nothing_can_be_compared(
    run, saved, other_model, tmp_path, caplog
):
    source = with_model_of_report(saved.folder, tmp_path / "source", sha256=None)

    run(source=source, teacher=other_model)

    said = [record.message for record in caplog.records if "can't be checked" in record.message]
    assert len(said) == 1
    assert "has no SHA-256 of the dense model" in said[0]


@pytest.fixture
def twice_pruned(tiny_folder, tmp_path):
    """Folders of a model of one layer, and of this model with zeros."""
    first = tmp_path / "first"
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    prune_and_save(model, first, pattern="layers:0.5")
    second = tmp_path / "second"
    prune_and_save(AutoModelForCausalLM.from_pretrained(first), second, pattern="2:4")
    return first, second


def test_after_several_runs_the_teacher_is_the_model_before_the_first_one(
    run, twice_pruned, tiny_folder
):
    between, source = twice_pruned

    with pytest.raises(ValueError, match=r"teacher='.*first' is not the dense model"):
        run(source=source, teacher=between)
    found = run(source=source, teacher=tiny_folder)

    assert found.teacher == tiny_folder.name


def test_a_model_that_was_loaded_by_another_class_can_not_be_compared(
    run, saved, other_model, tmp_path, caplog
):
    source = with_model_of_report(
        saved.folder, tmp_path / "source", **{"class": "MistralForCausalLM"}
    )

    run(source=source, teacher=other_model)

    assert "MistralForCausalLM" in caplog.text
    assert "can't be checked" in caplog.text


def test_a_dense_model_in_a_folder_of_another_form_is_the_same_model(run, tiny_folder, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(tiny_folder, shards)
    (shards / "model.safetensors").unlink()
    tiny_llama().save_pretrained(shards, max_shard_size="20KB")
    assert len(json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]) > 1

    found = run(teacher=shards)

    assert found.teacher == "shards"


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss", "opt"])
def test_files_have_the_digest_that_a_model_in_memory_had(family, tokens, tmp_path):
    dense = tmp_path / "dense"
    tiny_model(family).save_pretrained(dense)
    model = AutoModelForCausalLM.from_pretrained(dense)
    pruner = FistaPruner(FistaPruningConfig(method="magnitude"), progress=False)
    report = pruner.prune(model, tokens.split(4))

    digest = dense_sha256(str(dense), report.model["dtype"], tmp_path / "offload")

    assert digest == report.model["sha256"]


@pytest.mark.parametrize("quantized", [fp8_deepseek, auto_fp8_qwen3_moe, mxfp4_gpt_oss])
def test_a_quantized_model_has_the_digest_of_the_run_that_dequantized_it(
    quantized, tokens, tmp_path
):
    source = quantized(tmp_path / "source")
    pruner = FistaPruner(FistaPruningConfig(method="magnitude"), progress=False)
    report = pruner.prune(source, tokens.split(4), output_dir=tmp_path / "out")

    digest = dense_sha256(str(source), report.model["dtype"], tmp_path / "offload")

    assert digest == report.model["sha256"]


def test_a_run_that_was_allowed_another_teacher_resumes_only_if_it_still_is(
    run, other_model, tmp_path, monkeypatch
):
    def fail(*_, **__):
        raise RuntimeError("no more of this")

    with monkeypatch.context() as patched:
        patched.setattr(recovery, "write_checkpoint", fail)
        with pytest.raises(RuntimeError, match="no more of this"):
            run(teacher=other_model, other_teacher=True)

    with pytest.raises(ValueError, match=r"teacher=.*other'.* is not the dense model"):
        run(teacher=other_model)
    run(teacher=other_model, other_teacher=True)

    assert (tmp_path / "out" / "config.json").exists()

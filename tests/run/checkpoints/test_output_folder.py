"""Outputs that are refused, and the files in a folder that belong to its model."""

from pathlib import Path

import pytest
from text_folders import NEW, OLD, contents, foreign_files, mounted, no_waiting_for_the_disk, put, write  # noqa: F401

from optimum_fista.run.checkpoints.output_folder import MODEL_FILES, model_files, require_output


def test_an_adapter_of_others_is_not_loaded_with_the_model(tmp_path):
    write(tmp_path / "model", ("adapter_config.json", "adapter_model.safetensors"), "foreign")
    message = refused(tmp_path, "model", overwrite=True, names=MODEL_FILES)
    assert "holds adapter_config.json: from_pretrained would load that adapter, and not the model. Pass" in message


def test_files_that_belong_to_the_model_are_noted(tmp_path):
    output = tmp_path / "model"
    put(output, also=("vocab.bpe", "tokenizer_config.json"))
    written = {*NEW, "fista/files.json", "vocab.bpe", "tokenizer_config.json"}
    assert model_files(output) == written
    write(output, ("fista/evaluation.json", "vocab.txt"), "later")
    foreign_files(output)
    assert model_files(output) == written | {"fista/evaluation.json"}
    put(output)  # brings no tokenizer, so the old one stays; it is another model, so the evaluation goes
    assert model_files(output) == written
    put(output, also=("tokenizer_config.json", "fista/.files.json.partial"))  # a process was killed while it wrote that
    assert model_files(output) == written - {"vocab.bpe"}
    write(output, ("fista/files.json",), "{}")
    assert "files.json' is damaged (it is not a list): remove it" in refused(tmp_path, "model", overwrite=True)
    (output / "fista" / "files.json").unlink()
    assert model_files(output) == written - {"vocab.bpe", "fista/files.json"}


def refused(tmp_path: Path, name: str, **options) -> str:
    before = contents(tmp_path)
    with pytest.raises((ValueError, OSError)) as raised:
        require_output(Path(name) if name.startswith(".") else tmp_path / name, **options)
    assert contents(tmp_path) == before
    return str(raised.value)


def test_outputs_that_cant_work_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "source", OLD, "old")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "alias").symlink_to("source")
    for name in (".", "..", "../..", "source/.."):
        assert "has no name of its own" in refused(tmp_path, name, overwrite=True)
    for name in ("dangling", "loop"):
        assert "is a link that leads nowhere" in refused(tmp_path, name, overwrite=True)
    for name in ("source", "source/sub/out", "alias", "alias/out"):
        assert "lies in the folder that is read" in refused(tmp_path, name, overwrite=True, source="source")
    assert "is a file: pass a folder" in refused(tmp_path, "source/config.json", overwrite=True)
    assert "already holds a model" in refused(tmp_path, "source", overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_something_else_are_not_replaced(tmp_path, overwrite):
    write(tmp_path / "readme", ("README.md", "tokenizer.json"), "foreign")
    write(tmp_path / "fista", ("fista/report.json",), "foreign")
    write(tmp_path / "elsewhere", ("notes.txt",), "foreign")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "fista").symlink_to(tmp_path / "elsewhere")
    for name, shown in [("readme", "README.md, tokenizer.json"), ("fista", "fista/report.json"), ("linked", "fista")]:
        message = refused(tmp_path, name, overwrite=overwrite, names=MODEL_FILES)
        assert f"holds {shown} of something else" in message
    require_output(tmp_path / "readme", overwrite, names=["config.json"])
    (write(tmp_path / "odd", ("config.json", "model.safetensors"), "old") / "README.md").mkdir()
    if overwrite:
        assert "holds README.md of" in refused(tmp_path, "odd", overwrite=True, names=MODEL_FILES)


@pytest.mark.parametrize(
    "names", [("config.json", "README.md"), ("model-00001-of-00002.safetensors",), ("model.safetensors",)]
)
def test_a_configuration_or_weights_alone_are_no_model_that_is_replaced(tmp_path, names):
    write(tmp_path / "model", names, "foreign")
    with pytest.raises(FileExistsError, match="of something else"):
        put(tmp_path / "model")
    assert contents(tmp_path / "model") == dict.fromkeys(names, "foreign")


def test_the_unfinished_folder_of_another_run_is_no_output(tmp_path):
    write(tmp_path / "model.unfinished", ("journal/lock", "journal/calibration.safetensors"), "process 1 on here")
    assert "has the name of an unfinished run" in refused(tmp_path, "model.unfinished", overwrite=True)


def test_brackets_in_names_stand_for_themselves(tmp_path):
    write(tmp_path / "model", ("notes1.txt",), "foreign")
    require_output(tmp_path / "model", False, names=["notes[1].txt", "*"])
    write(tmp_path / "model", ("notes[1].txt",), "foreign")
    assert "holds notes[1].txt of" in refused(tmp_path, "model", overwrite=False, names=["notes[1].txt"])


def test_a_source_is_known_under_another_mount(tmp_path):
    source, output = write(tmp_path / "source", OLD, "old"), tmp_path / "output"
    with mounted(output, "--bind", str(source)):
        assert "lies in the folder that is read" in refused(tmp_path, "output", overwrite=True, source=source)

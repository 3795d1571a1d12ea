"""Which files of a model's folder come along to a result; test_sources.py has whole runs."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
from tiny_llama import tiny_tokens
from transformers import AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.cli.main import main
from optimum_fista.source.files import copy_source, source_folder


@pytest.fixture
def source(tmp_path) -> Path:
    """A model folder with links to a private file, to a folder, and to themselves."""
    source = tmp_path / "model"
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "LICENSE").write_text("free")
    (source / "COPYING").symlink_to("LICENSE")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "id_rsa").write_text("key")
    (source / "NOTICE.txt").symlink_to(tmp_path / "private" / "id_rsa")
    (source / "loop.txt").symlink_to("loop.txt")
    return source


def test_links_out_of_the_folder_are_not_followed_and_named(source, tmp_path, caplog):
    output = tmp_path / "output"
    output.mkdir()

    with caplog.at_level(logging.WARNING):
        copy_source(source, output)

    assert sorted(path.name for path in output.iterdir()) == ["COPYING", "LICENSE"]
    assert f"not copied from {source}: NOTICE.txt, loop.txt" in caplog.messages


def test_a_folder_of_templates_that_is_a_link_is_not_followed(source, tmp_path, caplog):
    (source / "additional_chat_templates").rmdir()
    (source / "additional_chat_templates").symlink_to(tmp_path / "private")
    output = tmp_path / "output"
    output.mkdir()

    copy_source(source, output)

    assert not (output / "additional_chat_templates").exists()
    assert "additional_chat_templates/" in caplog.text


def test_only_small_templates_are_copied_from_their_folder(source, tmp_path, caplog):
    templates = source / "additional_chat_templates"
    (templates / "rag.jinja").write_text("{{ messages }}")
    (templates / "notes.txt").write_text("mine")
    (templates / "huge.jinja").write_bytes(bytes(2**20 + 1))
    (templates / "key.jinja").symlink_to(tmp_path / "private" / "id_rsa")
    output = tmp_path / "output"
    output.mkdir()

    copy_source(source, output)

    copied = [path.name for path in (output / "additional_chat_templates").iterdir()]
    assert copied == ["rag.jinja"]
    for name in ("huge.jinja", "key.jinja", "notes.txt"):
        assert f"additional_chat_templates/{name}" in caplog.text


def test_a_file_that_cant_be_read_is_refused_before_the_run(source, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "LICENSE")

    with pytest.raises(PermissionError, match="would get a copy of it: make it readable"):
        source_folder(str(source), None)


def test_no_private_file_is_in_a_result_or_on_its_list_of_files(tiny_folder, tmp_path):
    """`--push-to-hub` uploads what is on that list. Streamed, packed, unpacked and recovered."""
    source = tmp_path / "source"
    source.mkdir()
    for path in tiny_folder.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (tmp_path / "id_rsa").write_text("a private key")
    (source / "NOTICE.txt").symlink_to(tmp_path / "id_rsa")
    (source / "loop.txt").symlink_to("loop.txt")

    pruner = FistaPruner(FistaPruningConfig(method="magnitude"), progress=False)
    pruner.prune(source, tiny_tokens().split(4), output_dir=tmp_path / "pruned")
    (tmp_path / "pruned" / "KEY").symlink_to(tmp_path / "id_rsa")
    assert main(["pack", str(tmp_path / "pruned"), "-o", str(tmp_path / "packed")]) == 0
    (tmp_path / "packed" / "KEY").symlink_to(tmp_path / "id_rsa")
    assert main(["unpack", str(tmp_path / "packed"), "-o", str(tmp_path / "unpacked")]) == 0
    options = "--tokens 64 --sequence-length 16 --device cpu --calibration pydoc"
    command = ["recover", str(tmp_path / "pruned"), "--teacher", str(source), *options.split()]
    assert main([*command, "-o", str(tmp_path / "recovered")]) == 0

    for name in ("pruned", "packed", "unpacked", "recovered"):
        for path in (tmp_path / name).rglob("*"):
            if path.is_file() and not path.is_symlink():
                assert b"a private key" not in path.read_bytes(), path
        assert "NOTICE.txt" not in (tmp_path / name / "fista" / "files.json").read_text()


def test_text_that_links_of_a_source_lead_to_gets_into_no_result(tiny_folder, tmp_path):
    source = tmp_path / "source"
    (source / "fista").mkdir(parents=True)
    for path in tiny_folder.iterdir():
        if path.name != "generation_config.json":
            (source / path.name).write_bytes(path.read_bytes())
    (tmp_path / "vocabulary").write_text("a private key")
    (tmp_path / "docker.json").write_text('{"auth": "a private key"}')
    (source / "fista" / "vocabulary.json").symlink_to(tmp_path / "vocabulary")
    (source / "generation_config.json").symlink_to(tmp_path / "docker.json")

    pruner = FistaPruner(FistaPruningConfig(method="magnitude"), progress=False)
    pruner.prune(source, tiny_tokens().split(4), output_dir=tmp_path / "streamed")
    model = AutoModelForCausalLM.from_pretrained(source)
    pruner.prune(model, tiny_tokens().split(4))
    pruner.save_pretrained(model, tmp_path / "saved")

    for name in ("streamed", "saved"):
        for path in (tmp_path / name).rglob("*"):
            if path.is_file():
                assert b"a private key" not in path.read_bytes(), path


def test_a_result_without_its_generation_configuration_ends_texts_where_the_model_does(
    tiny_folder, tmp_path
):
    source = tmp_path / "source"
    shutil.copytree(tiny_folder, source)
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | {"eos_token_id": [2, 5]}))
    (source / "generation_config.json").replace(tmp_path / "elsewhere.json")
    (source / "generation_config.json").symlink_to(tmp_path / "elsewhere.json")

    pruner = FistaPruner(FistaPruningConfig(method="magnitude"), progress=False)
    pruner.prune(source, tiny_tokens().split(4), output_dir=tmp_path / "streamed")
    model = AutoModelForCausalLM.from_pretrained(source)
    pruner.prune(model, tiny_tokens().split(4))
    pruner.save_pretrained(model, tmp_path / "saved")

    for name in ("streamed", "saved"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert loaded.generation_config.eos_token_id == [2, 5]

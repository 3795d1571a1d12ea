"""Which file of a model folder holds which tensor."""

import shutil

import pytest

from optimum_fista.folder.checkpoint import read_report
from optimum_fista.source.model_folder import checkpoint_files


def test_a_single_file_holds_every_tensor(saved):
    files = checkpoint_files(saved.folder)

    assert set(files.values()) == {saved.folder / "model.safetensors"}
    assert set(files) >= {operator.name for operator in saved.report.operators}


def test_an_index_names_several_files(saved_gpt2):
    files = checkpoint_files(saved_gpt2.folder)

    assert len(set(files.values())) > 2


def test_a_single_file_comes_before_an_index_as_in_from_pretrained(saved, saved_gpt2, tmp_path):
    folder = shutil.copytree(saved_gpt2.folder, tmp_path / "both")
    shutil.copy(saved.folder / "model.safetensors", folder)

    files = checkpoint_files(folder)

    assert set(files.values()) == {folder / "model.safetensors"}


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        checkpoint_files(tmp_path)


def test_a_misspelt_folder_is_refused_with_the_closest_name(saved):
    misspelt = saved.folder.with_name(f"{saved.folder.name}s")

    message = rf"no such folder\. Did you mean '.*/{saved.folder.name}'\?"
    with pytest.raises(FileNotFoundError, match=message):
        read_report(misspelt)

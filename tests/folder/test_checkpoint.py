"""Which file of a model folder holds which tensor."""

import shutil

import pytest

from optimum_fista.folder.checkpoint import read_report
from optimum_fista.source.model_folder import checkpoint_files


def test_checkpoint_files_follow_transformers_choice(saved, saved_gpt2, tmp_path):
    single = checkpoint_files(saved.folder)
    assert set(single.values()) == {saved.folder / "model.safetensors"}
    assert set(single) >= {o.name for o in saved.report.operators}
    shards = checkpoint_files(saved_gpt2.folder)
    assert len(set(shards.values())) > 2
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        checkpoint_files(tmp_path)
    misspelt = saved.folder.with_name(saved.folder.name + "s")
    with pytest.raises(
        FileNotFoundError, match=rf"no such folder\. Did you mean '.*/{saved.folder.name}'\?"
    ):
        read_report(misspelt)
    shutil.copytree(
        saved_gpt2.folder, tmp_path / "both"
    )  # `from_pretrained` prefers the single file
    shutil.copy(saved.folder / "model.safetensors", tmp_path / "both")
    assert set(checkpoint_files(tmp_path / "both").values()) == {
        tmp_path / "both" / "model.safetensors"
    }

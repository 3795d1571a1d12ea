"""Model folders as people have them: what a run from files to files makes of them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import tiny_llama, tiny_tokens
from transformers import AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.run.evaluation.verification import verify_checkpoint

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def tied_folder(folder: Path, change) -> Path:
    """A Llama whose configuration says that its head is tied; `change` is called with the tensors in its file."""
    tiny_llama(tie_word_embeddings=True).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def prune_both(source: Path, tmp_path: Path, **options):
    """Prune in memory and from files; returns the folders, both of which are verified and equal."""
    pruner = FistaPruner(FistaPruningConfig(method="wanda", **options), progress=False)
    model = AutoModelForCausalLM.from_pretrained(source)
    pruner.prune(model, tiny_tokens().split(4))
    pruner.save_pretrained(model, tmp_path / "in memory")
    pruner.prune(source, tiny_tokens().split(4), output_dir=tmp_path / "from files")
    folders = tmp_path / "in memory", tmp_path / "from files"
    assert verify_checkpoint(folders[0]).num_parameters == verify_checkpoint(folders[1]).num_parameters
    ids = tiny_tokens()
    logits = [AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in folders]
    assert torch.equal(*logits)
    assert torch.equal(logits[0], model(ids).logits)
    return folders


@pytest.mark.parametrize("options", [{}, {"pattern": "channels:0.25"}], ids=["zeros", "channels"])
def test_a_head_of_its_own_is_kept_although_the_configuration_calls_it_tied(tmp_path, options):
    def change(tensors):
        tensors[HEAD] = tensors[EMBEDDING] * 1.5 + 0.1

    source = tied_folder(tmp_path / "source", change)
    for folder in prune_both(source, tmp_path, **options):
        tensors = load_file(folder / "model.safetensors")
        assert torch.equal(tensors[HEAD], tensors[EMBEDDING] * 1.5 + 0.1)


def test_a_tied_head_that_is_stored_twice_counts_once(tmp_path):
    source = tied_folder(tmp_path / "source", lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    folders = prune_both(source, tmp_path)
    assert HEAD not in load_file(folders[1] / "model.safetensors")


def test_a_tied_head_that_is_stored_without_the_embedding(tmp_path):
    source = tied_folder(tmp_path / "source", lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    folders = prune_both(source, tmp_path)
    assert load_file(folders[1] / "model.safetensors").keys() == load_file(folders[0] / "model.safetensors").keys()

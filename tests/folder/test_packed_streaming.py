"""Pruned from files straight to a packed folder: the bytes of packing afterwards, and no dense shard on the way."""

from pathlib import Path

import pytest
import torch
from folder_files import files_of
from killed import Killed, killed_at_write
from safetensors.torch import load_file
from tiny_llama import save_tiny_folder, tiny_llama, tiny_tokens
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.estimate.estimate import Estimate
from optimum_fista.evaluate.verification import verify_checkpoint
from optimum_fista.folder.output import unfinished_folder
from optimum_fista.folder.packed_folder import pack_folder, packing_of, unpack_folder
from optimum_fista.prune import shards as shards_of_run

LAYERS = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    save_tiny_folder(folder)
    tiny_llama(num_hidden_layers=LAYERS).to(torch.bfloat16).save_pretrained(folder)
    return folder


def prune(source: Path, output: Path, config: FistaPruningConfig | None = None, **options):
    """Prune a folder on the tiny tokens, by default by Wanda; `options` are those of `FistaPruner.prune`."""
    if config is None:
        config = FistaPruningConfig(method="wanda")
    pruner = FistaPruner(config, progress=False)
    return pruner.prune(source, tiny_tokens().split(4), output_dir=output, **options)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> Path:
    """What an uninterrupted run writes."""
    output = tmp_path_factory.mktemp("whole") / "packed"
    prune(source, output, packed=True)
    return output


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gpt_oss", "granitemoe"])
def test_a_packed_run_writes_the_folder_that_packing_afterwards_writes(family, tmp_path):
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    prune(tmp_path / "source", tmp_path / "dense")
    packing = pack_folder(tmp_path / "dense", tmp_path / "afterwards")

    prune(tmp_path / "source", tmp_path / "packed", packed=True)

    assert files_of(tmp_path / "packed") == files_of(tmp_path / "afterwards")
    assert packing_of(tmp_path / "packed") == packing
    assert packing.num_tensors > 0
    verify_checkpoint(tmp_path / "packed")  # whose weights are in several files

    unpack_folder(tmp_path / "packed", tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "dense")

    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_dense_bytes_of_pruned_operators_are_never_written(source, tmp_path, monkeypatch):
    written = {}  # names of the tensors by that of their file
    write = shards_of_run.write_stored

    def watched(path, tensors):
        written[path.name] = set(tensors)
        return write(path, tensors)

    monkeypatch.setattr(shards_of_run, "write_stored", watched)

    report = prune(source, tmp_path / "packed", packed=True)

    shards = [name for name in written if name.startswith("packed-")]
    assert len(shards) == LAYERS + 1
    assert not [name for name in written if name.startswith("model-")]
    pruned = {operator.name for operator in report.operators}
    assert len(pruned) == 7 * LAYERS
    names = set().union(*written.values())
    assert pruned.isdisjoint(names)
    assert {f"{name}_values" for name in pruned} <= names


@pytest.mark.parametrize("writes", range(1, 21, 5))
def test_a_run_that_is_cut_off_at_any_write_resumes_to_the_same_bytes(
    source, whole, tmp_path, writes
):
    with killed_at_write(writes), pytest.raises(Killed):
        prune(source, tmp_path / "packed", packed=True)

    assert not (tmp_path / "packed").exists()
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(unfinished_folder(tmp_path / "packed"))

    prune(source, tmp_path / "packed", packed=True)
    assert files_of(tmp_path / "packed") == files_of(whole)


def test_a_model_in_memory_is_not_packed_by_prune():
    pruner = FistaPruner(progress=False)

    message = "packed=True is for a model given by name: save a loaded model"
    with pytest.raises(ValueError, match=message):
        pruner.prune(tiny_llama(), tiny_tokens().split(4), packed=True)


@pytest.mark.parametrize("pattern", ["unstructured", "1:4"])
def test_the_plan_counts_the_bytes_of_the_shards(pattern, tmp_path):
    source = tmp_path / "source"
    model = tiny_llama(hidden_size=128, intermediate_size=256, tie_word_embeddings=False)
    model.to(torch.bfloat16).save_pretrained(source)
    config = FistaPruningConfig(pattern=pattern, method="wanda")
    options = {"num_samples": 4, "sequence_length": 16}

    dense_bytes = Estimate(source, config, **options).disk_bytes["model"]
    packed_bytes = Estimate(source, config, packed=True, **options).disk_bytes["model"]

    prune(source, tmp_path / "packed", config, packed=True)
    written_bytes = 0
    for shard in (tmp_path / "packed").glob("packed-*.safetensors"):
        written_bytes += sum(tensor.nbytes for tensor in load_file(shard).values())
    assert packed_bytes == pytest.approx(written_bytes, rel=0.02)
    assert packed_bytes < 0.8 * dense_bytes

"""Model folders as people have them: what a run from files to files makes of them."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from folder_files import tensors_of
from hub_standin import hub_fixture, run_with_hub  # noqa: F401
from safetensors.torch import load_file, save_file
from tiny_llama import TEXT, save_tiny_folder, tiny_llama, tiny_tokens
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig, recover
from optimum_fista.cli.main import main
from optimum_fista.evaluate.verification import VerificationError, verify_checkpoint
from optimum_fista.folder.checkpoint import read_report
from optimum_fista.folder.loading import read_config
from optimum_fista.folder.output import foreign_files, model_files
from optimum_fista.folder.source_files import described_loss

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def tied_folder(folder: Path, change) -> Path:
    """A Llama whose configuration says that its head is tied; `change` is called with the tensors in its file."""
    tiny_llama(tie_word_embeddings=True).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def add_tensors(folder: Path, *names: str) -> Path:
    """Add tensors to the file of a model folder."""
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: torch.ones(2) for name in names}
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
    assert verify_checkpoint(folders[1], dense=source).num_equal
    return folders


@pytest.mark.parametrize("options", [{}, {"pattern": "channels:0.25"}], ids=["zeros", "channels"])
def test_a_head_of_its_own_is_kept_although_the_configuration_calls_it_tied(tmp_path, options):
    def change(tensors):
        tensors[HEAD] = tensors[EMBEDDING] * 1.5 + 0.1

    source = tied_folder(tmp_path / "source", change)
    for folder in prune_both(source, tmp_path, **options):
        tensors = tensors_of(folder)
        assert torch.equal(tensors[HEAD], tensors[EMBEDDING] * 1.5 + 0.1)


@pytest.mark.parametrize("take", [dict.get, dict.pop], ids=["stored twice", "stored without the embedding"])
def test_a_tied_head_counts_once(tmp_path, take):
    def change(tensors):
        tensors[HEAD] = take(tensors, EMBEDDING).clone()

    in_memory, from_files = map(tensors_of, prune_both(tied_folder(tmp_path / "source", change), tmp_path))
    assert in_memory.keys() == from_files.keys()
    assert HEAD not in from_files


CODE = "from transformers import LlamaForCausalLM\n\n\nclass OwnLlama(LlamaForCausalLM):\n    own = True\n"
BESIDE = {
    "preprocessor_config.json": "{}",
    "tokenizer.model": "as it was",
    "special_tokens_map.json": "{}",
    "generation_config.json": '{"temperature": 0.6, "top_p": 0.9}',  # which Transformers reads, and doesn't write
    "LICENSE": "MIT",
    "modeling_own.py": CODE,
    "additional_chat_templates/rag.jinja": "{{ messages }}",
}


def folder_with_code(folder: Path) -> Path:
    """A Llama with `BESIDE`, whose configuration names code of its own, and with files that are not to be copied."""
    save_tiny_folder(folder)
    others = ["README.md", ".git/config", "original/params.json", "model.onnx", "old.gguf"]
    for name, text in {**BESIDE, **dict.fromkeys(others, "---\nlicense: mit\n---\n")}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnLlama"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_files_beside_the_weights_come_along(tmp_path, caplog):
    source, output = folder_with_code(tmp_path / "my source"), tmp_path / "out"
    with caplog.at_level(logging.WARNING):
        pruner = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)
        pruner.prune(source, tiny_tokens().split(4), output_dir=output)
    assert f"not copied from {source}: model.onnx, old.gguf, original/" in caplog.messages
    assert {name: (output / name).read_text() for name in BESIDE} == BESIDE
    assert (output / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not (output / ".git").exists()
    assert "Pruned after training" in (output / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True).own
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    sizes = {"tokens": 256, "sequence_length": 16, "held_out": 4}
    assert model_files(output) > BESIDE.keys()
    (output / "notes.txt").write_text("added to the pruned folder")
    recover(output, source, tmp_path / "trained", calibration=str(text), **sizes, progress=False)
    kept = BESIDE.keys() - {"generation_config.json"}  # which Transformers writes anew
    assert all((tmp_path / "trained" / name).read_text() == BESIDE[name] for name in kept)
    assert foreign_files(tmp_path / "trained") == ["notes.txt"]  # there, but not uploaded


def test_small_files_of_the_hub_are_fetched(hub, tmp_path):
    source = folder_with_code(tmp_path / "source")
    code = f"""
        import logging
        import torch
        from huggingface_hub import HfApi
        from optimum_fista import FistaPruner, FistaPruningConfig
        HfApi().create_repo("tester/dense")
        HfApi().upload_folder(repo_id="tester/dense", folder_path={str(source)!r})
        pruner = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)
        pruner.prune("tester/dense", [torch.arange(64).view(4, 16)], output_dir={str(tmp_path / "out")!r})
    """
    done = run_with_hub(hub, code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert {name: (tmp_path / "out" / name).read_text() for name in BESIDE} == BESIDE
    assert not any(request.endswith("onnx") for request in hub.requests)


def test_tensors_that_would_be_lost_are_refused_unless_the_loss_is_meant(tmp_path, capsys):
    source, output = tmp_path / "source", tmp_path / "out"
    tiny_model("deepseek_v3", num_nextn_predict_layers=1).save_pretrained(source)
    add_tensors(source, "model.layers.2.eh_proj.weight", "model.layers.2.mlp.gate.weight", "mtp.fc.weight")
    said = "3 tensors of the dense model have no place in DeepseekV3ForCausalLM: model.layers.2 (2), mtp (1)"
    pruner, batches = FistaPruner(FistaPruningConfig(method="wanda"), progress=False), tiny_tokens().split(4)
    with pytest.raises(ValueError, match=rf"{re.escape(said)}\. .*: pass drop_unused=True"):
        pruner.prune(source, batches, output_dir=output)
    assert main(["prune", str(source), "--dry-run"]) == 1
    assert said in capsys.readouterr().err
    with pytest.warns(UserWarning, match="the pruned model lacks them"):
        assert pruner.prune(source, batches, output_dir=output, drop_unused=True).model["lacks"] == said
    with pytest.raises(VerificationError, match=re.escape(said)):
        verify_checkpoint(output, dense=source)
    assert "have no place in DeepseekV3ForCausalLM" in (output / "README.md").read_text()
    assert read_config(str(output)).num_nextn_predict_layers == 0
    smaller = FistaPruner(FistaPruningConfig(pattern="layers:0.5"), progress=False)
    with pytest.warns(UserWarning, match="the pruned model lacks them"):
        smaller.prune(model := AutoModelForCausalLM.from_pretrained(source), batches)
    smaller.save_pretrained(model, tmp_path / "smaller")
    assert read_report(tmp_path / "smaller").model["lacks"] == said  # removed decoder layers are no loss


@pytest.mark.parametrize("zipped", [True, False], ids=["today's", "of old versions"])
def test_binary_files_are_asked_too(tmp_path, zipped):
    model = tiny_llama()
    tensors = model.state_dict() | {"v_head.weight": torch.ones(2)}
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert described_loss(model, tmp_path).endswith(": v_head (1)")


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.1.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "h.1.attn.bias"),
        ("gpt_neox", "gpt_neox.layers.1.attention.masked_bias"),
    ],
)
def test_what_the_model_computes_itself_is_no_loss(tmp_path, family, name):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    assert not described_loss(model, add_tensors(tmp_path, name))
    assert described_loss(model, add_tensors(tmp_path, "visual.patch_embed.weight")).endswith(": visual (1)")

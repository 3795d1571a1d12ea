"""Model folders as people have them: what a run from files to files makes of them."""

import json
import logging
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from folder_files import tensors_of
from hub_standin import hub_fixture, run_with_hub  # noqa: F401
from media_models import save_llava_folder
from quantized_models import fp8_deepseek
from safetensors.torch import load_file, save_file
from tiny_llama import TEXT, save_tiny_folder, tiny_llama, tiny_tokenizer, tiny_tokens
from tiny_models import tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, Qwen3_5Config

from optimum_fista import FistaPruner, FistaPruningConfig, recover
from optimum_fista.cli.main import main
from optimum_fista.evaluate.verification import verify_checkpoint
from optimum_fista.folder.output import foreign_files, model_files
from optimum_fista.source.stored_tensor import read_stored

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
    assert (
        verify_checkpoint(folders[0]).num_parameters == verify_checkpoint(folders[1]).num_parameters
    )
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


@pytest.mark.parametrize(
    "take", [dict.get, dict.pop], ids=["stored twice", "stored without the embedding"]
)
def test_a_tied_head_counts_once(tmp_path, take):
    def change(tensors):
        tensors[HEAD] = take(tensors, EMBEDDING).clone()

    in_memory, from_files = map(
        tensors_of, prune_both(tied_folder(tmp_path / "source", change), tmp_path)
    )
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
    others = [
        "README.md",
        ".git/config",
        "original/params.json",
        "model-mtp.safetensors",
        "model.onnx",
        "old.gguf",
    ]
    for name, text in {**BESIDE, **dict.fromkeys(others, "---\nlicense: mit\n---\n")}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnLlama"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_files_beside_the_weights_come_along(tmp_path, caplog):
    source, output = folder_with_code(tmp_path / "my source"), tmp_path / "out"
    (source / "gone.safetensors").symlink_to("blob")
    (source / "additional_chat_templates").chmod(0o555)
    with caplog.at_level(logging.WARNING):
        pruner = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)
        pruner.prune(source, tiny_tokens().split(4), output_dir=output)
    left = "gone.safetensors, model-mtp.safetensors, model.onnx, old.gguf, original/"
    assert f"not copied from {source}: {left}" in caplog.messages
    assert {name: (output / name).read_text() for name in BESIDE} == BESIDE
    assert (output / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not (output / ".git").exists()
    assert (output / "additional_chat_templates").stat().st_mode == output.stat().st_mode
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
    assert not any(request.endswith("onnx") or "/original/" in request for request in hub.requests)


def folder_with_more_tokens(
    folder: Path, family: str = "deepseek_v3"
) -> tuple[Path, dict[str, Tensor]]:
    """A tiny model of four decoder layers whose files hold more than its class loads; returns also what that is.

    These are a layer that predicts more tokens, of the last decoder layer's shapes, a head in float8, and a buffer.
    """
    settings = {"num_hidden_layers": 4, "num_nextn_predict_layers": 1, "first_k_dense_replace": 1}
    tiny_model(family, **settings).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    tensors, last = load_file(folder / "model.safetensors"), "model.layers.3."
    more = {
        f"model.layers.4.{n.removeprefix(last)}": t.bfloat16()
        for n, t in tensors.items()
        if n.startswith(last)
    }
    beside = {"eh_proj": (32, 64), "enorm": (32,), "hnorm": (32,), "shared_head.norm": (32,)}
    beside |= {"shared_head.head": (64, 32), "embed_tokens": (64, 32)}
    more |= {f"model.layers.4.{name}.weight": torch.randn(shape) for name, shape in beside.items()}
    more |= {"model.layers.4.scale": torch.tensor(2.0)}
    more |= {"mtp.fc.weight": torch.randn(3, 5).to(torch.float8_e4m3fn)}
    more |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    save_file(tensors | more, folder / "model.safetensors", {"format": "pt"})
    return folder, more


@pytest.mark.parametrize("place", ["files", "packed", "memory", "recovered"])
@pytest.mark.parametrize(
    "pattern", ["unstructured", "channels:0.25", "layers:0.25", "experts:0.25"]
)
def test_tensors_that_the_class_does_not_load_are_copied(tmp_path, pattern, place):
    if place in ("packed", "recovered") and pattern != "unstructured":
        pytest.skip("a smaller model is not packed, and recover trains weights beside zeros")
    family = "glm4_moe" if place in ("packed", "memory") else "deepseek_v3"
    (source, more), output = folder_with_more_tokens(tmp_path / "source", family), tmp_path / "out"
    pruner = FistaPruner(FistaPruningConfig(pattern=pattern, method="wanda"), progress=False)
    lost = (
        {name for name in more if name.startswith("model.layers.4.")}
        if pattern == "experts:0.25"
        else set()
    )
    batches, said = tiny_tokens().split(4), r"not in the pruned model: model\.layers\.4 "
    with pytest.warns(UserWarning, match=said) if lost else nullcontext():
        if place == "memory":
            report = pruner.prune(model := AutoModelForCausalLM.from_pretrained(source), batches)
            pruner.save_pretrained(model, output)
        else:
            report = pruner.prune(source, batches, output_dir=output, packed=place == "packed")
    stay = report.model.get("layers_kept", range(4))
    moved = {f"layers.{old}.": f"layers.{new}." for new, old in enumerate((*stay, 4))}
    gone = {name for name in more if "layers.0." in name and 0 not in stay}
    assert (
        [*report.model["copied"].values()] == [1, 1]
        if lost
        else [len(more) - 2, 1, 1][: 2 + (not gone)]
    )
    if place == "recovered":
        (text := tmp_path / "text.txt").write_text(TEXT)
        sizes = {"tokens": 256, "sequence_length": 16, "held_out": 4, "progress": False}
        recover(output, source, tmp_path / "trained", calibration=str(text), **sizes)
        output = tmp_path / "trained"
    found, dense = read_stored(output), read_stored(source)
    for name in more.keys() - lost - gone:
        old = next((old for old in moved if old in name), "")
        assert dense[name].equals(found[name.replace(old, moved.get(old, ""))]), name
    loaded = AutoModelForCausalLM.from_pretrained(output)
    assert loaded.config.num_nextn_predict_layers == (not lost)
    assert not lost & {*found}
    assert verify_checkpoint(output).num_operators == len(report.operators)
    assert place in ("packed", "recovered") or verify_checkpoint(output, dense=source).num_equal
    assert not foreign_files(output)


def test_what_is_copied_is_said_before_and_after_a_run(tmp_path, capsys):
    source, _ = folder_with_more_tokens(tmp_path / "source")
    (text := tmp_path / "text.txt").write_text(TEXT)
    command = [
        "prune",
        str(source),
        "-o",
        str(tmp_path / "out"),
        "--method",
        "wanda",
        "--calibration",
        str(text),
    ]
    command += ["--num-samples", "4", "--sequence-length", "16", "--device", "cpu"]
    copied = "35 tensors that the model's class does not load are copied: model.layers."
    lost = "not in the pruned model: model.layers.4 (33 tensors: parts that decoder layers lose would have to go there"
    for pattern, said in ("2:4", copied), ("experts:0.25", lost):
        with warnings.catch_warnings(action="ignore"):
            assert main([*command, "--overwrite", "--pattern", pattern]) == 0
        printed = capsys.readouterr()
        assert said in printed.err
        assert said in printed.out


def test_a_model_whose_files_have_changed_is_not_saved_with_wrong_tensors(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(add_tensors(tmp_path / "source", "mtp.fc.weight"))
    pruner = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)
    pruner.prune(model, tiny_tokens().split(4))
    add_tensors(tmp_path / "source", "another.weight")  # the bytes of the first are elsewhere now
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"model\.safetensors' changed or went during the run or after it"
        ):
            pruner.save_pretrained(model, tmp_path / "out")
        (tmp_path / "source" / "model.safetensors").unlink(missing_ok=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_tensors_that_are_there_twice_are_refused(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "one")
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    save_file(
        tensors | {"norm.weight": torch.zeros(32)},
        tmp_path / "one" / "model.safetensors",
        {"format": "pt"},
    )
    model.save_pretrained(tmp_path / "two", max_shard_size="20KB")
    first, last, *_ = sorted((tmp_path / "two").glob("*.safetensors"))
    name = next(iter(load_file(first)))
    save_file(load_file(last) | {name: load_file(first)[name] + 1}, last, {"format": "pt"})
    scale = "model.layers.1.mlp.experts.0.up_proj.weight_scale_inv"
    tensors = load_file(fp8_deepseek(tmp_path / "fp8") / "model.safetensors")
    (tmp_path / "fp8" / "model.safetensors").rename(tmp_path / "fp8" / "all.safetensors")
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys(tensors, "all.safetensors") | {scale: "more.safetensors"},
    }
    (tmp_path / "fp8" / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({scale: tensors[scale] * 2}, tmp_path / "fp8" / "more.safetensors", {"format": "pt"})
    save_llava_folder(tmp_path / "llava")
    tensors, norm = (
        load_file(tmp_path / "llava" / "model.safetensors"),
        "language_model.norm.weight",
    )
    save_file(
        tensors | {f"model.{norm}": torch.ones(32)},
        tmp_path / "llava" / "model.safetensors",
        {"format": "pt"},
    )
    pruner = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)
    for folder, said in (
        ("one", r"norm\.weight .* model\.norm\.weight .*, with different values"),
        ("two", f"holds {name} twice"),
        ("fp8", f"holds {scale} twice"),
        ("llava", rf"norm\.weight .* model\.{norm} .*, with different values"),
    ):
        with pytest.raises(ValueError, match=said):
            pruner.prune(tmp_path / folder, tiny_tokens().split(4), output_dir=tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["fp8", "llava", "one", "two"]


def test_files_that_no_longer_fit_a_model_in_memory_are_named(tmp_path):
    source, _ = folder_with_more_tokens(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(source)
    (source / "model.safetensors").unlink()  # which the model still maps
    (source / "model.safetensors").write_bytes(b"no weights")
    with warnings.catch_warnings(action="ignore"):
        report = FistaPruner(FistaPruningConfig(method="wanda"), progress=False).prune(
            model, tiny_tokens().split(4)
        )
    ((what, why),) = report.model["lacks"].items()
    assert str(source) in what
    assert "can't be read" in why
    assert any("not in the pruned model" in warning for warning in report.warnings)


@pytest.mark.parametrize("zipped", [True, False], ids=["today's", "of old versions"])
def test_binary_files_are_read_too(tmp_path, zipped):
    model = tiny_llama()
    model.config.save_pretrained(tmp_path / "source")
    tensors = model.state_dict() | {"v_head.weight": torch.arange(2.0)}
    torch.save(
        tensors, tmp_path / "source" / "pytorch_model.bin", _use_new_zipfile_serialization=zipped
    )
    pruner = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)
    pruner.prune(tmp_path / "source", tiny_tokens().split(4), output_dir=tmp_path / "out")
    assert torch.equal(tensors_of(tmp_path / "out")["v_head.weight"], torch.arange(2.0))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.1.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "h.1.attn.bias"),
        ("gpt_neox", "gpt_neox.layers.1.attention.masked_bias"),
    ],
)
def test_tables_of_old_checkpoints_are_copied(tmp_path, family, name):
    tiny_model(family).save_pretrained(tmp_path / "source")
    pruner = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)
    source = add_tensors(tmp_path / "source", name, "visual.patch_embed.weight")
    report = pruner.prune(source, tiny_tokens().split(4), output_dir=tmp_path / "out")
    assert report.model["copied"].pop("visual") == 1
    assert [*report.model["copied"].values()] == [1]
    assert tensors_of(tmp_path / "out").keys() == tensors_of(source).keys()


def qwen3_5_folder(folder: Path) -> Path:
    """A Qwen3.5 with images, whose text decoder AutoModelForCausalLM loads alone, and a layer for more tokens."""
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "mtp_num_hidden_layers": 1,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 2,
        "out_hidden_size": 32,
    }
    config = Qwen3_5Config(text_config=text, vision_config=vision, image_token_id=60)
    AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return add_tensors(folder, "mtp.fc.weight")


def test_a_text_decoder_alone_lacks_the_image_tower_and_says_so(tmp_path):
    source = qwen3_5_folder(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(source)
    pruner = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)

    with pytest.warns(UserWarning, match=r"not in the pruned model: model\.visual \(\d+ tensors: "):
        report = pruner.prune(model, tiny_tokens().split(4))
    pruner.save_pretrained(model, tmp_path / "out")

    names = tensors_of(tmp_path / "out").keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "mtp.fc.weight" in names
    assert not any("visual" in name for name in names)
    assert config["model_type"] == "qwen3_5_text"
    assert config["mtp_num_hidden_layers"] == 1
    assert report.model["copied"] == {"mtp": 1}
    ((module, reason),) = report.model["lacks"].items()
    assert module == "model.visual"
    assert reason.endswith(
        "Qwen3_5ForCausalLM loads a part of the model, whose configuration does not describe them"
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters()


def test_the_whole_model_keeps_its_image_tower(tmp_path):
    source = qwen3_5_folder(tmp_path / "source")
    pruner = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)

    pruner.prune(source, tiny_tokens().split(4), output_dir=tmp_path / "out", device="cpu")

    assert tensors_of(tmp_path / "out").keys() == tensors_of(source).keys()
    assert "vision_config" in json.loads((tmp_path / "out" / "config.json").read_text())

"""Model folders as people have them: what a run from files to files makes of them."""

import json
import logging
import warnings
from collections.abc import Callable, Iterable
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
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    GenerationConfig,
    Qwen3_5Config,
)

from optimum_fista import FistaPruner, FistaPruningConfig, PruningReport, recover
from optimum_fista.cli.main import main
from optimum_fista.evaluate.verification import verify_checkpoint
from optimum_fista.folder.output import foreign_files, model_files
from optimum_fista.source.stored_tensor import read_stored

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def tied_folder(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A Llama whose configuration says that its head is tied; `change` is called with the tensors in its file."""
    tiny_llama(tie_word_embeddings=True).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def add_tensors(folder: Path, *names: str) -> Path:
    """Add tensors of ones to the file of a model folder."""
    return write_more(folder, {name: torch.ones(2) for name in names})


def write_more(folder: Path, more: dict[str, Tensor]) -> Path:
    """Write the file of a model folder with further tensors, or other values."""
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | more, folder / "model.safetensors", {"format": "pt"})
    return folder


def prune_both(source: Path, tmp_path: Path, **options) -> tuple[Path, Path]:
    """Prune in memory and from files; returns the folders, both of which are verified and equal."""
    in_memory = tmp_path / "in memory"
    from_files = tmp_path / "from files"
    batches = tiny_tokens().split(4)
    pruner = FistaPruner(FistaPruningConfig(method="wanda", **options), progress=False)
    model = AutoModelForCausalLM.from_pretrained(source)

    pruner.prune(model, batches)
    pruner.save_pretrained(model, in_memory)
    pruner.prune(source, batches, output_dir=from_files)

    sizes = [verify_checkpoint(folder).num_parameters for folder in (in_memory, from_files)]
    assert sizes[0] == sizes[1]
    logits = model(tiny_tokens()).logits
    for folder in (in_memory, from_files):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(loaded(tiny_tokens()).logits, logits)
    assert verify_checkpoint(from_files, dense=source).num_equal
    return in_memory, from_files


@pytest.mark.parametrize("options", [{}, {"pattern": "channels:0.25"}], ids=["zeros", "channels"])
def test_a_head_of_its_own_is_kept_although_the_configuration_calls_it_tied(tmp_path, options):
    def change(tensors):
        tensors[HEAD] = tensors[EMBEDDING] * 1.5 + 0.1

    source = tied_folder(tmp_path / "source", change)
    for folder in prune_both(source, tmp_path, **options):
        tensors = tensors_of(folder)
        assert torch.equal(tensors[HEAD], tensors[EMBEDDING] * 1.5 + 0.1)


@pytest.mark.parametrize(
    "has_embedding", [True, False], ids=["beside the embedding", "in place of the embedding"]
)
def test_a_tied_head_that_a_file_holds_is_not_written(tmp_path, has_embedding):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()
        if not has_embedding:
            del tensors[EMBEDDING]

    source = tied_folder(tmp_path / "source", change)

    in_memory, from_files = prune_both(source, tmp_path)

    names = tensors_of(in_memory).keys()
    assert names == tensors_of(from_files).keys()
    assert HEAD not in names


CODE = """from transformers import LlamaForCausalLM


class OwnLlama(LlamaForCausalLM):
    own = True
"""
BESIDE = {
    "preprocessor_config.json": "{}",
    "tokenizer.model": "as it was",
    "special_tokens_map.json": "{}",
    # Transformers reads it, and doesn't write it.
    "generation_config.json": '{"temperature": 0.6, "top_p": 0.9}',
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
    contents = BESIDE | dict.fromkeys(others, "---\nlicense: mit\n---\n")
    for name, text in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnLlama"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def recover_quickly(folder: Path, teacher: Path, output: Path) -> None:
    """Train a pruned folder for a few steps on a text beside it."""
    text = output.with_name("text.txt")
    text.write_text(TEXT)
    recover(
        folder,
        teacher,
        output,
        calibration=str(text),
        tokens=256,
        sequence_length=16,
        held_out=4,
        progress=False,
    )


def test_files_beside_the_weights_are_copied(tmp_path, caplog):
    source = folder_with_code(tmp_path / "my source")
    output = tmp_path / "out"
    (source / "gone.safetensors").symlink_to("blob")
    (source / "additional_chat_templates").chmod(0o555)

    with caplog.at_level(logging.WARNING):
        pruner = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)
        pruner.prune(source, tiny_tokens().split(4), output_dir=output)

    not_copied = "gone.safetensors, model-mtp.safetensors, model.onnx, old.gguf, original/"
    assert f"not copied from {source}: {not_copied}" in caplog.messages
    assert {name: (output / name).read_text() for name in BESIDE} == BESIDE
    assert (output / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not (output / ".git").exists()
    assert (output / "additional_chat_templates").stat().st_mode == output.stat().st_mode
    assert "Pruned after training" in (output / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True).own
    assert model_files(output) > BESIDE.keys()


def test_files_beside_the_weights_are_copied_when_a_model_is_recovered(tmp_path):
    source = folder_with_code(tmp_path / "source")
    output = tmp_path / "out"
    pruner = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)
    pruner.prune(source, tiny_tokens().split(4), output_dir=output)
    (output / "notes.txt").write_text("added to the pruned folder")

    recover_quickly(output, source, tmp_path / "trained")

    assert {name: (tmp_path / "trained" / name).read_text() for name in BESIDE} == BESIDE
    assert foreign_files(tmp_path / "trained") == ["notes.txt"]  # there, but not uploaded


def test_a_generation_configuration_that_nobody_changed_is_copied(tmp_path, monkeypatch):
    source = save_tiny_folder(tmp_path / "source")
    text = BESIDE["generation_config.json"]  # which Transformers calls invalid
    (source / "generation_config.json").write_text(text)
    model = AutoModelForCausalLM.from_pretrained(source)
    pruner = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)
    pruner.prune(model, tiny_tokens().split(4))
    generation = model.generation_config
    validate = GenerationConfig.validate
    validated_by = []
    save = model.save_pretrained

    def watched_save(*arguments, **options):
        validated_by.append(GenerationConfig.validate)
        return save(*arguments, **options)

    monkeypatch.setattr(model, "save_pretrained", watched_save)
    pruner.save_pretrained(model, tmp_path / "out")
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    pruner.save_pretrained(model, tmp_path / "changed")

    assert (tmp_path / "out" / "generation_config.json").read_text() == text
    changed = json.loads((tmp_path / "changed" / "generation_config.json").read_text())
    assert changed["temperature"] == 0.7
    assert model.generation_config is generation
    assert validated_by == [validate, validate]  # nothing is replaced in the process


def test_small_files_of_a_hub_model_are_copied_and_other_formats_are_not_fetched(hub, tmp_path):
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
    last = "model.layers.3."
    more = {
        f"model.layers.4.{name.removeprefix(last)}": tensor.bfloat16()
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.startswith(last)
    }
    shapes = {
        "eh_proj": (32, 64),
        "enorm": (32,),
        "hnorm": (32,),
        "shared_head.norm": (32,),
        "shared_head.head": (64, 32),
        "embed_tokens": (64, 32),
    }
    for name, shape in shapes.items():
        more[f"model.layers.4.{name}.weight"] = torch.randn(shape)
    more["model.layers.4.scale"] = torch.tensor(2.0)
    more["mtp.fc.weight"] = torch.randn(3, 5).to(torch.float8_e4m3fn)
    more["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    write_more(folder, more)
    return folder, more


def prune_from(place: str, pruner: FistaPruner, source: Path, output: Path) -> PruningReport:
    """Prune a model folder from its files, or in memory ("memory"), and save the result."""
    batches = tiny_tokens().split(4)
    if place == "files":
        return pruner.prune(source, batches, output_dir=output)
    model = AutoModelForCausalLM.from_pretrained(source)
    report = pruner.prune(model, batches)
    pruner.save_pretrained(model, output)
    return report


def require_copies(
    source: Path, output: Path, more: dict[str, Tensor], layers_kept: Iterable[int] = range(4)
) -> None:
    """Check that `output` has the tensors `more` of the source, under the new numbers of their layers."""
    new_names = {f"layers.{old}.": f"layers.{new}." for new, old in enumerate((*layers_kept, 4))}
    dense = read_stored(source)
    result = read_stored(output)
    for name in more:
        new_name = name
        for old, new in new_names.items():
            if old in name:
                new_name = name.replace(old, new)
                break
        assert dense[name].equals(result[new_name]), name


@pytest.mark.parametrize("place", ["files", "memory"])
@pytest.mark.parametrize("pattern", ["unstructured", "channels:0.25", "layers:0.25"])
def test_tensors_that_the_class_does_not_load_are_copied(tmp_path, pattern, place):
    family = "glm4_moe" if place == "memory" else "deepseek_v3"
    source, more = folder_with_more_tokens(tmp_path / "source", family)
    output = tmp_path / "out"
    pruner = FistaPruner(FistaPruningConfig(pattern=pattern, method="wanda"), progress=False)

    report = prune_from(place, pruner, source, output)

    layers_kept = report.model.get("layers_kept", range(4))
    if 0 not in layers_kept:
        del more["model.layers.0.self_attn.rotary_emb.inv_freq"]
    require_copies(source, output, more, layers_kept)
    assert sum(report.model["copied"].values()) == len(more)
    loaded = AutoModelForCausalLM.from_pretrained(output)
    assert loaded.config.num_nextn_predict_layers == 1
    assert verify_checkpoint(output, dense=source).num_equal
    assert not foreign_files(output)


@pytest.mark.parametrize("place", ["files", "memory"])
def test_a_layer_for_more_tokens_whose_input_is_not_known_is_not_copied_without_its_experts(
    tmp_path, place
):
    family = "glm4_moe" if place == "memory" else "deepseek_v3"
    source, more = folder_with_more_tokens(tmp_path / "source", family)
    del more["model.layers.4.enorm.weight"]
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.4.enorm.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    output = tmp_path / "out"
    pruner = FistaPruner(FistaPruningConfig(pattern="experts:0.25"), progress=False)

    with pytest.warns(UserWarning, match=r"not in the pruned model: model\.layers\.4 "):
        report = prune_from(place, pruner, source, output)

    others = {name: t for name, t in more.items() if not name.startswith("model.layers.4.")}
    require_copies(source, output, others)
    assert not any(name.startswith("model.layers.4.") for name in read_stored(output))
    assert sum(report.model["copied"].values()) == len(others)
    loaded = AutoModelForCausalLM.from_pretrained(output)
    assert loaded.config.num_nextn_predict_layers == 0
    assert verify_checkpoint(output, dense=source).num_equal


def test_tensors_that_the_class_does_not_load_are_copied_into_a_packed_folder(tmp_path):
    source, more = folder_with_more_tokens(tmp_path / "source", "glm4_moe")
    pruner = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)

    pruner.prune(source, tiny_tokens().split(4), output_dir=tmp_path / "out", packed=True)

    require_copies(source, tmp_path / "out", more)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_nextn_predict_layers
    assert verify_checkpoint(tmp_path / "out").num_operators


def test_tensors_that_the_class_does_not_load_are_in_a_recovered_model(tmp_path):
    source, more = folder_with_more_tokens(tmp_path / "source")
    pruner = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)
    pruner.prune(source, tiny_tokens().split(4), output_dir=tmp_path / "out")

    recover_quickly(tmp_path / "out", source, tmp_path / "trained")

    require_copies(source, tmp_path / "trained", more)
    assert not foreign_files(tmp_path / "trained")


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("2:4", "35 tensors that the model's class does not load are copied: model.layers."),
        (
            "experts:0.25",
            "layers that predict more tokens lose experts, too: model.layers.4.mlp.experts (3 of 4 left)",
        ),
        (
            "experts:0.25+heads:0.25",
            "not in the pruned model: model.layers.4 (33 tensors: parts that decoder layers lose would",
        ),
    ],
)
def test_copied_tensors_are_named_before_and_after_a_run(tmp_path, capsys, pattern, sentence):
    source, _ = folder_with_more_tokens(tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = ["prune", str(source), "-o", str(tmp_path / "out"), "--pattern", pattern]
    command += ["--method", "wanda", "--calibration", str(text), "--device", "cpu"]
    command += ["--num-samples", "4", "--sequence-length", "16"]

    with warnings.catch_warnings(action="ignore"):
        assert main(command) == 0

    printed = capsys.readouterr()
    assert sentence in printed.err
    assert sentence in printed.out


def test_a_model_whose_files_have_changed_is_not_saved_with_wrong_tensors(tmp_path):
    source = tmp_path / "source"
    tiny_llama().save_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(add_tensors(source, "mtp.fc.weight"))
    pruner = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)
    pruner.prune(model, tiny_tokens().split(4))
    sentence = r"model\.safetensors' changed or went during the run or after it"

    add_tensors(source, "another.weight")  # the bytes of the first are elsewhere now
    with pytest.raises(ValueError, match=sentence):
        pruner.save_pretrained(model, tmp_path / "out")
    (source / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=sentence):
        pruner.save_pretrained(model, tmp_path / "out")

    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def require_refusal(source: Path, sentence: str) -> None:
    """Check that pruning from files is refused with this sentence, and leaves nothing beside the source."""
    pruner = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)
    with pytest.raises(ValueError, match=sentence):
        pruner.prune(source, tiny_tokens().split(4), output_dir=source.with_name("out"))
    assert [path.name for path in source.parent.iterdir()] == [source.name]


def test_one_tensor_under_two_names_with_different_values_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "source")
    write_more(tmp_path / "source", {"norm.weight": torch.zeros(32)})

    require_refusal(
        tmp_path / "source", r"norm\.weight .* model\.norm\.weight .*, with different values"
    )


def test_one_tensor_of_a_multimodal_model_under_two_names_is_refused(tmp_path):
    save_llava_folder(tmp_path / "source")
    norm = "language_model.norm.weight"
    write_more(tmp_path / "source", {f"model.{norm}": torch.ones(32)})

    require_refusal(
        tmp_path / "source", rf"norm\.weight .* model\.{norm} .*, with different values"
    )


def test_one_name_in_two_files_with_different_values_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "source", max_shard_size="20KB")
    first, last, *_ = sorted((tmp_path / "source").glob("*.safetensors"))
    name = next(iter(load_file(first)))
    other_value = {name: load_file(first)[name] + 1}
    save_file(load_file(last) | other_value, last, {"format": "pt"})

    require_refusal(tmp_path / "source", f"holds {name} twice")


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"\x02\0"])
def test_a_file_that_is_no_safetensors_file_is_named(tmp_path, content):
    save_tiny_folder(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)

    with pytest.raises(ValueError, match=f"'{file}' is damaged, or a pointer of Git LFS"):
        read_stored(tmp_path)


def test_a_scale_in_two_files_with_different_values_is_refused(tmp_path):
    source = fp8_deepseek(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    scale = "model.layers.1.mlp.experts.0.up_proj.weight_scale_inv"
    (source / "model.safetensors").rename(source / "all.safetensors")
    save_file({scale: tensors[scale] * 2}, source / "more.safetensors", {"format": "pt"})
    weight_map = dict.fromkeys(tensors, "all.safetensors") | {scale: "more.safetensors"}
    index = {"metadata": {}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))

    require_refusal(source, f"holds {scale} twice")


def test_files_that_no_longer_fit_a_model_in_memory_are_named(tmp_path):
    source, _ = folder_with_more_tokens(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(source)
    (source / "model.safetensors").unlink()  # which the model still maps
    (source / "model.safetensors").write_bytes(b"no weights")
    pruner = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)

    with warnings.catch_warnings(action="ignore"):
        report = pruner.prune(model, tiny_tokens().split(4))

    ((what, reason),) = report.model["lacks"].items()
    assert str(source) in what
    assert "can't be read" in reason
    assert any("not in the pruned model" in warning for warning in report.warnings)


@pytest.mark.parametrize("zipped", [True, False], ids=["today's", "of old versions"])
def test_tensors_that_the_class_does_not_load_are_copied_from_pytorch_bin_files_too(
    tmp_path, zipped
):
    source = tmp_path / "source"
    model = tiny_llama()
    model.config.save_pretrained(source)
    tensors = model.state_dict() | {"v_head.weight": torch.arange(2.0)}
    torch.save(tensors, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    pruner = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)

    pruner.prune(source, tiny_tokens().split(4), output_dir=tmp_path / "out")

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
    source = tmp_path / "source"
    tiny_model(family).save_pretrained(source)
    add_tensors(source, name, "visual.patch_embed.weight")
    pruner = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)

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

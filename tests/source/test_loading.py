import gc
import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hub_standin import connect, hub_fixture  # noqa: F401
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from quantized_models import fp8_deepseek, gguf_llama
from tiny_llama import save_tiny_folder, tiny_llama, tiny_tokens
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.cli.main import main
from optimum_fista.evaluate.verification import verify_checkpoint
from optimum_fista.model.layers import require_unquantized
from optimum_fista.source import loading
from optimum_fista.source.loading import load_model, load_tokenizer, require_tokenizer
from optimum_fista.text.calibration_tokens import calibration_tokens_by_name


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory) -> Path:
    """A folder with one GGUF file; do not write to it."""
    pytest.importorskip("gguf")
    return gguf_llama(tmp_path_factory.mktemp("gguf"))


def test_a_folder_is_loaded_with_its_tokenizer(tiny_folder):
    model, tokenizer = load_model(str(tiny_folder), device="cpu")

    loaded = model.state_dict()
    expected = tiny_llama().state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    assert tokenizer.decode(tokenizer("the sea").input_ids) == "the sea"
    assert not model.training
    assert not model.use_kernels  # `from_pretrained` itself sets it, since Transformers 5.25


def test_a_folder_without_a_tokenizer_gives_none_or_an_error_if_one_is_required(tmp_path):
    tiny_llama().config.save_pretrained(tmp_path)

    assert load_tokenizer(str(tmp_path)) is None
    with pytest.raises(ValueError, match=r"model='.*' has no tokenizer: copy the files"):
        require_tokenizer(str(tmp_path))


def test_a_tokenizer_is_loaded_from_files_of_the_old_format(tmp_path):
    GPT2Config(vocab_size=3, bos_token_id=0, eos_token_id=0).save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")

    assert load_tokenizer(str(tmp_path))("ab").input_ids == [2]


def test_a_gguf_file_is_dequantized_with_its_tokenizer(gguf_folder):
    dense = tiny_llama(tie_word_embeddings=True, intermediate_size=64)

    model, tokenizer = load_model(str(gguf_folder), device="cpu", dtype="float32")

    name = "model.layers.1.mlp.up_proj.weight"
    loaded = model.get_parameter(name)
    error = float((loaded - dense.get_parameter(name)).detach().abs().max())
    assert loaded.dtype == torch.float32
    assert 0 < error < 0.01  # 8 bits of values up to about 0.8
    assert load_tokenizer(str(gguf_folder)).get_vocab() == tokenizer.get_vocab()
    assert tokenizer.tokenize("then") == ["th", "e", "n"]
    assert len(tokenizer) == 64


def test_a_model_of_a_gguf_file_is_pruned_saved_and_verified(gguf_folder, tmp_path):
    model, tokenizer = load_model(str(gguf_folder), device="cpu", dtype="float32")
    pruner = FistaPruner(FistaPruningConfig(pattern="2:4", method="wanda"), progress=False)

    pruner.prune(model, tiny_tokens().split(4))
    pruner.save_pretrained(model, tmp_path / "pruned", tokenizer)

    assert verify_checkpoint(tmp_path / "pruned").num_operators == 14
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert "quantization_config" not in config
    again, _ = load_model(str(tmp_path / "pruned"), device="cpu")
    loaded = again.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_a_model_of_a_gguf_file_may_change_its_dtype(gguf_folder):
    model, _ = load_model(str(gguf_folder), device="cpu", dtype="bfloat16")

    model.float()  # refused by Transformers for quantized models

    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_model_loaded_from_gguf_by_transformers_itself_can_be_saved(gguf_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        gguf_folder, gguf_file="tiny.Q8_0.gguf", dtype=torch.float32
    )
    require_unquantized(model)
    pruner = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)

    pruner.prune(model, tiny_tokens().split(4))
    pruner.save_pretrained(model, tmp_path / "pruned")

    assert verify_checkpoint(tmp_path / "pruned").num_operators == 14


def test_a_folder_with_no_model_or_with_several_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"with neither a config\.json nor a \.gguf file: pass"):
        load_model(str(tmp_path))

    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()

    with pytest.raises(ValueError, match=r"2 \.gguf files \(a\.gguf, b\.gguf, .*folder of its own"):
        load_model(str(tmp_path))


def test_an_adapter_is_named_with_its_base_model(tmp_path):
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "owner/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    (tmp_path / "adapter_model.safetensors").touch()

    sentence = (
        r"is an adapter of PEFT .*: merge it into its base model \(.*='owner/base'\) by merge"
    )
    with pytest.raises(ValueError, match=sentence):
        load_model(str(tmp_path))
    with pytest.raises(ValueError, match=sentence):
        prune_from_files(tmp_path)


def prune_from_files(name: Path) -> None:
    pruner = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)
    pruner.prune(str(name), tiny_tokens().split(4), output_dir=name.parent / "out", device="cpu")


def test_the_path_of_a_gguf_file_names_the_folder_to_pass(tmp_path):
    for folder in ("one", "two", "beside"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.gguf").touch()
    (tmp_path / "two" / "b.gguf").touch()
    (tmp_path / "beside" / "config.json").touch()

    with pytest.raises(
        ValueError, match=r"is a GGUF file: pass the folder that holds it, '.*/one'"
    ):
        load_model(str(tmp_path / "one" / "a.gguf"))
    for folder in ("two", "beside"):
        with pytest.raises(ValueError, match="is a GGUF file beside other models: move it into a"):
            prune_from_files(tmp_path / folder / "a.gguf")


def test_a_configuration_has_no_weights(tmp_path):
    tiny_llama().config.save_pretrained(tmp_path / "model")

    with pytest.raises(ValueError, match=r"has a config\.json but no weights .*--dry-run"):
        prune_from_files(tmp_path / "model")
    for read in (prune_from_files, lambda path: load_model(str(path))):
        with pytest.raises(ValueError, match=r"json' is a configuration, which has no .*--dry-run"):
            read(tmp_path / "model" / "config.json")


def test_a_folder_without_weights_is_refused_before_the_plan(tmp_path, capsys):
    save_tiny_folder(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()

    assert main(["prune", str(tmp_path / "model"), "-o", str(tmp_path / "out")]) == 1

    printed = capsys.readouterr()
    assert printed.out == ""
    assert "has a config.json but no weights" in printed.err
    assert "decoder layers" not in printed.err


def test_a_configuration_that_is_passed_stays_as_it_is(tmp_path):
    source = fp8_deepseek(tmp_path / "source")
    config = loading.read_config(str(source))
    before = config.to_dict()

    loading.read_model(str(source), config=config)

    assert config.to_dict() == before


def test_a_path_that_is_no_folder_is_refused_with_the_closest_one(tmp_path):
    (tmp_path / "absnt").mkdir()

    sentence = (
        r"absent' is neither a folder .* nor a Hub id: pass .*name'\. Did you mean '.*/absnt'\?$"
    )
    with pytest.raises(ValueError, match=sentence):
        load_model(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"'\./absent' is neither a folder .*name'\.$"):
        load_model("./absent")


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ("open", "has no such model that you may read"),
        ("closed", r"can't be reached \(.*refused\)"),
        ("offline", r"can't be reached \(.*offline mode is enabled.*\)"),
    ],
)
def test_a_misspelt_name_is_refused_at_once_with_the_closest_one(
    state, why, hub, tmp_path, monkeypatch
):
    """One request, and no retries, which take Transformers a minute."""
    connect(hub, monkeypatch)
    template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tester/model-50").mkdir(parents=True)
    if state == "closed":
        hub.__exit__()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", state == "offline")

    with pytest.raises(
        OSError, match=rf"no such folder, and the Hub {why}\. Did you mean 'tester/model-50'\?$"
    ):
        load_model("tester/model-5O", device="cpu")

    assert sum("model-5O" in request for request in hub.requests) == (state == "open")


def test_a_model_in_the_cache_is_loaded_without_requests(monkeypatch):
    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda *_: "config.json")
    monkeypatch.setattr(loading, "get_hf_file_metadata", None)  # a request would fail

    loading._require_on_hub("tester/cached")


@pytest.mark.parametrize("kind", [GatedRepoError, HfHubHTTPError])
def test_a_gated_model_and_a_busy_hub_are_left_to_transformers(kind, monkeypatch):
    def refuse(url):
        raise kind(f"refused: {url}", response=Mock(headers={}))

    monkeypatch.setattr(loading, "get_hf_file_metadata", refuse)
    loading._require_on_hub(f"tester/{kind.__name__}")


@pytest.mark.parametrize("device", ["cpu:x", "cuda:99", "meta"])
def test_unusable_device_is_found_before_the_model_is_read(device):
    sentence = rf"device='{device}' can't be used: .*Pass 'cpu', 'cuda' or 'cuda:N'"
    with pytest.raises(ValueError, match=sentence):
        load_model("no-such-model", device=device)


@pytest.mark.parametrize("dtype", ["nn", torch.int8, "float8_e4m3fn"])
def test_unusable_dtype_is_found_before_the_model_is_read(dtype):
    sentence = r"dtype=.*: pass 'auto', 'float32', 'bfloat16' or 'float16'"
    with pytest.raises(ValueError, match=sentence):
        load_model("no-such-model", device="cpu", dtype=dtype)


@pytest.mark.parametrize(
    "settings", [{"quant_method": "awq"}, type("Settings", (), {"quant_method": "awq"})()]
)
def test_a_quantized_model_in_memory_is_refused(settings):
    model = tiny_llama()
    require_unquantized(model)

    model.config.quantization_config = settings

    with pytest.raises(ValueError, match="quantized by 'awq'"):
        require_unquantized(model)


def test_weights_of_eight_bits_in_memory_are_refused():
    model = tiny_llama()
    projection = model.model.layers[0].mlp.up_proj
    weight = projection.weight.detach().to(torch.float8_e4m3fn)
    projection.weight = nn.Parameter(weight, requires_grad=False)

    sentence = r"up_proj\.weight has dtype torch\.float8_e4m3fn: prune the model in float32"
    with pytest.raises(ValueError, match=sentence):
        require_unquantized(model)


def test_text_for_a_gguf_file_is_cut_without_its_weights(gguf_folder, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("the moth " * 200)
    monkeypatch.setattr(loading, "read_model", None)

    tokens = calibration_tokens_by_name(str(gguf_folder), str(text), 3, 8, 0, keep_in=tmp_path)

    assert tokens.shape == (3, 8)


def test_the_garbage_collector_is_off_while_a_gguf_file_is_read(gguf_folder, monkeypatch):
    def read(name, **options):
        assert not gc.isenabled()
        raise OSError("no file")

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", read)

    with pytest.raises(OSError, match="no file"):
        loading.read_config(str(gguf_folder))

    assert gc.isenabled()


def test_a_gguf_file_without_its_package_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)

    sentence = r"needs the package gguf: run `pip install '\.\[gguf\]'` in a clone of"
    with pytest.raises(ImportError, match=sentence):
        load_model(str(tmp_path), device="cpu")


def test_no_warning_comes_of_an_offloading_that_was_asked_for(tiny_folder, tmp_path, caplog):
    loading.load_lazily(str(tiny_folder), tmp_path / "offload", device="cpu")

    assert "meta device" not in caplog.text

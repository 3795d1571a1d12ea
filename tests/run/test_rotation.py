import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from folder_files import bytes_of
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_llama import TEXT, tiny_llama, tiny_tokenizer, tiny_tokens
from tiny_models import VOCAB_SIZE, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_fista import FistaPruner, FistaPruningConfig, rotate
from optimum_fista.model.architecture import UnsupportedArchitectureError
from optimum_fista.run import rotation
from optimum_fista.run.checkpoints.output_folder import folder_beside
from optimum_fista.run.evaluation.verification import verify_checkpoint
from optimum_fista.solve.patterns import parse_pattern
from optimum_fista.solve.rotation import random_rotation

QUICK = {"tokens": 64, "sequence_length": 16, "steps": 4, "device": "cpu", "progress": False}


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "sea.txt"
    file.write_text(TEXT)
    return str(file)


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(tiny_tokens()).logits.float()


def saved(model, folder):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_rotated_folder_is_an_ordinary_dense_model(tiny_folder, text, tmp_path, capsys):
    before, output = bytes_of(tiny_folder), tmp_path / "rotated"
    report = rotate(tiny_folder, output, calibration=text, **QUICK | {"steps": 60, "learning_rate": 0.01})
    assert bytes_of(tiny_folder) == before
    torch.testing.assert_close(logits(output), logits(tiny_folder), rtol=1e-3, atol=1e-4)
    assert report.difference < 1e-5
    assert report.error_ratio < 0.97
    assert report.seconds > 0
    assert not {"Training", "Gradients"} & {*capsys.readouterr().err.split()}
    assert AutoTokenizer.from_pretrained(output).get_vocab() == tiny_tokenizer().get_vocab()
    config = json.loads((output / "config.json").read_text())
    kept = config["fista_rotation"]
    assert (kept["pattern"], kept["num_tokens"], kept["steps"], kept["calibration"]) == ("2:4", 64, 60, "sea.txt")
    assert kept["error_ratio"] == report.error_ratio
    weights = load_file(output / "model.safetensors")
    assert bool(torch.all(weights["model.norm.weight"] == 1))


def test_what_is_saved_has_the_rotation_that_was_trained(tiny_folder, text, tmp_path, monkeypatch):
    found = random_rotation(32, seed=5)
    monkeypatch.setattr(rotation, "train_rotation", lambda *_, **__: (found, 0.5))
    rotate(tiny_folder, tmp_path / "out", calibration=text, **QUICK)
    dense, rotated = (load_file(folder / "model.safetensors") for folder in (tiny_folder, tmp_path / "out"))
    name = "model.embed_tokens.weight"  # which no gain stands before
    torch.testing.assert_close(rotated[name], (dense[name].double() @ found).float())


def test_the_same_call_writes_the_same_bits_and_leaves_the_process_as_it_was(tiny_folder, text, tmp_path):
    state = torch.get_rng_state()
    for name, seed in (("a", 0), ("c", 1)):
        rotate(tiny_folder, tmp_path / name, calibration=text, seed=seed, **QUICK)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            rotate(tiny_folder, tmp_path / "b", calibration=text, **QUICK)
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])


def test_the_rotated_model_is_pruned_like_any_other(tiny_folder, text, tmp_path):
    rotate(tiny_folder, tmp_path / "rotated", calibration=text, **QUICK)
    config = FistaPruningConfig(pattern="2:4", method="wanda")
    for packed in (False, True):
        folder = tmp_path / f"pruned-{packed}"
        FistaPruner(config, progress=False).prune(
            tmp_path / "rotated", tiny_tokens().split(4), output_dir=folder, device="cpu", packed=packed
        )
        assert verify_checkpoint(folder).num_zeros > 0
        assert json.loads((folder / "config.json").read_text())["fista_rotation"]["pattern"] == "2:4"
        with pytest.raises(ValueError, match="was pruned: a rotation fills its zeros"):
            rotate(folder, tmp_path / "again", calibration=text, **QUICK)
    verify_checkpoint(tmp_path / "pruned-False", dense=str(tmp_path / "rotated"))


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_it_is_saved_in_the_dtype_of_the_checkpoint(dtype, expected, text, tmp_path):
    source = saved(tiny_llama().bfloat16(), tmp_path / "source")
    report = rotate(source, tmp_path / "rotated", calibration=text, dtype=dtype, **QUICK)
    assert {value.dtype for value in load_file(tmp_path / "rotated" / "model.safetensors").values()} == {expected}
    assert report.difference < 1e-5  # before it is rounded
    found, before = logits(tmp_path / "rotated"), logits(source)
    assert float((found - before).norm() / before.norm()) < 0.03  # of 12 rotations 0.012 to 0.014


def test_quick_products_change_the_rotation_and_not_the_model(tiny_folder, text, tmp_path):
    reports = [
        rotate(tiny_folder, tmp_path / dtype, calibration=text, compute_dtype=dtype, **QUICK)
        for dtype in ("float32", "bfloat16")
    ]
    assert reports[0].error_ratio != reports[1].error_ratio
    assert reports[0].error_ratio == pytest.approx(reports[1].error_ratio, rel=2e-2)
    assert all(report.difference < 1e-5 for report in reports)
    assert torch.get_float32_matmul_precision() == "highest"


def test_what_transformers_keeps_in_float32_is_not_rounded(text, tmp_path):
    source = saved(tiny_model("deepseek_v3").bfloat16(), tmp_path / "source")
    before = load_file(source / "model.safetensors")
    names = [name for name in before if "e_score_correction_bias" in name]
    for name in names:
        before[name] = 4 + torch.arange(4) / 1000
    save_file(before, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]  # as older configurations: the files say it
    (source / "config.json").write_text(json.dumps(config))
    rotate(source, tmp_path / "rotated", calibration=text, **QUICK)
    after = load_file(tmp_path / "rotated" / "model.safetensors")
    assert names
    assert all(torch.equal(after[name], before[name]) for name in names)
    assert after["model.layers.0.self_attn.o_proj.weight"].dtype == torch.bfloat16


def test_weights_that_overflow_are_not_saved(text, tmp_path):
    model = tiny_llama()
    model.model.norm.weight.data *= 1e3
    model.lm_head.weight.data *= 1e3
    source = saved(model, tmp_path / "source")
    with pytest.raises(ValueError, match=r"dtype='float16' is too small for values of lm_head\.weight: pass"):
        rotate(source, tmp_path / "out", calibration=text, dtype="float16", **QUICK)
    assert not (tmp_path / "out").exists()


def test_rounding_of_a_deep_model_is_no_reason_to_refuse_it():
    model = tiny_llama(num_hidden_layers=24, hidden_size=128)
    _, difference = rotation.rotate_model(model, tiny_tokens(1, 64), parse_pattern("2:4"), 1, 1e-3, 0, False)
    assert 1e-5 < difference < 1e-4


def test_sequences_too_long_for_the_model_are_explained(text, tmp_path):
    source = saved(tiny_model("gpt2"), tmp_path / "source")
    with pytest.raises(ValueError, match=r"calibration holds sequences of 65 tokens, .* pass at most 64"):
        rotate(source, tmp_path / "out", calibration=text, **QUICK | {"sequence_length": 65})
    assert rotate(source, tmp_path / "out", calibration=text, **QUICK | {"sequence_length": 64}).difference < 1e-5


def test_a_shared_head_makes_the_model_larger(text, tmp_path):
    source = saved(tiny_llama(tie_word_embeddings=True), tmp_path / "source")
    report = rotate(source, tmp_path / "rotated", calibration=text, **QUICK | {"sequence_length": None})
    assert report.num_tokens == 64  # one sequence, as long as the model takes
    before, after = report.num_parameters
    assert after == before + tiny_llama().lm_head.weight.numel()
    assert f"the head has its own weight now: {after / before - 1:+.1%} parameters" in str(report)
    torch.testing.assert_close(logits(tmp_path / "rotated"), logits(source), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "unstructured"])
def test_patterns_of_zeros(pattern, tiny_folder, text, tmp_path):
    sparsity = 0.3 if pattern == "unstructured" else None
    report = rotate(tiny_folder, tmp_path / "out", pattern=pattern, sparsity=sparsity, calibration=text, **QUICK)
    assert (report.pattern, report.sparsity) == (pattern, sparsity or 0.5)
    assert ("30% zeros" if sparsity else pattern) in str(report).splitlines()[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "channels:0.25"}, r"pattern='channels:0.25', sparsity=None: pass a pattern of zeros"),
        ({"pattern": "unstructured", "sparsity": 0.0}, r"sparsity=0.0: pass a pattern of zeros"),
        ({"pattern": "two"}, "pattern='two': pass"),
        ({"pattern": "2:5"}, r"self_attn\.q_proj has rows of 32 inputs, which 2:5 does not divide"),
        ({"pattern": "16:32"}, r"mlp\.down_proj has rows of 48 inputs, which 16:32 does not divide"),
        ({"tokens": 0}, "tokens=0: pass 1 or more"),
        ({"sequence_length": 1}, "sequence_length=1: pass 2 or more"),
        ({"steps": 0}, "steps=0: pass 1 or more"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: pass a positive number"),
        ({"learning_rate": float("inf")}, "learning_rate=inf: pass a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: pass a positive number"),
        ({"seed": -1}, "seed=-1"),
        ({"device": "nowhere"}, "device='nowhere' can't be used"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"compute_dtype": "int8"}, "compute_dtype='int8': pass auto, float32, bfloat16"),
        ({"tokens": 10_000_000}, "tokens=10000000: text 'sea.txt' has 3680 tokens"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message, tiny_folder, text, tmp_path):
    with pytest.raises(ValueError, match=message):
        rotate(tiny_folder, tmp_path / "out", calibration=text, **QUICK | options)
    assert not (tmp_path / "out").exists()


def test_nothing_is_lost_of_what_is_there(tiny_folder, text, tmp_path):
    output = saved(tiny_llama(), tmp_path / "out")
    (output / "notes.txt").write_text("mine")
    before = bytes_of(output)
    with pytest.raises(FileExistsError, match="already holds a model"):
        rotate(tiny_folder, output, calibration=text, **QUICK)
    assert bytes_of(output) == before
    rotate(tiny_folder, output, calibration=text, overwrite=True, **QUICK)
    assert (output / "notes.txt").read_text() == "mine"
    (output / "README.md").write_text("my card")
    rotate(tiny_folder, output, calibration=text, overwrite=True, **QUICK)
    assert (output / "README.md").read_text() == "my card"
    assert not (output / "README.before.md").exists()
    torch.testing.assert_close(logits(output), logits(tiny_folder), rtol=1e-3, atol=1e-4)
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    with pytest.raises(ValueError, match="lies in the folder that is read"):
        rotate(copy, copy, calibration=text, overwrite=True, **QUICK)


def test_without_progress_nothing_is_shown_while_the_model_writes(tiny_folder, tmp_path, capsys):
    assert rotate(tiny_folder, tmp_path / "out", **QUICK).calibration == "self"
    assert "Self-sampling" not in capsys.readouterr().err


def test_a_readme_alone_is_no_obstacle_and_stays(tiny_folder, text, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("my notes")
    rotate(tiny_folder, tmp_path / "out", calibration=text, **QUICK)
    assert (tmp_path / "out" / "README.md").read_text() == "my notes"


def test_a_disk_without_room_is_refused_before_the_training(tiny_folder, text, tmp_path, monkeypatch):
    monkeypatch.setattr(rotation, "calibration_tokens", lambda *_: pytest.fail("refused too late"))
    free = tiny_llama().num_parameters() * 4 - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2 * free, free, free))
    with pytest.raises(OSError, match=r"No space left on device: 0 MiB are needed and 0 free.*out\.unfinished"):
        rotate(tiny_folder, tmp_path / "out", calibration=text, **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["sea.txt"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_named(value, text, tmp_path):
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    source = saved(model, tmp_path / "source")
    with pytest.raises(
        ValueError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight holds NaN or Inf: the model is damaged"
    ):
        rotate(source, tmp_path / "out", calibration=text, **QUICK)


def test_channels_that_nothing_uses_promise_nothing(text, tmp_path):
    model, unused = tiny_llama(), [3, 7, 11]
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            stream = parameter.data.T if name.endswith(("o_proj.weight", "down_proj.weight")) else parameter.data
            stream[:, unused] = 0
    report = rotate(saved(model, tmp_path / "source"), tmp_path / "out", calibration=text, **QUICK)
    assert 0.9 < report.error_ratio <= 1  # after so few steps
    assert report.difference < 1e-5


def test_what_has_the_zeros_already_is_refused(text, tmp_path):
    model = tiny_llama()
    model.model.layers[0].mlp.gate_proj.weight.data[:, ::2] = 0
    source = saved(model, tmp_path / "source")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate_proj has the zeros of pattern='2:4' already"):
        rotate(source, tmp_path / "out", calibration=text, **QUICK)


def test_a_full_disk_leaves_the_old_model(tiny_folder, text, tmp_path, monkeypatch):
    output = saved(tiny_llama(), tmp_path / "out")
    before = bytes_of(output)

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(OSError, match=r"No space left on device.*out\.unfinished"):
        rotate(tiny_folder, output, calibration=text, overwrite=True, **QUICK)
    assert bytes_of(output) == before
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model.config, "quantization_config", {"quant_method": "gptq"}), "quantized by 'gptq'"),
        # as module.compile() does, which imports for seconds
        (
            lambda model: setattr(model.model.layers[0], "_compiled_call_impl", len),
            r"model\.model\.layers\.0 is compiled",
        ),
    ],
)
def test_models_that_are_not_plain_are_refused(change, message, tiny_folder, text, tmp_path, monkeypatch):
    model = tiny_llama()
    change(model)
    monkeypatch.setattr(rotation, "load_model", lambda *_, **__: (model, tiny_tokenizer()))
    with pytest.raises(ValueError, match=message):
        rotate(tiny_folder, tmp_path / "out", calibration=text, **QUICK)


def test_a_model_that_would_compute_something_else_is_not_saved(text, tmp_path, monkeypatch):
    source = saved(tiny_llama(), tmp_path / "source")
    with monkeypatch.context() as patched:
        found = rotation.find_residual_stream

        def without_a_writer(*arguments):
            stream = found(*arguments)
            object.__setattr__(stream, "writers", stream.writers[1:])
            return stream

        patched.setattr(rotation, "find_residual_stream", without_a_writer)
        patched.setattr(rotation, "train_rotation", lambda *_, **__: pytest.fail("refused too late"))
        with pytest.raises(UnsupportedArchitectureError, match=r"its logits then differ by .* rounding explains"):
            rotate(source, tmp_path / "out", calibration=text, **QUICK)
    assert not (tmp_path / "out").exists()
    source = saved(tiny_model("gemma3_text", vocab_size=tiny_llama().config.vocab_size), tmp_path / "gemma3")
    with pytest.raises(UnsupportedArchitectureError, match="the residual stream of Gemma3ForCausalLM can't be rotated"):
        rotate(source, tmp_path / "out", calibration=text, **QUICK)


@pytest.mark.parametrize(("family", "most"), [("llama", 0), ("mixtral", 6)])
def test_rounding_may_send_a_tenth_of_the_tokens_to_other_experts(family, most, monkeypatch):
    model, expected = tiny_model(family), torch.ones(64, VOCAB_SIZE)
    for number in (0, 6, 7):  # of 64 tokens
        found = expected.clone()
        found[:number] *= 2
        monkeypatch.setattr(rotation, "_logits", lambda *_, found=found: found)
        refused = pytest.raises(UnsupportedArchitectureError, match="logits then differ by")
        with nullcontext() if number <= most else refused:
            rotation._require_same(model, tiny_tokens(), expected)


def test_the_folder_is_named_after_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert folder_beside("model", "-rotated").name == "model-rotated"
    assert folder_beside(tmp_path / "model", "-rotated") == tmp_path / "model-rotated"
    assert str(folder_beside("meta-llama/Llama", "-rotated")) == "Llama-rotated"

"""examples/rotate.py: the rotated model computes the same, its files are those of a dense model, others are refused."""

import json
import math
import sys

import pytest
import rotate as example
import tiny_models
import torch
from folder_files import bytes_of, tensors_of
from safetensors.torch import load_file, save_file
from tiny_llama import TEXT, tiny_llama, tiny_tokenizer, tiny_tokens
from tiny_models import VOCAB_SIZE
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_fista import FistaPruner, FistaPruningConfig, recover
from optimum_fista.solve.pattern import parse_pattern

FITTING = (
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_next",
    "mistral",
    "phi3",
    "gemma",
    "granite",
    "smollm3",
)
OTHERS = (
    "gemma2",
    "gemma3_text",
    "olmo2",
    "cohere",
    "gpt2",
    "gpt_neox",
    "opt",
    "qwen3_moe",
    "mixtral",
)
QUICK = {
    "pattern": "2:4",
    "num_samples": 4,
    "sequence_length": 16,
    "steps": 4,
    "seed": 0,
    "device": "cpu",
    "dtype": "auto",
    "overwrite": False,
}


@pytest.fixture
def rotate(tmp_path):
    """`rotate(source, name, **options)` writes `tmp_path / name`, and returns what is said of it, and the folder."""
    (tmp_path / "sea.txt").write_text(TEXT)

    def run(source, name="rotated", **options):
        settings = QUICK | {"calibration": str(tmp_path / "sea.txt")} | options
        result = example.rotate(str(source), tmp_path / name, **settings)
        return result, tmp_path / name

    return run


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.no_grad():
        return model(tiny_tokens()).logits.float()


def some_tokens(num_sequences):
    """Random token ids [sequences, 16], the same in every call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCAB_SIZE, (num_sequences, 16), generator=generator)


def saved(model, folder):
    """Write a model with a tokenizer, and return its folder."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def model_of(family, monkeypatch):
    """A tiny random model of a family."""
    sizes = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB_SIZE,
        "intermediate_size": 48,
        "pad_token_id": 0,
    }
    if family.startswith(("gemma", "qwen3_next")):
        sizes["head_dim"] = 8
    if family == "qwen3_next":  # its attention has a gate before the output projection
        sizes |= {"layer_types": ["full_attention"] * 2, "mlp_only_layers": [0, 1]}
    monkeypatch.setattr(tiny_models, "_CONFIGS", tiny_models._CONFIGS | {family: sizes})
    return tiny_models.tiny_model(family)


@pytest.mark.parametrize("family", FITTING)
def test_a_rotated_model_of_any_family_computes_the_same(family, monkeypatch):
    model = model_of(family, monkeypatch)
    ids = some_tokens(4)

    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.mul_(0.3)
        before = model(ids).logits
        weights = {name: value.clone() for name, value in model.named_parameters()}
        result = example.rotate_model(model, ids, parse_pattern("2:4", None), 30, 0)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-4)

    assert 0 < result["error_ratio"] < 1
    assert result["difference"] < 1e-4
    assert result["heads"] == (0 if family in ("phi3", "qwen3_next") else 4)
    moved = {
        name
        for name, value in model.named_parameters()
        if name in weights and not torch.equal(value, weights[name])
    }
    assert {
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
    } <= moved
    # Weights keep their size, so that learning rates suit.
    projections = ["gate_up_proj"] if family == "phi3" else ["gate_proj", "up_proj"]
    for projection in projections:
        name = f"model.layers.1.mlp.{projection}.weight"
        norm = float(model.get_parameter(name).detach().norm())
        assert norm == pytest.approx(float(weights[name].norm()), rel=0.03)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_are_refused(family, monkeypatch):
    model = model_of(family, monkeypatch)
    ids = some_tokens(2)

    with pytest.raises(ValueError, match=r"can't be rotated: .*Prune it as it is"):
        example.rotate_model(model, ids, parse_pattern("2:4", None), 2, 0)


def test_the_folder_is_an_ordinary_dense_model(tiny_folder, rotate):
    before = bytes_of(tiny_folder)

    result, output = rotate(tiny_folder, steps=60)

    assert bytes_of(tiny_folder) == before
    torch.testing.assert_close(logits(output), logits(tiny_folder), rtol=1e-3, atol=1e-4)
    assert result["error_ratio"] < 0.97
    assert result["difference"] < 1e-5
    assert AutoTokenizer.from_pretrained(output).get_vocab() == tiny_tokenizer().get_vocab()
    assert json.loads((output / "config.json").read_text())["fista_rotation"] == result
    for name, tensor in tensors_of(output).items():
        if "norm" in name:
            assert float(tensor.std()) == 0  # only their size is left
    assert [*output.parent.glob("*.unfinished*")] == []


def test_a_head_that_shared_the_embedding_has_weights_of_its_own(rotate, tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    size = model.num_parameters()
    source = saved(model.bfloat16(), tmp_path / "source")

    result, output = rotate(source)

    tensors = tensors_of(output)
    head = tensors["lm_head.weight"]
    assert head.dtype == tensors["model.norm.weight"].dtype == torch.bfloat16
    assert result["growth"] == pytest.approx(head.numel() / size)
    difference = logits(output) - logits(source)
    assert float(difference.norm() / logits(source).norm()) < 0.03


def mean_log_error(model, ids, pattern):
    """The mean of the logarithms of the errors of the pattern as `prune` sees it, groups side by side."""
    stream = example._Stream(model, ids[:1], pattern)
    stream.measure(ids)
    terms = []  # numbers of weights, and logarithms of errors, by operator
    for layer in stream.layers:
        costs = dict(layer.squares)  # of removing an input with the weight 1, by operator
        costs[layer.output] = 1 / layer.blocks.diagonal(dim1=-2, dim2=-1).flatten()
        for norm, readers in layer.readers.items():
            for reader in readers:
                costs[reader] = 1 / layer.inverses[norm].diagonal()
        for operator, cost in costs.items():
            scores = operator.read().square() * cost
            lost = scores[~pattern.mask(scores, squared=True)].sum()
            terms.append((operator.parameter.numel(), math.log(float(lost))))
    return sum(count * term for count, term in terms) / sum(count for count, _ in terms)


def test_the_ratio_of_errors_that_a_rotation_reports_is_that_of_pruning_to_the_pattern():
    rotated = tiny_llama()
    plain = tiny_llama()
    ids = tiny_tokens()
    pattern = parse_pattern("2:4", None)
    with torch.no_grad():
        for model in (rotated, plain):
            for layer in model.model.layers:
                for projection in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.self_attn.o_proj):
                    projection.weight[:, ::2] *= 0.8  # it matters which inputs are side by side
        # The rotation moves the gains of norms into the weights: here they are moved alone.
        example._Stream(plain, ids[:1], pattern).move_gains()

        reported_ratio = example.rotate_model(rotated, ids, pattern, steps=50, seed=0)[
            "error_ratio"
        ]
        log_ratio = mean_log_error(rotated, ids, pattern) - mean_log_error(plain, ids, pattern)

    assert math.exp(log_ratio) == pytest.approx(reported_ratio, rel=0.01)
    assert reported_ratio < 0.9


def test_rotating_heads_too_lowers_the_error(monkeypatch):
    ratios = []
    for rate in (example._RATE_OF_HEADS, 0.0):  # a rate of 0 leaves the heads as they are
        monkeypatch.setattr(example, "_RATE_OF_HEADS", rate)
        pattern = parse_pattern("2:4", None)
        result = example.rotate_model(tiny_llama(), tiny_tokens(), pattern, 50, 0)
        ratios.append(result["error_ratio"])

    with_heads, without_heads = ratios
    assert with_heads < without_heads - 0.01


def test_a_rotated_model_is_pruned_and_recovered_like_any_other(tiny_folder, rotate, tmp_path):
    _, output = rotate(tiny_folder, steps=20)
    config = FistaPruningConfig(pattern="2:4", reorder_channels=True)

    FistaPruner(config, progress=False).prune(
        output, tiny_tokens().split(4), output_dir=tmp_path / "p", device="cpu"
    )
    recover(
        tmp_path / "p",
        tiny_folder,  # computes the same as the rotated model, which has other tensors
        tmp_path / "r",
        calibration=str(tmp_path / "sea.txt"),
        other_teacher=True,
        device="cpu",
        progress=False,
        tokens=64,
        sequence_length=16,
    )

    settings = json.loads((tmp_path / "p" / "config.json").read_text())
    assert settings["fista_rotation"]["pattern"] == "2:4"
    with pytest.raises(
        ValueError, match="is pruned, and a rotation would fill its zeros and lose its report"
    ):
        rotate(tmp_path / "p", "again")


def test_rotated_weights_are_rounded_only_once(rotate, tmp_path):
    source = saved(tiny_llama(), tmp_path / "source")

    _, once = rotate(source, "once", dtype="bfloat16")
    _, exact = rotate(source, "exact")

    for name, tensor in tensors_of(once).items():
        assert torch.equal(tensor, tensors_of(exact)[name].bfloat16())
    assert json.loads((once / "config.json").read_text())["dtype"] == "bfloat16"


def test_readme_and_licence_are_copied(tiny_folder, rotate, tmp_path):
    source = saved(tiny_llama(), tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: llama3.2\n---\n")
    (source / "LICENSE").write_text("text")

    result, output = rotate(source)

    for name in ("README.md", "LICENSE"):
        assert (output / name).read_bytes() == (source / name).read_bytes()
    assert (result["model"], result["calibration"]) == ("source", "sea.txt")


def test_a_rotation_that_does_not_help_is_not_written(rotate, tmp_path):
    model = tiny_llama()
    pattern = parse_pattern("2:4", None)
    for name, parameter in model.named_parameters():
        if "proj" in name:  # as pruned elsewhere
            parameter.data *= pattern.mask(parameter)

    with pytest.raises(ValueError, match="no rotation with a smaller error of 2:4 was found"):
        rotate(saved(model, tmp_path / "source"))
    assert not (tmp_path / "rotated").exists()


def test_a_model_with_operators_of_zeros_can_be_rotated(rotate, tmp_path):
    model = tiny_llama()
    attention = model.model.layers[1].self_attn
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.weight.data.zero_()
    source = saved(model, tmp_path / "source")

    _, output = rotate(source)

    torch.testing.assert_close(logits(output), logits(source), rtol=1e-3, atol=1e-4)


def test_the_seed_decides_which_rotation_is_found(tiny_folder, rotate):
    tensors = []
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        _, folder = rotate(tiny_folder, name, seed=seed)
        tensors.append(load_file(folder / "model.safetensors"))
    first, again, other = tensors

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"pattern": "unstructured"}, "a rotation is trained for n:m"),
        ({"pattern": "channels:0.25"}, "a rotation is trained for n:m"),
        ({"pattern": "4:8-pairs"}, "a rotation is trained for n:m"),
        ({"pattern": "2:5"}, "model.layers.0.self_attn.q_proj"),
        ({"pattern": "16:32"}, "model.layers.0.mlp.down_proj"),
        ({"steps": 0}, "steps is too small: pass at least 1"),
        ({"num_samples": 0}, "num_samples is too small: pass at least 1"),
        ({"sequence_length": 1}, "sequence_length is too small: pass at least 2"),
        ({"sequence_length": 65}, "65"),
        ({"device": "nowhere"}, "device='nowhere'"),
    ],
)
def test_bad_options_write_nothing(tiny_folder, rotate, tmp_path, options, why):
    with pytest.raises(ValueError, match=why):
        rotate(tiny_folder, **options)
    assert not (tmp_path / "rotated").exists()


def test_tensors_that_no_class_loads_are_not_left_behind(tiny_folder, rotate, tmp_path):
    source = saved(tiny_llama(), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    save_file(
        tensors | {"mtp.0.proj.weight": torch.ones(32, 64)},
        source / "model.safetensors",
        {"format": "pt"},
    )

    with pytest.raises(
        ValueError, match=r"has mtp\.0\.proj\.weight, which LlamaForCausalLM does not load"
    ):
        rotate(source)

    assert not (tmp_path / "rotated").exists()


def test_a_model_of_the_user_is_replaced_only_if_asked(tiny_folder, rotate):
    _, output = rotate(tiny_folder)
    before = bytes_of(output)

    with pytest.raises(FileExistsError):
        rotate(tiny_folder, seed=1)
    assert bytes_of(output) == before

    rotate(tiny_folder, seed=1, overwrite=True)
    assert bytes_of(output) != before


def test_the_command_rotates_once_and_refuses_a_folder_that_holds_a_model(
    tiny_folder, tmp_path, monkeypatch, capsys
):
    (tmp_path / "sea.txt").write_text(TEXT)
    flags = ["--model", str(tiny_folder), "--output", str(tmp_path / "out")]
    flags += ["--calibration", str(tmp_path / "sea.txt")]
    flags += ["--num-samples", "4", "--sequence-length", "16", "--steps", "3", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["rotate.py", *flags])

    example.main()

    shown = capsys.readouterr().out
    assert "the predicted error of 2:4 is" in shown
    assert "the logits differ by" in shown

    # The folder holds a model now.
    with pytest.raises(SystemExit, match="error: "):
        example.main()

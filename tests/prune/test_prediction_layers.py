"""Layers that predict more tokens lose as many experts as the decoder layers, chosen by their own router."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from folder_files import tensors_of
from prediction_models import (
    HIDDEN,
    NUM_LAYERS,
    PREDICTING,
    TEMPLATES,
    fp8_predicting_folder,
    predicting_folder,
)
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig, PruningReport
from optimum_fista.estimate.estimate import Estimate
from optimum_fista.evaluate.verification import VerificationError, verify_checkpoint
from optimum_fista.prune import journal, loop
from optimum_fista.records import MixtureReport
from optimum_fista.source.loading import read_model
from optimum_fista.source.prediction_layers import _template
from optimum_fista.source.stored_tensor import StoredTensor, read_stored

TOKENS = torch.randint(0, VOCAB_SIZE, (8, 16), generator=torch.Generator().manual_seed(0))
HALF = {"pattern": "experts:0.5"}
STORED = {"pattern": "experts:0.5", "expert_refit": False}
"""Options of a run that changes no value, so that what stays is written as it is stored."""


def prune(
    source: Path, output: Path, place: str = "files", dtype: str = "auto", batches=None, **options
) -> PruningReport:
    """Prune a folder from its files, or in memory, and save the result."""
    pruner = FistaPruner(FistaPruningConfig(**options), progress=False)
    if batches is None:
        batches = TOKENS.split(4)
    if place == "files":
        return pruner.prune(source, batches, output_dir=output, device="cpu", dtype=dtype)
    model = read_model(str(source))
    report = pruner.prune(model, batches)
    pruner.save_pretrained(model, output)
    return report


def module_of(folder: Path, prefix: str) -> dict[str, StoredTensor]:
    """The stored tensors whose names begin with `prefix`, by the rest of their names."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in read_stored(folder).items()
        if name.startswith(prefix)
    }


def layer_prefix(family: str) -> str:
    return "mtp.layers.0." if family == "qwen3_next" else f"model.layers.{NUM_LAYERS}."


def require_kept_bytes(source: Path, output: Path, mixture: MixtureReport) -> None:
    """Check that all tensors beside the decoder layers of the result are those of the source, or a choice of them."""
    before = read_stored(source)
    kept = list(mixture.groups_kept)
    prefix, _, _ = mixture.name.partition(".mlp.experts")
    module = "mtp." if prefix.startswith("mtp.") else f"{prefix}."
    after = {
        name: tensor for name, tensor in read_stored(output).items() if name.startswith(module)
    }
    assert after
    for name, tensor in after.items():
        number, _, rest = name.removeprefix(f"{mixture.name}.").partition(".")
        if number.isdigit():
            expected = before[f"{mixture.name}.{kept[int(number)]}.{rest}"]
        elif ".mlp.gate." in name:
            expected = before[name].selected(0, torch.tensor(kept))
        else:
            expected = before[name]
        assert tensor.equals(expected), name


@pytest.mark.parametrize("family", PREDICTING)
def test_a_prediction_layer_has_the_shapes_and_bytes_of_a_model_with_fewer_experts(
    tmp_path, family
):
    source = predicting_folder(tmp_path / "source", family)

    report = prune(source, tmp_path / "files", **HALF)
    of_memory = prune(source, tmp_path / "memory", place="memory", **HALF)

    (mixture,) = report.prediction_mixtures
    assert mixture.name == f"{layer_prefix(family)}mlp.experts"
    assert len(mixture.groups_kept) == 4
    assert of_memory.prediction_mixtures[0].groups_kept == mixture.groups_kept
    assert of_memory.prediction_mixtures[0].saliency == mixture.saliency
    # A decoder layer of the result has the shapes that its configuration describes: it can be loaded.
    like = module_of(tmp_path / "files", f"model.layers.{TEMPLATES[family]}.")
    layer = module_of(tmp_path / "files", layer_prefix(family))
    assert {name: layer[name].shape for name in like} == {
        name: tensor.shape for name, tensor in like.items()
    }
    for place in ("files", "memory"):
        require_kept_bytes(source, tmp_path / place, mixture)
        assert verify_checkpoint(tmp_path / place, dense=source).num_equal
        AutoModelForCausalLM.from_pretrained(tmp_path / place)
    in_memory = tensors_of(tmp_path / "memory")
    from_files = tensors_of(tmp_path / "files")
    assert in_memory.keys() == from_files.keys()
    assert all(torch.equal(tensor, from_files[name]) for name, tensor in in_memory.items())
    config = json.loads((tmp_path / "files" / "config.json").read_text())
    assert config.get("num_nextn_predict_layers", 1) == 1


@pytest.mark.parametrize("error_correction", ["full", "intra"])
def test_a_run_that_is_interrupted_while_it_predicts_resumes_at_the_last_decoder_layer(
    tmp_path, monkeypatch, error_correction
):
    source = predicting_folder(tmp_path / "source", "deepseek_v3")
    options = HALF | {"error_correction": error_correction}
    prune(source, tmp_path / "whole", **options)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop, "choose_prediction_experts", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prune(source, tmp_path / "out", **options)
    pruned = []
    keep = journal.Journal.keep_layer
    monkeypatch.setattr(
        journal.Journal,
        "keep_layer",
        lambda self, index, *others: [pruned.append(index), keep(self, index, *others)],
    )

    report = prune(source, tmp_path / "out", **options)

    assert pruned == [NUM_LAYERS - 1]
    assert len(report.prediction_mixtures) == 1
    expected = read_stored(tmp_path / "whole")
    result = read_stored(tmp_path / "out")
    assert result.keys() == expected.keys()
    assert all(tensor.equals(expected[name]) for name, tensor in result.items())


@pytest.mark.parametrize("place", ["files", "memory"])
def test_a_prediction_layer_in_fp8_is_dequantized_with_the_model(tmp_path, place):
    source = fp8_predicting_folder(tmp_path / "source")
    # Two texts, so that experts of the model may be refitted.
    batches = [
        {"input_ids": ids, "source": name} for ids, name in zip(TOKENS.split(4), "ab", strict=True)
    ]

    report = prune(source, tmp_path / "out", place=place, batches=batches, **HALF)

    layer = module_of(tmp_path / "out", "model.layers.3.")
    assert {tensor.dtype for tensor in layer.values()} == {"BF16", "F32"}  # F32: router's bias
    assert not any("scale" in name for name in layer)
    assert layer["mlp.experts.3.up_proj.weight"].shape == (16, HIDDEN)
    assert "mlp.experts.4.up_proj.weight" not in layer
    assert report.model["copied"] == {"model.layers.3": len(layer)}
    assert verify_checkpoint(tmp_path / "out", dense=source).num_equal


def test_a_prediction_layer_in_fp8_stays_as_it_is_stored_and_scales_stay_with_their_expert(
    tmp_path,
):
    source = fp8_predicting_folder(tmp_path / "source")

    report = prune(source, tmp_path / "out", **STORED)
    dequantized = prune(source, tmp_path / "dense", dtype="bfloat16", **STORED)

    (mixture,) = report.prediction_mixtures
    require_kept_bytes(source, tmp_path / "out", mixture)
    layer = module_of(tmp_path / "out", "model.layers.3.")
    assert layer["mlp.experts.3.up_proj.weight"].dtype == "F8_E4M3"
    assert "mlp.experts.3.up_proj.weight_scale_inv" in layer
    assert dequantized.prediction_mixtures[0].saliency == mixture.saliency
    assert verify_checkpoint(tmp_path / "out", dense=source).num_equal


def saliency_by_hand(
    source: Path, hidden_states: Tensor, token_mask: Tensor, family: str
) -> Tensor:
    """REAP's saliency of each expert of the layer that predicts more tokens, as its formulas say it.

    `hidden_states` [batch, sequence, hidden] are those after the final norm of the pruned model, and `token_mask` is
    True for the tokens that count.
    """
    tensors = load_file(source / "model.safetensors")
    prefix = layer_prefix(family)
    model = AutoModelForCausalLM.from_pretrained(source)
    layer = model.model.layers[TEMPLATES[family]]
    names = {
        "deepseek_v3": ("enorm", "hnorm", "eh_proj"),
        "qwen3_next": ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc"),
    }[family]
    outer = "mtp." if family == "qwen3_next" else prefix
    embedding_norm, hidden_norm, projection = (tensors[f"{outer}{name}.weight"] for name in names)

    def weight(name: str) -> Tensor:
        return tensors[f"{prefix}{name}"]

    with torch.no_grad():
        for name, parameter in [*layer.named_parameters(), *layer.named_buffers()]:
            if ".experts." not in name:
                parameter.copy_(weight(name))
        gates = [weight(f"mlp.experts.{expert}.gate_proj.weight") for expert in range(8)]
        ups = [weight(f"mlp.experts.{expert}.up_proj.weight") for expert in range(8)]
        downs = [weight(f"mlp.experts.{expert}.down_proj.weight") for expert in range(8)]

        def norm(values: Tensor, scale: Tensor) -> Tensor:
            normalized = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + 1e-6)
            return normalized * (1 + scale if family == "qwen3_next" else scale)

        embeddings = model.get_input_embeddings()(TOKENS[:, 1:])
        both = [norm(embeddings, embedding_norm), norm(hidden_states[:, :-1], hidden_norm)]
        entering = nn.functional.linear(torch.cat(both, dim=-1), projection)

        routed = []
        layer.mlp.experts.register_forward_pre_hook(lambda _, arguments: routed.append(arguments))
        positions = torch.arange(entering.shape[1])[None]
        rotary = model.model.rotary_emb(entering, positions)
        layer(entering, position_embeddings=rotary, attention_mask=None)

    ((inputs, chosen, router_weights),) = routed
    norms = [[] for _ in range(8)]
    for token in token_mask[:, :-1].flatten().nonzero()[:, 0].tolist():
        for expert, router_weight in zip(
            chosen[token].tolist(), router_weights[token], strict=True
        ):
            middle = nn.functional.silu(gates[expert] @ inputs[token]) * (
                ups[expert] @ inputs[token]
            )
            norms[expert].append(float((router_weight * (downs[expert] @ middle)).norm()))
    return torch.tensor([sum(values) / max(1, len(values)) for values in norms])


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_next"])
def test_experts_are_chosen_on_the_next_tokens_and_the_hidden_states_of_the_pruned_model(
    tmp_path, family
):
    source = predicting_folder(tmp_path / "source", family)
    model = AutoModelForCausalLM.from_pretrained(source)
    mask = torch.ones_like(TOKENS)
    mask[5, 9:] = 0
    batches = [
        {"input_ids": ids, "attention_mask": real}
        for ids, real in zip(TOKENS.split(4), mask.split(4), strict=True)
    ]
    pruner = FistaPruner(FistaPruningConfig(**STORED, error_correction="full"), progress=False)

    report = pruner.prune(model, batches)

    (mixture,) = report.prediction_mixtures
    with torch.no_grad():
        hidden_states = model.model(TOKENS, attention_mask=mask).last_hidden_state
    has_next = mask.bool().clone()
    has_next[:, :-1] &= mask.bool()[:, 1:]
    expected = saliency_by_hand(source, hidden_states, has_next, family)
    assert torch.allclose(torch.tensor(mixture.saliency), expected, rtol=1e-3)
    best = expected.argsort(descending=True)[:4].sort().values.tolist()
    assert list(mixture.groups_kept) == best
    assert sum(mixture.expert_tokens) == 2 * int(has_next[:, :-1].sum())


def test_two_prediction_layers_follow_each_other_and_are_numbered_after_the_layers_that_stay(
    tmp_path,
):
    source = predicting_folder(tmp_path / "source", "glm4_moe", num_predicted=2)

    report = prune(source, tmp_path / "out", pattern="layers:0.34+experts:0.5")

    first, second = report.prediction_mixtures
    assert first.name == "model.layers.3.mlp.experts"
    assert second.name == "model.layers.4.mlp.experts"
    # of 8 sequences of 16 tokens, one and two tokens have none so far behind
    assert sum(first.expert_tokens) == 2 * 8 * 15
    assert sum(second.expert_tokens) == 2 * 8 * 14
    names = read_stored(tmp_path / "out").keys()
    for number in (2, 3):  # of three decoder layers, two are left
        assert f"model.layers.{number}.eh_proj.weight" in names
        assert f"model.layers.{number}.mlp.experts.3.up_proj.weight" in names
        assert f"model.layers.{number}.mlp.experts.4.up_proj.weight" not in names
    assert not any(name.startswith("model.layers.4.") for name in names)
    assert verify_checkpoint(tmp_path / "out", dense=source).num_equal


def test_a_removed_last_decoder_layer_is_no_input_of_the_prediction_layer(tmp_path, monkeypatch):
    source = predicting_folder(tmp_path / "source", "glm4_moe")
    monkeypatch.setattr(
        "optimum_fista.removal.parts_removal.layers_with_least_loss",
        lambda *_: [(NUM_LAYERS - 1, 1.0)],
    )

    report = prune(source, tmp_path / "out", pattern="layers:0.34+experts:0.5")
    of_memory = prune(source, tmp_path / "memory", "memory", pattern="layers:0.34+experts:0.5")

    assert report.model["layers_kept"] == [0, 1]
    (mixture,) = report.prediction_mixtures
    assert of_memory.prediction_mixtures[0].saliency == mixture.saliency
    assert f"model.layers.{NUM_LAYERS - 1}.mlp.experts.3.up_proj.weight" in read_stored(
        tmp_path / "out"
    )
    assert verify_checkpoint(tmp_path / "out", dense=source).num_equal


def test_a_prediction_layer_that_would_lose_more_than_experts_is_left_out(tmp_path):
    source = predicting_folder(tmp_path / "source", "glm4_moe")

    with pytest.warns(UserWarning, match=r"not in the pruned model: model\.layers\.3 "):
        report = prune(source, tmp_path / "out", pattern="heads:0.5+experts:0.5", method="wanda")

    assert not report.prediction_mixtures
    assert not module_of(tmp_path / "out", "model.layers.3.")


def test_a_prediction_layer_that_cannot_run_is_left_out_before_the_run(tmp_path, monkeypatch):
    source = predicting_folder(tmp_path / "source", "glm4_moe")

    def fail(*_, **__):
        raise ValueError("no such model")

    monkeypatch.setattr("optimum_fista.removal.prediction_experts.load_lazily", fail)
    sentence = r"model\.layers\.3 \(\d+ tensors: its experts can't be chosen.*no such model"
    with pytest.warns(UserWarning, match=sentence):
        report = prune(source, tmp_path / "out", **HALF)

    assert not report.prediction_mixtures
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0


@pytest.mark.filterwarnings("ignore")
def test_a_prediction_layer_with_damaged_weights_is_left_out_and_the_run_ends(tmp_path):
    source = predicting_folder(tmp_path / "source", "glm4_moe")
    tensors = load_file(source / "model.safetensors")
    tensors[f"{layer_prefix('glm4_moe')}hnorm.weight"][0] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})

    report = prune(source, tmp_path / "out", **HALF)

    assert report.prediction_mixtures == []
    (reason,) = report.model["lacks"].values()
    assert "its experts can't be chosen, because it can't be run (" in reason
    assert "mlp.experts return NaN or Inf" in reason
    assert module_of(tmp_path / "out", layer_prefix("glm4_moe")) == {}
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
def test_narrower_experts_leave_out_a_prediction_layer_that_stores_its_experts_otherwise(tmp_path):
    source = predicting_folder(tmp_path / "source", "qwen3_next")
    file = source / "model.safetensors"
    tensors = load_file(file)
    experts = "mtp.layers.0.mlp.experts."
    down = torch.stack([tensors[f"{experts}{number}.down_proj.weight"] for number in range(8)])
    tensors = {name: value for name, value in tensors.items() if not name.startswith(experts)}
    save_file(tensors | {f"{experts}down_proj": down}, file, {"format": "pt"})

    report = prune(source, tmp_path / "out", pattern="expert_channels:0.25")

    assert "parts that decoder layers lose" in report.model["lacks"]["mtp"]
    assert module_of(tmp_path / "out", "mtp.") == {}


def test_the_template_of_a_prediction_layer_has_most_of_its_parameters():
    """The last decoder layer is like the prediction layer, but has no indexer; the one before it has."""
    names = ["norm.weight", "indexer.weight"]
    state = {f"model.layers.{number}.{name}" for number in (0, 1) for name in names}
    state |= {"model.layers.2.norm.weight"}
    naming = SimpleNamespace(
        state=state,
        names_of=lambda name: SimpleNamespace(place=name),
        is_loaded=lambda name, place: place in state,
    )

    number, places = _template(names, naming, "model.layers", "model.layers.")

    assert number == 1
    assert places.keys() == set(names)


def test_verify_refuses_a_prediction_layer_with_other_experts_than_the_report_names(tmp_path):
    source = predicting_folder(tmp_path / "source", "glm4_moe")
    report = prune(source, tmp_path / "out", **HALF)
    file = tmp_path / "out" / "fista" / "report.json"
    values = json.loads(file.read_text())
    removed = sorted(set(range(8)) - set(report.prediction_mixtures[0].groups_kept))

    values["prediction_mixtures"][0]["groups_kept"] = removed
    file.write_text(json.dumps(values))

    with pytest.raises(VerificationError, match=r"model\.layers\.3\..* was not copied as it is"):
        verify_checkpoint(tmp_path / "out", dense=source)


@pytest.mark.parametrize("family", ["glm4_moe", "qwen3_next"])
def test_the_estimate_counts_the_tensors_that_stay_and_the_bytes_of_the_copy(tmp_path, family):
    source = predicting_folder(tmp_path / "source", family)
    config = FistaPruningConfig(**HALF)

    estimate = Estimate(source, config, calibration="text", sequence_length=16, device="cpu")
    report = prune(source, tmp_path / "out", **HALF)

    assert estimate.source.num_copied_by_module == report.model["copied"]
    assert estimate.prediction_experts == {f"{layer_prefix(family)}mlp.experts": (4, 8)}
    # Buffers of decoder layers are no parameters, and too small to count.
    of_layers = module_of(tmp_path / "out", "model.layers.")
    buffers = [
        tensor.num_bytes
        for name, tensor in of_layers.items()
        if name.endswith("e_score_correction_bias") and not name.startswith(f"{NUM_LAYERS}.")
    ]
    written = sum(tensor.num_bytes for tensor in read_stored(tmp_path / "out").values())
    assert estimate.disk_bytes["model"] == written - sum(buffers)
    layer = module_of(source, layer_prefix(family)).values()
    assert estimate.prediction_bytes > sum(tensor.num_bytes for tensor in layer) / 2


def test_the_result_can_lose_experts_of_its_prediction_layer_again(tmp_path):
    source = predicting_folder(tmp_path / "source", "qwen3_next")
    prune(source, tmp_path / "once", **HALF)

    report = prune(tmp_path / "once", tmp_path / "twice", **HALF)

    assert len(report.prediction_mixtures[0].groups_kept) == 2
    assert module_of(tmp_path / "twice", "mtp.")["layers.0.mlp.gate.weight"].shape == (2, HIDDEN)
    assert verify_checkpoint(tmp_path / "twice", dense=tmp_path / "once").num_equal

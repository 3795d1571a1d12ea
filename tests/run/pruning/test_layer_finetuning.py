"""Fine-tuning of decoder layers as a part of pruning: in memory, offloaded, from files, with experts."""

import dataclasses
import json

import pytest
import torch
from accelerate import cpu_offload
from any_moment import assert_same_files
from killed import interrupted_after
from pruning import hidden_states_of
from tiny_llama import tiny_llama, tiny_tokens
from tiny_models import FAMILIES, MOE_FAMILIES, tiny_model
from transformers import AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig, PruningReport
from optimum_fista.run.evaluation.verification import verify_checkpoint

OPTIONS = {"finetune": "layer", "finetune_steps": 12, "finetune_learning_rate": 3e-3}


def pruner(**options) -> FistaPruner:
    return FistaPruner(FistaPruningConfig(**OPTIONS | {"under_calibrated_tokens": 0} | options), progress=False)


def error_of(made: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((made - wanted).square().sum(-1) / wanted.square().sum(-1)).mean().sqrt())


@pytest.mark.parametrize("options", [{}, {"method": "wanda"}, {"pattern": "2:4", "error_correction": "full"}])
def test_hidden_states_get_nearer_to_those_of_the_dense_model(llama, tokens, options):
    wanted = hidden_states_of(llama, tokens)
    plain = tiny_llama()
    FistaPruner(FistaPruningConfig(**options), progress=False).prune(plain, tokens.split(2))
    prune = pruner(**options)
    report = prune.prune(llama, tokens.split(2))
    found = zip(hidden_states_of(llama, tokens), hidden_states_of(plain, tokens), wanted, report.layers, strict=True)
    for index, (made, other, target, layer) in enumerate(found):
        assert layer.finetuning.error == pytest.approx(error_of(made, target), rel=1e-3)
        assert layer.finetuning.error < layer.finetuning.error_before
        assert layer.finetuning.seconds < layer.seconds
        assert error_of(made, target) < error_of(other, target)
        if index == 0:
            assert layer.finetuning.error_before == pytest.approx(error_of(other, target), rel=1e-3)
    assert report.totals["num_zeros"] == sum(int((llama.get_parameter(o.name) == 0).sum()) for o in report.operators)


def test_independent_layers_aim_at_the_dense_network_too(llama, tokens):
    dense = tiny_llama()
    pruner(error_correction="intra").prune(llama, tokens.split(4))
    plain = tiny_llama()
    FistaPruner(FistaPruningConfig(error_correction="intra"), progress=False).prune(plain, tokens.split(4))
    wanted = hidden_states_of(dense, tokens)[0]
    assert error_of(hidden_states_of(llama, tokens)[0], wanted) < error_of(hidden_states_of(plain, tokens)[0], wanted)


@pytest.mark.parametrize("family", [*FAMILIES, *MOE_FAMILIES])
def test_families_keep_their_zeros_and_no_error_grows(family, tokens, tmp_path):
    model = tiny_model(family)
    prune = pruner()
    report = prune.prune(model, tokens.split(4))
    assert all(layer.finetuning.error <= layer.finetuning.error_before for layer in report.layers)
    assert sum(layer.finetuning.error for layer in report.layers) < sum(
        layer.finetuning.error_before for layer in report.layers
    )
    prune.save_pretrained(model, tmp_path / "out")
    assert verify_checkpoint(tmp_path / "out").num_zeros == report.totals["num_zeros"]
    saved = PruningReport.from_dict(json.loads((tmp_path / "out" / "fista" / "report.json").read_text()))
    assert saved.layers == report.layers


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_files_and_offloaded_models_become_what_the_model_becomes_in_memory(family, tokens, tmp_path):
    model, offloaded = tiny_model(family), tiny_model(family)
    model.save_pretrained(tmp_path / "in")
    pruner().prune(model, tokens.split(4))
    report = pruner().prune(tmp_path / "in", tokens.split(4), output_dir=tmp_path / "out")
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for (name, expected), found in zip(model.named_parameters(), streamed.parameters(), strict=True):
        assert torch.equal(expected, found), name
    assert all(layer.finetuning.error < layer.finetuning.error_before for layer in report.layers)
    cpu_offload(offloaded, execution_device=torch.device("cpu"), state_dict=offloaded.state_dict())
    pruner().prune(offloaded, tokens.split(4))
    with torch.no_grad():
        assert torch.equal(offloaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("options", [{}, {"error_correction": "intra"}])
def test_a_run_cut_off_goes_on_to_the_same_weights_and_numbers(tokens, tmp_path, options):
    tiny_llama(num_hidden_layers=3).to(torch.bfloat16).save_pretrained(tmp_path / "in")
    whole = pruner(**options).prune(tmp_path / "in", tokens.split(2), output_dir=tmp_path / "whole")
    with interrupted_after(0), pytest.raises(KeyboardInterrupt):
        pruner(**options).prune(tmp_path / "in", tokens.split(2), output_dir=tmp_path / "out")
    report = pruner(**options).prune(tmp_path / "in", tokens.split(2), output_dir=tmp_path / "out")
    assert_same_files(tmp_path / "out", tmp_path / "whole")
    for layer, expected in zip(report.layers, whole.layers, strict=True):
        assert layer.hidden_state_error == expected.hidden_state_error
        assert layer.finetuning == dataclasses.replace(expected.finetuning, seconds=layer.finetuning.seconds)


def test_a_run_that_fails_leaves_the_model_as_it_was(llama, tokens, monkeypatch):
    from optimum_fista.run.pruning import loop

    train, calls = loop.reconstruct, []

    def fail(*arguments, **options):
        calls.append(train(*arguments, **options))
        if len(calls) == 2:
            raise RuntimeError("here")
        return calls[-1]

    monkeypatch.setattr(loop, "reconstruct", fail)
    with pytest.raises(RuntimeError, match="here"):
        pruner().prune(llama, tokens.split(4))
    for (name, expected), found in zip(tiny_llama().named_parameters(), llama.parameters(), strict=True):
        assert torch.equal(expected, found), name
        assert found.requires_grad
        assert found.grad is None


def test_memory_that_runs_out_halves_the_batches(llama, monkeypatch):
    from optimum_fista.run.pruning import loop

    train, sizes = loop.reconstruct, []

    def scarce(activations, operators, masks, entering, *arguments, **options):
        sizes.append(entering[0].shape[0])
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("no room")
        return train(activations, operators, masks, entering, *arguments, **options)

    monkeypatch.setattr(loop, "reconstruct", scarce)
    with pytest.warns(UserWarning, match="out of memory in model.layers.0: batches of 2 sequences"):
        report = pruner().prune(llama, tiny_tokens().split(4))
    assert sizes == [4, 2, 2]
    assert len(report.operators) == 14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"finetune": "model"}, r"finetune='model': pass 'layer'"),
        ({"finetune_steps": 0}, r"finetune_steps=0: pass a whole number of at least 1"),
        ({"finetune_learning_rate": 0}, r"finetune_learning_rate=0: pass a number from"),
        ({"finetune_learning_rate": float("inf")}, r"finetune_learning_rate=inf: pass a number from"),
        ({"finetune_learning_rate": "fast"}, r"finetune_learning_rate='fast': pass a number"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FistaPruningConfig(**options)

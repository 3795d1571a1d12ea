"""What `FistaPruner` refuses, and that a model it could not prune is as it was."""

import math
import signal

import pytest
import torch
from tiny_llama import tiny_llama
from torch import nn
from untouched import Untouched

from optimum_fista import FistaPruner, FistaPruningConfig, PruningCallback
from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.solve.methods import METHODS

Wanda = METHODS["wanda"]


def refuse(model, batches, error=ValueError, match=None, **options) -> str:
    """Prune, expect the error and an untouched model; returns the message."""
    pruner = FistaPruner(FistaPruningConfig(**{"method": "wanda"} | options), progress=False)
    with Untouched(model), pytest.raises(error, match=match) as caught:
        pruner.prune(model, batches)
    with pytest.raises(ValueError, match="was not pruned by this FistaPruner"):
        pruner.save_pretrained(model, "never-written")
    return str(caught.value)


def test_an_error_of_the_loader_reaches_the_user(llama, tokens):
    def broken():
        yield tokens[:4]
        raise LookupError("no more data")

    refuse(llama, broken(), LookupError, "no more data")


def test_damaged_weights_are_refused_by_name(llama, tokens):
    llama.model.layers[1].mlp.up_proj.weight.data[3, 4] = math.nan

    refuse(
        llama, tokens.split(4), match=r"weight of model\.layers\.1\.mlp\.up_proj holds NaN or Inf"
    )


@pytest.mark.parametrize("error_correction", ["none", "intra", "full"])
@pytest.mark.parametrize("norm", ["input_layernorm", "post_attention_layernorm"])
def test_damaged_activations_of_the_last_layer_undo_the_layers_before(
    llama, tokens, norm, error_correction
):
    getattr(llama.model.layers[1], norm).weight.data.fill_(1e30)
    first = {"input_layernorm": "self_attn.q_proj", "post_attention_layernorm": "mlp.gate_proj"}[
        norm
    ]
    message = rf"inputs of model\.layers\.1\.{first} hold NaN or Inf"

    refuse(llama, tokens.split(4), match=message, error_correction=error_correction)


def test_outputs_that_overflow_give_a_warning(llama, tokens):
    """Weights that float32 holds, but not the squares of what they make."""
    llama.model.layers[1].mlp.down_proj.weight.data.fill_(1e30)

    with pytest.warns(
        UserWarning,
        match=r"errors of 1 operators are NaN or Inf \(model\.layers\.1\.mlp\.down_proj",
    ):
        report = FistaPruner(FistaPruningConfig(method="magnitude"), progress=False).prune(
            llama, tokens.split(4)
        )
    assert len([warning for warning in report.warnings if "NaN or Inf" in warning]) == 1


def test_a_quantized_model_is_refused(llama, tokens):
    llama.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    refuse(llama, tokens.split(4), match="quantized by 'gptq': prune the unquantized model")


def test_a_model_whose_weights_are_not_loaded_is_refused(tokens):
    with torch.device("meta"):
        model = tiny_llama()

    with pytest.raises(
        ValueError, match=r"model\.embed_tokens\.weight is not loaded \(device meta\)"
    ):
        FistaPruner(progress=False).prune(model, tokens.split(4))


def test_weights_of_integers_and_objects_that_are_no_models_are_refused(llama, tokens):
    layer = llama.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)

    refuse(llama, tokens.split(4), match=r"layers\.0\.mlp\.up_proj\.weight has dtype torch\.int8")

    with pytest.raises(
        ValueError, match=r"model is a Linear: pass a transformers\.PreTrainedModel"
    ):
        FistaPruner().prune(nn.Linear(4, 4), tokens.split(4))


def test_a_configuration_that_leaves_every_operator_dense_is_refused(llama, tokens):
    message = refuse(llama, tokens.split(4), UnsupportedArchitectureError, include=("*.experts.*",))

    assert "include=['*.experts.*']" in message
    assert "found 14, all left dense: model.layers.0.self_attn.q_proj (not in include), " in message


def test_a_pattern_that_does_not_divide_a_row_is_refused_before_any_work(tokens):
    model = tiny_llama(intermediate_size=44)  # 44 inputs of down_proj: 8 does not divide them

    refuse(
        model,
        tokens.split(4),
        pattern="2:8",
        match=r"layers\.0\.mlp\.down_proj has rows of 44 inputs, which 2:8",
    )


@pytest.mark.parametrize("fault", ["wrong count", "not finite"])
def test_a_method_that_breaks_its_promise_is_named(llama, tokens, monkeypatch, fault):
    def wrong(self, problem, pattern, original=Wanda.prune):
        result = original(self, problem, pattern)
        if problem.name.endswith("1.mlp.down_proj"):
            if fault == "wrong count":
                result.mask[0, :] = True
            else:
                result.weight[0, 0] = math.inf
        return result

    monkeypatch.setattr(Wanda, "prune", wrong)
    problem = {"wrong count": "keeps", "not finite": "weights hold NaN or Inf"}[fault]
    message = rf"method 'wanda' failed on model\.layers\.1\.mlp\.down_proj: .*{problem}"
    refuse(llama, tokens.split(4), RuntimeError, message)


def test_not_converged_operators_are_named_in_the_warnings(llama, tokens, monkeypatch):
    def stopped(self, problem, pattern, original=Wanda.prune):
        result = original(self, problem, pattern)
        if problem.name == "model.layers.1.mlp.up_proj":
            object.__setattr__(result, "converged", False)
            object.__setattr__(result, "message", "stopped early: try more")
        return result

    monkeypatch.setattr(Wanda, "prune", stopped)
    report = FistaPruner(FistaPruningConfig(method="wanda"), progress=False).prune(
        llama, tokens.split(4)
    )
    assert report.warnings == ["model.layers.1.mlp.up_proj.weight: stopped early: try more"]
    assert report.totals["num_not_converged"] == 1


class PressesCtrlC(PruningCallback):
    """Interrupts the run once an operator of the second decoder layer is pruned."""

    def on_operator_end(self, report):
        if report.name.startswith("model.layers.1."):
            raise KeyboardInterrupt


@pytest.mark.parametrize("pattern", ["unstructured", "channels:0.25", "layers:0.5+heads:0.5"])
def test_ctrl_c_during_a_layer_leaves_weights_hooks_and_config_as_they_were(pattern, tokens):
    model = tiny_llama(num_hidden_layers=4)
    handler = signal.getsignal(signal.SIGINT)
    config = FistaPruningConfig(pattern=pattern, method="wanda", error_correction="intra")
    pruner = FistaPruner(config, progress=False, callbacks=[PressesCtrlC()])

    with Untouched(model), pytest.raises(KeyboardInterrupt):
        pruner.prune(model, tokens.split(4))

    assert len(model.model.layers) == model.config.num_hidden_layers == 4
    assert signal.getsignal(signal.SIGINT) is handler
    with pytest.raises(ValueError, match="was not pruned by this FistaPruner"):
        pruner.result(model)

"""What can't be pruned, or not be saved then, is refused by name before anything is changed."""

import pruning
import pytest
import torch
from tiny_llama import tiny_llama, tiny_tokens
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from untouched import Untouched

from optimum_fista import FistaPruner, FistaPruningConfig

UP = "model.layers.1.mlp.up_proj"


def refused(model: nn.Module, **options) -> str:
    """The message of the ValueError that refuses the model; asserts that every weight is as it was."""
    with Untouched(model), pytest.raises(ValueError) as caught:
        FistaPruner(FistaPruningConfig(**options), progress=False).prune(
            model, tiny_tokens().split(4)
        )
    return str(caught.value)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        weight_norm,
        spectral_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda module: prune.l1_unstructured(module, "weight", 0.2),
    ],
)
def test_weights_that_are_computed_from_other_tensors_are_refused_unless_excluded(change):
    model = tiny_llama()
    change(model.get_submodule(UP))

    message = refused(model, method="wanda")

    assert message.startswith(f"the weight of {UP} is computed from other tensors (weight_norm, ")
    FistaPruner(FistaPruningConfig(method="wanda", exclude=(UP,)), progress=False).prune(
        model, tiny_tokens().split(4)
    )


@pytest.mark.parametrize("pattern", ["2:4", "channels:0.1"])
@pytest.mark.parametrize("prune_base", [True, False])
def test_a_model_with_an_adapter_is_refused_until_it_is_merged(prune_base, pattern):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["v_proj"]))

    message = refused(adapted.get_base_model() if prune_base else adapted, pattern=pattern)

    assert "layers.0.self_attn.v_proj has a PEFT adapter: prune the model first" in message
    merged = adapted.merge_and_unload()
    assert len(pruning.prune(merged, tiny_tokens().split(4), method="wanda").operators) == 14


# What the error says after the name of the compiled module.
IS_COMPILED = "is compiled (torch.compile): prune the model before it is compiled"


@pytest.mark.parametrize("pattern", ["2:4", "channels:0.1"])
def test_a_compiled_model_is_refused(pattern):
    compiled = torch.compile(tiny_llama())

    message = refused(compiled, pattern=pattern)

    assert message.startswith(f"model {IS_COMPILED}")


def test_a_compiled_layer_is_refused():
    model = tiny_llama()
    model.model.layers[1].compile()

    message = refused(model, method="wanda")

    assert message.startswith(f"model.model.layers.1 {IS_COMPILED}")


def test_a_compiled_forward_pass_of_a_module_is_refused():
    model = tiny_llama()
    mlp = model.model.layers[0].mlp
    mlp.forward = torch.compile(mlp.forward)

    message = refused(model, method="wanda")

    assert message.startswith(f"model.model.layers.0.mlp {IS_COMPILED}")


def tie(model):
    model.get_submodule(UP).weight = model.model.layers[0].mlp.up_proj.weight


def tie_to_embedding(model):
    model.model.layers[1].self_attn.q_proj.weight = nn.Parameter(
        model.model.embed_tokens.weight[:32].detach()
    )


def overlap(model):
    both = torch.randn(80, 32)
    model.get_submodule(UP).weight = nn.Parameter(both[:48])
    model.model.layers[1].mlp.gate_proj.weight = nn.Parameter(both[32:])


def overlap_beyond_a_tied_part(model):
    """In memory, the head is a part of the embedding, and ends before the weight of a layer begins."""
    both = model.model.embed_tokens.weight.detach()
    model.lm_head.weight = nn.Parameter(both[2:12])
    model.model.layers[1].self_attn.q_proj.weight = nn.Parameter(both[20:52])


@pytest.mark.parametrize("change", [tie, tie_to_embedding, overlap, overlap_beyond_a_tied_part])
def test_weights_that_share_memory_without_being_declared_tied_are_refused(change):
    model = tiny_llama(tie_word_embeddings=True)
    change(model)

    message = refused(model, method="wanda")

    assert "share memory, and LlamaForCausalLM does not declare them tied" in message


def test_parts_of_one_tensor_that_do_not_overlap_are_pruned():
    model = tiny_llama()
    both = torch.randn(96, 32)
    model.get_submodule(UP).weight = nn.Parameter(both[:48])
    model.model.layers[1].mlp.gate_proj.weight = nn.Parameter(both[48:])

    report = FistaPruner(FistaPruningConfig(method="wanda"), progress=False).prune(
        model, tiny_tokens().split(4)
    )

    assert len(report.operators) == 14
    assert float((both == 0).float().mean()) == 0.5


class Blind(torch.autograd.Function):
    """A copy that has no backward pass."""

    @staticmethod
    def forward(context, values):
        return values.clone()


@pytest.mark.parametrize("blind", [Blind.apply, torch.no_grad()(lambda values: values.clone())])
def test_a_model_without_gradients_is_refused_with_the_advice_to_allocate_uniformly(blind):
    model = tiny_llama()
    model.lm_head.register_forward_hook(lambda module, inputs, output: blind(output))

    message = refused(model)

    assert message.startswith(
        "allocation='fisher' takes gradients of the loss, and they can't be computed: "
    )
    assert message.endswith("pass allocation='uniform' (--allocation uniform).")
    config = FistaPruningConfig(allocation="uniform", method="wanda")
    assert FistaPruner(config, progress=False).prune(model, tiny_tokens().split(4)).operators

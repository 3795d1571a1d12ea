import pytest
import torch
from families import family_model, family_tokens, logits
from live_memory import LiveMemory
from tiny_models import VOCAB_SIZE, tiny_model
from transformers import AutoModelForCausalLM
from untouched import Untouched

from optimum_fista.model.architecture import UnsupportedArchitectureError, find_decoder_layers
from optimum_fista.model.calibration import read_batches
from optimum_fista.model.loss_gradients import DenseLoss
from optimum_fista.model.products import quick_products_in
from optimum_fista.model.stream_search import find_residual_stream
from optimum_fista.solve.patterns import NOfM
from optimum_fista.solve.rotation import Readers, Writers, random_rotation

PATTERN = NOfM(0.5, n=2, m=4)
# LayerNorm with biases, learned positions, Conv1D; RMSNorm that adds 1; one norm for attention and MLP; a head of its
# own with a bias; mixtures with routers, shared experts and biases; state spaces
ROTATED = ("llama", "qwen2", "qwen3", "gemma", "gpt2", "opt", "gpt_neox", "falcon", "phi", "cohere", "granite", "mamba")
MIXTURES = ("mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe")


def found_in(model):
    return find_residual_stream(model, family_tokens()[0])


def assert_close(found, expected):
    assert float((found - expected).norm() / expected.norm()) < 2e-5


@pytest.mark.parametrize("family", [*ROTATED, *MIXTURES])
def test_a_rotated_model_computes_the_same_and_is_loaded_as_any_other(family, tmp_path):
    model = family_model(family)
    dense, weights = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    stream = found_in(model)
    stream.move_gains()
    assert_close(logits(model), dense)
    assert len({float(norm.module.weight.detach().std()) for norm in stream.norms}) == 1  # they scale nothing
    stream.rotate(random_rotation(stream.size, 0, stream.keeps_mean))
    assert_close(logits(model), dense)
    embedding = model.get_input_embeddings().weight
    assert not torch.allclose(embedding, weights[next(n for n, p in model.named_parameters() if p is embedding)])
    model.save_pretrained(tmp_path)
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), dense)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("gemma2", r"no linear operator is called on the output of model\.layers\.0\.post_attention_layernorm"),
        ("bloom", r"no linear operator is called on the output of transformer\.word_embeddings_layernorm"),
        ("olmo", "its head is not called on the output of a norm"),
        ("lfm2", r"model\.layers\.0\.conv\.conv\.weight \[32, 1, 3\] is neither a norm nor an operator"),
        ("llama4_text", r".*feed_forward\.experts\.gate_up_proj .* is neither a norm nor an operator"),
        ("bart", r".*encoder_attn_layer_norm is called 0 times"),
        ("fuyu", r"model\.vision_embed_tokens is outside of its text decoder"),
    ],
)
def test_what_stands_between_the_stream_and_its_operators_is_refused(family, why):
    model = family_model(family)
    with Untouched(model), pytest.raises(UnsupportedArchitectureError, match=rf"can't be rotated: {why}"):
        found_in(model)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])  # as in GPT-OSS 20B
def test_experts_as_wide_as_the_stream(family):
    model = tiny_model(family, intermediate_size=32)
    dense, stream = logits(model), found_in(model)
    stream.move_gains()
    stream.rotate(random_rotation(stream.size, 0, stream.keeps_mean))
    assert_close(logits(model), dense)


def test_norms_of_another_kind_are_refused():
    model = tiny_model("llama")
    norm = model.model.layers[1].input_layernorm
    norm.forward = lambda x: x * norm.weight
    with pytest.raises(UnsupportedArchitectureError, match=r"layers\.1\.input_layernorm .* is neither an RMSNorm nor"):
        found_in(model)


def test_weights_that_operators_share_are_refused():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(UnsupportedArchitectureError, match=r"layers\.0\.mlp\.up_proj\.weight"):
        found_in(model)


def test_a_norm_with_a_bias_needs_a_gain():
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = 0
    with pytest.raises(UnsupportedArchitectureError, match=r"ln_f has a bias, and a gain of zero in front of it"):
        found_in(model)


def test_a_shared_head_gets_its_own_weight():
    model = tiny_model("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    dense, count = logits(model), model.num_parameters()
    stream = found_in(model)
    stream.move_gains()
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.num_parameters() == count + VOCAB_SIZE * 32
    assert not model.config.tie_word_embeddings
    assert not model.all_tied_weights_keys
    assert_close(logits(model), dense)


def watch(model, modules):
    """Inputs and gradients of the loss by the outputs, [tokens, in] and [tokens, out], of the first sequence."""
    seen = {module: [] for module in modules}
    for module, kept in seen.items():

        def keep(_, arguments, output, kept=kept):
            kept.append(arguments[0].detach().flatten(0, -2).double())
            output.register_hook(lambda gradient: kept.append(gradient.flatten(0, -2).double()))

        module.register_forward_hook(keep)
    ids = family_tokens()[0]
    scores = model(input_ids=ids, use_cache=False).logits[0, :-1]
    torch.nn.functional.cross_entropy(scores, ids[0, 1:], reduction="sum").backward()
    return seen


def energies(module, inputs):
    """`e_t` of `Sensitivity`, cut off at twice the median."""
    energy = inputs.square() @ module.weight.detach().double().square().sum(0)
    return energy.clamp(max=2 * energy.median())


def test_what_a_rotation_is_trained_on():
    model = tiny_model("llama")
    stream = found_in(model)
    stream.move_gains()
    batches = read_batches([family_tokens()[0]], VOCAB_SIZE)
    measured = stream.measure(DenseLoss(model, find_decoder_layers(model), batches, 32))
    assert [type(group) for group in measured] == [Readers] * 4 + [Writers] * 4  # without the head
    layer = model.model.layers[1]
    attention = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    seen = watch(model, [*attention, layer.mlp.down_proj])
    readers, writers = measured[2], measured[7]
    gram = seen[attention[0]][0].T @ seen[attention[0]][0]
    ridge = gram + torch.diag(gram.diagonal()) * 0.5
    torch.testing.assert_close(readers.inverse.double(), torch.linalg.inv(ridge), rtol=1e-3, atol=1e-6)
    for module, weight, costs in zip(attention, readers.weights, readers.output_weights, strict=True):
        inputs, gradient = seen[module]
        energy = energies(module, inputs)
        assert weight.data_ptr() == module.weight.data_ptr()
        expected = (energy @ gradient.square()) * (0.5 / energy.sum())
        torch.testing.assert_close(costs.double(), expected, rtol=1e-3, atol=1e-8)
    inputs, gradient = seen[layer.mlp.down_proj]
    expected = (gradient * energies(layer.mlp.down_proj, inputs)[:, None]).T @ gradient
    torch.testing.assert_close(writers.output_weights.double(), expected, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(writers.inputs[0].double(), inputs.square().mean(0), rtol=1e-3, atol=1e-6)


def test_measuring_holds_four_matrices_a_decoder_layer():
    peaks = []
    for layers in (2, 4):
        sizes = {"intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
        model = tiny_model("llama", hidden_size=256, num_hidden_layers=layers, **sizes)
        stream = found_in(model)
        stream.move_gains()
        batches = read_batches([family_tokens()[0]], VOCAB_SIZE)
        with LiveMemory() as memory:
            stream.measure(DenseLoss(model, find_decoder_layers(model), batches, 32))
        peaks.append(memory.peak / (2 * 256 * 256 * 4))
    assert 3.9 < peaks[1] - peaks[0] < 4.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_of_a_mixture_are_measured_together(family, dtype):
    model = tiny_model(family)
    stream = found_in(model)
    stream.move_gains()
    batches = read_batches([family_tokens()[0]], VOCAB_SIZE)
    with quick_products_in(dtype):
        measured = stream.measure(DenseLoss(model, find_decoder_layers(model), batches, 32))
    readers, writers = (
        [len(group.weights) for group in measured if isinstance(group, kind)] for kind in (Readers, Writers)
    )
    assert readers == [3, 8, 3, 8]  # gate and up of 4 experts, without the router
    assert sorted(writers) == [1, 1, 4, 4]
    assert all(bool(torch.isfinite(group.error(torch.eye(32), PATTERN))) for group in measured)


def test_gradients_that_are_not_finite_are_refused():
    model = tiny_model("llama")
    stream = found_in(model)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.inf)
    batches = read_batches([family_tokens()[0]], VOCAB_SIZE)
    with pytest.raises(ValueError, match=r"the gradients of the loss by the outputs of .* hold NaN or Inf"):
        stream.measure(DenseLoss(model, find_decoder_layers(model), batches, 32))

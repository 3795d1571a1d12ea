"""Every expert of a mixture loses channels of its own: what is left is an ordinary smaller model."""

import warnings

import pytest
import torch
from folder_files import files_of, tensors_of, with_changed_report
from killed import Killed, killed_at_write
from quantized_models import fp8_deepseek
from shrunken_models import assert_shrinks, parts_of
from tiny_llama import tiny_llama
from tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.estimate.estimate import Estimate
from optimum_fista.evaluate.verification import VerificationError, verify_checkpoint
from optimum_fista.model import UnsupportedArchitectureError

PATTERN = "expert_channels:0.25"
DEEPSEEK = {"first_k_dense_replace": 1, "n_shared_experts": 2}
FAMILIES = {
    "mixtral": {},
    "qwen3_moe": {},
    "deepseek_v3": DEEPSEEK,
    "gpt_oss": {},
    "llama4_text": {},
}
IDS = torch.randint(3, 64, (48, 32), generator=torch.Generator().manual_seed(1))
PROBE = IDS[:3]


def mixture(family, **options):
    """A tiny random mixture; that of DeepSeek-V3 has a dense layer, and a shared expert that is two experts wide."""
    return tiny_model(family, **FAMILIES[family] | options)


def prune(model, pattern=PATTERN, output=None, batches=None, **options):
    """Prune a model, in memory or from a folder to another; returns the pruner and its report."""
    pruner = FistaPruner(FistaPruningConfig(pattern=pattern, **options), progress=False)
    folder = {} if output is None else {"output_dir": output}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers without residual correction
        return pruner, pruner.prune(model, IDS.split(8) if batches is None else batches, **folder)


def logits(model):
    with torch.no_grad():
        return model(PROBE).logits


@pytest.mark.parametrize("family", [*FAMILIES])
def test_a_model_without_channels_computes_what_it_does_with_zeros_in_them(family, tmp_path):
    model = mixture(family)
    before = parts_of(model, "expert_channels").groups

    again = assert_shrinks(model, tmp_path / "smaller", expert_channels=before // 4)

    assert parts_of(again, "expert_channels").groups == before // 4


@pytest.mark.parametrize("family", [*FAMILIES])
def test_a_smaller_model_loads_in_transformers_and_is_that_of_a_streamed_run(family, tmp_path):
    model = mixture(family)
    model.save_pretrained(tmp_path / "dense")

    pruner, report = prune(model)
    pruner.save_pretrained(model, tmp_path / "smaller")
    _, streamed = prune(tmp_path / "dense", output=tmp_path / "streamed")

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")
    assert again.num_parameters() == model.num_parameters() == report.model["num_parameters"]
    assert torch.equal(logits(again), logits(model))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    assert streamed.totals["num_removed"] == report.totals["num_removed"] > 0
    for folder in ("smaller", "streamed"):
        verified = verify_checkpoint(tmp_path / folder, dense=tmp_path / "dense")
        assert verified.num_equal
        assert verified.removed


@pytest.mark.parametrize("method", ["obs_admm", "wanda"])
def test_experts_in_fp8_are_dequantized(tmp_path, method):
    # A quarter of 16 channels would not do: the grouped products of Transformers need rows of whole 16 bytes.
    source = fp8_deepseek(tmp_path / "source", n_shared_experts=2, moe_intermediate_size=32)

    prune(source, output=tmp_path / "smaller", method=method)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller", dtype="auto")
    dtypes = {tensor.dtype for tensor in tensors_of(tmp_path / "smaller").values()}
    assert torch.float8_e4m3fn not in dtypes
    assert model.dtype == torch.bfloat16
    assert model.config.moe_intermediate_size == 24
    assert verify_checkpoint(tmp_path / "smaller", dense=source).removed


def test_verify_finds_an_expert_that_the_report_lacks_and_channels_that_were_not_kept(tmp_path):
    mixture("qwen3_moe").save_pretrained(tmp_path / "dense")
    prune(tmp_path / "dense", output=tmp_path / "smaller")

    def forget(operator):
        operator.update(groups_kept=None, pattern="columns:12of12", target_sparsity=0.0)

    def exchange(operator):
        first_channels = list(range(12))
        last_channels = list(range(4, 16))
        has_first = operator["groups_kept"] == first_channels
        operator["groups_kept"] = last_channels if has_first else first_channels

    lacks = with_changed_report(tmp_path / "smaller", tmp_path / "lacks", forget)
    other = with_changed_report(tmp_path / "smaller", tmp_path / "other", exchange)

    with pytest.raises(VerificationError, match=r"which groups of .*experts\.0\.down_proj stay"):
        verify_checkpoint(lacks, dense=tmp_path / "dense")
    with pytest.raises(VerificationError, match="gate_up_proj differs from"):
        verify_checkpoint(other, dense=tmp_path / "dense")


def test_masks_of_an_earlier_run_are_cut_like_the_weights(tmp_path):
    mixture("qwen3_moe").save_pretrained(tmp_path / "dense")
    prune(tmp_path / "dense", "2:4", output=tmp_path / "sparse", method="wanda")

    _, report = prune(
        tmp_path / "sparse",
        output=tmp_path / "smaller",
        method="wanda",
        residual_correction=0,
    )

    gates = [entry for entry in report.carried if "experts.0.gate_proj" in entry.name]
    assert [entry.shape for entry in gates] == [(12, 32)] * 2
    assert [entry.pattern for entry in gates] == ["2:4"] * 2
    assert not report.lost_masks
    assert verify_checkpoint(tmp_path / "smaller", dense=tmp_path / "sparse").removed


def test_every_expert_keeps_as_many_channels_of_its_own():
    model = mixture("qwen3_moe")

    _, report = prune(model)

    kept = [operator.groups_kept for operator in report.operators]
    assert len(kept) == 2 * 4
    assert {len(channels) for channels in kept} == {12}
    assert len(set(kept)) > 1
    assert model.config.moe_intermediate_size == 12
    assert model.config.intermediate_size == 48
    assert report.model["parts_removed"] == ["4 of 16 channels of every expert (25.00%)"]
    reasons = {reason for name, reason in report.left_dense.items() if "up_proj" in name}
    assert all("loses the rows that" in reason for reason in reasons)


def test_channels_that_no_expert_uses_are_the_ones_removed_and_logits_stay():
    model = mixture("qwen3_moe")
    used = {}
    for layer in model.model.layers:
        down = layer.mlp.experts.down_proj.data
        for expert in range(4):
            idle = torch.arange(expert, 16, 4)
            down[expert][:, idle] = 0
            used[expert] = sorted(set(range(16)) - set(idle.tolist()))
    expected = logits(model)

    _, report = prune(model)

    for operator in report.operators:
        expert = int(operator.name.split(".experts.")[1].split(".")[0])
        assert list(operator.groups_kept) == used[expert], operator.name
    assert torch.allclose(logits(model), expected, atol=2e-4 * float(expected.abs().max()))


def test_a_shared_expert_of_the_same_number_loses_the_same_share_and_a_dense_mlp_nothing():
    model = mixture("deepseek_v3")

    _, report = prune(model)

    of_shared = [operator for operator in report.operators if "shared" in operator.name]
    assert [len(operator.groups_kept) for operator in of_shared] == [24]
    assert model.model.layers[1].mlp.shared_experts.up_proj.weight.shape == (24, 32)
    assert model.model.layers[0].mlp.up_proj.weight.shape == (48, 32)
    assert model.config.moe_intermediate_size == 12


def test_channels_of_dense_mlps_and_of_experts_go_in_one_run(tmp_path):
    model = mixture("deepseek_v3")
    model.save_pretrained(tmp_path / "dense")

    pruner, _ = prune(model, "channels:0.5/4+expert_channels:0.25+layers:0.5+heads:0.5")
    pruner.save_pretrained(model, tmp_path / "smaller")

    assert model.config.intermediate_size == 24
    assert model.config.moe_intermediate_size == 12
    assert verify_checkpoint(tmp_path / "smaller", dense=tmp_path / "dense").removed


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path):
    mixture("deepseek_v3", num_hidden_layers=4).save_pretrained(tmp_path / "dense")
    prune(tmp_path / "dense", output=tmp_path / "whole")

    with pytest.raises(Killed), killed_at_write(14):
        prune(tmp_path / "dense", output=tmp_path / "again")
    finished = list((tmp_path / "again.unfinished" / "journal").glob("layer-*.json"))
    prune(tmp_path / "dense", output=tmp_path / "again")

    assert 0 < len(finished) < 4
    assert files_of(tmp_path / "again") == files_of(tmp_path / "whole")


def test_experts_with_few_tokens_lose_channels_by_magnitude_and_a_warning_says_so():
    model = mixture("qwen3_moe")

    _, report = prune(model, batches=[IDS[:1]])

    assert {operator.method for operator in report.operators} == {"magnitude"}
    assert {len(operator.groups_kept) for operator in report.operators} == {12}
    assert any("pruned by magnitude" in text for text in report.warnings)


def test_an_estimate_has_the_operators_and_numbers_of_the_run():
    model = mixture("deepseek_v3")

    config = FistaPruningConfig(pattern=PATTERN)
    estimate = Estimate(model.config, config, num_samples=48, sequence_length=32, device="cpu")
    _, report = prune(model)

    assert {*estimate.operators} == {
        operator.name.removesuffix(".weight") for operator in report.operators
    }
    assert estimate.num_removed == report.totals["num_removed"]
    assert sum(estimate.weights.values()) - sum(estimate.zeros.values()) == sum(
        operator.num_kept for operator in report.operators
    )
    assert [str(parts) for parts in estimate.removed_parts] == report.model["parts_removed"]


@pytest.mark.usefixtures("fails_at_the_end")
def test_a_failure_leaves_the_model_as_it_was():
    model = mixture("deepseek_v3")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config

    with pytest.raises(KeyboardInterrupt):
        prune(model)

    assert model.config is config
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_experts_whose_channels_depend_on_each_other_are_refused():
    model = mixture("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.act_fn = nn.Softmax(dim=-1)

    with pytest.raises(UnsupportedArchitectureError, match="does not return the same without"):
        prune(model)


def test_a_smaller_mixture_that_computes_its_experts_otherwise_is_refused(monkeypatch):
    model = mixture("mixtral")
    experts_class = type(model.model.layers[0].mlp.experts)
    forward = experts_class.forward

    def depends_on_size(self, hidden_states, top_k_index, top_k_weights):
        outputs = forward(self, hidden_states, top_k_index, top_k_weights)
        return outputs if self.down_proj.shape[2] == 48 else 2 * outputs

    monkeypatch.setattr(experts_class, "forward", depends_on_size)

    with pytest.raises(UnsupportedArchitectureError, match="computes its experts in an unknown"):
        prune(model)


def test_a_number_of_channels_for_which_transformers_has_no_products_is_refused():
    model = mixture("deepseek_v3").bfloat16()

    with pytest.raises(
        UnsupportedArchitectureError,
        match="does not run without the removed groups: strides should be multiple of 16 bytes",
    ):
        prune(model)


def test_a_model_without_experts_is_refused():
    with pytest.raises(
        UnsupportedArchitectureError, match="no matrix of an expert changes with intermediate_size"
    ):
        prune(tiny_llama())


def outputs_of_mixture(model, inputs):
    """What the first mixture returns for hidden states [tokens, hidden], and how the router weights its experts."""
    block = model.model.layers[0].mlp
    with torch.no_grad():
        _, weights, chosen = block.gate(inputs)
        return block.experts(inputs, chosen, weights), weights, chosen


def cut_by_activations(model, inputs, num_kept):
    """Outputs [tokens, hidden] if each expert keeps its channels of the largest activations, in a plain loop."""
    experts = model.model.layers[0].mlp.experts
    whole, weights, chosen = outputs_of_mixture(model, inputs)
    outputs = torch.zeros_like(whole)
    with torch.no_grad():
        for expert in range(4):
            tokens, places = (chosen == expert).nonzero(as_tuple=True)
            gate, up = (inputs[tokens] @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
            channels = nn.functional.silu(gate) * up
            kept = channels.norm(dim=0).argsort(descending=True)[:num_kept]
            of_expert = channels[:, kept] @ experts.down_proj[expert][:, kept].T
            outputs[tokens] += weights[tokens, places, None] * of_expert
    return outputs


def test_the_error_is_smaller_than_that_of_a_cut_by_the_norms_of_activations():
    model = mixture("mixtral", num_hidden_layers=1)
    generator = torch.Generator().manual_seed(2)
    # Embeddings in a subspace of half of the dimensions: channels are correlated.
    factors = torch.randn(64, 16, generator=generator) @ torch.randn(16, 32, generator=generator)
    model.model.embed_tokens.weight.data.copy_(factors)
    inputs = []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(
        lambda _, arguments: inputs.append(arguments[0].flatten(0, 1))
    )
    with torch.no_grad():
        model(IDS)
    handle.remove()
    expected, _, _ = outputs_of_mixture(model, inputs[0])
    cut = cut_by_activations(model, inputs[0], num_kept=36)

    prune(model, error_correction="none")

    pruned, _, _ = outputs_of_mixture(model, inputs[0])
    assert (pruned - expected).norm() < 0.7 * (cut - expected).norm()

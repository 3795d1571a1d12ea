import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_llama import tiny_llama
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig, PruningReport
from optimum_fista.solve.methods import METHODS


def prune(model, batches, **options) -> PruningReport:
    return FistaPruner(FistaPruningConfig(**options), progress=False).prune(model, batches)


def weights(model) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def inputs_of(model, tokens: Tensor) -> dict[str, Tensor]:
    """Input [tokens, in] of every linear operator, by the name of its weight."""
    seen, handles = {}, []
    for name, module in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, nn.Linear):
            hook = lambda _, args, name=name: seen.update({f"{name}.weight": args[0].flatten(0, 1).float()})  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return seen


def error_of(pruned: Tensor, dense: Tensor, inputs: Tensor, dense_inputs: Tensor) -> float:
    wanted = dense_inputs.double() @ dense.double().T
    return float((inputs.double() @ pruned.double().T - wanted).norm() / wanted.norm())


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    settings = {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**settings, initializer_range=0.2, bos_token_id=1, eos_token_id=2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1:4"])
def test_every_method_makes_exactly_the_zeros_of_the_pattern(llama, tokens, method, pattern):
    report = prune(llama, tokens.split(4), method=method, pattern=pattern, allocation="uniform")
    parameters = dict(llama.named_parameters())
    assert len(report.operators) == 14
    for operator in report.operators:
        nonzero = parameters[operator.name] != 0
        rows, columns = operator.shape
        assert operator.shape == nonzero.shape
        if pattern == "unstructured":
            assert int(nonzero.sum()) == rows * columns // 2
            if METHODS[method].defaults.scope == "row":
                assert set(nonzero.sum(1).tolist()) == {columns // 2}
        else:
            kept = int(pattern[0])
            assert set(nonzero.view(rows, -1, 4).sum(-1).unique().tolist()) == {kept}
        assert operator.num_kept == int(nonzero.sum())
        assert operator.sparsity == 1 - operator.num_kept / nonzero.numel()
        assert 0 < operator.relative_error < 1.2
        assert operator.num_tokens == 128
    assert report.totals["num_zeros"] == sum(int((parameters[o.name] == 0).sum()) for o in report.operators)


def test_overrides_by_name(llama, tokens):
    overrides = {"*.down_proj": "1:4", "*.0.*.q_proj": 0, "*.v_proj": 0.25}
    dense = weights(llama)
    report = prune(llama, tokens.split(4), sparsity=0.75, method="wanda", overrides=overrides)
    sparsity = {name: float((p == 0).double().mean()) for name, p in llama.named_parameters() if p.ndim == 2}
    assert sparsity.pop("model.layers.0.self_attn.q_proj.weight") == 0
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        sparsity.pop(name)
    for name, value in sparsity.items():
        assert value == (0.25 if "v_proj" in name else 0.75)
    down = llama.model.layers[1].mlp.down_proj.weight
    assert bool(((down != 0).view(32, -1, 4).sum(-1) == 1).all())
    assert report.left_dense == {"model.layers.0.self_attn.q_proj": "sparsity 0"}
    assert torch.equal(llama.model.layers[0].self_attn.q_proj.weight, dense["model.layers.0.self_attn.q_proj.weight"])


def test_include_and_exclude(llama, tokens):
    report = prune(llama, tokens.split(4), method="wanda", include=("*.mlp.*",), exclude=("*.1.mlp.up_proj",))
    pruned = {name for name, p in llama.named_parameters() if bool((p == 0).any()) and p.ndim == 2}
    pruned.remove("model.embed_tokens.weight")  # its row of the padding token
    assert pruned == {o.name for o in report.operators}
    assert len(pruned) == 5
    assert all(".mlp." in name for name in pruned)
    assert report.left_dense["model.layers.1.mlp.up_proj"] == "exclude"
    assert report.left_dense["model.layers.0.self_attn.q_proj"] == "not in include"
    assert len(report.left_dense) == 9


def test_everything_but_the_operators_is_bit_identical(llama, tokens):
    dense = weights(llama)
    report = prune(llama, tokens.split(4))
    pruned = weights(llama)
    changed = {name for name in dense if not torch.equal(dense[name], pruned[name])}
    assert changed == {o.name for o in report.operators}


def test_tied_weights_stay_tied_and_dense(tokens):
    model = tiny_llama(tie_word_embeddings=True)
    dense = model.lm_head.weight.detach().clone()
    prune(model, tokens.split(4), method="wanda")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, dense)


def test_conv1d_is_pruned_along_its_inputs(tokens):
    model = gpt2()
    report = prune(model, tokens.split(4), method="wanda", pattern="2:4")
    assert len(report.operators) == 8
    parameters = dict(model.named_parameters())
    for operator in report.operators:
        stored = parameters[operator.name]
        assert operator.stored_transposed
        assert operator.shape == tuple(stored.T.shape)
        assert bool(((stored.T != 0).reshape(stored.shape[1], -1, 4).sum(-1) == 2).all())


@pytest.mark.parametrize("error_correction", ["none", "intra", "full", 0.0, 0.25, 1.0])
@pytest.mark.parametrize("method", ["wanda", "fista"])
def test_errors_are_those_of_the_inputs_that_the_correction_promises(tokens, error_correction, method):
    dense, pruned = tiny_llama(), tiny_llama()
    report = prune(pruned, tokens.split(4), method=method, error_correction=error_correction)
    dense_inputs = inputs_of(dense, tokens)
    inputs = dict(dense_inputs) if error_correction == "none" else inputs_of(pruned, tokens)
    if error_correction == "intra":  # one decoder layer is pruned, the others are dense
        for index, layer in enumerate(pruned.model.layers):
            mixed = tiny_llama()
            mixed.model.layers[index] = layer
            seen = inputs_of(mixed, tokens)
            inputs |= {name: value for name, value in seen.items() if name.startswith(f"model.layers.{index}.")}
    dense_weights, pruned_weights = weights(dense), weights(pruned)
    for operator in report.operators:
        name = operator.name
        share = error_correction if isinstance(error_correction, float) else 1.0
        wanted = share * dense_inputs[name] + (1 - share) * inputs[name]
        expected = error_of(pruned_weights[name], dense_weights[name], inputs[name], wanted)
        assert operator.relative_error == pytest.approx(expected, rel=1e-4), name


def test_error_corrections_differ_where_they_should(tokens):
    results = {}
    for error_correction in ("none", "intra", "full"):
        model = tiny_llama()
        prune(model, tokens.split(4), error_correction=error_correction)
        results[error_correction] = weights(model)
    query, output = "model.layers.{}.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"
    for index in (0, 1):  # the first group of a layer sees dense inputs with "intra"
        assert torch.equal(results["none"][query.format(index)], results["intra"][query.format(index)])
    assert not torch.equal(results["none"][output], results["intra"][output])
    assert torch.equal(results["intra"][output] != 0, results["full"][output] != 0)
    assert not torch.equal(results["intra"][query.format(1)], results["full"][query.format(1)])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("error_correction", ["none", "intra", "full"])
def test_padding_counts_nowhere(tokens, side, error_correction):
    short, long = tokens[:, :10], tokens.flip(0)
    padding = torch.full((8, 6), 5)
    ones, zeros = torch.ones_like(short), torch.zeros_like(padding)
    order = (padding, short) if side == "left" else (short, padding)
    mask = torch.cat((zeros, ones) if side == "left" else (ones, zeros), dim=1)
    padded_batches = [
        {
            "input_ids": torch.cat([torch.cat(order, dim=1), long]),
            "attention_mask": torch.cat([mask, torch.ones_like(long)]),
        }
    ]
    options = {"error_correction": error_correction, "method": "sparsegpt"}
    padded = prune(tiny_llama(), padded_batches, **options)
    plain = prune(tiny_llama(), [short, long], **options)
    assert padded.calibration == plain.calibration
    assert padded.calibration["num_tokens"] == 8 * 10 + 8 * 16
    assert padded.calibration["num_sequences"] == 16
    for left, right in zip(padded.operators, plain.operators, strict=True):
        assert left.num_tokens == right.num_tokens == 208
        assert left.relative_error == pytest.approx(right.relative_error, rel=1e-3)


def test_every_kind_of_loader_gives_the_same_bits(tokens):
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    loaders = [
        tokens.split(2),
        list(DataLoader(rows, batch_size=2)),
        DataLoader(rows, batch_size=2),
        (batch for batch in tokens.split(2)),
        [batch.tolist() for batch in tokens.split(2)],
    ]
    results = []
    for loader in loaders:
        model = tiny_llama()
        report = prune(model, loader, method="wanda")
        results.append((weights(model), report.calibration))
    for values, calibration in results[1:]:
        assert same(values, results[0][0])
        assert calibration == results[0][1]


def test_batch_size_hardly_matters(tokens):
    errors = []
    for batch_size in (1, 3, 8):
        report = prune(tiny_llama(), tokens.split(batch_size), method="sparsegpt")
        errors.append(torch.tensor([o.relative_error for o in report.operators]))
    assert torch.allclose(errors[0], errors[1], rtol=1e-4, atol=0)
    assert torch.allclose(errors[0], errors[2], rtol=1e-4, atol=0)


def test_same_input_same_bits(tokens):
    results = []
    for _ in range(2):
        model = tiny_llama()
        report = prune(model, tokens.split(4))
        results.append((weights(model), [o.relative_error for o in report.operators]))
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("settings", [{}, {"method": "wanda", "error_correction": "intra"}, {"pattern": "2:4"}])
def test_activations_may_wait_elsewhere(tokens, tmp_path, settings):
    results = []
    for storage_device in (None, "cpu", torch.device("cpu"), "disk", str(tmp_path), tmp_path):
        model = tiny_llama()
        config = FistaPruningConfig(**settings)
        FistaPruner(config, progress=False, storage_device=storage_device).prune(model, tokens.split(4))
        results.append(weights(model))
        assert not [*tmp_path.iterdir()]
    assert all(same(results[0], result) for result in results[1:])


@pytest.mark.parametrize("place", ["moon", Path("no/such/folder")])
def test_places_that_are_none(tokens, place):
    pruner = FistaPruner(progress=False, storage_device=place)
    with pytest.raises(ValueError, match=f"storage_device='{place}': pass a device such as 'cpu', 'disk', or a folder"):
        pruner.prune(tiny_llama(), tokens.split(4))


def test_bfloat16_errors_are_those_of_the_rounded_weights(tokens):
    # SparseGPT moves every weight, and at 2% zeros rounding them makes most of the error.
    dense, model = tiny_llama().bfloat16(), tiny_llama().bfloat16()
    report = prune(model, tokens.split(8), method="sparsegpt", sparsity=0.02, error_correction="none")
    inputs = inputs_of(dense, tokens)
    dense_weights, pruned_weights = weights(dense), weights(model)
    for operator in report.operators:
        name = operator.name
        assert pruned_weights[name].dtype == torch.bfloat16
        expected = error_of(pruned_weights[name], dense_weights[name], inputs[name], inputs[name])
        assert operator.relative_error == pytest.approx(expected, rel=1e-2), name


def test_modes_of_all_modules_are_kept(llama, tokens):
    llama.train()
    llama.model.layers[1].mlp.eval()
    before = {name: module.training for name, module in llama.named_modules()}
    prune(llama, tokens.split(4), method="wanda")
    assert {name: module.training for name, module in llama.named_modules()} == before
    llama.eval()
    prune(llama, tokens.split(4), method="wanda")
    assert not any(module.training for module in llama.modules())


def test_dropout_is_off_while_pruning(tokens):
    results = []
    for training in (False, True):
        model = tiny_llama(attention_dropout=0.5).train(training)
        prune(model, tokens.split(4), method="wanda")
        results.append(weights(model))
    assert same(*results)


def test_model_is_left_without_hooks_and_gradients(llama, tokens):
    forwards = {name: module.forward for name, module in llama.named_modules()}
    prune(llama, tokens.split(4), error_correction="full")
    for name, module in llama.named_modules():
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
        assert module.forward == forwards[name], name
    assert all(p.requires_grad and p.grad is None for p in llama.parameters())
    llama(input_ids=tokens[:1], labels=tokens[:1]).loss.backward()


@pytest.mark.parametrize("method", METHODS)
def test_global_random_states_are_untouched(llama, tokens, method):
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    prune(llama, tokens.split(4), method=method)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))
    assert random.getstate() == before[2]


def test_too_few_tokens_are_warned_about_once(llama, tokens):
    with pytest.warns(
        UserWarning, match=r"32 calibration tokens for the 48 inputs of .*down_proj.*rank-deficient"
    ) as seen:
        report = prune(llama, tokens[:2], method="wanda")
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert report.warnings == [str(seen[0].message)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prune(tiny_llama(), tokens, method="wanda").warnings == []


def test_report_describes_the_run(llama, tokens):
    pruner = FistaPruner(FistaPruningConfig(pattern="2:4", seed=5), progress=False)
    report = pruner.prune(llama, tokens.split(4), calibration_source="pydoc")
    assert report.config == pruner.config.resolved().to_dict()
    assert report.model["class"] == "LlamaForCausalLM"
    assert report.model["model_type"] == "llama"
    assert report.model["dtype"] == "float32"
    assert report.model["num_parameters"] == sum(p.numel() for p in llama.parameters())
    assert report.calibration["source"] == "pydoc"
    assert report.calibration["num_sequences"] == 8
    assert report.calibration["num_tokens"] == 128
    assert 0 < report.totals["solve_seconds"] <= report.seconds["total"]
    names = [o.name for o in report.operators]
    assert names[0] == "model.layers.0.self_attn.q_proj.weight"
    assert names[3] == "model.layers.0.self_attn.o_proj.weight"
    assert names[-1] == "model.layers.1.mlp.down_proj.weight"
    assert all(o.iterations > 0 for o in report.operators)


def test_progress_bar_can_be_switched_off(llama, tokens, capsys):
    prune(llama, tokens.split(4), method="wanda")
    assert capsys.readouterr().err == ""
    FistaPruner(FistaPruningConfig(method="wanda")).prune(tiny_llama(), tokens.split(4))
    shown = capsys.readouterr().err
    assert "14/14" in shown
    assert "layer 2/2 mlp.down_proj" in shown


def test_patterns_that_match_nothing_are_named(llama, tokens):
    with pytest.warns(UserWarning, match=r"exclude: 'lm_head', '\*\.weight' matches no linear operator"):
        report = prune(llama, tokens.split(4), method="wanda", exclude=("*.q_proj", "lm_head", "*.weight"))
    assert len(report.operators) == 12
    assert [message.split(" ")[0] for message in report.warnings] == ["exclude:"]


def test_attention_of_a_model_with_fused_experts_can_be_pruned(tokens):
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    config = MixtralConfig(**settings, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2)
    model = MixtralForCausalLM(config)
    report = prune(model, tokens.split(4), method="wanda", exclude=("*.experts",))
    assert len(report.operators) == 8
    assert all("self_attn" in o.name for o in report.operators)
    assert report.left_dense == {f"model.layers.{i}.mlp.experts": "exclude" for i in range(2)}


def test_nothing_runs_behind_the_last_layer_with_something_to_prune(llama, tokens, monkeypatch):
    calls = []
    monkeypatch.setattr(llama.model.layers[1].mlp, "forward", lambda *args: calls.append(args))
    config = FistaPruningConfig(method="wanda", include=["*.layers.0.*"])
    assert len(FistaPruner(config, progress=False).prune(llama, tokens.split(4)).operators) == 7
    assert calls == []

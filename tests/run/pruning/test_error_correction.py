import pytest
import torch
from pruning import error_of, inputs_of, inputs_seen, prune, weights
from tiny_llama import tiny_llama


@pytest.mark.parametrize("error_correction", ["none", "intra", "full", 0.0, 0.25, 1.0])
@pytest.mark.parametrize("method", ["wanda", "fista"])
def test_errors_are_those_of_the_inputs_that_the_correction_promises(tokens, error_correction, method):
    dense, pruned = tiny_llama(), tiny_llama()
    report = prune(pruned, tokens.split(4), method=method, error_correction=error_correction)
    dense_inputs, inputs = inputs_seen(pruned, tokens, error_correction)
    dense_weights, pruned_weights = weights(dense), weights(pruned)
    for operator in report.operators:
        name = operator.name
        share = error_correction if isinstance(error_correction, float) else 1.0
        wanted = share * dense_inputs[name] + (1 - share) * inputs[name]
        expected = error_of(pruned_weights[name], dense_weights[name], inputs[name], wanted)
        assert operator.fit_error == pytest.approx(expected, rel=1e-4), name
        if error_correction == 0:
            assert operator.output_error is None, "the dense network did not run"
        else:
            expected = error_of(pruned_weights[name], dense_weights[name], inputs[name], dense_inputs[name])
            assert operator.output_error == pytest.approx(expected, rel=1e-4), name


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
        assert operator.fit_error == pytest.approx(expected, rel=1e-2), name

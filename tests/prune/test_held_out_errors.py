"""Sequences held out of the calibration: measured, and nothing is fitted to them."""

import pytest
import torch
from pruning import error_of, hidden_states_of, inputs_of, inputs_seen, prune, same, weights
from tiny_llama import tiny_llama
from tiny_models import VOCAB_SIZE, tiny_model


@pytest.mark.parametrize("error_correction", ["none", "intra", "full", 0.0, 0.25, 1.0])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_reported_errors_are_those_of_the_inputs_that_the_correction_aims_at(
    tokens, error_correction, method
):
    model = tiny_llama()
    report = prune(
        model, tokens.split(4), method=method, error_correction=error_correction, held_out=3
    )
    share = error_correction if isinstance(error_correction, float) else 1.0

    dense_weights = weights(tiny_llama())
    pruned_weights = weights(model)

    for prefix, rows in (("", tokens[:5]), ("held_out_", tokens[5:])):
        dense_inputs, inputs = inputs_seen(model, rows, error_correction)
        for operator in report.operators:
            name = operator.name
            wanted = share * dense_inputs[name] + (1 - share) * inputs[name]
            expected = error_of(pruned_weights[name], dense_weights[name], inputs[name], wanted)
            assert getattr(operator, f"{prefix}fit_error") == pytest.approx(expected, rel=1e-4), (
                name
            )
            expected = error_of(
                pruned_weights[name], dense_weights[name], inputs[name], dense_inputs[name]
            )
            found = getattr(operator, f"{prefix}output_error")
            assert found == (
                None if error_correction == 0 else pytest.approx(expected, rel=1e-4)
            ), name
            assert (operator.num_tokens, operator.held_out_tokens) == (5 * 16, 3 * 16)

    if method == "sparsegpt":  # has fitted 32 to 48 weights an output to 80 tokens
        assert report.totals["held_out_ratio"] > 1.1


def down_projection_and_rest(model, tokens, layer):
    """Inputs [tokens, in] and outputs of a down projection, and the hidden states after its layer without it."""
    seen = {}
    projection = model.model.layers[layer].mlp.down_proj
    with projection.register_forward_hook(
        lambda _, args, output: seen.update(inputs=args[0], own=output)
    ):
        seen["after"] = hidden_states_of(model, tokens)[layer]
    flat = {name: value.reshape(-1, value.shape[-1]).double() for name, value in seen.items()}
    return flat["inputs"], flat["own"], flat["after"] - flat["own"]


@pytest.mark.parametrize(("share", "residual"), [(1.0, 1.0), (0.5, 0.75), (0.0, 1.0)])
def test_residual_correction_aims_at_the_output_of_the_layer(tokens, share, residual):
    dense = tiny_llama()
    pruned = tiny_llama()
    options = {"method": "sparsegpt", "error_correction": share, "residual_correction": residual}

    report = prune(pruned, tokens.split(2), held_out=2, **options)

    for layer in range(2):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        inputs, own, rest = down_projection_and_rest(pruned, tokens[6:], layer)
        _, dense_own, dense_rest = down_projection_and_rest(dense, tokens[6:], layer)
        remade = inputs @ dense.get_parameter(name).detach().double().T
        wanted = share * dense_own + (1 - share) * remade - residual * (rest - dense_rest)
        (operator,) = [o for o in report.operators if o.name == name]
        expected = float((own - wanted).norm() / wanted.norm())
        assert operator.held_out_fit_error == pytest.approx(expected, rel=1e-4)
        expected = float((own - dense_own).norm() / dense_own.norm())
        assert operator.held_out_output_error == pytest.approx(expected, rel=1e-4)
        inputs, own, _ = down_projection_and_rest(pruned, tokens[:6], layer)
        _, dense_own, _ = down_projection_and_rest(dense, tokens[:6], layer)
        assert operator.output_error == pytest.approx(
            float((own - dense_own).norm() / dense_own.norm()), rel=1e-4
        )
        (query,) = [
            o for o in report.operators if o.name == f"model.layers.{layer}.self_attn.o_proj.weight"
        ]
        found, wanted = (inputs_of(model, tokens[:6])[query.name] for model in (pruned, dense))
        expected = error_of(
            pruned.get_parameter(query.name), dense.get_parameter(query.name), found, wanted
        )
        assert query.output_error == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "alps", "error_correction": "full"},
        {"method": "wanda", "error_correction": "intra"},
        {"method": "sparsegpt", "error_correction": "none", "pattern": "2:4"},
        {"method": "fista", "error_correction": 0.0},
    ],
    ids=lambda options: options.get("method", "default"),
)
def test_sequences_that_are_held_out_change_no_weight_and_no_calibration_error(tokens, options):
    alone = tiny_llama()
    model = tiny_llama()
    other = tiny_llama()
    expected = prune(alone, [tokens[:4], tokens[4:6]], **options)
    report = prune(model, tokens.split(4), held_out=2, **options)

    with_others = prune(
        other, [tokens[:4], tokens[4:6], tokens[:1], tokens[1:2]], held_out=2, **options
    )

    for run, result in ((report, model), (with_others, other)):
        assert same(weights(result), weights(alone))
        for found, wanted in zip(run.operators, expected.operators, strict=True):
            assert found.fit_error == wanted.fit_error
            assert found.num_tokens == wanted.num_tokens
            assert wanted.held_out_fit_error is None
        errors = [layer.hidden_state_error for layer in run.layers]
        assert errors == [layer.hidden_state_error for layer in expected.layers]
        held_out = run.calibration.pop("held_out")
        assert held_out["num_sequences"] == 2
        assert held_out["num_tokens"] == 32
        assert run.calibration == expected.calibration
    errors = [[o.held_out_fit_error for o in run.operators] for run in (report, with_others)]
    assert all(left != right for left, right in zip(*errors, strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("error_correction", ["none", "intra", 0.5])
@pytest.mark.parametrize(
    "family", ["llama", "gpt2"]
)  # positions relative to each other, and absolute ones
def test_padding_changes_no_error_of_calibration_or_held_out_sequences(
    tokens, family, side, error_correction
):
    short = tokens[6:, :10]
    padding = torch.full((2, 6), 5)
    order = (padding, short) if side == "left" else (short, padding)
    ids = torch.cat([tokens[:6], torch.cat(order, dim=1)])
    mask = torch.ones_like(ids)
    mask[6:] = torch.cat([torch.full_like(part, int(part is short)) for part in order], dim=1)
    options = {"error_correction": error_correction, "method": "sparsegpt", "held_out": 2}
    padded = prune(tiny_model(family), [{"input_ids": ids, "attention_mask": mask}], **options)

    plain = prune(tiny_model(family), [tokens[:6], short], **options)

    assert padded.calibration == plain.calibration
    assert padded.calibration["held_out"]["num_tokens"] == 20
    for left, right in zip(padded.operators, plain.operators, strict=True):
        assert left.held_out_tokens == right.held_out_tokens == 20
        assert left.fit_error == right.fit_error
        assert left.held_out_fit_error == pytest.approx(right.held_out_fit_error, rel=1e-3)


def test_bfloat16_errors_are_those_of_the_rounded_weights(tokens):
    dense = tiny_llama().bfloat16()
    model = tiny_llama().bfloat16()
    options = {"method": "sparsegpt", "sparsity": 0.02, "error_correction": "none"}
    report = prune(model, tokens.split(8), held_out=4, **options)

    dense_weights = weights(dense)
    pruned_weights = weights(model)

    for field, rows in (("fit_error", tokens[:4]), ("held_out_fit_error", tokens[4:])):
        inputs = inputs_of(dense, rows)
        for operator in report.operators:
            name = operator.name
            expected = error_of(
                pruned_weights[name], dense_weights[name], inputs[name], inputs[name]
            )
            assert getattr(operator, field) == pytest.approx(expected, rel=1e-2), name


@pytest.mark.usefixtures("enough_tokens")
def test_experts_have_a_held_out_error_exactly_where_held_out_tokens_reach_them():
    tokens = torch.randint(0, VOCAB_SIZE, (9, 24), generator=torch.Generator().manual_seed(1))
    alone = tiny_model("mixtral")
    model = tiny_model("mixtral")
    options = {"method": "sparsegpt", "error_correction": 0.5}
    prune(alone, [tokens[:8]], **options)

    report = prune(model, [tokens[:8], tokens[8:, :2]], held_out=1, **options)

    assert same(weights(model), weights(alone))
    assert any(o.held_out_tokens == 0 for o in report.operators)
    for operator in report.operators:
        assert (operator.held_out_fit_error is None) == (operator.held_out_tokens == 0)
    again = prune(tiny_model("mixtral"), [tokens[:8], tokens[:8]], held_out=8, **options)
    for operator in again.operators:
        assert operator.held_out_fit_error == pytest.approx(operator.fit_error, rel=1e-3)

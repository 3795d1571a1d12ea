"""The order of the work in the loop over decoder layers."""

import pytest
import torch
from pruning import hidden_states_of, plan_of, prune, weights

from optimum_fista import FistaPruner, FistaPruningConfig, PruningCallback
from optimum_fista.model.hooks import evaluation_mode
from optimum_fista.prune.batches import read_calibration
from optimum_fista.prune.loop import prune_layers

GROUPS = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


class Recorder(PruningCallback):
    """A sink and a callback that note what they are called with, in one list."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def write(self, operator, weight, mask):
        operator.write(weight)
        self.events.append(("write", operator.name.rsplit(".", 1)[-1]))

    def undo(self):
        self.events.append(("undo", ""))

    def store(self, index, layer, record):
        self.events.append(("store", record.report.name))

    def commit(self, index, record, travelling):
        self.events.append(("commit", record.report.name))

    def on_operator_end(self, report):
        self.events.append(("report", report.name.rsplit(".", 2)[-2]))

    def on_layer_end(self, index, report, operators):
        self.events.append(("layer", report.name))


@pytest.mark.parametrize("error_correction", ["none", "intra", "full"])
def test_a_group_is_written_before_it_is_reported_and_a_layer_committed_before_callbacks_see_it(
    llama, tokens, error_correction
):
    recorder = Recorder()
    config = FistaPruningConfig(method="wanda", error_correction=error_correction)
    plan = plan_of(llama, config, callbacks=[recorder])
    calibration, _, report = read_calibration(plan, tokens.split(4), None)
    expected = []
    for layer in ("model.layers.0", "model.layers.1"):
        for group in GROUPS:
            expected += [("write", name) for name in group] + [("report", name) for name in group]
        expected += [("store", layer), ("commit", layer), ("layer", layer)]

    with evaluation_mode(llama), torch.no_grad():
        prune_layers(plan, calibration, report, recorder)

    assert recorder.events == expected
    found = weights(llama)
    assert all(o.num_kept == int((found[o.name] != 0).sum()) for o in report.operators)


@pytest.mark.parametrize(
    ("error_correction", "residual", "passes"),
    [
        ("none", 0.0, 1),
        ("intra", 0.0, 2),
        ("full", 0.0, 2),
        (0.5, 0.0, 2),
        (0.0, 1.0, 2),
        (0.0, 0.0, 1),
    ],
)
def test_a_layer_runs_twice_for_a_batch_only_if_both_networks_are_needed(
    llama, tokens, error_correction, residual, passes
):
    """The gate of the second layer runs in the dense pass, and up to the down projection; that runs on kept inputs."""
    runs = []
    llama.model.layers[1].mlp.gate_proj.register_forward_hook(lambda *_: runs.append(1))

    prune(
        llama,
        tokens.split(4),
        method="wanda",
        error_correction=error_correction,
        residual_correction=residual,
    )

    # one run traces the layer, and two find whether its last operator is added to the output
    others = 1 + (2 if residual else 0)
    num_batches = 2
    assert len(runs) == passes * num_batches + others


@pytest.mark.parametrize(
    "options",
    [
        {"method": "wanda", "error_correction": "full"},
        {"error_correction": 0.5, "residual_correction": 1.0},
        {"error_correction": 0.5, "exclude": ("*.layers.1.*",)},
    ],
)
def test_hidden_state_errors_are_those_of_the_two_models_on_real_tokens(llama, tokens, options):
    mask = torch.ones_like(tokens)
    mask[5, 10:] = mask[7, 3:] = 0
    dense = hidden_states_of(llama, tokens, mask)
    batches = [
        {"input_ids": i, "attention_mask": m}
        for i, m in zip(tokens.split(3), mask.split(3), strict=True)
    ]

    report = FistaPruner(FistaPruningConfig(**options), progress=False).prune(llama, batches)

    assert [layer.name for layer in report.layers] == ["model.layers.0", "model.layers.1"]
    for layer, pruned, wanted in zip(
        report.layers, hidden_states_of(llama, tokens, mask), dense, strict=True
    ):
        pruned = pruned[mask.bool()]
        wanted = wanted[mask.bool()]
        if "exclude" in options and layer.name.endswith("1"):
            assert layer.hidden_state_error is None  # after the last operator nothing runs
        else:
            assert layer.hidden_state_error == pytest.approx(
                float((pruned - wanted).norm() / wanted.norm()), rel=1e-4
            )

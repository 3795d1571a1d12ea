import logging

import pytest
from tiny_llama import tiny_llama, tiny_tokens
from tiny_models import tiny_model

from optimum_fista import FistaPruner, FistaPruningConfig, TrackingCallback


class Tracker:
    def __init__(self, fails: bool = False) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.fails = fails

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))
        if self.fails:
            raise ConnectionError("the server is gone")


def prune(model, tracker, **options):
    pruner = FistaPruner(FistaPruningConfig(**options), progress=False, callbacks=[TrackingCallback(tracker)])
    return pruner.prune(model, tiny_tokens().split(4))


def test_every_layer_is_one_step():
    tracker = Tracker()
    report = prune(tiny_llama(), tracker)
    assert [step for step, _ in tracker.logged] == [0, 1]
    kinds = [operator.name.split(".", 3)[3].removesuffix(".weight") for operator in report.operators[:7]]
    names = [f"{name}/{kind}" for kind in kinds for name in ("relative_error", "sparsity", "solve_seconds")]
    for layer, (step, values) in enumerate(tracker.logged):
        assert list(values) == ["layer_seconds", "hidden_state_error", *names]
        assert values["hidden_state_error"] == report.layers[step].hidden_state_error
        assert values["relative_error/mlp.down_proj"] == report.operators[7 * layer + 6].relative_error


def test_held_out_errors_are_curves():
    tracker = Tracker()
    report = prune(tiny_llama(), tracker, method="wanda", held_out=2)
    logged = [values["held_out_error/mlp.up_proj"] for _, values in tracker.logged]
    assert logged == [o.held_out_error for o in report.operators if o.name.endswith("mlp.up_proj.weight")]


def test_experts_are_one_curve_and_what_is_not_known_is_none():
    tracker = Tracker()
    report = prune(tiny_model("mixtral"), tracker, method="wanda")
    values = tracker.logged[0][1]
    errors = [
        o.relative_error for o in report.operators if ".layers.0." in o.name and o.name.endswith("down_proj.weight")
    ]
    (mean,) = [value for name, value in values.items() if name.startswith("relative_error") and "down_proj" in name]
    assert mean == pytest.approx(sum(errors) / len(errors))
    assert len(errors) > 1
    assert "hidden_state_error" not in values


def test_a_tracker_that_fails_is_warned_of_once(caplog):
    tracker = Tracker(fails=True)
    with caplog.at_level(logging.WARNING):
        report = prune(tiny_llama(), tracker)
    assert len(report.operators) == 14
    assert len(tracker.logged) == 1
    warned = [r.getMessage() for r in caplog.records if "tracker" in r.getMessage()]
    assert warned == ["the tracker failed on decoder layer 0 and is no longer used: the server is gone"]


def test_other_objects_are_refused():
    with pytest.raises(ValueError, match=r"tracker is a list: pass a SummaryWriter"):
        TrackingCallback([])


def test_tensorboard_reads_the_curves(tmp_path):
    pytest.importorskip("tensorboard", reason="needs TensorBoard: pip install 'optimum-fista[tracking]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        report = prune(tiny_llama(), writer)
    events = EventAccumulator(str(tmp_path)).Reload()
    curve = [(event.step, event.value) for event in events.Scalars("hidden_state_error")]
    assert curve == [(i, pytest.approx(layer.hidden_state_error)) for i, layer in enumerate(report.layers)]
    assert len(events.Tags()["scalars"]) == 2 + 3 * 7

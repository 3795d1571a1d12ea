"""What a run tells its callbacks, and what is left when one of them fails."""

import copy

import pytest
from tiny_llama import save_tiny_folder, tiny_llama, tiny_tokens

from optimum_fista import FistaPruner, FistaPruningConfig, PruningCallback
from optimum_fista.evaluate.verification import verify_checkpoint
from optimum_fista.folder.output import unfinished_folder

LAYERS = 3


class Recorder(PruningCallback):
    """Notes every call, and raises at one of them."""

    def __init__(
        self, raise_at: tuple[str, int] | None = None, error: type[BaseException] = RuntimeError
    ) -> None:
        self.calls: list[tuple] = []
        self.raise_at = raise_at
        self.error = error

    def note(self, name: str, *arguments) -> None:
        self.calls.append((name, *arguments))
        if self.raise_at == (name, len(self.named(name))):
            raise self.error("no more of this")

    def named(self, name: str) -> list[tuple]:
        return [arguments for called, *arguments in self.calls if called == name]

    def on_prune_begin(self, report):
        self.note("begin", copy.deepcopy(report))

    def on_operator_end(self, report):
        self.note("operator", report)

    def on_layer_end(self, index, layer, operators):
        self.note("layer", index, layer, operators)

    def on_prune_end(self, report):
        self.note("end", report)


@pytest.fixture
def dense():
    return tiny_llama(num_hidden_layers=LAYERS)


@pytest.fixture
def source(dense, tmp_path):
    folder = save_tiny_folder(tmp_path / "dense")
    dense.save_pretrained(folder)
    return folder


def prune(model, *callbacks, output_dir=None, **options):
    config = FistaPruningConfig(method="wanda", error_correction="full", **options)
    pruner = FistaPruner(config, progress=False, callbacks=callbacks)
    return pruner, pruner.prune(model, tiny_tokens().split(4), output_dir=output_dir)


@pytest.mark.parametrize("from_files", [False, True])
def test_callbacks_hear_of_the_start_each_operator_each_layer_and_the_end_once_in_order(
    dense, source, tmp_path, from_files
):
    told = Recorder()
    model, output = (source, tmp_path / "out") if from_files else (dense, None)

    _, report = prune(model, told, output_dir=output, exclude=("*.layers.2.*",))

    assert [call[0] for call in told.calls] == [
        "begin",
        *2 * [*7 * ["operator"], "layer"],
        "layer",
        "end",
    ]
    ((begun,),) = told.named("begin")
    assert not begun.operators
    assert begun.calibration == report.calibration
    assert [operator for (operator,) in told.named("operator")] == report.operators
    assert [index for index, *_ in told.named("layer")] == [0, 1, 2]
    assert [len(operators) for *_, operators in told.named("layer")] == [7, 7, 0]
    for (_, layer, _), reported in zip(told.named("layer"), report.layers, strict=True):
        assert (layer.name, layer.hidden_state_error) == (
            reported.name,
            reported.hidden_state_error,
        )
    assert told.named("end") == [[report]]


@pytest.mark.parametrize(("place", "finished"), [(("operator", 9), 1), (("layer", 2), 2)])
def test_a_callback_that_fails_loses_no_finished_layer_in_files(source, tmp_path, place, finished):
    with pytest.raises(RuntimeError, match="no more of this"):
        prune(source, Recorder(place), output_dir=tmp_path / "out")

    assert (
        len(list((unfinished_folder(tmp_path / "out") / "journal").glob("layer-*.json")))
        == finished
    )

    again = Recorder()
    _, report = prune(source, again, output_dir=tmp_path / "out")

    assert [index for index, *_ in again.named("layer")] == list(range(finished, LAYERS))
    assert len(again.named("operator")) == 7 * (LAYERS - finished)
    _, whole = prune(source, output_dir=tmp_path / "whole")
    assert [o.fit_error for o in report.operators] == [o.fit_error for o in whole.operators]
    assert [o.hidden_state_error for o in report.layers] == [
        o.hidden_state_error for o in whole.layers
    ]


def test_a_callback_that_fails_at_the_end_leaves_a_whole_pruned_model(dense, source, tmp_path):
    with pytest.raises(RuntimeError):
        prune(source, Recorder(("end", 1)), output_dir=tmp_path / "out")

    assert verify_checkpoint(tmp_path / "out").num_operators == 7 * LAYERS

    pruner = FistaPruner(FistaPruningConfig(), progress=False, callbacks=[Recorder(("end", 1))])
    with pytest.raises(RuntimeError):
        pruner.prune(dense, tiny_tokens().split(4))
    pruner.save_pretrained(dense, tmp_path / "saved")

    assert verify_checkpoint(tmp_path / "saved").num_operators == 7 * LAYERS

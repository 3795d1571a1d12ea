from pathlib import Path

import pytest
import torch
from pruning import same, weights
from tiny_llama import tiny_llama

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.prune import budgets


@pytest.mark.parametrize("settings", [{}, {"method": "wanda", "error_correction": "intra"}])
def test_where_activations_are_stored_changes_no_weight_and_leaves_no_file(
    tokens, tmp_path, settings
):
    results = []

    for storage_device in (None, "cpu", torch.device("cpu"), "disk", str(tmp_path), tmp_path):
        model = tiny_llama()
        config = FistaPruningConfig(**settings)
        FistaPruner(config, progress=False, storage_device=storage_device).prune(
            model, tokens.split(4)
        )
        results.append(weights(model))
        assert not [*tmp_path.iterdir()]

    assert all(same(results[0], result) for result in results[1:])


def test_hidden_states_for_the_gradients_are_kept_in_the_storage_folder_too(
    tokens, tmp_path, monkeypatch
):
    places = []
    measure = budgets.measure_sensitivities

    def noting_the_place(loss, *arguments):
        places.append(loss.storage)
        return measure(loss, *arguments)

    monkeypatch.setattr(budgets, "measure_sensitivities", noting_the_place)

    FistaPruner(FistaPruningConfig(), progress=False, storage_device=tmp_path).prune(
        tiny_llama(), tokens.split(4)
    )

    assert places == [tmp_path]


@pytest.mark.parametrize("place", ["moon", Path("no/such/folder")])
def test_a_storage_device_that_is_no_device_and_no_folder_is_refused(tokens, place):
    pruner = FistaPruner(progress=False, storage_device=place)

    with pytest.raises(
        ValueError,
        match=f"storage_device='{place}': pass a device such as 'cpu', 'disk', or a folder",
    ):
        pruner.prune(tiny_llama(), tokens.split(4))

"""The same model pruned on the CPU and wherever else a model and its activations may lie."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import simulated_device.backend  # noqa: F401
import torch
from accelerate import cpu_offload, dispatch_model
from tiny_llama import tiny_tokens
from torch import Tensor, nn
from transformers import PreTrainedModel
from untouched import weights_of

from optimum_fista import FistaPruner, FistaPruningConfig, PruningReport
from optimum_fista.model.layers import find_decoder_layers

PLACES = (
    "in memory",
    "in memory, stored on the cpu",
    "on two devices",
    "on a device, cpu and disk",
    "offloaded to the cpu",
    "streamed, stored on the device",
    "streamed, stored on disk",
    "streamed and packed",
)


def dispatched(model: PreTrainedModel, offload: Path, *places: str) -> PreTrainedModel:
    """Place the decoder layers of a model at these places in turn, and the rest on the first device.

    A place is a device or "disk", for which files are written to the folder `offload`.
    """
    layer_names = [name for name, _ in find_decoder_layers(model)]
    device_map = dict.fromkeys(_parts_without(model, layer_names), "simulated:0")
    for index, name in enumerate(layer_names):
        device_map[name] = places[index % len(places)]
    return dispatch_model(model, device_map, main_device="simulated:0", offload_dir=offload)


def _parts_without(module: nn.Module, layers: Sequence[str], prefix: str = "") -> Iterator[str]:
    """Names of the largest modules that hold none of the `layers`; `prefix` is the name of `module` and a dot."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if any(layer.startswith(f"{path}.") for layer in layers):
            yield from _parts_without(child, layers, f"{path}.")
        elif path not in layers:
            yield path


def placed(model: PreTrainedModel, place: str, tmp_path: Path) -> PreTrainedModel:
    """Move a model in memory to a place of `PLACES` that is not streamed."""
    if place == "on two devices":
        return dispatched(model, tmp_path, "simulated:0", "simulated:1")
    if place == "on a device, cpu and disk":
        return dispatched(model, tmp_path, "cpu", "disk")
    if place == "offloaded to the cpu":
        return cpu_offload(model, execution_device=torch.device("simulated:1"))
    return model.to("simulated:1")


def pruned_at(
    place: str,
    config: FistaPruningConfig,
    model: PreTrainedModel,
    batches: Sequence[Any],
    tmp_path: Path,
) -> tuple[dict[str, Tensor], PruningReport]:
    """Prune a dense model at a place of `PLACES`; return its weights, on the CPU, and the report.

    A streamed model is saved to a folder first, and the weights are those of the folder that is written.
    """
    storage: Any = None  # where the model is
    if place.endswith("stored on the cpu"):
        storage = "cpu"
    elif place.endswith("stored on disk"):
        storage = tmp_path
    pruner = FistaPruner(config, progress=False, storage_device=storage)

    if place.startswith("streamed"):
        model.save_pretrained(tmp_path / "dense")
        report = pruner.prune(
            tmp_path / "dense",
            batches,
            output_dir=tmp_path / "pruned",
            device="simulated:1",
            packed=place == "streamed and packed",
        )
        pruned = type(model).from_pretrained(tmp_path / "pruned")
        return dict(pruned.state_dict()), report

    model = placed(model, place, tmp_path)
    report = pruner.prune(model, batches)
    return weights_of(model), report


def prune_on_device(rank: int, source: Path, output: Path, config: FistaPruningConfig) -> None:
    """Prune the model of a folder as one of several processes, each of which has a device of its own."""
    pruner = FistaPruner(config, progress=False)
    pruner.prune(source, tiny_tokens().split(4), output_dir=output, device=f"simulated:{rank}")


def require_the_same(
    weights: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4
) -> None:
    """Assert that weights have the same zeros, and that every matrix is equal to `tolerance` of its norm."""
    for name, expected_weight in expected.items():
        weight = weights[name]
        assert torch.equal(weight == 0, expected_weight == 0), name
        difference = float((weight - expected_weight).norm())
        assert difference <= tolerance * float(expected_weight.norm()), name

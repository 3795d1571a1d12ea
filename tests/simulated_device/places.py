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
    """The model with its decoder layers at these places in turn, and the rest on the first device."""
    layers = [name for name, _ in find_decoder_layers(model)]
    parts = dict.fromkeys(_parts_without(model, layers), "simulated:0")
    parts |= {name: places[index % len(places)] for index, name in enumerate(layers)}
    return dispatch_model(model, parts, main_device="simulated:0", offload_dir=offload)


def _parts_without(module: nn.Module, layers: Sequence[str], prefix: str = "") -> Iterator[str]:
    """Names of the largest modules that hold no decoder layer."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if any(layer.startswith(f"{path}.") for layer in layers):
            yield from _parts_without(child, layers, f"{path}.")
        elif path not in layers:
            yield path


def placed(model: PreTrainedModel, place: str, tmp_path: Path) -> PreTrainedModel:
    """A model in memory at a place that is not streamed."""
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
    """The weights, on the CPU, of a dense model that was pruned at a place of `PLACES`."""
    storage: Any = (
        {"cpu": "cpu", "disk": tmp_path}.get(place.rpartition(" ")[-1])
        if "stored" in place
        else None
    )
    pruner = FistaPruner(config, progress=False, storage_device=storage)
    if place.startswith("streamed"):
        model.save_pretrained(tmp_path / "dense")
        options = {"device": "simulated:1", "packed": place == "streamed and packed"}
        report = pruner.prune(
            tmp_path / "dense", batches, output_dir=tmp_path / "pruned", **options
        )
        return dict(type(model).from_pretrained(tmp_path / "pruned").state_dict()), report
    model = placed(model, place, tmp_path)
    report = pruner.prune(model, batches)
    return weights_of(model), report


def prune_on_device(rank: int, source: Path, output: Path, config: FistaPruningConfig) -> None:
    """The work of a process of several that prune one model, each on a device of its own."""
    pruner = FistaPruner(config, progress=False)
    pruner.prune(source, tiny_tokens().split(4), output_dir=output, device=f"simulated:{rank}")


def require_the_same(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4
) -> None:
    """The same zeros, and every weight matrix equal to `tolerance` of its norm."""
    for name, weight in expected.items():
        assert torch.equal(found[name] == 0, weight == 0), name
        assert float((found[name] - weight).norm()) <= tolerance * float(weight.norm()), name

"""The plan of a pruning run, from a model's configuration alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from optimum_fista.run.checkpoints.loading import default_device
from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.planning.counts import GroupCount, count_groups, disk_bytes, notes_on
from optimum_fista.run.planning.machine import MachineRates, measure_for
from optimum_fista.run.planning.memory import Peak, plan_memory
from optimum_fista.run.planning.model import load_config, planned_model, stored_dtype
from optimum_fista.run.planning.settings import PlanSettings
from optimum_fista.run.planning.text import plan_text
from optimum_fista.run.planning.work import StageWork, plan_work

_USUAL_LENGTH = 2048


@dataclass
class PruningPlan:
    """What a run will do, and what it will take.

    Attributes:
        model: Class, model type, parameters and dtype.
        config: The configuration with the method's defaults filled in.
        settings: Calibration and device.
        groups: Operators to prune by their last name.
        left_dense: Operators left dense, with the reason.
        other_parameters: Parameters outside the operators of decoder layers: embeddings, norms, biases, the head.
        peaks: Peak memory by place: `"device"` and `"host"`, or `"host"` alone on a CPU.
        disk_bytes: Disk by part while the run goes on.
        stages: Work by stage.
        rates: Rates of the machine; `None` where it was not measured.
        notes: What the reader should know.
    """

    model: dict[str, Any]
    config: dict[str, Any]
    settings: dict[str, Any]
    groups: dict[str, GroupCount]
    left_dense: dict[str, str]
    other_parameters: int
    peaks: dict[str, Peak]
    disk_bytes: dict[str, int]
    stages: dict[str, StageWork]
    rates: MachineRates | None
    notes: list[str]

    @property
    def products(self) -> float:
        """Floating-point operations of all products."""
        return sum(stage.products for stage in self.stages.values())

    @property
    def seconds(self) -> dict[str, float] | None:
        """Time by stage; `None` without rates."""
        if self.rates is None:
            return None
        return {name: stage.seconds(self.rates) for name, stage in self.stages.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = dataclasses.asdict(self)
        for name, peak in self.peaks.items():
            values["peaks"][name]["total"] = peak.total
        for name, stage in self.stages.items():
            values["stages"][name]["products"] = stage.products
        return values | {"products": self.products, "seconds": self.seconds}

    def __str__(self) -> str:
        return plan_text(self)


def plan_pruning(
    model: str | Path | PreTrainedConfig,
    config: FistaPruningConfig | None = None,
    *,
    num_samples: int = 128,
    sequence_length: int | None = None,
    batch_size: int = 1,
    calibration: str = "text",
    device: str | None = None,
    dtype: str | torch.dtype = "auto",
    storage_device: str | None = None,
    rates: MachineRates | None = None,
    measure: bool = True,
    packed: bool = False,
) -> PruningPlan:
    """Plan a run from files to files; nothing is read but the model's configuration, nothing is written.

    Args:
        model: Hub id, model folder, folder with one GGUF file, a configuration file alone, or a configuration.
        config: What to prune and how; `FistaPruningConfig()` by default.
        num_samples: Calibration sequences, held-out ones (`config.held_out`) included.
        sequence_length: Tokens a sequence; `None`: 2048, or the model's maximum where that is shorter.
        batch_size: Sequences a forward pass.
        calibration: Source of the text; `"self"` has the model, held whole, sample it.
        device: `None`: the accelerator if there is one, otherwise the CPU. A GPU may be named where there is none;
            its time is then not estimated.
        dtype: Dtype of the model; `"auto"` takes the checkpoint's.
        storage_device: Where hidden states wait, as in `FistaPruner`; `None`: on the device, in files on the CPU.
        rates: Rates of the machine; `None` measures the device.
        measure: Whether to measure, about ten seconds; without it there are no times.
        packed: Whether a packed folder is to be written.

    Raises:
        ValueError: If the model or an option can't be used.
    """
    chosen = (config or FistaPruningConfig()).resolved()
    for name, value in (("num_samples", num_samples), ("sequence_length", sequence_length), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: pass at least 1.")
    if chosen.held_out >= num_samples:
        raise ValueError(
            f"held_out={chosen.held_out}: of num_samples={num_samples} sequences none is left to calibrate on: pass a "
            "smaller number, or more sequences."
        )
    where = (device or default_device()).partition(":")[0]
    loaded, in_memory = load_config(model)
    length = sequence_length or min(_USUAL_LENGTH, getattr(loaded, "max_position_embeddings", None) or _USUAL_LENGTH)
    planned = planned_model(loaded, chosen, batch_size, length, dtype, in_memory)
    weight_dtype = planned.model.dtype
    place = (storage_device or ("disk" if where == "cpu" else where)).partition(":")[0]
    settings = PlanSettings(
        config=chosen,
        cost=chosen.create_method(planned.model.config.model_type).cost(),
        num_samples=num_samples,
        sequence_length=length,
        batch_size=batch_size,
        element_size=weight_dtype.itemsize,
        maps_files=where == "cpu" and weight_dtype == stored_dtype(loaded, in_memory) and not in_memory,
        on_cpu=where == "cpu",
        storage={where: "device", "cpu": "device" if where == "cpu" else "host"}.get(place, "disk"),
        calibration=calibration,
    )
    notes = notes_on(planned, settings)
    groups = count_groups(planned, chosen)
    if rates is None and measure:
        rates, why_not = measure_for(planned, settings, device)
        notes += [why_not] if why_not else []
    return PruningPlan(
        model={
            "class": type(planned.model).__name__,
            "model_type": planned.model.config.model_type,
            "num_parameters": planned.model.num_parameters(),
            "decoder_layers": len(planned.layers),
            "dtype": str(weight_dtype).removeprefix("torch."),
            "bytes": planned.weight_bytes,
        },
        config=chosen.to_dict(),
        settings={
            "num_samples": num_samples,
            "held_out": chosen.held_out,
            "sequence_length": length,
            "batch_size": batch_size,
            "calibration": calibration,
            "device": where,
            "storage_device": {"host": "cpu", "disk": "disk"}.get(settings.storage, where),
        },
        groups=groups,
        left_dense=planned.left_dense,
        other_parameters=planned.model.num_parameters() - sum(group.parameters for group in groups.values()),
        peaks=plan_memory(planned, settings).peaks,
        disk_bytes=disk_bytes(planned, settings, packed),
        stages=plan_work(planned, settings),
        rates=rates,
        notes=notes,
    )

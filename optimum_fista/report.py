"""The report of a pruning run, written to `fista/report.json`.

The model card, the page, `verify` and the summary in the terminal are made from the report. Shares and means are
computed from the operators when they are needed, so that no two numbers can disagree.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch

import optimum_fista
from optimum_fista.memory import MemoryPeak
from optimum_fista.options import as_record
from optimum_fista.solve.pattern import Scope


def library_versions() -> dict[str, str]:
    """Versions of Python, this package and the libraries whose numbers or files depend on them."""
    names = ("torch", "transformers", "accelerate", "optimum", "safetensors", "huggingface-hub")
    versions = {"python": platform.python_version(), "optimum-fista": optimum_fista.__version__}
    versions |= {name: _version(name) for name in names}
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return versions if found is None else versions | {"gpu": device_name(found)}


_version = functools.cache(importlib.metadata.version)  # the search in the file system is slow


def device_name(device: torch.device) -> str:
    """The name that a device gives itself; its type if it gives none."""
    module = torch.get_device_module(device)
    return module.get_device_name(device) if hasattr(module, "get_device_name") else device.type


@dataclass(frozen=True)
class OperatorReport:
    """Numbers of one pruned linear operator. If the model was retrained, errors are those before the training."""

    name: str  # of its weight in the model and the checkpoint
    shape: tuple[int, int]  # (out, in)
    stored_transposed: bool  # whether the checkpoint stores the weight as [in, out]
    pattern: str  # such as "unstructured" or "2:4"
    target_sparsity: float  # share of zeros asked for
    scope: Scope  # what shares the zeros of an unstructured pattern: "matrix" or "row"
    num_kept: int  # weights
    sparsity: float  # share of zeros
    method: str
    fit_error: (
        float  # || W* X* - Y || / || Y || on the calibration tokens; the error correction chooses Y
    )
    l1_penalty: float | None  # of the solution, if the method has one
    iterations: int  # over all trials
    converged: bool  # False if an iteration limit or a numerical failure ended the method
    message: str  # advice or remark of the method
    num_tokens: int  # calibration tokens that reached it
    solve_seconds: float  # shared evenly over the operators that were solved together
    output_error: float | None = (
        None  # || W* X* - W X || / || W X ||; `None` if the dense network did not run
    )
    held_out_fit_error: float | None = None  # on held-out tokens, to which no weight was fitted
    held_out_output_error: float | None = None
    held_out_tokens: int = 0  # that reached it
    residual_corrected: bool = (
        False  # whether it compensates for the error in the rest of its layer
    )
    groups_kept: tuple[int, ...] | None = (
        None  # of columns, if others were removed; `shape` is the smaller one
    )
    input_order: tuple[int, ...] | None = (
        None  # numbers of the inputs in the dense model; `None`: the same order
    )

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape of the weight in the checkpoint."""
        return self.shape[::-1] if self.stored_transposed else self.shape


@dataclass(frozen=True)
class MixtureReport:
    """Experts of a mixture that stayed, and how close their output is to that of all experts."""

    name: str
    groups_kept: tuple[int, ...]  # numbers of the kept experts in the dense model
    saliency: tuple[float, ...]  # of each expert of the dense model (`score_experts`)
    expert_tokens: tuple[int, ...]  # how many calibration tokens the router sent to each of them
    fit_error: float  # || E* - Y || / || Y || of the summed output E* of the kept experts
    fit_error_before: float  # before the down projections were refitted
    num_refitted: int
    solve_seconds: float
    message: str = ""
    held_out_fit_error: float | None = None
    residual_corrected: bool = False


@dataclass(frozen=True)
class LayerReport:
    """Numbers of one pruned decoder layer."""

    name: str  # in the model
    hidden_state_error: (
        float | None
    )  # || H* - H || / || H || after the layer; `None` if one of the two is not computed
    seconds: float  # wall time
    memory: MemoryPeak | None = (
        None  # peak while its operators were pruned; `None` if none was pruned
    )
    mixture: MixtureReport | None = None  # if it lost experts
    dense_sha256: str | None = None  # of its tensors before pruning (`model.offload.sha256_of`)


@dataclass(frozen=True)
class LayerRecord:
    """The report of one pruned decoder layer with its operators; a streamed run keeps it on disk."""

    report: LayerReport
    operators: list[OperatorReport] = field(default_factory=list)
    left_dense: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RecoveryReport:
    """A recovery of the pruned model: its kept weights were trained to predict as the dense model does."""

    teacher: str  # name of the dense model: a Hub id, or the last part of a path
    train: str  # a key of `WORDS_OF_TRAIN`
    num_trained: int  # weights, without zeros
    num_tokens: int  # trained on
    calibration: dict[
        str, Any
    ]  # `source` and `sha256` of the tokens, `sequence_length`, `held_out` sequences
    options: dict[str, Any]
    evaluations: list[
        list[float]
    ]  # steps, seconds, held-out loss: mean negative log-likelihood of a token
    best_step: (
        int  # the weights after this step were kept; 0: no step was better than the weights before
    )
    held_out_loss_before: float  # of the pruned model
    held_out_loss: float  # of the saved weights
    seconds: float  # of training and evaluation

    def __str__(self) -> str:
        """One line for people."""
        perplexities = f"perplexity {math.exp(self.held_out_loss_before):.2f} -> {math.exp(self.held_out_loss):.2f}"
        held_out = f"{self.calibration['held_out']} held-out sequences of {self.calibration['sequence_length']} tokens"
        kept = (
            f"best after step {self.best_step}"
            if self.best_step
            else "nothing gained, so the weights stayed"
        )
        return (
            f"held-out loss {self.held_out_loss_before:.4f} -> {self.held_out_loss:.4f} ({perplexities}) on {held_out}"
            f"; {WORDS_OF_TRAIN[self.train]} trained ({self.num_trained:,} weights) on {self.num_tokens:,} tokens of "
            f"{self.calibration['source']} in {self.evaluations[-1][0]:.0f} steps and {self.seconds / 60:.1f} min, "
            f"with {self.teacher} as the teacher; {kept}"
        )


# What a recovery can train.
WORDS_OF_TRAIN = {"all": "all kept weights but embeddings and head", "norms": "norms and biases"}


@dataclass
class PruningReport:
    """Record of a pruning run."""

    config: dict[str, Any]  # the configuration as plain values
    model: dict[
        str, Any
    ]  # class, name, num_parameters, sha256 of the dense tensors, what is copied or lacks
    calibration: dict[
        str, Any
    ]  # sha256, num_sequences, num_tokens, source if known; `held_out` has the same keys
    operators: list[OperatorReport] = field(default_factory=list)  # in pruning order
    layers: list[LayerReport] = field(default_factory=list)
    left_dense: dict[str, str] = field(
        default_factory=dict
    )  # operators that were not pruned, with the reason
    warnings: list[str] = field(default_factory=list)  # what the user should know
    seconds: dict[str, float] = field(default_factory=dict)  # wall time of the parts of the run
    versions: dict[str, str] = field(default_factory=library_versions)
    retrained: bool = False  # whether weights were trained after pruning
    perplexity: dict[str, Any] | None = (
        None  # of dense and pruned, bits_per_byte, num_tokens, text, vocabulary
    )
    environment: dict[str, Any] = field(
        default_factory=dict
    )  # dtypes, device, ..., and batches [number, rows, tokens]
    recoveries: list[RecoveryReport] = field(default_factory=list)  # in order

    def add(self, record: LayerRecord) -> None:
        """Add a decoder layer."""
        self.layers.append(record.report)
        self.operators += record.operators
        self.left_dense |= record.left_dense

    def warn(self, message: str) -> None:
        """Add a warning to the report, and show it to the user."""
        self.warnings.append(message)
        warnings.warn(message, stacklevel=2)

    @property
    def measured_on(self) -> str:
        """Say in words on which text the perplexity was measured."""
        found = self.perplexity or {}
        text = {None: "text", "self": "text of its own"}.get(found.get("text"), found.get("text"))
        return f"{found['num_tokens']:,} tokens of {text} that no weight was fitted to"

    @property
    def mixtures(self) -> list[MixtureReport]:
        """Mixtures that lost experts, in the order of their decoder layers."""
        return [layer.mixture for layer in self.layers if layer.mixture is not None]

    @property
    def removed(self) -> str:
        """Say how much smaller the model is; empty if no part of it was removed."""
        gone, left = self.totals["num_removed"], self.model["num_parameters"]
        share, found = self.totals["share_removed"], self.model.get("vocabulary")
        tokens = f", with {found['kept']:,} of {found['before']:,} tokens" if found else ""
        return (
            f"{gone:,} of {gone + left:,} parameters removed ({share:.2%}), {left:,} left{tokens}"
            if gone
            else ""
        )

    @property
    def experts_left(self) -> str:
        """Say how many experts stayed, and how large their fit error is; empty if none was removed."""
        if not self.mixtures:
            return ""
        first, errors = self.mixtures[0], [mixture.fit_error for mixture in self.mixtures]
        before = fmean(mixture.fit_error_before for mixture in self.mixtures)
        refits = "" if not self.config["expert_refit"] else f", {before:.4f} before refits"
        left = f"{len(first.groups_kept)} of {len(first.saliency)} experts left"
        fit = f"fit error of their outputs {fmean(errors):.4f} on average, {max(errors):.4f} at most{refits}"
        return f"{left} in each of {len(errors)} mixtures (REAP), {fit}"

    @property
    def totals(self) -> dict[str, Any]:
        """Sums and means over the pruned operators; an error that no operator has measured is `None`."""
        weights = sum(o.shape[0] * o.shape[1] for o in self.operators)
        zeros = weights - sum(o.num_kept for o in self.operators)
        dense = self.model.get("dense_num_parameters", self.model["num_parameters"])
        removed = dense - self.model["num_parameters"]
        errors: dict[str, float | None] = {}
        for name in ("fit_error", "output_error", "held_out_fit_error", "held_out_output_error"):
            known = [value for o in self.operators if (value := getattr(o, name)) is not None]
            nothing = 0.0 if name == "fit_error" else None  # every operator has a fit error
            errors |= {
                f"mean_{name}": fmean(known) if known else nothing,
                f"max_{name}": max(known, default=nothing),
            }
        both = [
            (o.held_out_fit_error, o.fit_error)
            for o in self.operators
            if o.held_out_fit_error is not None
        ]
        held_out, fitted = (
            (sum(values) for values in zip(*both, strict=True)) if both else (0.0, 0.0)
        )
        return {
            "num_operators": len(self.operators),
            "num_weights": weights,
            "num_zeros": zeros,
            "sparsity": zeros / weights if weights else 0.0,
            "model_sparsity": zeros
            / self.model["num_parameters"],  # of all parameters, embeddings too
            "num_removed": removed,  # parameters of whole parts that were removed
            "share_removed": removed / dense,  # of the dense model's parameters
            **errors,
            "held_out_ratio": held_out / fitted
            if fitted
            else None,  # of the same operators; 1: no overfitting
            "solve_seconds": sum(o.solve_seconds for o in self.operators)
            + sum(mixture.solve_seconds for mixture in self.mixtures),
            "num_not_converged": sum(not o.converged for o in self.operators),
        }

    def command(self) -> str:
        """The command that prunes the same model in the same way; a word in capitals stands for an unknown name."""
        tokens, sequences = self.calibration["num_tokens"], self.calibration["num_sequences"]
        words = ["optimum-fista", "prune", self.model.get("name") or "MODEL", "--output", "DIR"]
        words += ["--config", "fista/report.json"]
        for source in (self.calibration.get("source") or "SOURCE").split(
            ", "
        ):  # several for tokens
            words += ["--calibration", source]
        words += ["--num-samples", str(sequences)]
        if sequences and tokens % sequences == 0:
            words += ["--sequence-length", str(tokens // sequences)]
        if found := self.environment:
            words += ["--batch-size", str(found["batches"][0][1]), "--device", found["device"]]
            if (
                found.get("written", found["dtype"]) == found["dtype"]
            ):  # not as in the files, which is the default
                words += ["--dtype", found["dtype"].removeprefix("torch.")]
        return shlex.join(words)

    def to_json(self) -> str:
        """Write JSON text; the `totals` and `command` in it are for readers: `from_dict` does not need them."""
        return json.dumps(
            dataclasses.asdict(self) | {"totals": self.totals, "command": self.command()}, indent=1
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PruningReport:
        """Read the parsed JSON of `to_json`; TypeError if a field is missing, unknown, or of another type."""
        report = as_record(
            cls, {key: value for key, value in values.items() if key not in ("totals", "command")}
        )
        if not report.model["num_parameters"] > 0:  # shares are divided by this number
            raise TypeError(f"model has {report.model['num_parameters']} parameters")
        return report

    def __str__(self) -> str:
        """A few lines for people."""
        totals, held_out, output = self.totals, "", "not known"
        if totals["mean_output_error"] is not None:
            output = f"{totals['mean_output_error']:.4f} on average, {totals['max_output_error']:.4f} at most"
        if totals["held_out_ratio"] is not None:
            held_out = (
                f" ({totals['held_out_ratio']:.2f} times that on {self.calibration['held_out']['num_tokens']:,} "
                f"held-out tokens, {totals['mean_held_out_fit_error']:.4f} on average)"
            )
        if self.removed and not self.operators:
            return "; ".join(
                filter(
                    None,
                    (self.removed, self.experts_left, f"{self.seconds.get('total', 0.0):.1f} s"),
                )
            )
        experts = f"{self.experts_left}; " if self.mixtures else ""
        zeros = f"{totals['num_zeros']:,} of {totals['num_weights']:,} weights zero ({totals['sparsity']:.2%})"
        return (
            f"{totals['num_operators']} operators pruned by {self.config['method']}, "
            f"{self.removed or zeros}; {experts}"
            f"fit error {totals['mean_fit_error']:.4f} on average, {totals['max_fit_error']:.4f} at most{held_out}, "
            f"output error {output}{', before retraining' if self.retrained else ''}; "
            f"{self.seconds.get('total', 0.0):.1f} s, of which solving {totals['solve_seconds']:.1f} s"
        )


def lines_of_unplaced(copied: Mapping[str, int], lacks: Mapping[str, str]) -> list[str]:
    """Say which tensors the model's class does not load: modules with the number that is copied, or why none is."""
    lines = []
    if copied:
        shown = ", ".join(f"{module} ({count})" for module, count in copied.items())
        lines.append(
            f"{sum(copied.values())} tensors that the model's class does not load are copied: {shown}"
        )
    if lacks:
        lines.append(
            f"not in the pruned model: {', '.join(f'{module} ({why})' for module, why in lacks.items())}"
        )
    return lines


# repositories of the data sets that have a short name here
HUB_DATASETS = {
    "wikitext2": "Salesforce/wikitext",
    "c4": "allenai/c4",
    "ptb": "ptb-text-only/ptb_text_only",
}


def public_name(name: str) -> str:
    """The name to write into a folder that may be uploaded: for a path only its last part."""
    is_path = os.path.exists(name) or os.path.isabs(name) or name.startswith(("~", "."))
    return os.path.basename(os.path.abspath(name)) if is_path else name


class OperatorGrid:
    """Operators by decoder layer (rows) and kind (columns); the experts of a mixture share a kind."""

    def __init__(self, operators: Iterable[OperatorReport]) -> None:
        self.cells: dict[
            tuple[str, str], list[OperatorReport]
        ] = {}  # by layer and kind; no empty lists
        self.kinds: dict[str, list[OperatorReport]] = {}  # layer by layer
        for operator in operators:
            layer, kind = layer_and_kind(operator.name)
            self.cells.setdefault((layer, kind), []).append(operator)
            self.kinds.setdefault(kind, []).append(operator)
        self.layers = list(dict.fromkeys(layer for layer, _ in self.cells))  # in pruning order


def layer_and_kind(name: str) -> tuple[str, str]:
    """`model.layers.3` and `self_attn.q_proj` of `model.layers.3.self_attn.q_proj.weight`."""
    match = re.fullmatch(r"(.*?\.\d+)\.(.+)", name)
    layer, kind = match.groups() if match else ("", name)
    kind = re.sub(
        r"(experts)\.\d+\.", r"\1.*.", kind.removesuffix(".weight")
    )  # experts that are modules
    return layer, re.sub(r"\[\d+", "[*", kind)  # fused ones: "experts.gate_up_proj[3, :, 0::2]"

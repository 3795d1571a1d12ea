"""The report of a pruning run, and its operators by decoder layer and kind."""

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


_version = functools.cache(importlib.metadata.version)  # which searches the file system


def device_name(device: torch.device) -> str:
    """What a device calls itself, its type if it does not say."""
    module = torch.get_device_module(device)
    return module.get_device_name(device) if hasattr(module, "get_device_name") else device.type


@dataclass(frozen=True)
class OperatorReport:
    """How one linear operator was pruned.

    Attributes:
        name: Name of its weight in the model and the checkpoint.
        shape: (out, in).
        stored_transposed: Whether the checkpoint stores the weight as [in, out].
        pattern: `str` of the pattern, such as `"unstructured"` or `"2:4"`.
        target_sparsity: Fraction of zeros asked for.
        scope: What an unstructured budget is shared over, `"matrix"` or `"row"`.
        num_kept: Weights kept.
        sparsity: Fraction of zeros.
        method: Pruning method.
        fit_error: `|| W* X* - Y ||_F / || Y ||_F` on the calibration tokens, weights as saved, or as they
            were before retraining; `Y` are the outputs that the error correction aims at, those of the
            dense network `W X` or others.
        l1_penalty: Penalty of the solution, if the method has one.
        iterations: Iterations over all trials.
        converged: False when an iteration limit or a numerical failure ended the method.
        message: Advice or remark of the method.
        num_tokens: Calibration tokens seen.
        solve_seconds: Time of the method, shared evenly over the operators it solved together.
        output_error: `|| W* X* - W X ||_F / || W X ||_F`, against the dense network's outputs; `None` if they were
            not known (`error_correction=0` without residual correction).
        held_out_fit_error: `fit_error` on held-out tokens, to which no weight was fitted; `None` if there are none.
        held_out_output_error: `output_error` on held-out tokens.
        held_out_tokens: Held-out tokens seen.
        residual_corrected: Whether it compensates for the error in the rest of its layer (`residual_correction`).
        groups_kept: Numbers of the groups of columns that stayed, if the others were removed from the model: shape,
            `num_kept` and `sparsity` are then those of the smaller weight.
        input_order: Numbers that the inputs have in the dense model, in their order here; `None` if it is the same.
    """

    name: str
    shape: tuple[int, int]
    stored_transposed: bool
    pattern: str
    target_sparsity: float
    scope: Scope
    num_kept: int
    sparsity: float
    method: str
    fit_error: float
    l1_penalty: float | None
    iterations: int
    converged: bool
    message: str
    num_tokens: int
    solve_seconds: float
    output_error: float | None = None
    held_out_fit_error: float | None = None
    held_out_output_error: float | None = None
    held_out_tokens: int = 0
    residual_corrected: bool = False
    groups_kept: tuple[int, ...] | None = None
    input_order: tuple[int, ...] | None = None

    @property
    def stored_shape(self) -> tuple[int, int]:
        """As the checkpoint stores the weight."""
        return self.shape[::-1] if self.stored_transposed else self.shape


@dataclass(frozen=True)
class MixtureReport:
    """Which experts of a mixture stayed, and how near these come to all of them.

    `fit_error` is `|| E* - Y ||_F / || Y ||_F` of what the experts that stayed return together on the calibration
    tokens, weights as saved; `Y` is what the error correction aims at, the outputs of all experts or others.
    """

    name: str
    groups_kept: tuple[int, ...]  # numbers that the experts that stayed had in the dense model
    saliency: tuple[float, ...]  # of each expert of the dense model (`score_experts`)
    expert_tokens: tuple[int, ...]  # how many calibration tokens the router sent to each of them
    fit_error: float
    fit_error_before: float  # before the down projections were refitted
    num_refitted: int
    solve_seconds: float
    message: str = ""
    held_out_fit_error: float | None = None
    residual_corrected: bool = False


@dataclass(frozen=True)
class LayerReport:
    """What pruning made of one decoder layer.

    Attributes:
        name: Its name in the model.
        hidden_state_error: `|| H* - H ||_F / || H ||_F` of the hidden states after it, `H*` in the pruned network and
            `H` in the dense one, on the calibration tokens. `None` if the two are not both carried on
            (`error_correction` `"none"` or `"intra"`, or nothing corrected), and after the last operator pruned.
        seconds: Wall time of the layer.
        memory: The most memory that the process held while the layer's operators were pruned; `None` if there are
            none.
        mixture: Its mixture, if that lost experts.
        dense_sha256: Digest of its tensors before (`model.offload.sha256_of`).
    """

    name: str
    hidden_state_error: float | None
    seconds: float
    memory: MemoryPeak | None = None
    mixture: MixtureReport | None = None
    dense_sha256: str | None = None


@dataclass(frozen=True)
class LayerRecord:
    """The report of one pruned decoder layer with its operators; a streamed run keeps it on disk."""

    report: LayerReport
    operators: list[OperatorReport] = field(default_factory=list)
    left_dense: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RecoveryReport:
    """What a recovery made of the pruned model: its kept weights, trained to predict as the dense model does.

    Attributes:
        teacher: Name of the dense model (a Hub id, or the last part of a path).
        train: What was trained: `"all"` kept weights but embeddings and head, `"lora"` (masked adapters, norms and
            biases) or `"norms"` (norms and biases).
        num_trained: How many weights that were, zeros aside.
        num_tokens: Tokens trained on.
        calibration: Their `source` and `sha256`, `sequence_length`, and `held_out`: sequences never trained on.
        options: How it was trained.
        evaluations: Steps done, seconds of training, and held-out loss: the mean negative log-likelihood of a token.
        best_step: The step whose weights were kept; 0: nothing was gained, and the weights are as they were before.
        held_out_loss_before: The held-out loss before, on the pruned model.
        held_out_loss: The held-out loss of the weights as they were saved.
        seconds: Time of training and evaluation.
    """

    teacher: str
    train: str
    num_trained: int
    num_tokens: int
    calibration: dict[str, Any]
    options: dict[str, Any]
    evaluations: list[list[float]]
    best_step: int
    held_out_loss_before: float
    held_out_loss: float
    seconds: float

    def __str__(self) -> str:
        """One line for people."""
        perplexities = f"perplexity {math.exp(self.held_out_loss_before):.2f} -> {math.exp(self.held_out_loss):.2f}"
        held_out = f"{self.calibration['held_out']} held-out sequences of {self.calibration['sequence_length']} tokens"
        kept = f"best after step {self.best_step}" if self.best_step else "nothing gained, so the weights stayed"
        return (
            f"held-out loss {self.held_out_loss_before:.4f} -> {self.held_out_loss:.4f} ({perplexities}) on {held_out}"
            f"; {WORDS_OF_TRAIN[self.train]} trained ({self.num_trained:,} weights) on {self.num_tokens:,} tokens of "
            f"{self.calibration['source']} in {self.evaluations[-1][0]:.0f} steps and {self.seconds / 60:.1f} min, "
            f"with {self.teacher} as the teacher; {kept}"
        )


WORDS_OF_TRAIN = {
    "all": "all kept weights but embeddings and head",
    "lora": "masked adapters, norms and biases",
    "norms": "norms and biases",
}
"""What a recovery can train, in words."""


@dataclass
class PruningReport:
    """What a pruning run did.

    Attributes:
        config: The configuration, as plain values.
        model: Class, type, name (a Hub id, or the last part of a path) and number of parameters of the model, and the
            `sha256` of the dense model's tensors; also `dense_num_parameters` if parts of it were removed, and what it
            `lacks` of the tensors in the dense model's files.
        calibration: `sha256` of the tokens, `num_sequences`, `num_tokens`, and `source` if known; the same of the
            tokens held out under `held_out`, if there are any.
        operators: One report an operator, in pruning order.
        layers: One report a decoder layer.
        left_dense: Linear operators of the decoder layers that were left dense, with the reason.
        warnings: What the user should know.
        seconds: Wall time of the parts of the run.
        versions: Versions of the libraries that matter.
        retrained: Whether weights were trained after pruning, so that the operators' errors are those before it.
        perplexity: Of the `"dense"` and of the `"pruned"` network on `"num_tokens"` to which no weight was fitted, the
            name of their `"text"` if known, and the size of the `"vocabulary"`; `None` if it was not measured.
        environment: What the run computed with: dtypes, device, attention, processor and threads, and its `batches`,
            `[number, sequences, tokens]` for each shape in turn.
        recoveries: What recoveries (`optimum_fista.recover`) made of it, in order.
    """

    config: dict[str, Any]
    model: dict[str, Any]
    calibration: dict[str, Any]
    operators: list[OperatorReport] = field(default_factory=list)
    layers: list[LayerReport] = field(default_factory=list)
    left_dense: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=library_versions)
    retrained: bool = False
    perplexity: dict[str, Any] | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    recoveries: list[RecoveryReport] = field(default_factory=list)

    def add(self, record: LayerRecord) -> None:
        """Add a decoder layer."""
        self.layers.append(record.report)
        self.operators += record.operators
        self.left_dense |= record.left_dense

    def lack(self, lost: str) -> None:
        """Note what the dense model's files hold and the pruned model lacks."""
        self.model["lacks"] = lost
        self.warn(f"{lost}; the pruned model lacks them")

    def warn(self, message: str) -> None:
        """Add what the user should know, and warn of it."""
        self.warnings.append(message)
        warnings.warn(message, stacklevel=2)

    @property
    def measured_on(self) -> str:
        """What the perplexity was measured on, in words."""
        found = self.perplexity or {}
        text = {None: "text", "self": "text of its own"}.get(found.get("text"), found.get("text"))
        return f"{found['num_tokens']:,} tokens of {text} that no weight was fitted to"

    @property
    def before(self) -> str:
        """What the operators' errors were measured before: `", before retraining"`, or nothing."""
        return ", before retraining" if self.retrained else ""

    @property
    def mixtures(self) -> list[MixtureReport]:
        """Mixtures that lost experts, in the order of their decoder layers."""
        return [layer.mixture for layer in self.layers if layer.mixture is not None]

    @property
    def removed(self) -> str:
        """How much smaller the model is, in words; empty if no part of it was removed."""
        gone, left = self.totals["num_removed"], self.model["num_parameters"]
        share = self.totals["share_removed"]
        return f"{gone:,} of {gone + left:,} parameters removed ({share:.2%}), {left:,} left" if gone else ""

    @property
    def experts_left(self) -> str:
        """How many experts of the mixtures stayed, and how near they come to all, in words; empty if none went."""
        if not self.mixtures:
            return ""
        first, errors = self.mixtures[0], [mixture.fit_error for mixture in self.mixtures]
        before = fmean(mixture.fit_error_before for mixture in self.mixtures)
        refits = "" if not self.config["expert_refit"] else f", {before:.4f} before refits"
        return (
            f"{len(first.groups_kept)} of {len(first.saliency)} experts left in each of {len(errors)} mixtures "
            f"(REAP), fit error of their outputs {fmean(errors):.4f} on average, "
            f"{max(errors):.4f} at most{refits}"
        )

    @property
    def totals(self) -> dict[str, Any]:
        """Sums and means over the pruned operators; `model_sparsity` counts every parameter of the model.

        `num_removed` parameters went with whole parts of the model, `share_removed` of those of the dense one.
        `held_out_ratio` is the mean fit error on held-out tokens over the mean fit error of the same operators: 1 if
        nothing is over-fitted. Without held-out tokens it and the held-out errors are `None`; so are output errors if
        the dense network's outputs were not known.
        """
        weights = sum(o.shape[0] * o.shape[1] for o in self.operators)
        zeros = weights - sum(o.num_kept for o in self.operators)
        dense = self.model.get("dense_num_parameters", self.model["num_parameters"])
        removed = dense - self.model["num_parameters"]
        errors: dict[str, float | None] = {}
        for name in ("fit_error", "output_error", "held_out_fit_error", "held_out_output_error"):
            known = [value for o in self.operators if (value := getattr(o, name)) is not None]
            nothing = 0.0 if name == "fit_error" else None
            errors |= {f"mean_{name}": fmean(known) if known else nothing, f"max_{name}": max(known, default=nothing)}
        both = [(o.held_out_fit_error, o.fit_error) for o in self.operators if o.held_out_fit_error is not None]
        held_out, fitted = (sum(values) for values in zip(*both, strict=True)) if both else (0.0, 0.0)
        return {
            "num_operators": len(self.operators),
            "num_weights": weights,
            "num_zeros": zeros,
            "sparsity": zeros / weights if weights else 0.0,
            "model_sparsity": zeros / self.model["num_parameters"],
            "num_removed": removed,
            "share_removed": removed / dense,
            **errors,
            "held_out_ratio": held_out / fitted if fitted else None,
            "solve_seconds": sum(o.solve_seconds for o in self.operators)
            + sum(mixture.solve_seconds for mixture in self.mixtures),
            "num_not_converged": sum(not o.converged for o in self.operators),
        }

    def command(self) -> str:
        """The command that prunes the same model in the same way; what is not known is in capitals."""
        tokens, sequences = self.calibration["num_tokens"], self.calibration["num_sequences"]
        words = ["optimum-fista", "prune", self.model.get("name") or "MODEL", "--output", "DIR"]
        words += ["--config", "fista/report.json", "--calibration", self.calibration.get("source") or "SOURCE"]
        words += ["--num-samples", str(sequences)]
        if sequences and tokens % sequences == 0:
            words += ["--sequence-length", str(tokens // sequences)]
        if found := self.environment:
            words += ["--batch-size", str(found["batches"][0][1]), "--device", found["device"]]
            words += ["--dtype", found["dtype"].removeprefix("torch.")]
        return shlex.join(words)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self) | {"totals": self.totals, "command": self.command()}

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PruningReport:
        """Inverse of `to_dict`.

        Raises:
            TypeError: If a field is missing, unknown, or of another type.
        """
        values = {key: value for key, value in values.items() if key not in ("totals", "command")}
        report = as_record(cls, values)
        if not report.model["num_parameters"] > 0:
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
        if self.mixtures and not self.operators:
            return f"{self.removed}; {self.experts_left}; {self.seconds.get('total', 0.0):.1f} s"
        experts = f"{self.experts_left}; " if self.mixtures else ""
        zeros = f"{totals['num_zeros']:,} of {totals['num_weights']:,} weights zero ({totals['sparsity']:.2%})"
        return (
            f"{totals['num_operators']} operators pruned by {self.config['method']}, "
            f"{self.removed or zeros}; {experts}"
            f"fit error {totals['mean_fit_error']:.4f} on average, {totals['max_fit_error']:.4f} at most{held_out}, "
            f"output error {output}{self.before}; "
            f"{self.seconds.get('total', 0.0):.1f} s, of which solving {totals['solve_seconds']:.1f} s"
        )


HUB_DATASETS = {"wikitext2": "Salesforce/wikitext", "c4": "allenai/c4", "ptb": "ptb-text-only/ptb_text_only"}
"""Repositories of the data sets that have a short name here."""


def public_name(name: str) -> str:
    """What a folder that is uploaded may say of a Hub id, a data set or a path: of a path only its last part."""
    is_path = os.path.exists(name) or os.path.isabs(name) or name.startswith(("~", "."))
    return os.path.basename(os.path.abspath(name)) if is_path else name


class OperatorGrid:
    """Operators by decoder layer (rows) and kind (columns).

    Attributes:
        cells: The operators of a layer and a kind (`layer_and_kind`); only those that there are.
        kinds: The operators of each kind, layer by layer; the experts of a mixture share a kind.
        layers: Names of the decoder layers, in pruning order, as the kinds are.
    """

    def __init__(self, operators: Iterable[OperatorReport]) -> None:
        self.cells: dict[tuple[str, str], list[OperatorReport]] = {}
        self.kinds: dict[str, list[OperatorReport]] = {}
        for operator in operators:
            layer, kind = layer_and_kind(operator.name)
            self.cells.setdefault((layer, kind), []).append(operator)
            self.kinds.setdefault(kind, []).append(operator)
        self.layers = list(dict.fromkeys(layer for layer, _ in self.cells))


def layer_and_kind(name: str) -> tuple[str, str]:
    """`model.layers.3` and `self_attn.q_proj` of `model.layers.3.self_attn.q_proj.weight`.

    Experts are counted by a `*`, as in `mlp.experts.*.down_proj`. The layer is empty if the name holds no number.
    """
    match = re.fullmatch(r"(.*?\.\d+)\.(.+)", name)
    layer, kind = match.groups() if match else ("", name)
    kind = re.sub(r"(experts)\.\d+\.", r"\1.*.", kind.removesuffix(".weight"))
    return layer, re.sub(r"\[\d+", "[*", kind)

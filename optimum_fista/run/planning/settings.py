"""Settings of a run that a plan is made for."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.planning.model import LayerKind
from optimum_fista.solve.cost import SolveCost
from optimum_fista.solve.patterns import parse_pattern

_SAMPLED_TOGETHER = 32
"""Sequences that `run.texts.self_sampling` writes at a time."""


@dataclass(frozen=True)
class PlanSettings:
    """Everything but the model that memory and work depend on.

    Attributes:
        config: The configuration, with the method's defaults filled in.
        cost: Cost of the method.
        num_samples: Calibration sequences, held-out ones included.
        sequence_length: Tokens a sequence.
        batch_size: Sequences a forward pass.
        element_size: Bytes of a weight.
        maps_files: Whether weights on the device are pages of the checkpoint's files: on a CPU, in the stored dtype.
        on_cpu: Whether the device is the CPU.
        storage: Where hidden states wait, `"device"`, `"host"`, or `"disk"`: in files, which count nowhere.
        calibration: Source of the calibration text.
    """

    config: FistaPruningConfig
    cost: SolveCost
    num_samples: int
    sequence_length: int
    batch_size: int
    element_size: int
    maps_files: bool
    on_cpu: bool
    storage: str
    calibration: str

    @property
    def tokens(self) -> int:
        """Calibration tokens, held-out ones included."""
        return self.num_samples * self.sequence_length

    @property
    def fitted_tokens(self) -> int:
        """Calibration tokens without those held out."""
        return (self.num_samples - self.config.held_out) * self.sequence_length

    @property
    def batches(self) -> float:
        """Batches, the last one counted by its size."""
        return self.num_samples / self.batch_size

    @property
    def batch_tokens(self) -> int:
        """Tokens of a batch."""
        return self.batch_size * self.sequence_length

    @property
    def allocation_tokens(self) -> int:
        """Tokens of the sequences that gradients are taken on."""
        sequences = -(-self.config.allocation_tokens // self.sequence_length)
        return min(self.fitted_tokens, sequences * self.sequence_length)

    @property
    def allocates(self) -> bool:
        """Whether zeros are shared by gradients of the loss."""
        return self.config.allocation == "fisher" and not parse_pattern(self.config.pattern).fixed

    @property
    def stacks(self) -> bool:
        """Whether operators that share inputs are pruned as one."""
        return self.allocates and self.config.scope == "matrix"

    @property
    def carries_on(self) -> bool:
        """Whether the pruned hidden states are carried on between decoder layers."""
        return self.config.error_correction not in ("none", "intra")

    @property
    def dense_share(self) -> float:
        """Share of the dense inputs in the targets."""
        given = self.config.error_correction
        return 1.0 if isinstance(given, str) or given is None else float(given)

    @property
    def residual(self) -> float:
        """Share of the residual correction."""
        return self.config.residual_correction or 0.0

    @property
    def records_dense(self) -> bool:
        """Whether operators need anything that only the dense hidden states show."""
        return not self.carries_on or self.dense_share > 0 or self.residual > 0

    @property
    def runs_dense(self) -> bool:
        """Whether the dense hidden states are needed."""
        return self.records_dense or self.finetunes

    @property
    def finetunes(self) -> bool:
        """Whether decoder layers are fine-tuned."""
        return self.config.finetune is not None

    @property
    def streams(self) -> int:
        """Streams of hidden states."""
        return int(self.runs_dense) + int(self.carries_on)

    def sees_dense(self, group: int) -> bool:
        """Whether the inputs of a group of operators, by its place in the decoder layer, are the dense network's."""
        given = self.config.error_correction
        return given == "none" or (given == "intra" and group == 0)

    def corrects_residual(self, kind: LayerKind, group: int) -> bool:
        """Whether a group makes up for the residual stream; that its output is added to it is taken for granted."""
        groups = kind.probe.groups
        return self.residual > 0 and group == len(groups) - 1 and len(groups[group]) == 1 and not kind.experts

    def embedding_bytes(self, model: PreTrainedModel) -> int:
        """Bytes of the input embedding."""
        weight = model.get_input_embeddings().weight
        assert weight is not None
        return int(weight.numel()) * self.element_size  # type: ignore[operator]

    def vocabulary(self, model: PreTrainedModel) -> int:
        """Rows of the input embedding."""
        return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index]

    def cache_bytes(self, model: PreTrainedModel) -> int:
        """Keys and values of the sequences that a model samples at a time."""
        text = model.config.get_text_config(decoder=True)
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        sequences = min(_SAMPLED_TOGETHER, self.num_samples)
        return 2 * text.num_hidden_layers * sequences * self.sequence_length * heads * width * self.element_size

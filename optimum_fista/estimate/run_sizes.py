"""A run that is planned on a model without weights, and the sizes that its bytes and seconds follow from.

`RunSizes` builds the model on the meta device, which has shapes but no weights, and plans the run exactly as
`FistaPruner` does (`plan_run`). `peak_memory.py` computes from it which bytes the run holds, and `trial.py` how long it
takes; an `Estimate` is a `RunSizes` that gives both.

Words: an *operator* is a linear operator of a decoder layer, a matrix [out, in], called by the name of its module, such
as "model.layers.3.mlp.up_proj". A *stream* is the hidden states of all calibration sequences in one network, dense or
pruned. *Held-out* sequences are not fitted to. Activations that *wait*, such as the hidden states between two decoder
layers, are in the run's *storage*: on the device, on the host or on disk. Matrices are *widened* if they are copied to
float32 for each product, because the CPU is slow in their dtype.
"""

import copy
import math
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_fista.config import FistaPruningConfig
from optimum_fista.devices import default_device, floating_dtype
from optimum_fista.model.layers import prunable_layers, token_limits
from optimum_fista.model.precision import choose_products
from optimum_fista.model.sensitivity import TOKENS_TOGETHER
from optimum_fista.prune.budgets import longest_of_loss
from optimum_fista.prune.plan import Budgets, Plan, plan_run
from optimum_fista.removal.planning import plan_removal, require_zeros_to_pack
from optimum_fista.removal.removal import Removal
from optimum_fista.source import loading
from optimum_fista.source.formats.dequantizer import read_dequantized
from optimum_fista.source.inventory import source_tensors
from optimum_fista.source.prediction_layers import with_fewer_experts
from optimum_fista.source.quantization import forget_quantization, quantization
from optimum_fista.text.calibration_tokens import usual_length
from optimum_fista.verdict import LEAST_TOKENS


class RunSizes:
    """The plan of a run, and the sizes that follow from it; arguments are those of `optimum-fista prune`.

    Of the model only the configuration is read, and the headers of the files if it is a folder. Wrong options raise
    `ValueError`. Bytes are those of the whole run if nothing else is said.

    Attributes of the model:
        model: The dense model on the meta device.
        source: The tensors of the files (`SourceTensors`). Layers that predict more tokens have lost their experts.
        quantized: The quantization settings of the source; None if it is not quantized.
        weight_bytes: Of all parameters of the dense model.
        value_bytes: Of a weight, and of a value in a hidden state.
        vocabulary, hidden: Rows and columns of the embedding.
        is_loaded_whole: Whether all weights are in memory during the run, as those of a GGUF file are.
        reads_files: Whether weights are read into memory from files; otherwise they are pages of the files, or loaded
            whole.

    Attributes of the plan:
        config: The user's configuration, with a value for each option that was left open.
        layers: The decoder layers, with their names.
        operators: Shapes [out, in] of the operators to prune or to fit anew, by name (`"model.layers.3.mlp.up_proj"`).
        operators_of_layers: The names of these operators for each decoder layer.
        weights, zeros: Numbers of their weights, and of those that become zero or are removed, by the same names.
        left_dense: Reasons why other operators stay dense, by name.
        num_removed: Parameters that the result lacks.
        num_removed_layers, removes_experts, removed_parts: What whole parts the run removes.
        kept_expert_bytes: Of the experts that stay in a layer that loses some, by the name of the decoder layer.
        refit_bytes: Of the matrices of the refit of one expert, if experts are refitted.
        prediction_experts: Of layers that predict more tokens: how many experts stay, and of how many, by the name of
            their mixture.
        prediction_bytes: Of the copies of these layers from which they run, before any expert is removed.
        as_stored: Whether tensors are written as they are stored, because the run only removes parts.
        allocates: Whether operators share the zeros by gradients of the loss.
        num_streams: Networks whose hidden states are computed: 0 to 2.
        packed: Whether the result is stored without its zeros.
        measures_perplexity: Whether the run measures the perplexity of held-out text.

    Attributes of the machine and the text:
        place, device, on_cpu: The device as the user named it, its type (such as `"cuda"`), and whether it is the CPU.
        storage_device, storage: Where activations wait, as the user named it and as one of three words.
        widens: Whether matrices are widened.
        num_samples, length: All sequences, and the tokens in each.
        num_sources: Texts that the sequences are of.
        sequences_of_loss, length_of_loss: On which it computes the loss of the dense model, and the tokens in each.
        batch_size: Sequences in a forward pass; 1 if the user passes none (`Estimate` then chooses it).
        sequence_bytes, stream_bytes: Of the hidden states of one sequence, and of all.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedConfig,
        config: FistaPruningConfig | None = None,
        *,
        num_samples: int = 128,
        sequence_length: int | None = None,
        batch_size: int | None = None,
        device: str | None = None,
        dtype: str | torch.dtype = "auto",
        storage_device: str | None = None,
        packed: bool = False,
        measures_perplexity: bool = True,
        num_sources: int = 1,
    ) -> None:
        """Plan the run on a model without weights. Each step sets fields that later steps use.

        Arguments are the flags of `optimum-fista prune`; `None`: the usual value. Reads the model's configuration,
        which the Hub's client may download, and the headers of the files of a model folder. ValueError if options are
        wrong.
        """
        if config is None:
            config = FistaPruningConfig()
        config = config.resolved()
        require_zeros_to_pack(config, packed)
        sizes = (
            ("num_samples", num_samples, 1),
            ("sequence_length", sequence_length, 2),
            ("batch_size", batch_size, 1),
        )
        for name, size, least in sizes:
            if size is not None and size < least:
                flag = name.replace("_", "-")
                raise ValueError(f"{name}={size} (--{flag}): pass at least {least}.")
        self.num_samples = num_samples
        self.num_sources = num_sources
        self.batch_size = 1 if batch_size is None else batch_size
        self.packed = packed

        self._choose_places(device, storage_device)
        model_config = self._describe_model(model, dtype)
        self.length = usual_length(model_config) if sequence_length is None else sequence_length
        _, longest = token_limits(self.model)  # None: any length
        if longest is not None and self.length > longest:
            raise ValueError(
                f"sequence_length={self.length} (--sequence-length): the model has {longest} positions "
                f"(max_position_embeddings), so pass at most {longest}."
            )
        # Whether a matrix is copied to float32 for each product.
        products = choose_products(config.compute_dtype, torch.device("cpu"), self.model.dtype)
        self.widens = self.on_cpu and products == "widened"

        is_folder = not isinstance(model, PreTrainedConfig) and Path(model).is_dir()
        folder = Path(str(model)) if is_folder else None
        plan = self._plan_run(config, folder, files_dtypes=dtype == "auto")
        self._take_plan(plan)
        # A network whose experts are removed is not measured, because its dense layers are gone by then.
        self.measures_perplexity = measures_perplexity and not self.removes_experts

    @property
    def length_of_loss(self) -> int:
        """Tokens of a sequence that the run computes the loss and its gradients on."""
        return self.length_of_loss_with(self.num_samples)

    def length_of_loss_with(self, num_samples: int) -> int:
        """Tokens of a sequence that a run with so many sequences, held-out ones too, computes the loss on."""
        longest = longest_of_loss(self.config, num_samples - self.config.held_out)
        return self.length if longest is None else min(self.length, longest)

    @property
    def tokens_of_loss_together(self) -> int:
        """Tokens that gradients are computed on together: of one sequence, or of several short ones."""
        at_once = max(1, TOKENS_TOGETHER // self.length_of_loss)  # sequences
        return self.length_of_loss * min(at_once, math.ceil(self.sequences_of_loss))

    @property
    def sequences_of_loss(self) -> float:
        """Sequences that have `allocation_tokens` tokens: one of each text at least, and at most all; not rounded."""
        assert self.config.allocation_tokens is not None  # the configuration is resolved
        wanted = self.config.allocation_tokens / self.length_of_loss
        if self.num_sources > 1:
            wanted = max(self.num_sources, wanted)
        return min(wanted, self.num_samples)

    def _choose_places(self, device: str | None, storage_device: str | None) -> None:
        """Set `device`, the type of the device that computes, and `storage`, where activations wait.

        `storage` becomes "device", "host" or "disk". The arguments are the user's, such as "cuda:1". `place` and
        `storage_device` keep them as they are, for the trial.
        """
        self.place = device
        # "cuda:1" is a device of the type "cuda".
        self.device, _, _ = (device or default_device()).partition(":")
        self.on_cpu = self.device == "cpu"

        self.storage_device = storage_device
        default_storage = "disk" if self.on_cpu else self.device
        storage, _, _ = (storage_device or default_storage).partition(":")
        self.storage: Literal["device", "host", "disk"]
        if storage == self.device:
            self.storage = "device"
        elif storage == "cpu":
            self.storage = "host"
        else:
            self.storage = "disk"

    def _describe_model(
        self, model: str | Path | PreTrainedConfig, dtype: str | torch.dtype
    ) -> PreTrainedConfig:
        """Build the dense model without weights and set `self.model`, and fields with the sizes that bytes depend on.

        `model` and `dtype` are the user's; a configuration that is passed stays as it is, and that of a Hub id is
        downloaded into the cache. Returns a configuration without quantization settings.
        """
        if isinstance(model, PreTrainedConfig):
            stored_config = model
            self.is_loaded_whole = False
        else:
            stored_config = loading.read_config(str(model))
            # A GGUF file is read whole: its weights are unpacked to float32.
            self.is_loaded_whole = loading.gguf_file(str(model)) is not None
        self.quantized = quantization(stored_config)
        model_config = copy.deepcopy(stored_config)
        if self.quantized:
            # Both change the copy. The first one sets its dtype, and refuses formats that can't be read.
            read_dequantized(model_config)
            forget_quantization(model_config)

        stored_dtype = torch.float32
        named_dtype = getattr(model_config, "dtype", None)
        if named_dtype and not self.is_loaded_whole:
            stored_dtype = floating_dtype(named_dtype)
        used_dtype = stored_dtype if dtype == "auto" else floating_dtype(dtype)
        # On the CPU, weights in the stored dtype are pages of the checkpoint's files, which the system can drop.
        maps_files = self.on_cpu and stored_dtype == used_dtype and not self.quantized
        self.reads_files = not self.is_loaded_whole and not maps_files

        self.model: PreTrainedModel = loading.model_without_weights(model_config, used_dtype)
        self.weight_bytes = sum(parameter.nbytes for parameter in self.model.parameters())
        self.value_bytes = used_dtype.itemsize  # of a weight, and of a hidden state
        embedding = next(self.model.get_input_embeddings().parameters())
        self.vocabulary, self.hidden = embedding.shape
        return model_config

    def _plan_run(
        self, config: FistaPruningConfig, folder: Path | None, *, files_dtypes: bool
    ) -> Plan:
        """Plan the run as `FistaPruner` does, on `self.model`, which has no weights. Changes nothing.

        `config` has a value for each option. `folder` holds the model's files; `None`: they are not known.
        `files_dtypes`: tensors keep the dtypes that they have in the files, because the user asks for no other.
        """
        removal = plan_removal(
            prunable_layers(self.model, loaded=False), config, num_texts=self.num_sources
        )
        source = None
        if folder is not None:
            # Tensors stay as they are stored if the run only removes parts.
            stays_quantized = files_dtypes and removal.keeps_values
            with loading.reading(str(folder)):  # errors name the folder
                source = source_tensors(
                    self.model,
                    folder,
                    removal.part_of,  # by a tensor's name: the part that becomes smaller
                    quantized=stays_quantized,
                    layers_name=removal.layers.name,
                )
        return plan_run(removal, source, loaded=False, files_dtypes=files_dtypes)

    def _take_plan(self, plan: Plan) -> None:
        """Set the fields that follow from the plan of the run: operators, their weights and zeros, and the steps.

        Uses `model`, `length`, `num_samples` and the sizes of `_describe_model`, which are set before.
        """
        self._take_prediction_layers(plan)
        self.as_stored = plan.as_stored
        # Values decide which decoder layers are removed. For the numbers it does not matter.
        self.num_removed_layers = plan.removal.num_removed_layers
        # Assumed are the layers 1, 2 and so on, each with a loss after its removal.
        removed_layers = [(index, 0.0) for index in range(1, 1 + self.num_removed_layers)]
        # `Budgets` are what a run decides by values; `with_budgets` returns another plan.
        plan = plan.with_budgets(Budgets(removed_layers=removed_layers))
        removal = plan.removal
        self.layers = plan.layers
        self.config = plan.config
        self.left_dense = removal.left_dense
        self.num_removed = self.model.num_parameters() - removal.num_parameters
        self.removed_parts = removal.removed_parts
        self._take_mixtures(removal)

        self.operators = _operators_to_solve(removal)
        self.operators_of_layers = [  # names, by the number of the layer
            [name for name in self.operators if name.startswith(f"{layer_name}.")]
            for layer_name, _ in self.layers
        ]
        self.weights = {name: rows * columns for name, (rows, columns) in self.operators.items()}
        self.zeros = {
            name: self.weights[name] - removal.patterns[name].num_kept(shape)
            for name, shape in self.operators.items()
        }

        # Operators that share the zeros of the model have a common budget of zeros.
        self.allocates = any(self.config.shares_budget(name) for name in self.operators)
        # Hidden states of the dense network, and of the pruned one.
        correction = self.config.correction
        has_pruned_stream = correction.carry == "full"
        self.num_streams = int(correction.needs_dense) + int(has_pruned_stream)
        self.sequence_bytes = self.value_bytes * self.length * self.hidden  # of hidden states
        self.stream_bytes = self.num_samples * self.sequence_bytes

    def _take_mixtures(self, removal: Removal) -> None:
        """Set what is known of mixtures that lose experts: `removes_experts`, `kept_expert_bytes`, `refit_bytes`.

        `removal` is what the run takes from the model, and `self.model` has the shapes of its tensors.
        """
        self.removes_experts = bool(removal.mixtures)
        self.kept_expert_bytes: dict[str, float] = {}
        self.refit_bytes = 0.0
        state = self.model.state_dict()
        for layer_name, part in removal.mixtures.items():
            tensors = {name: state[name] for name in part.tensors}
            share = removal.num_groups_kept[part.name] / part.groups
            all_bytes = sum(tensor.nbytes for tensor in tensors.values())
            self.kept_expert_bytes[layer_name] = share * all_bytes
            if not removal.refits_experts:
                continue
            down_projections = [
                tensor for name, tensor in tensors.items() if name.endswith("down_proj")
            ]
            for tensor in down_projections:  # [experts, out, in], or [experts, in, out]
                _, *sizes = tensor.shape
                # Some models store them transposed: the larger matrices are counted.
                num_inputs = max(sizes)
                matrices = num_inputs**2 + math.prod(sizes)
                # A Gram matrix and targets in float32, for each text, and four copies of their sums.
                self.refit_bytes = max(self.refit_bytes, 4 * (self.num_sources + 4) * matrices)

    def _take_prediction_layers(self, plan: Plan) -> None:
        """Set `source`, and what is known of layers that predict more tokens and lose experts with the model.

        Sets also `prediction_experts` and `prediction_bytes`. `plan` is that of the run; only descriptions of tensors
        are read. `self.model` has the shapes of all parameters.
        """
        self.prediction_experts: dict[str, tuple[int, int]] = {}
        self.prediction_bytes = 0
        stored = plan.source.stored
        in_layers = f"{plan.layers.name}."  # such as "model.layers."
        names_around = [
            name for name, place in plan.source.places.items() if not place.startswith(in_layers)
        ]
        state = self.model.state_dict()
        first_experts: dict[str, range] = {}  # which ones stay does not matter for the sizes

        for layer in plan.source.prediction_layers:
            num_kept = plan.removal.num_groups_kept[layer.part.name]
            self.prediction_experts[layer.mixture] = (num_kept, layer.part.groups)
            first_experts[layer.mixture] = range(num_kept)
            # It is copied to a model of its own, with all that is around the decoder layers.
            copied = [*layer.places, *names_around]
            self.prediction_bytes += sum(stored[name].num_bytes for name in copied)
            if not self.quantized:  # the lazy reader copies fused experts once more
                mixture = [state[name] for name in layer.part.tensors]
                self.prediction_bytes += sum(t.nbytes for t in mixture if t.ndim == 3)

        self.source = with_fewer_experts(plan.source, self.model, first_experts)

    @property
    def num_held_out(self) -> int:
        """Number of sequences to measure the perplexity on; 0 if `self.measures_perplexity` is False.

        These are as many as have `LEAST_TOKENS` tokens, and at most the user's `held_out` if there is one.
        """
        if not self.measures_perplexity:
            return 0
        sequences = math.ceil(LEAST_TOKENS / self.length)  # tokens that a perplexity needs
        if self.config.held_out:
            return min(sequences, self.config.held_out)
        return sequences


def _operators_to_solve(removal: Removal) -> dict[str, tuple[int, int]]:
    """Return the shapes [out, in] of the operators to solve for, by name.

    They get zeros, lose inputs, or are the last of their decoder layer, which compensates for the errors of the others.
    `removal` is what the run takes from the model: it has the operators of each decoder layer, in the order in which
    they run, and the pattern of each by its name. Changes nothing.
    """
    operators: dict[str, tuple[int, int]] = {}
    for operators_of_layer in removal.operators.values():
        names = list(operators_of_layer)
        for name, operator in operators_of_layer.items():
            is_last = name == names[-1]
            if is_last or removal.patterns[name].sparsity > 0:
                operators[name] = operator.shape
    return operators

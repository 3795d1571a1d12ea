"""Train a pruned model without losing its zeros, by hand or by the Trainer, and save it again.

A mask is a boolean tensor of the shape of a parameter, True = kept: a pruned weight is zero if its mask is False. The
masks are not part of the model: hooks apply them to gradients before any other code reads them, and to weights after
each step. So every PyTorch optimizer, clipping, accumulation and FSDP2 work unchanged, and checkpoints hold plain
weights. The masks come from the pruning run, because a kept weight may be zero too.

`masked_training` is a `with` block around a loop of one's own; `MaskedTrainingCallback` does the same inside
`transformers.Trainer`. Afterwards `save_masked` writes the model with the masks and the report of the pruning run.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import cached_file

from optimum_fista import internals
from optimum_fista.folder.checkpoint import (
    CONFIG_KEY,
    MASKS_FILE,
    REPORT_FILE,
    mark_retrained,
    read_report,
)
from optimum_fista.folder.naming import as_in_model, operators_by_weight
from optimum_fista.folder.output import new_output
from optimum_fista.folder.packed_folder import is_packed, packed_operators
from optimum_fista.folder.writing import summary, write_checkpoint
from optimum_fista.model.experts import is_fused_experts
from optimum_fista.model.layers import find_decoder_layers, require_unquantized
from optimum_fista.model.operators import LINEAR
from optimum_fista.pruner import FistaPruner
from optimum_fista.report import PruningReport
from optimum_fista.solve.pattern import unpack_mask
from optimum_fista.source.inventory import source_tensors
from optimum_fista.source.model_folder import CONFIG_FILE

# The pruner that pruned the model; the folder or Hub id that the model was loaded from; masks by parameter name;
# `None`: the zeros that the weights have now.
MaskSource: TypeAlias = FistaPruner | str | Path | Mapping[str, Tensor] | None

# Integers that have as many bytes as a floating-point number.
_INTEGERS_BY_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# A smaller share of zeros is chance: a few weights of dense models are zero, too.
_SHARE_BY_CHANCE = 1e-3
# A model of an unknown program counts as pruned from this share of zeros on.
_SHARE_OF_PRUNED = 0.2


@contextmanager
def masked_training(
    model: PreTrainedModel, masks: MaskSource = None, *, fill_zeros: bool = False
) -> Iterator[None]:
    """Keep the zeros of a pruned model zero while it is trained, with any PyTorch optimizer.

    Use it in a `with` block around the training loop. Gradients outside the masks are zero before they are accumulated,
    so that clipping, loss scaling, the other processes and the optimizer's moments never see them. The weights
    themselves are zero after every optimizer step, for optimizers that move weights without a gradient.

    It needs one byte for each weight of a pruned parameter, and one pass over these weights for each backward pass and
    each step. Sharded weights of PyTorch's `fully_shard` (FSDP2) are supported: enter the `with` block after
    `fully_shard` and before the first forward pass, with a folder. FSDP1 and DeepSpeed are not supported.

    Inside the block, parameters have hooks, and PyTorch has a hook on the steps of all optimizers. At the end, also
    after an error, all hooks are removed, and the weights are masked once more. A step that trains the model notes in
    `model.config.fista_pruning` that it was retrained.

    Args:
        model: A pruned model, in memory.
        masks: The `FistaPruner` that pruned it; the folder or Hub id it was loaded from; boolean masks by parameter
            name, True = kept; `None`: the zeros that the weights have now.
        fill_zeros: Train zeros that an earlier run has left and no mask of `masks` covers. Otherwise they are refused.

    Raises:
        ValueError: If the model is quantized, offloaded or not pruned, the masks are not those of this model, or zeros
            of an earlier run have no mask.
        FileNotFoundError: If the folder or repository holds no masks.
    """
    masks_by_name = find_masks(model, masks, fill_zeros=fill_zeros)
    zeros = _PrunedZeros(model, masks_by_name)
    with ExitStack() as hooks:
        for parameter in zeros.parameters:
            if not parameter.requires_grad:
                continue

            if isinstance(parameter, DTensor):  # sharded; FSDP2 calls these hooks and no others
                hook = parameter.register_post_accumulate_grad_hook(zeros.restore_in_gradient)
            else:
                hook = parameter.register_hook(partial(zeros.restored_gradient, parameter))
            hooks.callback(hook.remove)

        hooks.callback(register_optimizer_step_post_hook(zeros.after_step).remove)
        hooks.callback(zeros.restore)  # the last in is called first, also after an error
        yield


class _PrunedZeros:
    """The zeros of a pruned model, and the hooks that restore them in weights and gradients.

    Attributes:
        parameters: The parameters of the model that have zeros; the others need no hook.
    """

    def __init__(self, model: PreTrainedModel, masks: Mapping[str, Tensor]) -> None:
        """Find the zeros of `model`; `masks` are boolean, True = kept, by the name of the parameter."""
        self._model = model
        parameters = plain_parameters(model)
        self._all_parameters = {*parameters.values()}
        # The mask of each parameter that has zeros, by the parameter itself (tensors are hashed by identity).
        self._mask_of: dict[Tensor, Tensor] = {
            parameters[name]: mask for name, mask in masks.items() if not mask.all()
        }
        self.parameters = list(self._mask_of)

    def restore(self) -> None:
        """Set the pruned weights of all parameters to zero."""
        for parameter in self.parameters:
            self._clear(parameter.data, parameter)

    def restored_gradient(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """Return a copy of the gradient of `parameter` that is zero where it is pruned; a hook of the parameter."""
        # The gradient is a tensor of autograd's, which may be used elsewhere.
        return self._clear(gradient.clone(), parameter)

    def restore_in_gradient(self, parameter: Tensor) -> None:
        """Clear the gradient of `parameter` that FSDP2 has summed over the processes; a hook of its parameters."""
        self._clear(cast(Tensor, parameter.grad), parameter)

    def after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """If an optimizer trains a parameter of this model, set its pruned weights to zero, and note the training.

        A hook that PyTorch calls after each step of every optimizer in the process. `mark_retrained` changes the
        model's configuration.
        """
        for group in optimizer.param_groups:
            if not self._all_parameters.isdisjoint(group["params"]):
                mark_retrained(self._model)
                self.restore()
                return

    def _clear(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        """Set `tensor` (a parameter or its gradient) to zero in place where `parameter` is pruned.

        Returns `tensor`, or the part of it that is in this process.
        """
        mask = self._mask_of[parameter].to(parameter.device)  # the model may have moved
        self._mask_of[parameter] = mask
        values = local(tensor)  # the same memory
        # The bits of the numbers are taken as integers and multiplied by 0 or 1. So NaN becomes zero, too, and this is
        # 20 times as fast as `masked_fill_` on a CPU.
        values.view(_INTEGERS_BY_SIZE[values.element_size()]).mul_(mask)
        return values


class MaskedTrainingCallback(TrainerCallback):
    """Keeps the zeros of a pruned model zero during `Trainer.train`, resumed runs included.

    Args:
        masks: Where the masks come from, as in `masked_training`.
        fill_zeros: Train zeros of an earlier run that have no mask, as in `masked_training`.
    """

    def __init__(self, masks: MaskSource = None, *, fill_zeros: bool = False) -> None:
        self.masks = masks
        self.fill_zeros = fill_zeros
        self._training = ExitStack()  # holds the `masked_training` of a run that goes on

    def on_train_begin(self, args: TrainingArguments, *_: Any, **given: Any) -> None:
        """Enter `masked_training` for the Trainer's model (`given["model"]`), with `self.masks` and `self.fill_zeros`.

        The Trainer calls it. The model gets the hooks of `masked_training`, and `self._training` (an ExitStack) keeps
        that block open until `on_train_end`. Refuses the same models as `masked_training`, and weights of DeepSpeed and
        FSDP1. `self.masks` says where the masks come from, and `self.fill_zeros` whether zeros without a mask are
        trained.
        """
        model = given["model"]
        if args.deepspeed_plugin or isinstance(model, FullyShardedDataParallel):
            raise ValueError(
                "MaskedTrainingCallback does not know the weights that DeepSpeed and FSDP1 keep: use FSDP2 (accelerate "
                "launch --use_fsdp --fsdp_version 2), or no sharding."
            )

        self._training.close()  # the hooks of a training that failed before `on_train_end`
        self._training.enter_context(masked_training(model, self.masks, fill_zeros=self.fill_zeros))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Leave `masked_training`: hooks are removed, and weights are masked once more.

        The weights need it, because the Trainer may have loaded its best checkpoint.
        """
        self._training.close()


def save_masked(
    model: PreTrainedModel,
    folder: str | Path,
    source: FistaPruner | str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Save a pruned model that was trained under its masks, with the masks and the report of its pruning.

    The report, the model card and `config.json` say that it was retrained. `folder` may be `source` with `overwrite`.

    `model.config` is written to `config.json`, and afterwards has these entries of it: `fista_pruning` (the summary of
    the report, with `"retrained": True`), `architectures`, `dtype`, `tie_word_embeddings` (False if the weights are no
    longer tied), and numbers of layers that predict more tokens (0 if the model lacks these layers). The weights stay
    as they are.

    Args:
        model: The model, its zeros still zero and its weights not sharded.
        folder: Where to write it.
        source: The folder or Hub id the pruned model was loaded from, or the `FistaPruner` that pruned it.
        tokenizer: Saved with the model.
        overwrite: Replace a model that the folder already holds.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            "model has sharded weights: put them together by torch.distributed.checkpoint.state_dict."
            "get_model_state_dict with full_state_dict=True, load them into a model that is not sharded, and save that."
        )

    # Files have the names of a model without the wrappers of Accelerate. They are back at the end of the block.
    with internals.without_checkpoint_wrappers(model):
        report, masks = find_record(model, source)
        if isinstance(source, FistaPruner):
            tensors_of_source = source.sources[model]  # what the pruner noted of the model's files
        else:
            tensors_of_source = source_tensors(model, pruned_folder(source))

        # The configuration may lack the summary, such as that of a new model with the weights of the pruned one.
        if getattr(model.config, CONFIG_KEY, None) is None:
            setattr(model.config, CONFIG_KEY, summary(report))
        mark_retrained(model)

        with new_output(Path(folder), overwrite) as unfinished:
            write_checkpoint(model, unfinished, report, masks, tokenizer, tensors_of_source)


def find_masks(
    model: PreTrainedModel, source: MaskSource = None, *, fill_zeros: bool = False
) -> dict[str, Tensor]:
    """Find the masks of the parameters that hold pruned weights, by parameter name, and check them.

    Each mask is boolean, True = kept, and has the shape of its parameter and its device. Of a sharded parameter (FSDP2)
    it is the part of this process. A parameter without an entry is dense. Changes neither the model nor `source`; masks
    of the Hub are downloaded into its cache.

    Args:
        model: A pruned model, in memory.
        source: Where the masks come from, as in `masked_training`.
        fill_zeros: Do not refuse zeros of an earlier run that no mask covers.

    Raises:
        ValueError: If the model is quantized, offloaded or not pruned, the masks are not those of this model, or zeros
            of an earlier run have no mask.
    """
    if not isinstance(model, PreTrainedModel) and hasattr(model, "get_base_model"):
        raise ValueError(
            f"model is a {type(model).__name__}: merge its adapters first (merge_and_unload())."
        )
    require_unquantized(model)
    # Names of reports and masks are those of a model without wrappers.
    with internals.without_checkpoint_wrappers(model):
        return _found_masks(model, source, fill_zeros=fill_zeros)


def _found_masks(
    model: PreTrainedModel, source: MaskSource, *, fill_zeros: bool
) -> dict[str, Tensor]:
    """Find the masks as `find_masks` does, in a model whose modules have no wrappers; `model` is not changed.

    `source` says where the masks come from (`MaskSource`), and `fill_zeros` whether zeros without a mask are accepted.
    Files of the Hub are downloaded into its cache. Returns boolean masks, True = kept, by parameter name.
    """
    earlier_patterns: list[str] = []  # of earlier runs that set weights to zero, such as "2:4"
    if source is None:
        masks = _masks_of_zeros(model)
    elif isinstance(source, Mapping):
        masks = dict(source)
    else:
        report, packed = find_record(model, source)
        masks = _assemble(model, report, packed)
        # A run that only removed parts has set no weight to zero. `None`: it is not known how many it set.
        steps = [step for step in report.first_model.steps if step.num_zeros != 0]
        earlier_patterns = [step.pattern for step in steps]

    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in parameters:
            raise ValueError(
                f"masks name {name!r}, which is no parameter of {type(model).__name__}."
            )
        masks[name] = _checked_mask(name, parameters[name], mask)

    if earlier_patterns and not fill_zeros:
        _require_no_other_zeros(model, masks, earlier_patterns)
    return masks


def _checked_mask(name: str, weight: Tensor, mask: Tensor) -> Tensor:
    """Return the mask of a parameter on its device; refuse it if the parameter has other weights than zero outside.

    `weight` is the parameter, `name` its name in the model, and `mask` a mask of its shape, which should be boolean,
    True = kept. If the parameter is sharded, the mask that is returned is the part of this process. Changes nothing.
    """
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(
            f"masks[{name!r}] has shape {tuple(mask.shape)} and dtype {mask.dtype}: "
            f"pass torch.bool of shape {tuple(weight.shape)}, True = kept."
        )
    if weight.device.type == "meta":
        raise ValueError(
            f"{name} is offloaded, and offloaded weights can't be trained: load the model without it."
        )

    if isinstance(weight, DTensor):
        # Every process has the whole mask and takes its own part of it. Nothing is sent (`src_data_rank`).
        sharded = distribute_tensor(mask, weight.device_mesh, weight.placements, src_data_rank=None)
        mask = sharded.to_local()
    mask = mask.to(weight.device)

    outside = local(weight.detach()).masked_fill(mask, 0)
    num_not_zero = int(torch.count_nonzero(outside))
    if num_not_zero:
        raise ValueError(
            f"{name} has {num_not_zero} weights outside its mask that are not zero: the model was changed after "
            "pruning, or the masks are those of another model. Load the pruned model, or pass its own masks."
        )
    return mask


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model by the names that they have without PyTorch's checkpoint wrappers."""
    with internals.without_checkpoint_wrappers(model):
        return dict(model.named_parameters())


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that is in this process (FSDP2), in the same memory; all of it if not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def find_record(
    model: PreTrainedModel, source: FistaPruner | str | Path
) -> tuple[PruningReport, dict[str, Tensor]]:
    """Read the report and the packed masks of a pruned model from its pruner, folder or Hub id.

    Operators of the report, and the keys of the masks, have the names of their weights in `model`, such as
    "model.layers.3.mlp.down_proj.weight". A packed mask is uint8, eight weights a byte (`solve.pattern.pack_mask`).
    Files of the Hub are downloaded into its cache; nothing else changes.
    """
    if isinstance(source, FistaPruner):
        return source.result(model)

    folder = pruned_folder(source)
    report = read_report(folder)
    if is_packed(folder):
        packed = {operator.name: mask for operator, _, mask in packed_operators(folder, report)}
    else:
        packed = load_file(_file_of(source, MASKS_FILE))
    operators = operators_by_weight(model, report).values()
    return as_in_model(model, operators, report, packed)


def pruned_folder(source: str | Path) -> Path:
    """The folder of a pruned model that is given as folder or Hub id; refused if it has no report or no masks.

    Of a Hub id, configuration, report and masks are downloaded into the cache, and the result is the folder there.
    """
    folder = _file_of(source, REPORT_FILE).parents[1]
    # The configuration says whether the folder is packed.
    internals.cached_file_if_any(str(source), CONFIG_FILE)
    if not is_packed(folder):  # a packed folder stores the masks with the weights
        _file_of(source, MASKS_FILE)
    return folder


def _file_of(source: str | Path, file: str) -> Path:
    """Return the path of a file of a pruned model, which is downloaded into the Hub's cache if need be.

    `source` is a folder or Hub id, and `file` a path in it, such as "fista/report.json". FileNotFoundError if there is
    no such file.
    """
    try:
        return Path(str(cached_file(str(source), file)))
    except OSError as error:
        raise FileNotFoundError(
            f"{str(source)!r} holds no {file}: pass a folder or Hub id saved by optimum-fista."
        ) from error


def _assemble(
    model: PreTrainedModel, report: PruningReport, packed: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Unpack the masks of operators into masks of parameters, by parameter name.

    An operator is one matrix; experts and fused operators share a parameter, so several operators fill one mask.
    `report` and `packed` come from `find_record`: masks of one bit a weight, by the names of the operators' weights.
    Returns boolean masks on the CPU, True = kept; what belongs to no operator is kept. Changes nothing.
    """
    operators = operators_by_weight(model, report)
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    masks: dict[str, Tensor] = {}
    for entry in report.masked:  # the reports of the operators that have a mask
        operator = operators[entry.name]
        parameter = getattr(operator.owner, operator.tensor)  # of the module that holds the weight
        name = names[id(parameter)]
        if name not in masks:
            masks[name] = torch.ones(parameter.shape, dtype=torch.bool)
        # `select` takes the operator's part of a tensor. It is a view, so the mask of the parameter gets the values.
        part_of_operator = operator.select(masks[name])
        part_of_operator.copy_(unpack_mask(packed[entry.name], tuple(part_of_operator.shape)))
    return masks


def _prunable_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield names and weights of the linear operators of the decoder layers, those of experts too.

    The weights are the parameters themselves, with names such as "model.layers.3.mlp.down_proj.weight". Offloaded ones
    (on the meta device) are left out.
    """
    for layer_name, layer in find_decoder_layers(model):
        for name, module in layer.named_modules(prefix=layer_name):
            if not (isinstance(module, LINEAR) or is_fused_experts(module)):
                continue
            for key, weight in module.named_parameters(recurse=False):
                is_bias = weight.ndim <= 1
                is_offloaded = weight.device.type == "meta"
                if not is_bias and not is_offloaded:
                    yield f"{name}.{key}", weight


def _masks_of_zeros(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return masks of the zeros that the linear operators of the decoder layers have now; refuse a dense model.

    Masks are boolean, True = kept, by parameter name. A model that has lost whole parts and has no zeros gives no
    masks. The configuration of the model (`fista_pruning`) has the number of zeros of all masks that the pruning run
    left: a model with fewer zeros is refused. Changes nothing.
    """
    masks: dict[str, Tensor] = {}
    zeros = 0
    weights = 0
    for name, weight in _prunable_weights(model):
        if local(weight.detach()).shape != weight.shape:
            raise ValueError(
                f"{name} is sharded, so its zeros are not all here: pass the folder of the pruned model."
            )
        mask = weight.detach() != 0
        zeros_of_weight = weight.numel() - int(mask.sum())
        zeros += zeros_of_weight
        weights += weight.numel()
        if zeros_of_weight:  # a dense operator needs no hook
            masks[name] = mask

    # The summary of the pruning run. A model that another program has pruned has none.
    record = getattr(model.config, CONFIG_KEY, None) or {}
    promised = record.get("num_zeros")  # the zeros of all masks
    are_by_chance = zeros < _SHARE_BY_CHANCE * weights
    if promised == 0:  # and not missing: the run only removed whole parts
        # If there are more zeros than by chance, an earlier run left them, without masks.
        return {} if are_by_chance else masks

    lacks_zeros = promised is not None and zeros < promised
    if are_by_chance or lacks_zeros:
        promise = f", its configuration says {promised:,}." if promised else "."
        raise ValueError(
            f"{type(model).__name__} is not pruned, or no longer: {zeros:,} of the {weights:,} weights of its decoder "
            f"layers' linear operators are zero{promise}"
        )
    return masks


def require_dense(model: PreTrainedModel) -> None:
    """Refuse a model without a report that has many zeros all the same: another program may have pruned it.

    A model that was quantized to a few bits before has up to a tenth of zeros by chance.
    """
    zeros = 0
    weights = 0
    for _, weight in _prunable_weights(model):
        zeros += weight.numel() - int(torch.count_nonzero(weight))
        weights += weight.numel()
    if zeros >= _SHARE_OF_PRUNED * weights:
        raise ValueError(
            f"{type(model).__name__} has no report of optimum-fista, but {zeros:,} of the {weights:,} weights of its "
            "decoder layers' linear operators are zero. Training would fill them. Pass fill_zeros=True (--fill-zeros) "
            "to do so. To keep them, train norms alone (recover --train norms), or call masked_training(model)."
        )


def _require_no_other_zeros(
    model: PreTrainedModel, masks: Mapping[str, Tensor], earlier_patterns: list[str]
) -> None:
    """Refuse to train a model that was pruned several times if it has zeros that no mask covers. Changes nothing.

    Training would fill the zeros of such a run, and nothing would say so. A few zeros are there by chance, so two
    shares must be larger than chance explains: that of some operator, which the message names, and that of all weights.

    Args:
        model: The pruned model.
        masks: Those that `find_masks` found, by parameter name: of the last run, and of earlier runs if they were
            carried through it. A mask of a sharded parameter is the part of this process: each process judges
            its own parts.
        earlier_patterns: The patterns of the runs before the last one that set weights to zero, such as `["2:4"]`,
            for the message.
    """
    uncovered = 0
    weights = 0
    first_name = ""  # of an operator with more zeros than by chance
    for name, weight in _prunable_weights(model):
        is_uncovered_zero = local(weight.detach()) == 0
        if name in masks:
            is_uncovered_zero &= masks[name]  # zeros of kept weights
        zeros_of_weight = int(is_uncovered_zero.sum())
        uncovered += zeros_of_weight
        weights += is_uncovered_zero.numel()
        are_by_chance = zeros_of_weight <= _SHARE_BY_CHANCE * is_uncovered_zero.numel()
        if not are_by_chance and not first_name:
            first_name = name

    all_are_by_chance = uncovered < _SHARE_BY_CHANCE * weights
    if first_name and not all_are_by_chance:
        raise ValueError(
            f"{type(model).__name__} has {uncovered:,} zeros that no mask covers, such as those of {first_name}: an "
            f"earlier run ({', '.join(earlier_patterns)}) set them, and its masks for them are lost. Training would "
            "fill them. Pass fill_zeros=True (--fill-zeros) to do so. To keep them, train norms alone "
            "(recover --train norms), or call masked_training(model) without masks, which keeps all zeros of now."
        )

"""Train a pruned model without losing its zeros, by hand or by the Trainer, and save it again.

The masks are not part of the model: hooks apply them to gradients before any other code reads them, and to weights
after each step. So every PyTorch optimizer, clipping, accumulation and FSDP2 work unchanged, and checkpoints hold plain
weights. The masks come from the run, by parameter name, because a kept weight may be zero too.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from safetensors.torch import load_file
from torch import Tensor
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

from optimum_fista.folder.checkpoint import (
    CONFIG_KEY,
    MASKS_FILE,
    REPORT_FILE,
    mark_retrained,
    read_report,
)
from optimum_fista.folder.output import new_output
from optimum_fista.folder.packed_folder import is_packed, packed_operators
from optimum_fista.folder.writing import as_in_model, operators_by_weight, summary, write_checkpoint
from optimum_fista.model.experts import is_fused_experts
from optimum_fista.model.layers import find_decoder_layers, require_unquantized
from optimum_fista.model.operators import LINEAR
from optimum_fista.pruner import FistaPruner
from optimum_fista.report import PruningReport
from optimum_fista.solve.pattern import unpack_mask
from optimum_fista.source.source_tensors import source_tensors

MaskSource: TypeAlias = FistaPruner | str | Path | Mapping[str, Tensor] | None

_BITS = {size: getattr(torch, f"int{8 * size}") for size in (1, 2, 4, 8)}  # dtypes by their bytes
_LEAST_ZEROS = (
    1e-3  # a model with a smaller share of zeros counts as dense: a few may be zero by chance
)


@contextmanager
def masked_training(model: PreTrainedModel, masks: MaskSource = None) -> Iterator[None]:
    """Keep the zeros of a pruned model zero while it is trained, with any PyTorch optimizer.

    Use it in a `with` block around the training loop. Gradients outside the masks are zero before they are accumulated,
    so that clipping, loss scaling, the other processes and the optimizer's moments never see them. The weights
    themselves are zero after every optimizer step, for optimizers that move weights without a gradient.

    It needs one byte for each weight of a pruned parameter, and one pass over these weights for each backward pass and
    each step. Sharded weights of PyTorch's `fully_shard` (FSDP2) are supported: enter the `with` block after
    `fully_shard` and before the first forward pass, with a folder. FSDP1 and DeepSpeed are not supported.

    Args:
        model: A pruned model, in memory.
        masks: The `FistaPruner` that pruned it; the folder or Hub id it was loaded from; boolean masks by parameter
            name, True = kept; `None`: the zeros that the weights have now.

    Raises:
        ValueError: If the model is quantized, offloaded or not pruned, or the masks are not those of this model.
        FileNotFoundError: If the folder or repository holds no masks.
    """
    parameters = dict(model.named_parameters())
    ours = {*parameters.values()}
    found = find_masks(model, masks)
    kept: dict[Tensor, Tensor] = {
        parameters[name]: mask for name, mask in found.items() if not mask.all()
    }

    def clear(tensor: Tensor, parameter: Tensor) -> Tensor:
        """Make a parameter, or its gradient, zero where it is pruned."""
        kept[parameter] = kept[parameter].to(parameter.device)  # the model may have moved
        part = local(tensor)
        # Numbers of the bits: NaN becomes zero, too, and this is 20 times as fast as `masked_fill_` on a CPU.
        part.view(_BITS[part.element_size()]).mul_(kept[parameter])
        return part

    def clear_weights() -> None:
        for parameter in kept:
            clear(parameter.data, parameter)

    def after_step(optimizer: Optimizer, *_: Any) -> None:
        if any(
            parameter in ours for group in optimizer.param_groups for parameter in group["params"]
        ):
            mark_retrained(model)
            clear_weights()

    with ExitStack() as hooks:
        for parameter in kept:
            if not parameter.requires_grad:
                continue
            if isinstance(parameter, DTensor):  # FSDP2 calls these hooks and no others
                summed = parameter.register_post_accumulate_grad_hook(
                    lambda of: clear(cast(Tensor, of.grad), of)
                )
                hooks.callback(summed.remove)
            else:
                mask = lambda gradient, of=parameter: clear(gradient.clone(), of)  # noqa: E731
                hooks.callback(parameter.register_hook(mask).remove)
        hooks.callback(register_optimizer_step_post_hook(after_step).remove)
        hooks.callback(clear_weights)  # first, also after an error
        yield


class MaskedTrainingCallback(TrainerCallback):
    """Keeps the zeros of a pruned model zero during `Trainer.train`, resumed runs included.

    Args:
        masks: Where the masks come from, as in `masked_training`.
    """

    def __init__(self, masks: MaskSource = None) -> None:
        self.masks = masks
        self._training = ExitStack()

    def on_train_begin(self, args: TrainingArguments, *_: Any, **given: Any) -> None:
        """Start; refuses the same models as `masked_training`, and weights of DeepSpeed and FSDP1."""
        if args.deepspeed_plugin or isinstance(given["model"], FullyShardedDataParallel):
            raise ValueError(
                "MaskedTrainingCallback does not know the weights that DeepSpeed and FSDP1 keep: use FSDP2 (accelerate "
                "launch --use_fsdp --fsdp_version 2), or no sharding."
            )
        self._training.close()  # what a training run that failed has left
        self._training.enter_context(masked_training(given["model"], self.masks))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Stop; the weights are masked once more, because the trainer may have loaded its best checkpoint."""
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
    report, masks = find_record(model, source)
    if isinstance(source, FistaPruner):
        stored_as = source.sources[model]
    else:
        stored_as = source_tensors(model, pruned_folder(source))
    if getattr(model.config, CONFIG_KEY, None) is None:
        setattr(model.config, CONFIG_KEY, summary(report))
    mark_retrained(model)
    with new_output(Path(folder), overwrite) as unfinished:
        write_checkpoint(model, unfinished, report, masks, tokenizer, stored_as)


def find_masks(model: PreTrainedModel, source: MaskSource = None) -> dict[str, Tensor]:
    """Masks of the parameters that hold pruned weights, True = kept; of sharded ones (FSDP2) this process's part."""
    if not isinstance(model, PreTrainedModel) and hasattr(model, "get_base_model"):
        raise ValueError(
            f"model is a {type(model).__name__}: merge its adapters first (merge_and_unload())."
        )
    require_unquantized(model)
    if source is None:
        masks = _from_zeros(model)
    elif isinstance(source, Mapping):
        masks = dict(source)
    else:
        masks = _assemble(model, *find_record(model, source))
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in parameters:
            raise ValueError(
                f"masks name {name!r}, which is no parameter of {type(model).__name__}."
            )
        weight = parameters[name]
        if mask.dtype != torch.bool or mask.shape != weight.shape:
            wanted = f"pass torch.bool of shape {tuple(weight.shape)}, True = kept"
            raise ValueError(
                f"masks[{name!r}] has shape {tuple(mask.shape)} and dtype {mask.dtype}: {wanted}."
            )
        if weight.device.type == "meta":
            raise ValueError(
                f"{name} is offloaded, and offloaded weights can't be trained: load the model without it."
            )
        if isinstance(weight, DTensor):
            # every process has the whole mask: none is sent
            mask = distribute_tensor(
                mask, weight.device_mesh, weight.placements, src_data_rank=None
            ).to_local()
        masks[name] = mask.to(weight.device)
        if stray := int(torch.count_nonzero(local(weight.detach()).masked_fill(masks[name], 0))):
            raise ValueError(
                f"{name} has {stray} weights outside its mask that are not zero: the model was changed after pruning, "
                "or the masks are those of another model. Load the pruned model, or pass its own masks."
            )
    return masks


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is in this process (FSDP2), in the same memory; all of it if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def find_record(
    model: PreTrainedModel, source: FistaPruner | str | Path
) -> tuple[PruningReport, dict[str, Tensor]]:
    """The report and the packed masks of a pruned model, under the names of the model."""
    if isinstance(source, FistaPruner):
        return source.result(model)
    folder = pruned_folder(source)
    report = read_report(folder)
    if is_packed(folder):  # the masks are in the weights
        packed = {operator.name: mask for operator, _, mask in packed_operators(folder, report)}
    else:
        packed = load_file(_file_of(source, MASKS_FILE))
    return as_in_model(model, operators_by_weight(model, report).values(), report, packed)


def pruned_folder(source: str | Path) -> Path:
    """The folder of a pruned model by name, which has a report."""
    return _file_of(source, REPORT_FILE).parents[1]


def _file_of(source: str | Path, file: str) -> Path:
    try:
        return Path(str(cached_file(str(source), file)))
    except OSError as error:
        raise FileNotFoundError(
            f"{str(source)!r} holds no {file}: pass a folder or Hub id saved by optimum-fista."
        ) from error


def _assemble(
    model: PreTrainedModel, report: PruningReport, packed: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Unpack the masks of operators into those of parameters; experts and fused operators share a parameter."""
    operators = operators_by_weight(model, report)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    masks: dict[str, Tensor] = {}
    for entry in report.operators:
        operator = operators[entry.name]
        parameter = getattr(operator.owner, operator.tensor)
        mask = masks.setdefault(names[id(parameter)], torch.ones(parameter.shape, dtype=torch.bool))
        part = operator.select(mask)
        part.copy_(unpack_mask(packed[entry.name], tuple(part.shape)))
    return masks


def _from_zeros(model: PreTrainedModel) -> dict[str, Tensor]:
    """Masks of the zeros that the linear operators of the decoder layers have now."""
    masks: dict[str, Tensor] = {}
    record = getattr(model.config, CONFIG_KEY, None)
    if record is not None and not record.get(
        "num_zeros", 1
    ):  # whole parts were removed: nothing has to stay zero
        return masks
    zeros = weights = 0
    candidates = (
        (f"{name}.{key}", weight)
        for layer_name, layer in find_decoder_layers(model)
        for name, module in layer.named_modules(prefix=layer_name)
        if isinstance(module, LINEAR) or is_fused_experts(module)
        for key, weight in module.named_parameters(recurse=False)
        if weight.ndim > 1
        and weight.device.type != "meta"  # no biases; offloaded ones are refused by the count below
    )
    for name, weight in candidates:
        if local(weight.detach()).shape != weight.shape:
            raise ValueError(
                f"{name} is sharded, so its zeros are not all here: pass the folder of the pruned model."
            )
        kept = weight.detach() != 0
        found = weight.numel() - int(kept.sum())
        zeros, weights = zeros + found, weights + weight.numel()
        if found:  # a dense operator needs no hook
            masks[name] = kept
    promised = int((record or {}).get("num_zeros", 0))
    if zeros < max(promised, _LEAST_ZEROS * weights):
        raise ValueError(
            f"{type(model).__name__} is not pruned, or no longer: {zeros:,} of the {weights:,} weights of its decoder "
            f"layers' linear operators are zero"
            + (f", its configuration says {promised:,}." if promised else ".")
        )
    return masks

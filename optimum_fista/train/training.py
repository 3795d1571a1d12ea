"""Training a pruned model without losing its zeros, by hand or by the Trainer, and saving it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from optimum_fista.folder.checkpoint import CONFIG_KEY, mark_retrained
from optimum_fista.folder.output import new_output
from optimum_fista.folder.writing import summary, write_checkpoint
from optimum_fista.pruner import FistaPruner
from optimum_fista.train.trained_masks import MaskSource, find_masks, find_record, local


@contextmanager
def masked_training(model: PreTrainedModel, masks: MaskSource = None) -> Iterator[None]:
    """Keep the zeros of a pruned model zero while it is trained, with any PyTorch optimizer.

    Use it in a `with` block around the training loop. Nothing about the model, its names or its checkpoints changes:

    - a hook on every pruned parameter sets its gradients outside the mask to zero before they are accumulated, so that
      clipping, accumulation, loss scaling, the other processes and the optimizer's moments never see them; if the
      parameter is sharded, it does so once FSDP2 has summed them over the processes;
    - a hook after every optimizer step sets the weights themselves to zero, for optimizers that move weights without a
      gradient.

    Costs a byte a pruned parameter's weight and one pass over these weights a backward pass and a step. Of weights that
    are sharded over processes, those of PyTorch's `fully_shard` (FSDP2) are supported: call it after `fully_shard` and
    before the first forward pass, with a folder. FSDP1 and DeepSpeed are not.

    Args:
        model: A pruned model, in memory.
        masks: The `FistaPruner` that pruned it; the folder or Hub id it was loaded from; boolean masks by parameter
            name, True = kept; `None`: the zeros that the weights have now.

    Raises:
        ValueError: If the model is quantized, offloaded or not pruned, or the masks are not those of this model.
        FileNotFoundError: If the folder or repository holds no masks.
    """
    parameters = dict(model.named_parameters())
    found = find_masks(model, masks)
    pruned: dict[Tensor, Tensor] = {parameters[name]: ~mask for name, mask in found.items() if not mask.all()}
    del found
    ours = {*parameters.values()}

    def zeros(parameter: Tensor) -> Tensor:
        """Where a parameter is pruned, on its device of now."""
        pruned[parameter] = pruned[parameter].to(parameter.device)
        return pruned[parameter]

    def apply() -> None:
        for parameter in pruned:
            local(parameter.data).masked_fill_(zeros(parameter), 0)

    def mask_sharded(parameter: Tensor) -> None:
        assert parameter.grad is not None
        local(parameter.grad).masked_fill_(zeros(parameter), 0)

    def after_step(optimizer: Optimizer, *_: Any) -> None:
        if any(parameter in ours for group in optimizer.param_groups for parameter in group["params"]):
            mark_retrained(model)
            apply()

    with ExitStack() as hooks:
        for parameter in filter(lambda parameter: parameter.requires_grad, pruned):
            if isinstance(parameter, DTensor):  # FSDP2 calls these hooks and no others
                hooks.callback(parameter.register_post_accumulate_grad_hook(mask_sharded).remove)
            else:
                mask = lambda gradient, of=parameter: gradient.masked_fill(zeros(of), 0)  # noqa: E731
                hooks.callback(parameter.register_hook(mask).remove)
        hooks.callback(register_optimizer_step_post_hook(after_step).remove)
        hooks.callback(apply)  # first, also after an error
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
        """Start.

        Raises:
            ValueError: As `masked_training`, and if DeepSpeed or FSDP1 keeps the weights in forms of its own.
        """
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

    The report, the model card and `config.json` say that it was retrained, so that the relative errors are those
    before it.

    Args:
        model: The model, its zeros still zero.
        folder: Where to write it; it may be `source` with `overwrite`.
        source: The folder or Hub id the pruned model was loaded from, or the `FistaPruner` that pruned it.
        tokenizer: Saved with the model.
        overwrite: Replace a model that the folder already holds.

    Raises:
        ValueError: If a weight outside its mask is no longer zero, the masks are not those of this model, or the
            weights are sharded.
        FileNotFoundError: If `source` holds no masks.
        FileExistsError: If the folder already holds a model and `overwrite` is False.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            "model has sharded weights: put them together by torch.distributed.checkpoint.state_dict."
            "get_model_state_dict with full_state_dict=True, load them into a model that is not sharded, and save that."
        )
    report, masks = find_record(model, source)
    if getattr(model.config, CONFIG_KEY, None) is None:
        setattr(model.config, CONFIG_KEY, summary(report))
    mark_retrained(model)
    with new_output(Path(folder), overwrite) as unfinished:
        write_checkpoint(model, unfinished, report, masks, tokenizer)

"""Training a pruned model without losing its zeros, by hand or by the Trainer, and saving it again."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from optimum_fista.run.checkpoints.checkpoint import CONFIG_KEY, mark_retrained, summary
from optimum_fista.run.checkpoints.writing import save_checkpoint
from optimum_fista.run.pruner import FistaPruner
from optimum_fista.run.retraining.masks import MaskSource, find_masks, find_record
from optimum_fista.run.retraining.sharding import local


class MaskedTraining:
    """Keeps pruned weights zero while a model is trained, until `remove` or the end of its `with` block.

    Two kinds of hooks do it, and nothing about the model, its names or its checkpoints changes:

    - a hook on every pruned parameter sets its gradients outside the mask to zero before they are accumulated, so that
      clipping, accumulation, loss scaling, the other processes and the optimizer's moments never see them; if the
      parameter is sharded, it does so once FSDP2 has summed them over the processes;
    - a hook after every optimizer step sets the weights themselves to zero, for optimizers that move weights without a
      gradient. State that an optimizer already has is masked after its first step.
    """

    def __init__(self, model: PreTrainedModel, masks: Mapping[str, Tensor]) -> None:
        parameters = dict(model.named_parameters())
        self._masked = {name: parameters[name] for name in masks}
        self._model = model
        self._parameters = {id(parameter): parameter for parameter in parameters.values()}
        self._pruned = {id(parameters[name]): ~mask for name, mask in masks.items()}
        self._clean: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._handles: list[RemovableHandle] = []
        for parameter in self._masked.values():
            if not parameter.requires_grad:
                continue
            if isinstance(parameter, DTensor):  # FSDP2 calls these hooks and no others
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._mask_gradient))
            else:  # Python's garbage collector sees through these, so that they may keep this object
                self._handles.append(parameter.register_hook(self._gradient_hook(parameter)))
        # The hooks of the parameters keep this object alive, with the model; the hook on all optimizers must not.
        this = weakref.ref(self)

        def after_step(optimizer: Optimizer, *_: Any) -> None:
            training = this()
            if training is not None:
                training._after_step(optimizer)

        handle = register_optimizer_step_post_hook(after_step)
        self._handles.append(handle)
        weakref.finalize(self, handle.remove)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Masks by parameter name, bool, True = kept; of sharded parameters this process's part."""
        return {name: ~self._pruned_of(parameter) for name, parameter in self._masked.items()}

    def apply(self) -> None:
        """Set every weight outside its mask to zero."""
        for parameter in self._masked.values():
            local(parameter.data).masked_fill_(self._pruned_of(parameter), 0)

    def remove(self) -> None:
        """Apply the masks once more and release the model."""
        try:
            if self._handles:
                self.apply()
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    def __enter__(self) -> MaskedTraining:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _gradient_hook(self, parameter: Tensor) -> Any:
        return lambda gradient: gradient.masked_fill(self._pruned_of(parameter), 0)

    def _mask_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        local(parameter.grad).masked_fill_(self._pruned_of(parameter), 0)

    def _pruned_of(self, parameter: Tensor) -> Tensor:
        """Where a parameter is pruned, on its device of now."""
        pruned = self._pruned[id(parameter)]
        if pruned.device != parameter.device:
            pruned = self._pruned[id(parameter)] = pruned.to(parameter.device)
        return pruned

    def _after_step(self, optimizer: Optimizer) -> None:
        trained = [p for group in optimizer.param_groups for p in group["params"] if id(p) in self._parameters]
        if not trained:
            return
        mark_retrained(self._model)
        for parameter in trained:
            if id(parameter) in self._pruned:
                pruned = self._pruned_of(parameter)
                local(parameter.data).masked_fill_(pruned, 0)
                if optimizer not in self._clean:
                    for value in optimizer.state.get(parameter, {}).values():
                        if isinstance(value, Tensor) and local(value).shape == pruned.shape:
                            local(value).masked_fill_(pruned.to(value.device), 0)
        if optimizer not in self._clean:
            self._clean.add(optimizer)
            self._handles.append(optimizer.register_load_state_dict_post_hook(self._clean.discard))


def masked_training(model: PreTrainedModel, masks: MaskSource = None) -> MaskedTraining:
    """Keep the zeros of a pruned model zero while it is trained, with any PyTorch optimizer.

    Use it in a `with` block around the training loop, or keep what it returns and call its `remove`. Costs a byte a
    pruned parameter's weight and one pass over these weights a backward pass and a step. Of weights that are sharded
    over processes, those of PyTorch's `fully_shard` (FSDP2) are supported: call it after `fully_shard` and before the
    first forward pass, with a folder. FSDP1 and DeepSpeed ZeRO-3 are not.

    Args:
        model: A pruned model, in memory.
        masks: The `FistaPruner` that pruned it; the folder or Hub id it was loaded from; boolean masks by parameter
            name, True = kept; `None`: the zeros that the weights have now.

    Raises:
        ValueError: If the model is quantized, offloaded or not pruned, or the masks are not those of this model.
        FileNotFoundError: If the folder or repository holds no masks.
    """
    return MaskedTraining(model, find_masks(model, masks))


class MaskedTrainingCallback(TrainerCallback):
    """Keeps the zeros of a pruned model zero during `Trainer.train`, resumed runs included.

    Args:
        masks: Where the masks come from, as in `masked_training`.
    """

    def __init__(self, masks: MaskSource = None) -> None:
        self.masks = masks
        self._training: MaskedTraining | None = None

    def on_train_begin(self, args: TrainingArguments, *_: Any, **given: Any) -> None:
        """Start.

        Raises:
            ValueError: As `masked_training`, and if the trainer shards the weights.
        """
        if args.fsdp or args.deepspeed:
            raise ValueError(
                "MaskedTrainingCallback does not know the weights that the Trainer shards: train without fsdp and "
                "deepspeed, or shard a model by fully_shard and train it by hand in masked_training(model, folder)."
            )
        self._stop()  # what a training run that failed has left
        self._training = masked_training(given["model"], self.masks)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Stop; the weights are masked once more, because the trainer may have loaded its best checkpoint."""
        self._stop()

    def _stop(self) -> None:
        if self._training is not None:
            self._training.remove()
            self._training = None


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
    save_checkpoint(model, Path(folder), report, masks, tokenizer, overwrite=overwrite)

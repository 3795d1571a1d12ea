"""Offloaded weights: Accelerate keeps them in CPU memory or on disk while a module does not run.

Accelerate puts a hook (`AlignDevicesHook`) on each module: before a forward pass it loads the module's weights to the
*execution device*, and afterwards it puts tensors on the meta device in their place, so changed values are lost. Where
weights are *kept* is the hook's `weights_map`. Here weights are loaded for longer (`onloaded`), and new values are
stored where the old ones are kept (`store_tensor`), so that models larger than the device's memory can be pruned.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import (
    OffloadedWeightsLoader,
    PrefixedDataset,
    offload_weight,
    set_module_tensor_to_device,
)
from accelerate.utils.modeling import named_module_tensors
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_fista import internals


def execution_device(module: nn.Module) -> torch.device:
    """Find where a module computes: the device of its first weight, or the one to which Accelerate moves it.

    If the weight is on the meta device and nothing is offloaded, that is the meta device. Changes nothing.
    """
    parameter = next(module.parameters())
    if parameter.device.type != "meta":
        return parameter.device
    for part in module.modules():
        hook = offload_hook(part)
        if hook is not None and hook.execution_device is not None:
            return torch.device(hook.execution_device)
    return parameter.device


def stored_tensor(module: nn.Module, name: str) -> Tensor:
    """Read a parameter or buffer of a module, or of one inside it, from where it is kept.

    `name` is relative to the module, such as "mlp.down_proj.weight". The tensor is not a copy if it is in memory.
    """
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    tensor = getattr(owner, leaf)
    if tensor.device.type != "meta":
        return tensor.detach()
    hook = offload_hook(owner)
    if hook is None:
        raise ValueError(
            f"{name} of a {type(module).__name__} is on the meta device, and Accelerate keeps it nowhere: load the "
            "model with its weights (from_pretrained)."
        )
    return hook.weights_map[leaf]


def offloaded_tensor(module: nn.Module, name: str) -> Tensor:
    """An offloaded parameter or buffer of a module, as Accelerate keeps it; it may be onloaded now."""
    hook = offload_hook(module)
    assert hook is not None
    return hook.weights_map[name]


def store_tensor(
    module: nn.Module, name: str, value: Tensor, keep_undo: Callable[[Callable[[], None]], None]
) -> None:
    """Replace an offloaded parameter of a module where it is kept: in CPU memory, or on disk.

    First, `keep_undo` is called with a function that puts the old value back. The new value is rounded to the dtype of
    the old one. The checkpoint from which the model was loaded is never changed: the new value goes to a new file, in a
    temporary folder if the model has no offload folder. `module` is the one that has the parameter itself, and `name`
    its name there, such as "weight".
    """
    data, key = _whole_map(module, name)  # of the whole model, and the tensor's full name in it
    if not isinstance(data, OffloadedWeightsLoader):
        _store_in_memory(data, key, value, keep_undo)
    elif key in data.state_dict:  # the tensors that are in memory
        _store_in_memory(data.state_dict, key, value, keep_undo)
    else:
        _store_on_disk(data, key, value, keep_undo)


def _store_in_memory(
    tensors: MutableMapping[str, Tensor],
    key: str,
    value: Tensor,
    keep_undo: Callable[[Callable[[], None]], None],
) -> None:
    """Replace the tensor `key` of a dictionary by a copy of `value`, in CPU memory and in the old tensor's dtype.

    First, `keep_undo` is called with a function that puts the old tensor back.
    """
    before = tensors[key]  # no copy: the dictionary gets a new tensor

    def restore() -> None:
        """Put the old value `before` back into the dictionary `tensors`, under `key`."""
        tensors[key] = before

    keep_undo(restore)
    tensors[key] = value.detach().to("cpu", before.dtype, copy=True)


def _store_on_disk(
    data: OffloadedWeightsLoader,
    key: str,
    value: Tensor,
    keep_undo: Callable[[Callable[[], None]], None],
) -> None:
    """Write `value` to a file for the tensor `key`, and change its entry in the index of `data`.

    `data` is what Accelerate reads offloaded weights from. First, `keep_undo` is called with a function that puts the
    old value back. Makes a temporary folder if `data` has none to write to; it is removed with the model.
    """
    old_entry: dict[str, Any] = dict(data.index[key])
    is_in_checkpoint = old_entry.get("safetensors_file") is not None
    # For a file of the checkpoint, only the index changes. Other files are overwritten, so the old value is copied.
    old_value = None if is_in_checkpoint else data[key].clone()

    if data.save_folder is None:
        folder = tempfile.TemporaryDirectory(prefix="optimum-fista-")
        data.save_folder = folder.name
        data.kept_by = folder  # so that the folder is removed with the model

    # The new value gets the dtype of the old one, which the entry may name, such as "bfloat16".
    names_dtype = "dtype" in old_entry
    dtype = getattr(torch, old_entry["dtype"], value.dtype) if names_dtype else data[key].dtype

    def restore() -> None:
        """Put the entry `old_entry` back into the index of `data`, and `old_value` into its file.

        `key` is the name of the tensor in both. `old_value` is `None` if the file was not changed.
        """
        if old_value is not None:
            offload_weight(old_value, key, data.save_folder, data.index)
        data.index[key] = old_entry

    keep_undo(restore)  # before anything is written, so that an interrupt in between loses nothing
    # writes the file, and the entry of the index
    offload_weight(value.detach().to("cpu", dtype), key, data.save_folder, data.index)


@contextmanager
def onloaded(modules: Iterable[nn.Module], *, read_only: bool = False) -> Iterator[None]:
    """Inside, the weights of modules stay on their device; the hooks of Accelerate leave them there.

    `modules` are given one by one, such as all modules of a decoder layer. Modules whose weights are not offloaded, or
    are onloaded already, are left alone. Onloaded weights are copies, even if they are kept on that device. Changes of
    copies are lost at the end unless they were stored by `store_tensor`. If `read_only`, the caller promises not to
    write to the weights: those that are kept on the device already are then not copied.

    Until the end, parameters of the modules are replaced, and their hooks do nothing; also after an error both are as
    before.
    """
    # modules whose weights are onloaded here, with their hook and the names of these weights
    brought: list[tuple[nn.Module, AlignDevicesHook, list[str]]] = []
    try:
        for module in modules:
            hook = offload_hook(module)
            if hook is not None and hook.offload:
                tensors = named_module_tensors(
                    module,
                    include_buffers=hook.offload_buffers,
                    recurse=hook.place_submodules,
                    remove_non_persistent=True,
                )
                names = [name for name, _ in tensors]
                # noted before the first is loaded, so that after an error all are taken off the device
                brought.append((module, hook, names))
                for name in names:
                    value = hook.weights_map[name].to(hook.execution_device, copy=not read_only)
                    set_module_tensor_to_device(
                        module, name, hook.execution_device, value=value, clear_cache=False
                    )
                # Until this is undone, the hook neither loads weights nor removes them.
                hook.offload = False
        yield
    finally:
        for module, hook, names in brought:
            hook.offload = True
            for name in names:
                set_module_tensor_to_device(module, name, "meta")  # frees it on the device


def settle_ties(model: PreTrainedModel) -> None:
    """Compare offloaded weights that the configuration calls tied: equal ones are tied, others stay two weights.

    Changes the model, but no value of a weight: equal ones become one parameter, and others are taken out of
    `model.all_tied_weights_keys`, which has the names of tied weights, each with the name of the weight that it is tied
    to. If only the tied weight is in the files, the weight that it is tied to has no value there. Then this one gets an
    entry in Accelerate's index, with the same place in the files. Transformers settles ties of weights in memory, but
    not of weights on disk.
    """
    # names such as "lm_head.weight", which is tied to "model.embed_tokens.weight"
    for target, source in list(model.all_tied_weights_keys.items()):
        path, _, leaf = target.rpartition(".")
        owner = model.get_submodule(path)
        if not getattr(owner, leaf).is_meta:  # it is not offloaded
            continue
        source_parameter = model.get_parameter(source)
        # What Accelerate reads the offloaded weights of the whole model from. A loader looks for a tensor in memory
        # first (`state_dict`), then for its place on disk (`index`). The files may have the value only under the name
        # `target`.
        data, _ = _whole_map(owner, leaf)
        is_on_disk = isinstance(data, OffloadedWeightsLoader) and target in data.index
        if is_on_disk and source not in data.state_dict:
            data.index.setdefault(source, data.index[target])
        if getattr(owner, leaf) is source_parameter:  # they are one parameter already
            continue
        if torch.equal(stored_tensor(model, target), stored_tensor(model, source)):
            setattr(owner, leaf, source_parameter)
        else:
            del model.all_tied_weights_keys[target]


def describe_ties(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Set `config.tie_word_embeddings` to False if the model's head is not tied although the class would tie it.

    `config` is the configuration that will be saved; nothing else is changed.
    """
    # Weights that were found to differ are not in it any more.
    has_ties = bool(model.all_tied_weights_keys)
    if not has_ties and model.get_expanded_tied_weights_keys(all_submodels=True):
        config.tie_word_embeddings = False


def move_execution(model: nn.Module, device: torch.device) -> None:
    """Make an offloaded model compute on another device, and move there what is not offloaded, such as buffers.

    Changes the hooks of Accelerate, and which device the model's tensors are on. Offloaded weights stay where they are.
    """
    for module in model.modules():
        for hook in alignment_hooks(module):
            if hook.execution_device is not None:
                hook.execution_device = device
        # tensors of this module alone; those on the meta device are offloaded
        for name, tensor in named_module_tensors(module):
            if tensor.device.type != "meta":
                set_module_tensor_to_device(module, name, device)


def alignment_hooks(module: nn.Module) -> list[AlignDevicesHook]:
    """The hooks by which Accelerate brings a module's weights and inputs to its device; there may be none."""
    hook = internals.hook_of(module)  # one, or several in a sequence, or None
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return [one for one in hooks if isinstance(one, AlignDevicesHook)]


def offload_hook(module: nn.Module) -> AlignDevicesHook | None:
    """Find the hook through which Accelerate keeps the weights of a module itself elsewhere (`weights_map`).

    They may be onloaded now. Returns `None` if they are not offloaded at all.
    """
    for hook in alignment_hooks(module):
        if hook.weights_map is not None:
            return hook
    return None


def _whole_map(module: nn.Module, name: str) -> tuple[Any, str]:
    """Find the map from which Accelerate reads the offloaded weights of the whole model, and a tensor's name in it.

    The map is an `OffloadedWeightsLoader` (`state_dict`: tensors in memory, `index`: where the others are on disk), or
    a dictionary of tensors in memory. `module` is offloaded, and `name` is that of the tensor in it, such as "weight".
    """
    hook = offload_hook(module)
    assert hook is not None
    data = hook.weights_map
    key = name
    # A module's map is a view of the whole model's, whose names have a prefix.
    while isinstance(data, PrefixedDataset):
        key = f"{data.prefix}{key}"
        data = data.dataset
    return data, key

"""Everything that this package takes from the inside of Transformers, Accelerate and PyTorch.

These libraries give no promise about names that begin with an underscore, and some of what is used here differs between
the versions that the package supports. Each such name and each branch by version has one function here, which says what
it gives. `tests/test_internals.py` has a test of every function that fails if the name is gone. No other module uses
such a name. This module stands at the bottom of the import layers, because `model` needs it as well as `source`.

Methods of Transformers that are overridden (of `HfQuantizer` in `source.formats.dequantizer`, of `Trainer` in
`train.distillation`) stay where they are; `OVERRIDDEN` lists them for the test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

OVERRIDDEN = {
    "transformers.quantizers.base.HfQuantizer": (
        "_process_model_before_weight_loading",
        "_process_model_after_weight_loading",
    ),
    "transformers.Trainer": ("_save", "_save_checkpoint", "_issue_warnings_after_load"),
}
"""Methods with private names that this package overrides, by class."""


# Transformers: models and configurations


def classes_not_split(model: nn.Module) -> set[str]:
    """Return names of classes whose modules Transformers does not split over devices: those of decoder layers."""
    return set(getattr(model, "_no_split_modules", None) or ())  # it may be None


def names_not_saved(model: nn.Module) -> set[str]:
    """Return names of tensors of a model that `save_pretrained` leaves out, besides tied ones."""
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def loaded_from(config: Any) -> str:
    """Return the folder or Hub id from which a configuration was loaded; "" if it was made in Python."""
    return getattr(config, "_name_or_path", "") or ""


LOADED_FROM = "_name_or_path"
"""The key of `loaded_from` in what `to_dict` of a configuration returns."""


def commit_of(config: Any) -> str | None:
    """Return the commit of the Hub's repository from which a configuration was loaded.

    `None` for a folder, and with versions of Transformers that no longer note it (5.24): the cache then knows the
    commit of the branch.
    """
    commit: str | None = getattr(config, "_commit_hash", None)
    return commit


def attention_implementation(config: Any) -> str | None:
    """Return how the model of a configuration computes attention, such as "sdpa" or "eager"."""
    name: str | None = config._attn_implementation
    return name


def experts_implementation(config: Any) -> str | None:
    """Return how the model of a configuration computes fused experts, such as "grouped_mm".

    `None` in versions of Transformers without a choice.
    """
    name: str | None = getattr(config, "_experts_implementation", None)
    return name


def classes_by_configuration(automatic_class: Any) -> Mapping[type, Any]:
    """Return the model class of each class of configurations, for an `automatic_class` such as AutoModelForCausalLM."""
    mapping: Mapping[type, Any] = automatic_class._model_mapping
    return mapping


def applies_gate(experts: nn.Module) -> bool:
    """Tell whether a module of fused experts has a function of its own that applies the gate."""
    return hasattr(experts, "_apply_gate")


def apply_gate(experts: Any, gate_and_up: Tensor) -> Tensor:
    """Apply the gate of a module of fused experts: [tokens, 2 * intermediate] -> [tokens, intermediate]."""
    product: Tensor = experts._apply_gate(gate_and_up)
    return product


def is_as_loaded(generation_config: Any) -> bool:
    """Tell whether a generation configuration has not been changed since it was read from a file.

    Transformers notes a hash when it reads one, so that it can save an invalid one again.
    """
    # set when the file is read; a configuration made in Python has none
    noted = getattr(generation_config, "_original_object_hash", None)
    return noted is not None and noted == hash(generation_config)


def cached_file_if_any(name: str, file: str, *, needs_hub: bool = True) -> str | None:
    """Return the path of a model's file, downloaded to the Hub's cache if need be; `None` if there is no such file.

    `name` is a Hub id or a folder, and `file` the name of the file in it, such as "config.json". If the Hub can't be
    reached and the cache lacks the file, an error is raised if `needs_hub`, otherwise `None` is returned.
    """
    from transformers.utils import cached_file

    path: str | None = cached_file(
        name,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=needs_hub,
    )
    return path


# Transformers: chat templates.


def marked_spans(tokenizer: Any, turns: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """Find what the chat template of a tokenizer marks by `{% generation %}` in a conversation that it writes.

    Returns pairs of the first character and the one after the last. `apply_chat_template` tells which tokens these are,
    but not in Transformers 5.16 if a token begins with white space that the tokenizer leaves out of its offsets.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(
        [list(turns)],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    _, spans_of_conversations = rendered  # texts and spans of one conversation
    return [(start, end) for start, end in spans_of_conversations[0]]


# Transformers: conversions of weights. A conversion says how tensors of a file become parameters of a model: under
# other names, joined, or split (`WeightConverter`, `WeightRenaming`).


def original_sources(conversion: Any) -> list[str]:
    """Return the patterns of the names of stored tensors with which a conversion was made; they can be passed again."""
    sources: list[str] = conversion._original_source_patterns
    return list(sources)


def original_targets(conversion: Any) -> list[str]:
    """Return the patterns of the names of parameters with which a conversion was made; they can be passed again."""
    targets: list[str] = conversion._original_target_patterns
    return list(targets)


def copy_weight_conversions(source: nn.Module, target: nn.Module) -> None:
    """Have `save_pretrained` save `target` under the names that it gives the tensors of `source`.

    Both are models of Transformers. An attribute of `target` is set if `source` was loaded from files; a model that was
    made in Python has no such attribute.
    """
    if "_weight_conversions" in vars(source):
        vars(target)["_weight_conversions"] = vars(source)["_weight_conversions"]


def set_weight_conversions(model: nn.Module, conversions: Sequence[Any]) -> None:
    """Set the conversions that `save_pretrained` reverts to save `model`, in an attribute of the model."""
    vars(model)["_weight_conversions"] = list(conversions)


def forget_weight_conversions(model: nn.Module) -> None:
    """Have `save_pretrained` save `model` as if it was made in Python: removes the attribute with its conversions."""
    vars(model).pop("_weight_conversions", None)


def renames_without_casting() -> bool:
    """Tell whether Transformers is before 5.22: tensors that it only renames then keep the dtype of the file."""
    from transformers.quantizers.base import HfQuantizer

    return not hasattr(HfQuantizer, "get_load_operations")


def parts_in_float32(model: Any, dtype: torch.dtype) -> list[str]:
    """Return parts of names of parameters that stay in float32 if a model is loaded in `dtype`."""
    return list(model._get_dtype_plan(dtype))


def prepare_for_loading(quantizer: Any, model: nn.Module, **options: Any) -> None:
    """Have a quantizer of Transformers change the modules of `model` for the weights in the files."""
    quantizer._process_model_before_weight_loading(model, **options)


def unchanged() -> Any:
    """Return an operation of a conversion that returns what it gets."""
    from transformers.core_model_loading import _IdentityOp

    return _IdentityOp()


# Transformers: training


def checkpointing_option() -> str:
    """Return the name of the option of TrainingArguments that computes activations again in the backward pass.

    Transformers renamed it in 5.24.
    """
    from transformers import TrainingArguments

    new_name = "activation_checkpointing"
    return new_name if hasattr(TrainingArguments, new_name) else "gradient_checkpointing"


def set_only_device(arguments: Any, device: torch.device) -> None:
    """Have the Trainer of these TrainingArguments, which this changes, use one device: any one, such as "cuda:1".

    Transformers keeps the device that it finds in a cached property, `_setup_devices`; this sets its value.
    """
    arguments._setup_devices = device
    arguments._n_gpu = 1  # for more, the Trainer would copy the model to all devices


# Accelerate


def hook_of(module: nn.Module) -> Any:
    """Return the hook of Accelerate that runs before and after a module; `None` if it has none."""
    return getattr(module, "_hf_hook", None)


def forward_attribute(module: nn.Module) -> str:
    """Return the attribute that holds the module's own forward function.

    A hook of Accelerate replaces `forward` and calls the original, which it keeps beside it.
    """
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


@contextmanager
def accelerate_states_restored() -> Iterator[None]:
    """Put the states that Accelerate shares in the whole process back at the end of the context, also after an error.

    They say which devices and processes there are. Accelerate keeps each in a dictionary of a class.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState

    with ExitStack() as stack:
        for kind in (AcceleratorState, GradientState, PartialState):
            shared: dict[str, Any] = kind._shared_state
            content_before = dict(shared)
            stack.callback(_put_back, shared, content_before)
        yield


def _put_back(shared: dict[str, Any], content: dict[str, Any]) -> None:
    """Give the dictionary `shared` the entries of `content`; it stays the same object, as all states refer to it."""
    shared.clear()
    shared.update(content)


# PyTorch


@contextmanager
def without_checkpoint_wrappers(model: nn.Module) -> Iterator[None]:
    """Replace PyTorch's checkpoint wrappers by the modules that they wrap, until the block ends.

    Accelerate wraps decoder layers so for FSDP (`fsdp_activation_checkpointing`). Inside the block, names of modules
    and parameters are those of a model without wrappers, and decoder layers have their own classes. Changes only which
    modules `model` has; at the end, also after an error, the wrappers are back.
    """
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper

    with ExitStack() as stack:
        for parent in list(model.modules()):
            if isinstance(parent, ActivationWrapper):
                continue
            for name, child in list(parent.named_children()):
                module = child  # the wrapped module, if this is a wrapper
                while isinstance(module, ActivationWrapper):  # a wrapper may wrap another one
                    module = module._checkpoint_wrapped_module
                if module is not child:
                    setattr(parent, name, module)
                    # called at the end
                    stack.callback(setattr, parent, name, child)
        yield


def version_of(tensor: Tensor) -> int:
    """Return the version of a tensor, a number that grows when it, or one that shares its memory, changes in place."""
    return tensor._version


def memory_of(tensor: Tensor) -> int:
    """Return a number that tensors have in common if they share memory; also on the meta device."""
    return tensor.untyped_storage()._cdata


def has_forward_hooks(module: nn.Module) -> bool:
    """Tell whether functions run after the module, which may change its output."""
    return len(module._forward_hooks) > 0


def has_forward_pre_hooks(module: nn.Module) -> bool:
    """Tell whether functions run before the module, which may change its inputs."""
    return len(module._forward_pre_hooks) > 0


def hooks_of(module: nn.Module) -> list[Mapping[int, Callable[..., Any]]]:
    """Return the dictionaries of all kinds of hooks of a module itself, such as those before and after `forward`."""
    # A module may have an attribute of its own with such a name, such as a list.
    return [
        value
        for name, value in vars(module).items()
        if name.endswith("_hooks") and isinstance(value, dict)
    ]


def is_compiled(module: nn.Module) -> bool:
    """Tell whether `torch.compile(module)`, `torch.compile(module.forward)` or `module.compile()` was called.

    In the first case, `module` is what `torch.compile` has returned.
    """
    forward = module.forward
    # `torch.compiler.disable` leaves the same trace on a function as `torch.compile`, and one more
    is_disabled = hasattr(forward, "_torchdynamo_disable")
    has_compiled_forward = hasattr(forward, "_torchdynamo_orig_callable") and not is_disabled
    is_wrapper = "_orig_mod" in dict(module.named_children())  # of torch.compile(module)
    has_compiled_call = module._compiled_call_impl is not None  # by module.compile()
    return has_compiled_forward or is_wrapper or has_compiled_call


def is_own_parameter(module: nn.Module, name: str) -> bool:
    """Tell whether an attribute of a module is a parameter, and not computed from others (weight_norm)."""
    return name in module._parameters


def is_convolution(module: nn.Module) -> bool:
    """Tell whether a module is a convolution, transposed or not, in any number of dimensions."""
    return isinstance(module, nn.modules.conv._ConvNd)


def leaves_of(values: Any) -> list[Any]:
    """Return everything inside lists, tuples and dictionaries of any depth."""
    return _pytree.tree_leaves(values)


def tensors_replaced(values: Any, replace: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy of lists, tuples and dictionaries of any depth with `replace` applied to all tensors inside."""
    return _pytree.tree_map_only(Tensor, replace, values)


def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN multiplies matrices of a dtype, bfloat16 or float16, on this processor.

    The environment variable ONEDNN_MAX_CPU_ISA may restrict oneDNN. A PyTorch without oneDNN has no function that
    tells, and the answer is False.
    """
    kind = "bf16" if dtype == torch.bfloat16 else "fp16"
    is_supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported", None)
    return is_supported is not None and bool(is_supported())


def has_bfloat16_units() -> bool:
    """Tell whether an x86 processor has units for bfloat16: AMX, or AVX-512 with its extension for bfloat16.

    An older PyTorch may have no function that tells; then the answer is False.
    """
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        is_supported = getattr(torch.cpu, name, None)
        if is_supported is not None and is_supported():
            return True
    return False

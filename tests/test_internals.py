"""Every private name of another library that the package uses is there, and gives what its function says.

A test fails if the name is gone. No other module of the package uses such a name.
"""

import ast
import importlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import PartialState, cpu_offload
from accelerate.hooks import ModelHook
from packaging.version import Version
from tiny_llama import tiny_llama, tiny_tokenizer
from tiny_models import tiny_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
    offload_wrapper,
)
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TrainingArguments,
)
from transformers.core_model_loading import WeightConverter, revert_weight_conversion
from transformers.quantizers.base import HfQuantizer

import optimum_fista
from optimum_fista import internals
from optimum_fista.source.formats.format import Unchanged

# Names that belong to the package itself, or to the text of messages and of files.
OWN_NAMES = {
    "_bias",  # the end of names of parameters
    "_original",  # solve/problem.py
    "_fista_packed",
    "_group_actions",  # of argparse
    "_layout",
    "_mask",
    "_packed",
    "_quantized_source",
    "_scale_inv",
    "_status_alloc_failed",  # of messages
    "_token_",
    "_values",
}


def private_names(file: Path) -> Iterator[str]:
    """Private names in a file that it does not define: attributes, imports, and strings that look like one."""
    tree = ast.parse(file.read_text())
    nodes = list(ast.walk(tree))
    defined = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    for node in nodes:
        names = []
        if isinstance(node, ast.Attribute):
            is_of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            names = [] if is_of_self else [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value] if re.fullmatch(r"_[a-z]\w+", node.value) else []
        elif isinstance(node, ast.ImportFrom):
            is_own_module = (node.module or "").startswith("optimum_fista")
            names = [] if is_own_module else [alias.name for alias in node.names]
        for name in names:
            if re.match("_[a-zA-Z]", name) and name not in defined:
                yield name


def test_no_other_module_uses_a_private_name():
    package = Path(optimum_fista.__file__).parent
    files = [file for file in package.rglob("*.py") if file.name != "internals.py"]

    used = {
        f"{file.relative_to(package)}: {name}" for file in files for name in private_names(file)
    }

    assert {use for use in used if use.partition(": ")[2] not in OWN_NAMES} == set()


def test_private_methods_that_are_overridden_exist():
    for path, methods in internals.OVERRIDDEN.items():
        module, _, name = path.rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        for method in methods:
            assert callable(getattr(kind, method)), f"{path}.{method}"


def test_decoder_layers_are_not_split():
    assert internals.classes_not_split(tiny_llama()) == {"LlamaDecoderLayer"}
    assert internals.classes_not_split(nn.Linear(1, 1)) == set()


def test_names_that_a_model_does_not_save_are_known():
    model = tiny_llama()
    assert hasattr(PreTrainedModel, "_keys_to_ignore_on_save")

    model._keys_to_ignore_on_save = ["lm_head.weight"]

    assert internals.names_not_saved(model) == {"lm_head.weight"}
    assert internals.names_not_saved(tiny_llama()) == set()


def test_a_configuration_knows_where_it_was_loaded_from(tiny_folder):
    config = AutoModelForCausalLM.from_pretrained(tiny_folder).config

    assert internals.loaded_from(config) == str(tiny_folder)
    assert internals.LOADED_FROM in config.to_dict()
    assert internals.loaded_from(LlamaConfig()) == ""


def test_the_commit_of_a_folder_is_none_and_that_of_the_hub_is_noted(tiny_folder, tmp_path):
    commit = "a" * 40
    repository = tmp_path / "models--tester--cached"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    shutil.copyfile(tiny_folder / "config.json", snapshot / "config.json")

    cached = LlamaConfig.from_pretrained("tester/cached", cache_dir=tmp_path, local_files_only=True)

    notes_it = "_commit_hash" in vars(cached)  # Transformers 5.24 does not
    assert internals.commit_of(cached) == (commit if notes_it else None)
    assert internals.commit_of(LlamaConfig.from_pretrained(tiny_folder)) is None


def test_attention_and_experts_have_an_implementation():
    model = tiny_llama()

    assert internals.attention_implementation(model.config) in ("sdpa", "eager")
    assert isinstance(internals.experts_implementation(tiny_model("mixtral").config), str)


def test_an_automatic_class_has_a_class_for_each_configuration():
    classes = internals.classes_by_configuration(AutoModelForCausalLM)

    assert classes[LlamaConfig] is LlamaForCausalLM


def test_fused_experts_apply_their_gate():
    experts = next(m for m in tiny_model("gpt_oss").modules() if internals.applies_gate(m))

    gate_and_up = torch.randn(3, 2 * experts.intermediate_size)

    assert internals.apply_gate(experts, gate_and_up).shape == (3, experts.intermediate_size)
    assert not internals.applies_gate(nn.Linear(1, 1))


def test_a_generation_configuration_is_as_loaded_until_it_changes(tmp_path):
    GenerationConfig(max_new_tokens=3).save_pretrained(tmp_path)
    loaded = GenerationConfig.from_pretrained(tmp_path)

    assert internals.is_as_loaded(loaded)
    assert not internals.is_as_loaded(GenerationConfig())
    loaded.max_new_tokens = 4
    assert not internals.is_as_loaded(loaded)


def test_a_file_that_a_model_lacks_is_none(tiny_folder):
    assert internals.cached_file_if_any(str(tiny_folder), "config.json") is not None
    assert internals.cached_file_if_any(str(tiny_folder), "no.json") is None
    assert internals.cached_file_if_any("tester/none", "no.json", needs_hub=False) is None


def test_what_a_chat_template_marks_is_found_in_the_text_that_it_writes():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %} {{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    turns = [{"role": "user", "content": "the sea?"}, {"role": "assistant", "content": "is deep"}]
    written = tokenizer.apply_chat_template(turns, tokenize=False)

    ((start, end),) = internals.marked_spans(tokenizer, turns)

    assert written == f"{tokenizer.bos_token}the sea? is deep"
    assert written[start:end] == " is deep"


def test_a_conversion_has_the_patterns_with_which_it_was_made():
    conversion = WeightConverter(["a.*.x", "a.*.y"], "a.xy", [Unchanged()])

    assert internals.original_sources(conversion) == ["a.*.x", "a.*.y"]
    assert internals.original_targets(conversion) == ["a.xy"]


def test_the_conversions_of_a_model_decide_by_which_names_it_is_saved():
    model = tiny_model("mixtral")
    tensors = {k: t for k, t in model.state_dict().items() if "experts" in k}

    own = revert_weight_conversion(model, dict(tensors))
    internals.set_weight_conversions(model, [])
    plain = revert_weight_conversion(model, dict(tensors))
    internals.forget_weight_conversions(model)

    assert plain.keys() == tensors.keys()
    assert own.keys() != tensors.keys()
    assert revert_weight_conversion(model, dict(tensors)).keys() == own.keys()


def test_tensors_that_are_only_renamed_keep_their_dtype_in_an_older_transformers():
    is_older = Version(transformers.__version__) < Version("5.18")

    assert internals.renames_without_casting() == is_older


def test_some_parameters_stay_in_float32():
    model = tiny_llama()
    assert internals.parts_in_float32(model, torch.bfloat16) == []

    model._keep_in_fp32_modules_strict = ["norm"]

    assert internals.parts_in_float32(model, torch.bfloat16) == ["norm"]


def test_a_quantizer_prepares_a_model():
    prepared = []

    class Quantizer(HfQuantizer):
        def __init__(self) -> None:
            pass

        def _process_model_before_weight_loading(self, model, **options):
            prepared.append((model, options))

        def is_serializable(self) -> bool:
            return True

        is_trainable = True

    model = nn.Linear(1, 1)
    internals.prepare_for_loading(Quantizer(), model, device_map="cpu")

    assert prepared == [(model, {"device_map": "cpu"})]


def test_the_operation_unchanged_returns_its_input():
    tensors = {"a": [torch.ones(1)]}

    assert internals.unchanged().convert(tensors) is tensors


def test_the_option_of_checkpointing_is_one_of_the_trainer(tmp_path):
    name = internals.checkpointing_option()
    assert getattr(TrainingArguments(output_dir=str(tmp_path), **{name: True}), name)


def test_the_trainer_uses_the_device_that_is_set(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)

    internals.set_only_device(arguments, torch.device("meta"))

    assert arguments.device.type == "meta"
    assert arguments.n_gpu == 1


def test_accelerate_has_a_hook_on_an_offloaded_module():
    module = nn.Linear(2, 2)
    own = module.forward
    assert internals.hook_of(module) is None
    assert internals.forward_attribute(module) == "forward"

    cpu_offload(module)

    assert isinstance(internals.hook_of(module), ModelHook)
    assert getattr(module, internals.forward_attribute(module)) == own


def test_states_of_accelerate_are_put_back():
    before = dict(PartialState._shared_state)
    shared = PartialState._shared_state

    with internals.accelerate_states_restored():
        PartialState(cpu=True)
        assert PartialState().initialized
        shared["other"] = 1

    assert PartialState._shared_state is shared
    assert shared == before


def test_checkpoint_wrappers_are_taken_off_for_a_time():
    model = tiny_llama()
    layers = model.model.layers
    names = [name for name, _ in model.named_parameters()]
    layers[0].mlp = checkpoint_wrapper(layers[0].mlp)
    layers[0] = offload_wrapper(checkpoint_wrapper(layers[0]))
    wrapped = [name for name, _ in model.named_parameters()]

    with internals.without_checkpoint_wrappers(model):
        names_inside = [name for name, _ in model.named_parameters()]

    assert names_inside == names
    assert sum("_checkpoint_wrapped_module." in name for name in wrapped) > 0
    assert [name for name, _ in model.named_parameters()] == wrapped


def test_changes_in_place_are_counted():
    tensor = torch.zeros(2, 2)
    before = internals.version_of(tensor)

    tensor.view(-1).add_(1)

    assert internals.version_of(tensor) == before + 1
    assert internals.version_of(tensor + 1) == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_views_share_memory(device):
    tensor = torch.zeros(4, device=device)

    assert internals.memory_of(tensor) == internals.memory_of(tensor[2:])
    assert internals.memory_of(tensor) != internals.memory_of(torch.zeros(4, device=device))


def test_hooks_of_a_module_are_known():
    module = nn.Linear(1, 1)
    assert not internals.has_forward_hooks(module)
    assert not internals.has_forward_pre_hooks(module)

    module.register_forward_hook(after := lambda *_: None)
    module.register_forward_pre_hook(before := lambda *_: None)

    assert internals.has_forward_hooks(module)
    assert internals.has_forward_pre_hooks(module)
    hooks = [hook for kind in internals.hooks_of(module) for hook in kind.values()]
    assert {after, before} <= {*hooks}


def compiled_forward(module):
    module.forward = torch.compile(module.forward, backend="eager")
    return module


def compiled_in_place(module):
    module.compile(backend="eager")
    return module


def disabled(module):
    module.forward = torch.compiler.disable(module.forward)
    return module


def test_a_compiled_module_is_known_in_every_form():
    for compile_module in (
        lambda module: torch.compile(module, backend="eager"),
        compiled_forward,
        compiled_in_place,
    ):
        assert internals.is_compiled(compile_module(nn.Linear(1, 1)))
    assert not internals.is_compiled(nn.Linear(1, 1))
    assert not internals.is_compiled(disabled(nn.Linear(1, 1)))


def test_a_weight_that_is_computed_is_no_parameter():
    module = nn.Linear(2, 2)
    assert internals.is_own_parameter(module, "weight")

    nn.utils.parametrizations.weight_norm(module)

    assert not internals.is_own_parameter(module, "weight")


def test_convolutions_of_all_dimensions_are_known():
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d):
        assert internals.is_convolution(kind(1, 1, 1))
    assert not internals.is_convolution(nn.Linear(1, 1))


def test_leaves_and_tensors_of_nested_values_are_found():
    values = {"a": [torch.ones(1), None], "b": (2, {"c": torch.zeros(1)})}

    leaves = internals.leaves_of(values)
    replaced = internals.tensors_replaced(values, lambda tensor: tensor + 1)

    assert len(leaves) == 4
    assert float(replaced["a"][0]) == 2
    assert float(replaced["b"][1]["c"]) == 1
    assert (replaced["a"][1], replaced["b"][0]) == (None, 2)


def test_functions_that_ask_for_units_of_the_processor_exist():
    """Their names are there; the answer depends on the processor."""
    for kind in ("bf16", "fp16"):
        assert callable(getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported"))
    assert callable(torch.cpu._is_amx_tile_supported)
    assert callable(torch.cpu._is_avx512_bf16_supported)

    for dtype in (torch.bfloat16, torch.float16):
        assert internals.onednn_multiplies(dtype) in (True, False)
    assert internals.has_bfloat16_units() in (True, False)

"""Load models to prune, GGUF files included, and refuse those that can't be pruned.

A model is named by a *name*: a Hub id, a model folder, or a folder that holds one GGUF file. `load_model` reads a whole
model into memory. A streamed run, which holds one decoder layer at a time, calls `load_lazily`, which leaves the
weights in their files. Both call `read_model`. Transformers reads every file; its errors on damaged files become one
error that names the model (`reading`). No code that comes with a model runs.

An *automatic class* is one of Transformers' `Auto...` classes, whose `from_pretrained` chooses the class by the
configuration. The Hub's *cache* is the folder on this computer where files of the Hub are kept.
"""

import copy
import functools
import gc
import importlib.util
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

import optimum_fista.packed  # noqa: F401  # so that packed folders load
from optimum_fista import internals
from optimum_fista.devices import floating_dtype, usable_device
from optimum_fista.installing import install_command
from optimum_fista.memory import is_out_of_memory
from optimum_fista.model.digests import sha256_of
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.model.offload import move_execution, settle_ties
from optimum_fista.source.files import source_folder
from optimum_fista.source.formats.dequantizer import read_dequantized
from optimum_fista.source.model_folder import (
    question_of_folder,
    require_name,
    require_no_configuration_file,
    require_weights,
)
from optimum_fista.source.quantization import quantization

_TOKENIZER_FILES = ("tokenizer*", "*.model", "*.gguf", "vocab.*")


def load_model(
    name: str,
    *,
    device: str | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer. The model of a GGUF file counts as dense from then on.

    Args:
        name: Hub id, model folder, or a folder that holds one GGUF file, which is dequantized.
        device: Device to load to; `None`: the accelerator if there is one, otherwise the CPU.
        dtype: Floating dtype, `"auto"` takes the checkpoint's.
        device_map: Accelerate's device map instead of `device`, such as `"auto"`, for a model that doesn't fit on it.

    Raises:
        ValueError: If the model has no tokenizer, can't be read, or `device` or `dtype` is none that can be used.
    """
    target = usable_device(device)
    if dtype != "auto":
        dtype = floating_dtype(dtype)
    tokenizer = require_tokenizer(name)  # first: the weights take long
    model = read_model(name, dtype=dtype, device_map=device_map)
    forget_gguf(model)
    if device_map is None:
        torch.nn.Module.to(model, target)  # the method of Transformers has no types
    return model, tokenizer


class LazyModel(NamedTuple):
    """What `load_lazily` returns.

    Attributes:
        model: The model.
        tokenizer: The tokenizer of a GGUF file; otherwise `None`.
        folder: The folder of the model's files, in the Hub's cache if it is from there.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    folder: Path


def load_lazily(
    name: str, offload_folder: Path, *, device: str | None = None, dtype: str | torch.dtype = "auto"
) -> LazyModel:
    """Load a model whose weights stay in its files until they are needed.

    Weights of a GGUF file are dequantized in memory; the same file has the tokenizer. A model of the Hub is downloaded
    into the cache, with the small files beside its weights.

    Args:
        name: Hub id, model folder, or a folder that holds one GGUF file.
        offload_folder: Gets copies of the weights that can't be read from the model's files one parameter at a time,
            such as those that Transformers merges when it loads them.
        device: Device that the model computes on; `None`: the accelerator if there is one, otherwise the CPU.
        dtype: Floating dtype, `"auto"` takes the checkpoint's.
    """
    if gguf_file(name) is not None:
        model, tokenizer = load_model(name, device=device, dtype=dtype)
        return LazyModel(model, tokenizer, Path(name))

    target = usable_device(device)
    if dtype != "auto":
        dtype = floating_dtype(dtype)
    with _without_news_of_offloading():
        model = read_model(
            name, dtype=dtype, device_map={"": "disk"}, offload_folder=offload_folder
        )
    source = source_folder(name, internals.commit_of(model.config))
    # Tied weights are two once they are offloaded: equal ones become one parameter again.
    settle_ties(model)
    move_execution(model, target)
    return LazyModel(model, None, source)  # no tokenizer: the caller loads it from its files


def dense_sha256(name: str, dtype: str, offload_folder: Path) -> str:
    """Compute the SHA-256 of a dense model as a pruning run notes it, in hexadecimal digits.

    All weights are read, one decoder layer at a time. `name` is that of the model. `dtype` is that of the pruning run,
    such as "bfloat16", or "auto": that of the files. Weights that are not in safetensors files in this form are written
    to `offload_folder`.
    """
    layers = find_decoder_layers(load_lazily(name, offload_folder, device="cpu", dtype=dtype).model)
    digests = [sha256_of(layer, layer.state_dict()) for _, layer in layers]
    return layers.dense_digest(digests)


@contextmanager
def _without_news_of_offloading() -> Iterator[None]:
    """Silence, inside, Accelerate's remark that weights stay in their files: it is intended.

    Its logger gets a filter, which is taken off at the end.
    """

    def is_other_message(record: logging.LogRecord) -> bool:
        """Tell whether a message is not that remark: only then it is shown."""
        return not record.getMessage().startswith("Some parameters are on the meta device")

    accelerate_logger = logging.getLogger("accelerate.big_modeling")
    accelerate_logger.addFilter(is_other_message)
    try:
        yield
    finally:
        accelerate_logger.removeFilter(is_other_message)


def local_source(model: PreTrainedModel) -> Path | None:
    """Return the folder from which a model in memory was loaded; `None` if it was made in Python.

    Of a model of the Hub, this is the folder in the cache. Nothing is downloaded. `None` also if the folder is gone.
    """
    name = internals.loaded_from(model.config)  # a path or a Hub id; empty if it was made in Python
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    try:
        config_file = try_to_load_from_cache(
            name, "config.json", revision=internals.commit_of(model.config)
        )
    except HFValidationError:  # the path of a folder that is gone
        return None
    # If it is not in the cache, this is None or a mark that the model has no such file.
    return Path(config_file).parent if isinstance(config_file, str) else None


def load_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a model (a Hub id, or a folder); `None` if a model folder has no files of one.

    The tokenizer of a Hub id is downloaded into the cache. ValueError if `name` is the path of a `config.json` itself.
    """
    require_no_configuration_file(name, missing="tokenizer")
    folder = Path(name)
    is_model_folder = (folder / "config.json").is_file()
    if is_model_folder:
        files_of_tokenizer = [file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)]
        if not files_of_tokenizer:
            return None
    tokenizer: PreTrainedTokenizerBase = _read(AutoTokenizer, name)
    return tokenizer


def require_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model (a Hub id, or a folder) without the model; ValueError if it has none.

    The tokenizer of a Hub id is downloaded into the cache.
    """
    tokenizer = load_tokenizer(name)
    if tokenizer is None:
        raise ValueError(
            f"model={name!r} has no tokenizer: copy the files of its tokenizer into the folder (tokenizer.json, "
            "tokenizer_config.json)."
        )
    return tokenizer


def require_processor(name: str) -> ProcessorMixin:
    """Load the processor of a model, which makes its inputs from text and images; ValueError if it has none.

    `name` is a folder or a Hub id, whose processor is downloaded into the cache.
    """
    processor = _read(AutoProcessor, name)
    if not isinstance(processor, ProcessorMixin):  # the tokenizer of a model of text
        raise ValueError(
            f"model={name!r} has no processor, so it can't be calibrated with images: pass text alone, or copy its "
            "processor_config.json and preprocessor_config.json into the folder."
        )
    return processor


def read_config(name: str) -> PreTrainedConfig:
    """Read the configuration of a Hub id, a model folder, a folder with one GGUF file, or a `config.json`.

    The configuration of a Hub id is downloaded into the cache.
    """
    config: PreTrainedConfig = _read(AutoConfig, name)
    return config


def model_class(config: PreTrainedConfig) -> Any:
    """Return the automatic class that loads the model of a configuration, image and audio towers included.

    This is AutoModelForCausalLM or AutoModelForMultimodalLM: the one that makes the class in `config.architectures`. If
    neither makes that class (Transformers may load such a model in part), it is the causal one, or the other if there
    is no causal one. Raises ValueError if Transformers has no class that writes text for the configuration.
    """
    # The name of the model's class, by the automatic class that makes it.
    class_names = dict[Any, str]()
    for automatic in (AutoModelForCausalLM, AutoModelForMultimodalLM):
        classes = internals.classes_by_configuration(automatic)
        if type(config) in classes:
            class_names[automatic] = classes[type(config)].__name__

    # Code beside the model is never run: Transformers refuses it with an error of its own.
    has_code = bool(getattr(config, "auto_map", None))
    if not class_names and not has_code:
        raise ValueError(
            f"model {config.name_or_path!r} has model_type={config.model_type!r}, of which Transformers has no class "
            "that writes text: pass a causal language model, or a multimodal one with a text decoder."
        )
    for automatic, class_name in class_names.items():
        if class_name in (config.architectures or ()):
            return automatic
    if not class_names:
        return AutoModelForCausalLM  # which refuses the code beside the model
    # The keys are in the order of the loop that made them: the causal class comes first, if it is there.
    return next(iter(class_names))


def model_without_weights(
    config: PreTrainedConfig, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Build the model of a configuration without weights, on the meta device; `config` stays as it is.

    `dtype` is that of its parameters; `None`: that of the configuration.
    """
    with reading(config.name_or_path or type(config).__name__), torch.device("meta"):
        model: PreTrainedModel = model_class(config).from_config(
            copy.deepcopy(config), dtype=dtype, trust_remote_code=False
        )
    return model


def read_model(
    name: str, *, config: PreTrainedConfig | None = None, **options: Any
) -> PreTrainedModel:
    """Read a language model from its files, dequantized; a Hub id is downloaded into the cache.

    It runs without the compiled kernels of the Hub (`use_kernels=False`).

    Args:
        name: Hub id, model folder, or a folder with one GGUF file.
        config: Its configuration, if it is not that of the files; the model gets a copy, and it stays as it is.
        options: Further options of `from_pretrained`, such as `dtype` and `device_map`.

    Raises:
        ValueError: The files lack tensors that the model needs, or are quantized in a form that can't be read.
    """
    require_weights(name)
    is_gguf = gguf_file(name) is not None
    if is_gguf:
        class_to_load = AutoModelForCausalLM
    else:
        config = read_config(name) if config is None else copy.deepcopy(config)
        class_to_load = model_class(config)
        is_quantized = quantization(config) is not None
        if is_quantized:
            config = read_dequantized(config)
    if config is not None:
        options["config"] = config

    # With its default, Transformers replaces norms and activations on a GPU by compiled kernels that it downloads from
    # the Hub. They may round otherwise than the modules that decoder layers read from files one by one have.
    model: PreTrainedModel
    model, info = _read(class_to_load, name, output_loading_info=True, use_kernels=False, **options)
    missing = sorted(info["missing_keys"])
    if missing:  # Transformers warns and takes random values
        raise ValueError(
            f"model={name!r} can't be loaded: its files lack {len(missing)} tensors that its config.json asks for, "
            f"such as {missing[0]}. Download it again."
        )
    return model


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn, inside, all errors of Transformers on damaged files into a ValueError that names the model `name`.

    Errors that say themselves what is wrong pass: of the system, of missing packages, of memory, and plain ValueErrors.
    """
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        # Parsers of damaged files raise subclasses of ValueError.
        is_plain_value_error = type(error) is ValueError
        if is_plain_value_error or is_out_of_memory(error):
            raise
        raise ValueError(
            f"model={name!r} can't be loaded ({type(error).__name__}: {error}). If its files are damaged, or pointers "
            "of Git LFS, download them again (git lfs pull)."
        ) from error


def _read(automatic: Any, name: str, **options: Any) -> Any:
    """Return what `from_pretrained` of an automatic class makes of the files of the model `name`, with these options.

    `automatic` is a class such as AutoTokenizer. The result is a model, a configuration, a tokenizer or a processor;
    with `output_loading_info` it is a pair, with a model. A Hub id may be downloaded to the cache. Errors name the
    model (`reading`).
    """
    file = gguf_file(name)
    if file is None:
        if not Path(name).exists():
            _require_on_hub(name)
        with reading(name):
            return automatic.from_pretrained(name, trust_remote_code=False, **options)

    if importlib.util.find_spec("gguf") is None:
        raise ImportError(
            f"model={name!r} is a GGUF file, which needs the package gguf: run {install_command('gguf')}."
        )
    # Python's garbage collector would look again and again at the many tokens of the file, which takes time.
    with reading(name), _without_collector():
        return automatic.from_pretrained(name, trust_remote_code=False, gguf_file=file, **options)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Stop Python's garbage collector inside; it is as before at the end."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@functools.cache
def _require_on_hub(name: str) -> None:
    """Raise OSError if a model is neither in the cache nor on the Hub, or the Hub can't be reached.

    Transformers would repeat each request for a minute. Here the Hub is asked once, and only for the head of a file. A
    `name` (a Hub id) that was found is not asked for again in this process.
    """
    is_in_cache = isinstance(try_to_load_from_cache(name, "config.json"), str)
    if is_in_cache:
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except Exception as error:  # errors of the Hub's client have no common base class
        is_gated = isinstance(error, GatedRepoError)
        is_absent = isinstance(error, RepositoryNotFoundError) and not is_gated
        if is_absent:
            raise OSError(
                f"model={name!r}: there is no such folder, and the Hub has no such model that you may read."
                f"{question_of_folder(name)}"
            ) from error
        # The Hub has answered: it has no such file, the model is gated, or the Hub is busy. Transformers says so.
        if isinstance(error, HfHubHTTPError):
            return
        first_line = str(error).partition("\n")[0]
        raise OSError(
            f"model={name!r}: there is no such folder, and the Hub can't be reached ({first_line})."
            f"{question_of_folder(name)}"
        ) from error


def gguf_file(name: str) -> str | None:
    """Return the name of the GGUF file if `name` is a folder with one and no configuration; otherwise `None`.

    Raises ValueError if `name` is nothing that a model can be read from: a file except `*.json`, an adapter, a folder
    without a model, or neither a path nor a Hub id.
    """
    path = Path(name)
    if path.is_file() and path.suffix != ".json":
        _refuse_file(path)
    require_name(name)
    if not path.is_dir() or (path / "config.json").exists():
        return None

    adapter = path / "adapter_config.json"
    if adapter.exists():
        _refuse_adapter(adapter)
    files = sorted(path.glob("*.gguf"))
    if not files:
        raise ValueError(
            f"model={name!r} is a folder with neither a config.json nor a .gguf file: pass a model folder or a Hub id."
        )
    if len(files) > 1:
        raise ValueError(
            f"model={name!r} is a folder with {len(files)} .gguf files ({files[0].name}, {files[1].name}, ...): move "
            "the one to prune into a folder of its own, and pass that."
        )
    return files[0].name


def _refuse_file(path: Path) -> None:
    """Raise ValueError for the `path` of a file where a model's folder is needed, and say what to pass instead."""
    if path.suffix != ".gguf":
        raise ValueError(
            f"model={str(path)!r} is a file: pass the folder that holds it, or a Hub id."
        )
    others = [file for file in path.parent.glob("*.gguf") if file != path]
    if others or (path.parent / "config.json").exists():
        raise ValueError(
            f"model={str(path)!r} is a GGUF file beside other models: move it into a folder of its own, and pass that."
        )
    raise ValueError(
        f"model={str(path)!r} is a GGUF file: pass the folder that holds it, {str(path.parent)!r}."
    )


def _refuse_adapter(adapter_config: Path) -> None:
    """Raise ValueError for the folder of an adapter of PEFT, and say what to do with its base model.

    `adapter_config` is the path of the `adapter_config.json` in the folder.
    """
    try:
        base = json.loads(adapter_config.read_bytes()).get("base_model_name_or_path")
    except (ValueError, AttributeError):  # it is damaged
        base = None
    raise ValueError(
        f"model={str(adapter_config.parent)!r} is an adapter of PEFT (adapter_config.json), not a model: merge it into "
        f"its base model (base_model_name_or_path={base!r}) by merge_and_unload() of PEFT, save that model, and pass "
        "its folder."
    )


def forget_gguf(model: PreTrainedModel) -> None:
    """Drop the mark of the GGUF file from a model whose weights were dequantized, so that it counts as any dense model.

    Changes `model` and its configuration: the model can then be saved, and moved to another dtype. Other models stay as
    they are.
    """
    settings = getattr(model.config, "quantization_config", None)
    is_from_gguf = getattr(settings, "quant_method", None) == "gguf"
    if is_from_gguf:
        # What Transformers sets when it loads the file.
        vars(model.config).pop("quantization_config")
        vars(model)["hf_quantizer"] = None
        for mark in ("is_quantized", "quantization_method"):
            vars(model).pop(mark, None)

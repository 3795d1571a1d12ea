"""Load models to prune, GGUF files included, and refuse those that can't be pruned.

Transformers reads every file; its errors on damaged files become one error that names the model. A streamed run loads a
model with all weights left in their files (`load_lazily`).
"""

import copy
import functools
import gc
import importlib.util
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
from optimum_fista.folder.checkpoint import closest_folder, require_name
from optimum_fista.installing import install_command
from optimum_fista.memory import is_out_of_memory
from optimum_fista.model.activations import Storage
from optimum_fista.model.offload import move_execution, settle_ties
from optimum_fista.source.files import source_folder
from optimum_fista.source.formats.dequantization import quantization, read_dequantized


def load_model(
    name: str,
    *,
    device: str | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        name: Hub id, model folder, or a folder that holds one GGUF file, which is dequantized.
        device: Device to load to; `None`: the accelerator if there is one, otherwise the CPU.
        dtype: Floating dtype, `"auto"` takes the checkpoint's.
        device_map: Accelerate's device map instead of `device`, such as `"auto"`, for a model that doesn't fit on it.
    """
    target, dtype = usable_device(device), dtype if dtype == "auto" else floating_dtype(dtype)
    tokenizer = require_tokenizer(name)  # first: the weights take long
    model = read_model(name, dtype=dtype, device_map=device_map)
    forget_gguf(model)
    if device_map is None:
        torch.nn.Module.to(model, target)
    return model, tokenizer


def load_lazily(
    name: str, offload_folder: Path, *, device: str | None = None, dtype: str | torch.dtype = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, Path]:
    """Load a model whose weights stay in its files until they are needed.

    Weights of a GGUF file are dequantized in memory; the same file has the tokenizer. Returns also the folder of the
    files.
    """
    if gguf_file(name) is not None:
        return (*load_model(name, device=device, dtype=dtype), Path(name))
    target, dtype = usable_device(device), dtype if dtype == "auto" else floating_dtype(dtype)

    def is_news(record: logging.LogRecord) -> bool:  # that weights stay in their files is intended
        return not record.getMessage().startswith("Some parameters are on the meta device")

    talker = logging.getLogger("accelerate.big_modeling")
    talker.addFilter(is_news)
    try:
        # Weights stay in safetensors files. Those that are stored in another form are copied into the offload folder.
        model = read_model(
            name, dtype=dtype, device_map={"": "disk"}, offload_folder=offload_folder
        )
    finally:
        talker.removeFilter(is_news)
    source = source_folder(name, getattr(model.config, "_commit_hash", None))
    settle_ties(model)  # tied weights are two once they are offloaded
    move_execution(model, target)
    return model, None, source


def local_source(model: PreTrainedModel) -> Path | None:
    """The folder from which a model in memory was loaded, in the cache of the Hub too; `None` if there is none."""
    name, revision = (
        getattr(model.config, "_name_or_path", ""),
        getattr(model.config, "_commit_hash", None),
    )
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # a path that is gone
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def load_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a Hub id, a model folder, or a folder with one GGUF file; `None` if a model folder has none."""
    folder, kinds = Path(name), ("tokenizer*", "*.model", "*.gguf", "vocab.*")
    if (folder / "config.json").is_file() and not any(any(folder.glob(kind)) for kind in kinds):
        return None
    return _read(AutoTokenizer, name)


def require_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, without the model."""
    tokenizer = load_tokenizer(name)
    if tokenizer is None:
        files = "tokenizer.json, tokenizer_config.json"
        raise ValueError(
            f"model={name!r} has no tokenizer: copy the files of its tokenizer into the folder ({files})."
        )
    return tokenizer


def require_processor(name: str) -> ProcessorMixin:
    """The processor of a model, which makes its inputs from text and images."""
    processor = _read(AutoProcessor, name)
    if not isinstance(processor, ProcessorMixin):  # the tokenizer of a model of text
        advice = "pass text alone, or copy its processor_config.json and preprocessor_config.json into the folder"
        raise ValueError(
            f"model={name!r} has no processor, so it can't be calibrated with images: {advice}."
        )
    return processor


def read_config(name: str) -> PreTrainedConfig:
    """The configuration of a Hub id, a model folder, or a folder with one GGUF file."""
    return _read(AutoConfig, name)


def model_class(config: PreTrainedConfig) -> Any:
    """Choose the automatic class that loads the class that a configuration names, image and audio towers included.

    If it names none that writes text, a causal language model is preferred: Transformers may load a part only.
    """
    kinds: dict[Any, Any] = {
        kind: kind._model_mapping for kind in (AutoModelForCausalLM, AutoModelForMultimodalLM)
    }
    known = {
        kind: classes[type(config)].__name__
        for kind, classes in kinds.items()
        if type(config) in classes
    }
    if not known and not getattr(
        config, "auto_map", None
    ):  # about code beside the model, Transformers has an error
        raise ValueError(
            f"model {config.name_or_path!r} has model_type={config.model_type!r}, of which Transformers has no class "
            "that writes text: pass a causal language model, or a multimodal one with a text decoder."
        )
    named = [kind for kind in known if known[kind] in (config.architectures or ())]
    return [*named, *known, AutoModelForCausalLM][0]


def described(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Build the model of a configuration without weights, on the meta device; the configuration stays as it is."""
    with reading(config.name_or_path or type(config).__name__), torch.device("meta"):
        given = copy.deepcopy(config)
        model: PreTrainedModel = model_class(config).from_config(
            given, dtype=dtype, trust_remote_code=False
        )
    return model


def read_model(name: str, **options: Any) -> PreTrainedModel:
    """Read a language model from its files, dequantized, with further options of `from_pretrained`."""
    config = None if gguf_file(name) else options.get("config") or read_config(name)
    kind = AutoModelForCausalLM if config is None else model_class(config)
    if config is not None and quantization(config):
        options["config"] = read_dequantized(config)
    model, info = _read(kind, name, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"])
    if missing:  # Transformers warns and takes random values
        why = f"its files lack {len(missing)} tensors that its config.json asks for, such as {missing[0]}"
        raise ValueError(f"model={name!r} can't be loaded: {why}. Download it again.")
    return model


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn all errors of Transformers on damaged files into one error that names the model."""
    try:
        yield
    except (OSError, ImportError):  # which say what is wrong
        raise
    except Exception as error:
        if type(error) is ValueError or is_out_of_memory(
            error
        ):  # parsers raise subclasses of ValueError
            raise
        raise ValueError(
            f"model={name!r} can't be loaded ({type(error).__name__}: {error}). If its files are damaged, or pointers "
            "of Git LFS, download them again (git lfs pull)."
        ) from error


def _read(kind: Any, name: str, **options: Any) -> Any:
    """Read a model's files by an automatic class of Transformers; no code that comes with them runs."""
    file, enabled = gguf_file(name), gc.isenabled()
    if file is None:
        if not Path(name).exists():
            _require_on_hub(name)
    elif importlib.util.find_spec("gguf") is None:
        command = install_command("gguf")
        raise ImportError(
            f"model={name!r} is a GGUF file, which needs the package gguf: run {command}."
        )
    else:
        options["gguf_file"] = file
        gc.disable()  # the tokens of the file are many objects, at all of which the collector would look many times
    try:
        with reading(name):
            return kind.from_pretrained(name, trust_remote_code=False, **options)
    finally:
        if enabled:
            gc.enable()


@functools.cache
def _require_on_hub(name: str) -> None:
    """Ask the Hub once if it has a model that is not in the cache: Transformers repeats each request for a minute."""
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except Exception as error:  # the client has no common base
        absent = isinstance(error, RepositoryNotFoundError) and not isinstance(
            error, GatedRepoError
        )
        if (
            isinstance(error, HfHubHTTPError) and not absent
        ):  # it has another file, it is gated, or is busy
            return
        unreached = f"can't be reached ({str(error).partition(chr(10))[0]})"
        why = "has no such model that you may read" if absent else unreached
        raise OSError(
            f"model={name!r}: there is no such folder, and the Hub {why}.{closest_folder(name)}"
        ) from error


def gguf_file(name: str) -> str | None:
    """Name of the GGUF file if `name` is a folder with one and no configuration."""
    folder = Path(name)
    if folder.is_file() and folder.suffix != ".json":
        raise ValueError(f"model={name!r} is a file: pass the folder that holds it, or a Hub id.")
    require_name(name)
    if not folder.is_dir() or (folder / "config.json").exists():
        return None
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        what = "is a folder with neither a config.json nor exactly one .gguf file"
        raise ValueError(f"model={name!r} {what}: pass a model folder or a Hub id.")
    return files[0].name


def default_device() -> str:
    """Type of the accelerator if there is one, otherwise the CPU; MPS is not chosen, because it has no float64."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None or found.type == "mps" else found.type


def usable_device(device: str | None) -> torch.device:
    """A device by name; `None`: `default_device()`."""
    device = device or default_device()
    try:
        found = torch.empty(
            0, device=device
        ).device  # with the number of the current one, if none was named
        if found.type == "meta":
            raise RuntimeError("it holds no values")
        return found
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch without CUDA
        raise ValueError(
            f"device={device!r} can't be used: {error}. Pass 'cpu', 'cuda' or 'cuda:N'."
        ) from error


def storage_place(name: str | torch.device | Path | None) -> Storage | None:
    """The device or folder for activations; `"disk"` is the temporary folder, `None` stays `None`."""
    if name is None:
        return None
    if name == "disk":
        return Path(tempfile.gettempdir())
    try:
        return usable_device(str(name))
    except ValueError as error:
        if Path(str(name)).is_dir():  # a device comes first: a folder called `cpu` is `./cpu`
            return Path(str(name))
        wanted = f"a device such as 'cpu', 'disk', or a folder that exists ({error})"
        raise ValueError(f"storage_device={str(name)!r}: pass {wanted}") from error


def floating_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A floating dtype by name."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if (
        not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2
    ):  # no sums in 8 bits
        raise ValueError(f"dtype={dtype!r}: pass 'auto', 'float32', 'bfloat16' or 'float16'.")
    return found


def forget_gguf(model: PreTrainedModel) -> None:
    """Drop the mark of the GGUF file from a model whose weights were dequantized, so that it can be saved."""
    if getattr(getattr(model.config, "quantization_config", None), "quant_method", None) == "gguf":
        model.config.__dict__.pop("quantization_config")
        vars(model)["hf_quantizer"] = None

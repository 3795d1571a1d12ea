"""Files of a dense model that are copied to its pruned folder, and tensors that the pruned model has no place for.

A pruned folder gets all files of the dense one except weights (templates, processors, licences), so it can replace it.
If the loaded class has no place for a tensor, the model is refused with the name of the tensor.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from zipfile import is_zipfile

import torch
from huggingface_hub import HfApi, RepoFile, snapshot_download, try_to_load_from_cache
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from optimum_fista.folder.checkpoint import checkpoint_files, names_in, read_json
from optimum_fista.model.architecture import find_decoder_layers
from optimum_fista.model.dequantization import dequantizer_of

_TEMPLATES = "additional_chat_templates"
_WRITTEN = {"config.json", "README.md", "fista"}  # by the run
_WEIGHTS = re.compile(
    r"\.(safetensors|bin|gguf|pth?|ckpt|h5|msgpack|onnx(_data)?|tflite|npz|ot)(\.index\.json)?$|^adapter_config\.json$"
)
_READ = re.compile(r"^(model|packed|pytorch_model)\b.*\.(safetensors|bin)(\.index\.json)?$")
_MOST_BYTES = 2**28  # the largest vocabularies have about 2**25
# Tables that a model computes itself; older checkpoints also store them. They are not counted as lost.
# Nor are scales for activations that were quantized, too: a model in 16 bits has none.
_COMPUTED = re.compile(
    r"(\brotary_emb\.inv_freq|\bposition_ids|\.masked_bias|_extra_state"
    r"|\.(input|output|q|k|v)_(scale|global_scale|zero_point))$"
)
logger = logging.getLogger(__name__)


def source_folder(name: str, revision: str | None) -> Path:
    """The folder of a model that has been loaded; for a Hub id, its small files are first loaded into the cache."""
    if Path(name).is_dir():
        return Path(name)
    try:
        tree = HfApi().list_repo_tree(name, revision=revision)
        small = [file.path for file in tree if isinstance(file, RepoFile) and _comes_along(file.path, file.size)]
        snapshot_download(name, revision=revision, allow_patterns=[*small, f"{_TEMPLATES}/*"])
    except Exception as error:  # the client has no common base
        logger.warning("the Hub doesn't tell which files %s has (%s): those in the cache are copied", name, error)
    return Path(str(try_to_load_from_cache(name, "config.json", revision=revision))).parent


def copy_source(source: Path, folder: Path, pattern: str = "*") -> None:
    """Copy matching files of a model's folder, except weights and files that a run writes; log files not copied."""
    left = []
    for path in sorted(source.glob(pattern)):
        name = path.name
        if path.is_file() and _comes_along(name, path.stat().st_size):
            shutil.copyfile(path, folder / name)
        elif name == _TEMPLATES and path.is_dir():
            shutil.copytree(path, folder / name, copy_function=shutil.copyfile, dirs_exist_ok=True)
        elif not name.startswith(".") and name not in _WRITTEN and not _READ.search(name):
            left.append(f"{name}/" if path.is_dir() else name)
    if left:
        logger.warning("not copied from %s: %s", source, ", ".join(left))


def described_loss(model: PreTrainedModel, source: Path) -> str:
    """Describe the tensors in a model's files for which the loaded model has no place, by module; empty if none.

    Tables that the model computes itself do not count (rotary embeddings, causal masks), nor tensors in its decoder
    layers that its class declares useless. Useless tensors elsewhere do count, because other programs use them: layers
    that predict more tokens, or a vision tower.
    """
    stored_names = list(_stored_names(source))
    transforms = get_model_conversion_mapping(model, hf_quantizer=dequantizer_of(source))
    state = model.state_dict()
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    layers = tuple(f"{name}." for name, _ in find_decoder_layers(model))
    useless = re.compile("|".join(model._keys_to_ignore_on_load_unexpected or ["(?!)"]))
    modules, buffers = dict(model.named_modules()), dict(model.named_buffers())
    lost: Counter[str] = Counter()
    for stored in stored_names:
        names = [  # as this version of Transformers names a stored tensor, and unchanged
            rename_source_key(stored, *rules, model.base_model_prefix, state)[0]
            for rules in ((renamings, converters), ([], []))
        ]
        if any(name in state or name in buffers for name in names) or _COMPUTED.search(stored):
            continue
        name = names[0]
        if f"{model.base_model_prefix}.{name.partition('.')[0]}" in modules:
            name = f"{model.base_model_prefix}.{name}"  # stored without it
        if not (name.startswith(layers) and useless.search(name)):
            parts = name.split(".")
            above = (".".join(parts[:count]) for count in range(1, len(parts)))  # from the outermost module inwards
            lost[next((module for module in above if module not in modules), name)] += 1
    shown = ", ".join(f"{name} ({count})" for name, count in [*lost.items()][:4]) + ", ..." * (len(lost) > 4)
    said = f"{lost.total()} tensors of the dense model have no place in {type(model).__name__}: {shown}"
    return said if lost else ""


def _stored_names(source: Path) -> Iterator[str]:
    """Names of all tensors in the weight files that Transformers reads; of a GGUF file none."""
    binary, index = source / "pytorch_model.bin", source / "pytorch_model.bin.index.json"
    try:
        for file in {*checkpoint_files(source).values()}:
            yield from names_in(file)
    except FileNotFoundError:
        if binary.exists():
            # Names only: no tensor is read. Files of PyTorch before 1.6 are no zip files, and can't be mapped.
            yield from torch.load(binary, map_location="meta", weights_only=True, mmap=is_zipfile(binary))
        elif index.exists():
            yield from read_json(index)["weight_map"]


def _comes_along(name: str, size: int) -> bool:
    return not name.startswith(".") and name not in _WRITTEN and not _WEIGHTS.search(name) and size <= _MOST_BYTES

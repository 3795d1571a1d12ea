"""Files of a dense model that are copied to its pruned folder.

A pruned folder gets all files of the dense one except weights (templates, processors, licences), so it can replace it.
"""

import logging
import re
import shutil
from pathlib import Path

from huggingface_hub import HfApi, RepoFile, snapshot_download, try_to_load_from_cache

from optimum_fista.source.source_tensors import weight_files

_TEMPLATES = "additional_chat_templates"
_WRITTEN = {"config.json", "README.md", "fista"}  # by the run
_LEFT = re.compile(
    r"^\.|/|\.(safetensors|bin|gguf|pth?|ckpt|h5|msgpack|onnx(_data)?|tflite|npz|ot)(\.index\.json)?$|^adapter_config\."
)
_MOST_BYTES = 2**28  # the largest vocabularies have about 2**25
logger = logging.getLogger(__name__)


def source_folder(name: str, revision: str | None) -> Path:
    """The folder of a model that has been loaded; for a Hub id, its small files are first loaded into the cache."""
    if Path(name).is_dir():
        return Path(name)
    try:
        tree = HfApi().list_repo_tree(name, revision=revision)
        small = [
            file.path
            for file in tree
            if isinstance(file, RepoFile) and _comes_along(file.path, file.size)
        ]
        snapshot_download(name, revision=revision, allow_patterns=[*small, f"{_TEMPLATES}/*"])
    except Exception as error:  # the client has no common base
        logger.warning(
            "the Hub doesn't tell which files %s has (%s): those in the cache are copied",
            name,
            error,
        )
    return Path(str(try_to_load_from_cache(name, "config.json", revision=revision))).parent


def copy_source(source: Path, folder: Path, pattern: str = "*") -> None:
    """Copy matching files of a model's folder, except weights and files that a run writes; log files not copied."""
    left = list[Path]()
    for path in sorted(source.glob(pattern)):
        name = path.name
        if path.is_file() and _comes_along(name, path.stat().st_size):
            shutil.copyfile(path, folder / name)
        elif name == _TEMPLATES and path.is_dir():
            shutil.copytree(path, folder / name, copy_function=shutil.copyfile, dirs_exist_ok=True)
            (folder / name).chmod(folder.stat().st_mode)  # the source may be read-only
        elif not (name.startswith(".") or name in _WRITTEN or name.endswith(".index.json")):
            left.append(path)
    read = weight_files(source) if left else set()
    if names := [
        f"{path.name}/" if path.is_dir() else path.name for path in left if path not in read
    ]:
        logger.warning("not copied from %s: %s", source, ", ".join(names))


def _comes_along(name: str, size: int) -> bool:
    return name not in _WRITTEN and not _LEFT.search(name) and size <= _MOST_BYTES

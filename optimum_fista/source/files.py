"""Files of a dense model that are copied to its pruned folder.

A pruned folder gets all files of the dense one except weights (templates, processors, licences), so it can replace it.
"""

import logging
import re
import shutil
from pathlib import Path

from huggingface_hub import HfApi, RepoFile, snapshot_download, try_to_load_from_cache

from optimum_fista.source.stored_tensor import weight_files

_TEMPLATES = "additional_chat_templates"
_WRITTEN = {"config.json", "README.md", "fista"}  # by the run
# Hidden files, paths with folders, weights in any format, and what describes an adapter.
_LEFT_OUT = re.compile(
    r"^\.|/|\.(safetensors|bin|gguf|pth?|ckpt|h5|msgpack|onnx(_data)?|tflite|npz|ot)(\.index\.json)?$|^adapter_config\."
)
_MOST_BYTES = 2**28  # the largest vocabularies have about 2**25
logger = logging.getLogger(__name__)


def source_folder(name: str, revision: str | None) -> Path:
    """Return the folder of a model that has been loaded; `revision` is the commit of a Hub id.

    For a Hub id, the small files of the repository are first loaded into the cache.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        tree = HfApi().list_repo_tree(name, revision=revision)
        files = [file for file in tree if isinstance(file, RepoFile)]
        small = [file.path for file in files if _comes_along(file.path, file.size)]
        snapshot_download(name, revision=revision, allow_patterns=[*small, f"{_TEMPLATES}/*"])
    except Exception as error:  # the client has no common base
        logger.warning(
            "the Hub doesn't tell which files %s has (%s): those in the cache are copied",
            name,
            error,
        )
    return Path(str(try_to_load_from_cache(name, "config.json", revision=revision))).parent


def copy_source(source: Path, folder: Path, pattern: str = "*") -> None:
    """Copy the files of a model's folder that match `pattern`, except weights and files that a run writes, to `folder`.

    Files that are neither copied, nor weights that are read, nor hidden are named in a warning.
    """
    not_copied: list[Path] = []
    for path in sorted(source.glob(pattern)):
        name = path.name
        is_expected = name.startswith(".") or name in _WRITTEN or name.endswith(".index.json")
        if path.is_file() and _comes_along(name, path.stat().st_size):
            shutil.copyfile(path, folder / name)
        elif name == _TEMPLATES and path.is_dir():
            shutil.copytree(path, folder / name, copy_function=shutil.copyfile, dirs_exist_ok=True)
            (folder / name).chmod(folder.stat().st_mode)  # the source may be read-only
        elif not is_expected:
            not_copied.append(path)

    weights = weight_files(source) if not_copied else set()
    names = [
        f"{path.name}/" if path.is_dir() else path.name
        for path in not_copied
        if path not in weights
    ]
    if names:
        logger.warning("not copied from %s: %s", source, ", ".join(names))


def _comes_along(name: str, size: int) -> bool:
    """Tell whether a file of a model's folder is copied; `name` is its path in the folder, `size` its bytes."""
    return name not in _WRITTEN and not _LEFT_OUT.search(name) and size <= _MOST_BYTES

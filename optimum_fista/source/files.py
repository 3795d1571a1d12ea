"""Files of a dense model that are copied to its pruned folder.

A pruned folder gets all files of the dense one except weights (templates, processors, licences), so it can replace it.
`source_folder` finds the dense folder before the run, and `copy_source` copies from there at the end.
"""

import errno
import logging
import os
import re
import shutil
from pathlib import Path

from huggingface_hub import HfApi, RepoFile, snapshot_download, try_to_load_from_cache

from optimum_fista.source.links import leads_out
from optimum_fista.source.model_folder import weight_files

_TEMPLATES = "additional_chat_templates"
_WRITTEN = {"config.json", "README.md", "fista"}  # by the run
# Hidden files, paths with folders, weights in any format, and what describes an adapter.
_LEFT_OUT = re.compile(
    r"^\.|/|\.(safetensors|bin|gguf|pth?|ckpt|h5|msgpack|onnx(_data)?|tflite|npz|ot)(\.index\.json)?$|^adapter_config\."
)
_MOST_BYTES = 2**28  # of a file that is copied; the largest vocabularies have about 2**25
_MOST_BYTES_OF_TEMPLATE = 2**20
logger = logging.getLogger(__name__)


def source_folder(name: str, revision: str | None) -> Path:
    """Return the folder of a model that has been loaded; that of a Hub id is in the cache.

    For a Hub id, the files of the repository that `copy_source` will copy are first downloaded into the cache. If the
    Hub can't be asked, there is a warning instead.

    Args:
        name: The path of a folder, or a Hub id.
        revision: The commit from which a Hub id was loaded; `None`: that of the main branch.

    Raises:
        PermissionError: If a file that `copy_source` will copy can't be read.
    """
    if Path(name).is_dir():
        folder = Path(name)
        _require_readable(folder)
        return folder
    try:
        tree = HfApi().list_repo_tree(name, revision=revision)
        files = [file for file in tree if isinstance(file, RepoFile)]  # without folders
        needed = [file.path for file in files if _comes_along(file.path, file.size)]
        needed.append(f"{_TEMPLATES}/*.jinja")
        snapshot_download(name, revision=revision, allow_patterns=needed)
    except Exception as error:  # errors of the Hub's client have no common base class
        logger.warning(
            "the Hub doesn't tell which files %s has (%s): those in the cache are copied",
            name,
            error,
        )
    # The model has been loaded, so its configuration is in the cache.
    config_file = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(str(config_file)).parent


def copy_source(source: Path, folder: Path, pattern: str = "*") -> None:
    """Copy the files of a model's folder `source`, except weights and files that a run writes, to `folder`.

    `pattern` is that of the names of files to copy, such as "*.json". Files with these names in `folder` are replaced.
    A warning names the files that are neither copied, nor weights that are read, nor hidden.
    """
    copied, others = _files_to_copy(source, pattern)
    for name in copied:
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target)
    if others:
        logger.warning("not copied from %s: %s", source, ", ".join(others))


def _files_to_copy(source: Path, pattern: str) -> tuple[list[str], list[str]]:
    """Return the names of the files that `copy_source` copies, and the names of those that its warning names.

    Links that lead out of the folder are not followed, because the copy may be uploaded. Of the folder of chat
    templates only small templates are copied. Names are relative to `source`; `pattern` is that of `copy_source`.
    Nothing is copied here.
    """
    copied: list[str] = []
    others: list[Path] = []
    for path in sorted(source.glob(pattern)):
        name = path.name
        # Nobody misses these if they are not copied.
        is_expected = name.startswith(".") or name in _WRITTEN or name.endswith(".index.json")
        if leads_out(path, source):
            if not is_expected:
                others.append(path)
        elif path.is_file() and _comes_along(name, path.stat().st_size):
            copied.append(name)
        elif path.is_dir() and name == _TEMPLATES:
            for template in sorted(path.iterdir()):
                if _is_template(template, source):
                    copied.append(f"{_TEMPLATES}/{template.name}")
                else:
                    others.append(template)
        elif not is_expected:
            others.append(path)

    weights = weight_files(source) if others else set()  # these are read, not copied
    not_copied = []
    for path in others:
        if path not in weights:
            name = path.relative_to(source).as_posix()
            not_copied.append(f"{name}/" if path.is_dir() else name)
    return copied, not_copied


def _is_template(path: Path, source: Path) -> bool:
    """Tell whether `path`, in the folder of chat templates of `source`, is a chat template that may be copied."""
    if path.suffix != ".jinja" or leads_out(path, source) or not path.is_file():
        return False
    return path.stat().st_size <= _MOST_BYTES_OF_TEMPLATE


def _require_readable(source: Path) -> None:
    """Raise PermissionError if the folder `source` has a file that `copy_source` would copy and that can't be read.

    So the error comes before the run, and not at its end.
    """
    copied, _ = _files_to_copy(source, "*")
    for name in copied:
        if not os.access(source / name, os.R_OK):
            raise PermissionError(
                errno.EACCES,
                "this file of the model can't be read, and the result would get a copy of it: make it readable, or "
                "move it away",
                str(source / name),
            )


def _comes_along(name: str, size: int) -> bool:
    """Tell whether a file of a model's folder is copied; `name` is its path in the folder, `size` its bytes.

    Files that the run writes, hidden ones, weights and very large files are not, and none in a folder inside.
    """
    return name not in _WRITTEN and not _LEFT_OUT.search(name) and size <= _MOST_BYTES

"""The files of the model that a run reads, with their digests, by which a change during the run is noticed.

`shared_files` hashes the files when a run begins, in every process (`Ranks`: the processes of a run). Before a decoder
layer counts as finished, `SourceFiles.require_unchanged` looks at them again.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from optimum_fista.atomic import digest_of, read_record
from optimum_fista.bars import tqdm
from optimum_fista.folder.output import JOURNAL
from optimum_fista.prune.ranks import Ranks
from optimum_fista.source.model_folder import CONFIG_FILE

WEIGHTS_FILE = f"{JOURNAL}/weights.json"
"""Hashes of the files that are read (`SourceFiles.hashes`), in an unfinished folder."""
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".gguf", ".bin", ".bin.index.json")
_READERS = 4  # files that are hashed at a time


class SourceFiles:
    """Weight files and configuration of the model that is read, with their digests.

    Whole files are hashed, at 1 to 2 GB/s a core: 140 GB take a minute, which is little beside hours of pruning.

    Args:
        folder: The folder of the files.
        noted: Hashes of an earlier look at the same files; a file that has not changed is not read again.
        progress: Whether a bar is shown while files are read.

    Attributes:
        folder: As passed.
        hashes: Size, time of modification, time of change, inode and SHA-256, by file name.
    """

    def __init__(self, folder: Path, noted: Mapping[str, list[Any]], progress: bool) -> None:
        """Look at the weight files and the configuration in `folder`, and hash those that changed since `noted`.

        `noted` is as `hashes`: size, times, inode and SHA-256, by file name. `progress` shows a bar. The files are only
        read, several at a time.
        """
        self.folder = folder
        self.hashes: dict[str, list[Any]] = {}
        self._progress = progress
        changed: list[Path] = []
        for file in sorted(folder.iterdir()):
            # A link in the Hub's cache may lead nowhere.
            is_read = file.name == CONFIG_FILE or file.name.endswith(_WEIGHTS)
            if not is_read or not file.is_file():
                continue
            status = file.stat()
            # A write changes `st_ctime_ns`, which no program can set.
            stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
            # An entry is the stamp and, last, the digest; of a new file, nothing is noted.
            entry = noted.get(file.name, [])
            digest = entry[-1] if entry[:-1] == stamp else None
            self.hashes[file.name] = [*stamp, digest]  # in the order of the files
            if digest is None:
                changed.append(file)

        with ThreadPoolExecutor(_READERS) as pool:
            digests = tqdm(
                pool.map(digest_of, changed),
                desc="Hashing weights",
                total=len(changed),
                unit="file",
                leave=False,
                disable=not (progress and changed),
            )
            for file, digest in zip(changed, digests, strict=True):
                self.hashes[file.name][-1] = digest

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 by file name."""
        return {name: values[-1] for name, values in self.hashes.items()}

    def require_unchanged(self) -> None:
        """Refuse to go on (ValueError) if a file has changed since it was hashed, is new, or is gone.

        `self.hashes` has size, times and SHA-256 of each file in `self.folder`. Files with a new time are read again;
        their new times are noted in `self.hashes`. `self._progress` says whether a bar is shown meanwhile.
        """
        now = SourceFiles(self.folder, self.hashes, self._progress)
        before = self.digests
        after = now.digests
        changed = [
            name for name in sorted({**before, **after}) if before.get(name) != after.get(name)
        ]
        if changed:
            raise ValueError(
                f"{', '.join(changed)} in {str(self.folder)!r} changed during the run: restore the old files and start "
                "again with the same output, or pass another folder, or pass overwrite=True (--overwrite) to throw its "
                "layers away."
            )
        self.hashes = now.hashes


def shared_files(folder: Path, unfinished: Path, ranks: Ranks, progress: bool) -> SourceFiles:
    """Hash the files of a model that several processes read; rank 0 alone hashes those that the others see as it does.

    `folder` has the files of the model. Digests that an earlier start of the run left in the `unfinished` folder are
    used for files that did not change. Writes nothing. All processes must call this.
    """
    noted = read_record(unfinished / WEIGHTS_FILE) or {}
    # Every process looks at the files: on another machine, others may lie at the same path.
    of_rank_0 = ranks.first(lambda: SourceFiles(folder, noted, progress).hashes)
    return ranks.each(lambda: SourceFiles(folder, of_rank_0, progress))

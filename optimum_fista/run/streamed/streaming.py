"""From a model's files to the files of the pruned model, one decoder layer in memory at a time."""

from __future__ import annotations

import errno
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from optimum_fista.run.callbacks.pruning_callback import PruningCallback
from optimum_fista.run.checkpoints.output_folder import FOLDER, MODEL_FILES, require_output, unfinished_folder
from optimum_fista.run.checkpoints.output_lock import locked_output
from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.reports.report import PruningReport
from optimum_fista.run.streamed.fingerprint import model_folder
from optimum_fista.run.streamed.lazy_loading import load_lazily
from optimum_fista.run.streamed.ranks import RankError, joined_ranks, require_independent_layers
from optimum_fista.run.streamed.streamed_run import StreamedRun

_ADVICE = dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make it writable, and ")
_ADVICE |= dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room, and ")


def prune_files(
    name: str | Path,
    calib_dataloader: Iterable[Any],
    output_dir: Path,
    config: FistaPruningConfig,
    *,
    calibration_source: str | None = None,
    device: str | None = None,
    dtype: str | torch.dtype = "auto",
    overwrite: bool = False,
    progress: bool = True,
    storage_device: str | torch.device | Path | None = None,
    callbacks: Sequence[PruningCallback] = (),
    packed: bool = False,
) -> PruningReport:
    """Prune a model from its files to the files of `output_dir`; see `FistaPruner.prune`."""
    started = time.perf_counter()
    require_output(output_dir, overwrite, source=name, names=MODEL_FILES)
    folder = unfinished_folder(output_dir)
    with joined_ranks(device) as ranks, ExitStack() as opened:

        def lock() -> None:
            opened.enter_context(locked_output(output_dir))
            require_output(output_dir, overwrite, names=MODEL_FILES)  # another run may just have ended

        def begin() -> tuple[StreamedRun, Path]:
            if not (folder / FOLDER).exists():
                raise ValueError(f"output: rank 0 began {str(folder)!r}, and it isn't here: pass a shared folder.")
            require_independent_layers(config, ranks.count)
            offload = tempfile.TemporaryDirectory(prefix="offload-", dir=folder / FOLDER)
            model, tokenizer = load_lazily(
                str(name), Path(opened.enter_context(offload)), device=ranks.device, dtype=dtype
            )
            shown = progress and not ranks.index
            run = StreamedRun(
                model, tokenizer, calib_dataloader, config, calibration_source, shown, storage_device, callbacks, packed
            )
            run.store_beside(folder)
            if ranks.count > 1:
                run.pruning.title = f"Pruning, rank {ranks.index} of {ranks.count}"
            return run, model_folder(str(name))

        ranks.first(lock)
        run, source = ranks.each(begin)
        run.open(folder, source, overwrite, ranks)
        try:
            ranks.each(run.begin)
            run.prune(ranks)
            report = ranks.first(lambda: run.complete(output_dir, overwrite, started))
        except OSError as error:
            advice = f"{run.kept()}; {_ADVICE.get(error.errno or 0, '')}start again with the same output"
            if error.errno is None:
                raise type(error)(f"{error} {advice}") from error
            raise OSError(error.errno, f"{error.strerror}: {advice}", error.filename) from error
        except RankError as error:
            raise RankError(f"{error}; {run.kept()}; start again with the same output") from error
    for callback in callbacks:
        callback.on_prune_end(report)
    return report

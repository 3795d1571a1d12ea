"""The pruner: it takes a model, prunes it, and returns a report.

`FistaPruner.prune` has two entries. A model given by name goes to `named.prune_named`. A loaded model is planned here:
`plan_removal` decides what is taken from it (`Removal`), `source_tensors` finds the tensors in the files from which it
was loaded (`SourceTensors`), `plan_run` joins both to a `Plan`, and `read_calibration` reads the text and begins the
report. Both entries call `run.run`, with a sink for the model in memory or for files.
"""

import logging
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_fista.config import FistaPruningConfig
from optimum_fista.devices import storage_place
from optimum_fista.environment import numerical_environment
from optimum_fista.folder.checkpoint import CONFIG_KEY
from optimum_fista.folder.hub import push_folder, require_repo_id
from optimum_fista.folder.output import new_output
from optimum_fista.folder.writing import summary, write_checkpoint
from optimum_fista.model.calibration import count_texts
from optimum_fista.model.layers import prunable_layers
from optimum_fista.model.offload import offload_hook
from optimum_fista.prune.batches import read_calibration
from optimum_fista.prune.callback import PruningCallback
from optimum_fista.prune.measuring import (
    MeasuringInterrupted,
    measure_folder,
    note_failure,
    note_losses,
    require_texts,
)
from optimum_fista.prune.named import prune_named
from optimum_fista.prune.plan import plan_run, prediction_layers_of
from optimum_fista.prune.run import run
from optimum_fista.prune.sink import ModelSink
from optimum_fista.removal.planning import plan_removal
from optimum_fista.removal.prediction_experts import LoadedPredictionLayer
from optimum_fista.removal.removal import Removal
from optimum_fista.report import PruningReport
from optimum_fista.source.inventory import source_tensors
from optimum_fista.source.loading import local_source, reading, require_tokenizer
from optimum_fista.source.source_tensors import SourceTensors
from optimum_fista.text.loss import MEASURING_ERRORS, losses_of

logger = logging.getLogger(__name__)


class FistaPruner:
    """Prunes decoder-only Transformers models after training, in one shot.

    It prunes one decoder layer after the other, as FISTAPruner does (arXiv 2408.03728; its settings are in
    `FistaPruningConfig.paper()`).

    Args:
        config: What to prune and how; 50% unstructured by default.
        progress: Whether to show a progress bar, and a line for each finished decoder layer, on stderr.
        storage_device: Where to keep activations between passes: a device (`"cpu"` spares the memory of a GPU), a
            folder, or `"disk"` (files beside the output; for a model in memory, the temporary folder). `None`: the
            model's device. If a model given by name is pruned on the CPU, `None` means `"disk"`.
        callbacks: Called for every operator and decoder layer as it is pruned.
    """

    def __init__(
        self,
        config: FistaPruningConfig | None = None,
        *,
        progress: bool = True,
        storage_device: str | torch.device | Path | None = None,
        callbacks: Sequence[PruningCallback] = (),
    ) -> None:
        """Keep the options, which the docstring of the class explains.

        `config` says what to prune and how; `None`: the default one. `progress` shows bars, `storage_device` is where
        activations are kept between passes, and `callbacks` are called as operators and decoder layers are pruned. The
        results of models that are pruned in place will be kept by model, and are freed with the model.
        """
        self.config = config if config is not None else FistaPruningConfig()
        self.progress = progress
        self.storage_device = storage_device
        self.callbacks = tuple(callbacks)
        # Report and packed masks of each model.
        self._results: WeakKeyDictionary[
            PreTrainedModel, tuple[PruningReport, dict[str, Tensor]]
        ] = WeakKeyDictionary()
        # Of each model, the tensors in the files from which it was loaded, by their names in the pruned model.
        self.sources: WeakKeyDictionary[PreTrainedModel, SourceTensors] = WeakKeyDictionary()

    @numerical_environment()
    def prune(
        self,
        model: PreTrainedModel | str | Path,
        calib_dataloader: Iterable[Any],
        *,
        calibration_source: str | None = None,
        output_dir: str | Path | None = None,
        device: str | None = None,
        dtype: str | torch.dtype = "auto",
        overwrite: bool = False,
        packed: bool = False,
        measure: Mapping[str, str] | None = None,
        protect: Mapping[str, float] | None = None,
    ) -> PruningReport:
        """Prune a model in place, or from its files to the files of `output_dir`; return the report.

        If the model is given by name, one decoder layer at a time is read, pruned, and written to its own file, so the
        whole model is never in memory. Until the end, its files are in `output_dir` + ".unfinished". After a crash, an
        interrupt, a full disk (OSError) or the end of another process (RankError), the same call resumes there, with
        the same result. Processes (`accelerate launch`, `torchrun`) that make this call share the decoder layers
        (docs/ranks.md). Each prunes its own copy of a loaded model. One thread of a process may prune at a time.

        The options of this pruner are its fields: `self.config` says what to prune and how, `self.progress` shows bars,
        `self.storage_device` is where activations are kept between passes, and `self.callbacks` are called on the way.
        The report and the masks of a loaded model are kept for `result`.

        Args:
            model: Decoder-only language model in memory, or offloaded by Accelerate (an error leaves the model as it
                was). Or a name: a Hub id, a model folder, or a folder with one GGUF file.
            calib_dataloader: Iterable of `{"input_ids", "attention_mask"}` dicts, or of tensors or lists of ids [batch,
                sequence]. Dicts may hold images or sounds as the model's processor makes them (`pixel_values`, ...). A
                dict with `"held_out"` (True, or the name of the text) only measures the perplexity. If the calibration
                has several texts, `"source"` is the name of the text that all sequences of a dict are of: the held-out
                sequences and the first tokens, on which the loss is computed, are then of all texts, and experts that
                stay are refitted, which each text tests. For a pattern such as `vocab:0.35`, texts, too.
            calibration_source: Name of the text, for the report.
            output_dir: Where to write the pruned model. This option and the next ones are for a model given by name.
            device: Where to compute; `None`: the accelerator if there is one (MPS has to be named).
            dtype: `"auto"` takes the checkpoint's.
            overwrite: Replace a model that `output_dir` already holds, and an unfinished run of other settings.
            packed: Store the weights without their zeros (docs/formats.md).
            measure: Held-out texts by name, such as `{"code.txt": text}`, of 4,096 tokens and more each: the loss on
                each, before and after, goes into `report.texts` and the model card. A loaded model must come from a
                folder with a tokenizer.
            protect: By names of `measure`, how many times the bits per byte before the run those after it may be, such
                as `{"code.txt": 1.02}`. If they are more, the result is kept, and the report says so
                (`report.unprotected`).
        """
        if isinstance(model, str | Path):
            if output_dir is None:
                raise ValueError(
                    f"model={str(model)!r} is a name: pass output_dir as well, or a loaded model."
                )
            texts = require_texts(str(model), measure, protect)
            report = prune_named(
                str(model),
                calib_dataloader,
                Path(output_dir),
                self.config,
                calibration_source=calibration_source,
                device=device,
                dtype=dtype,
                overwrite=overwrite,
                packed=packed,
                storage_device=self.storage_device,
                progress=self.progress,
                callbacks=self.callbacks,
                to_measure=[text.name for text in texts],
            )
            measure_folder(
                str(model),
                Path(output_dir),
                texts,
                report,
                device=device,
                progress=self.progress,
            )
        else:
            if output_dir is not None:
                raise ValueError(
                    "output_dir is for a model given by name: save a loaded model by save_pretrained."
                )
            if packed:
                raise ValueError(
                    "packed=True is for a model given by name: save a loaded model by save_pretrained."
                )
            report = self._prune_and_measure(
                model, calib_dataloader, calibration_source, measure=measure, protect=protect
            )
            logger.info("%s", report)

        for callback in self.callbacks:
            callback.on_prune_end(report)
        return report

    def _prune_and_measure(
        self,
        model: PreTrainedModel,
        calib_dataloader: Iterable[Any],
        source_name: str | None,
        *,
        measure: Mapping[str, str] | None,
        protect: Mapping[str, float] | None,
    ) -> PruningReport:
        """Prune a loaded model (`_prune_loaded`), and measure it before and after on the texts that the user named.

        The arguments are those of `prune`: `calib_dataloader` are the batches of the calibration, `source_name` is the
        name of their text, `measure` has held-out texts by name, such as `{"code.txt": text}`, and `protect`, by names
        of `measure`, how many times the bits per byte before the run those after it may be. The model is changed in
        place, and this pruner keeps its report and masks. The losses go into the report, and into the summary in
        `model.config`. If they can't be measured after the run, or Ctrl-C stops that (MeasuringInterrupted), the report
        says so. The tokenizer is that of the folder from which the model was loaded; ValueError if there is none.
        """
        if not measure and not protect:
            return self._prune_loaded(model, calib_dataloader, source_name)
        folder = local_source(model)
        if folder is None:
            raise ValueError(
                f"measure: model {type(model).__name__} was not loaded from a folder with a tokenizer, which the texts "
                "need: load it by from_pretrained, or pass its name and output_dir."
            )
        texts = require_texts(str(folder), measure, protect)
        tokenizer = require_tokenizer(str(folder))
        dense = losses_of(
            model,
            tokenizer,
            texts,
            compute_dtype=self.config.compute_dtype,
            progress=self.progress,
            label="Measuring before",
            counts_experts=True,
            counts_loops=True,
        )
        report = self._prune_loaded(model, calib_dataloader, source_name)
        interrupt: KeyboardInterrupt | None = None
        try:
            pruned = losses_of(
                model,
                tokenizer,
                texts,
                compute_dtype=self.config.compute_dtype,
                progress=self.progress,
                label="Measuring after",
                counts_loops=True,
            )
        except KeyboardInterrupt as error:
            note_failure(report, texts, error)
            interrupt = error
        except MEASURING_ERRORS as error:  # the model is pruned, and stays so
            note_failure(report, texts, error)
        else:
            note_losses(report, texts, dense=dense, pruned=pruned)
        # Once more: the summary that the run left there has no losses.
        model.config.fista_pruning = summary(report)
        if interrupt is not None:
            raise MeasuringInterrupted(
                f"the {type(model).__name__} is pruned (`result` has the report), and its texts were not measured to "
                "the end"
            ) from interrupt
        return report

    def _prune_loaded(
        self, model: PreTrainedModel, calib_dataloader: Iterable[Any], source_name: str | None
    ) -> PruningReport:
        """Prune a loaded model in place, and keep what `result` and `save_pretrained` need of it.

        `self._results` gets the report and the masks of the model, and `self.sources` the tensors in its files.
        `calib_dataloader` are the user's batches, and `source_name` is the name of their text, for the report. The
        options of the user are fields of this pruner: `config`, `storage_device`, `progress` and `callbacks`. The
        model's configuration gets a summary of the run. After an error the model is as it was. The callbacks of the run
        are called, but not yet for its end.
        """
        started = time.perf_counter()
        removes_parts = self.config.whole_parts is not None
        is_offloaded = any(offload_hook(module) is not None for module in model.modules())
        if removes_parts and is_offloaded:
            raise ValueError(
                f"pattern={self.config.pattern!r}: the model is offloaded, so it can't be made smaller in place: pass "
                "its name or folder and output_dir instead."
            )
        num_texts = 1
        if self.config.may_refit_experts:
            calib_dataloader, num_texts = count_texts(calib_dataloader)
        removal = plan_removal(prunable_layers(model), self.config, num_texts=num_texts)
        source = _loaded_source(model, removal)
        # `save_pretrained` writes in the dtypes of the files, unless the model was loaded in another dtype.
        in_files_dtypes = bool(source.loaded_in_dtypes_of_files(model.dtype))
        with _prediction_layers(removal, source) as (source, prediction_layers):
            plan = plan_run(
                removal,
                source,
                prediction_layers=prediction_layers,
                storage=storage_place(self.storage_device),
                progress=self.progress,
                callbacks=self.callbacks,
            )
            calibration, held_out, report = read_calibration(plan, calib_dataloader, source_name)
            if in_files_dtypes:  # `read_calibration` has noted the model's dtype
                report.environment["written"] = "in the dtypes of the files"
            sink = ModelSink(model)
            report = run(plan, calibration, held_out, report, sink, started)
        self._results[model] = (report, sink.masks)
        # Not `source`: if the run made the model smaller, its tensors have other names and shapes by now.
        self.sources[model] = sink.source
        return report

    def result(self, model: PreTrainedModel) -> tuple[PruningReport, dict[str, Tensor]]:
        """Return the report of a model that this pruner has pruned in place, and its masks by `"{operator}.weight"`.

        A mask is packed to one bit a weight (`solve.pattern.unpack_mask`), in the layout of the model's weight. Both
        are the objects that this pruner keeps, no copies. Raises ValueError if another pruner has pruned the model
        since then. Changes nothing. `self._results` has both by model, since `prune`.
        """
        if model not in self._results:
            raise ValueError(
                f"model {type(model).__name__} was not pruned by this FistaPruner: call prune first."
            )
        report, masks = self._results[model]
        # A run by another pruner has left its own summary in the configuration (`fista_pruning`). Without a summary,
        # the user has replaced the configuration, which is no other run.
        has_other_summary = False
        latest = getattr(model.config, CONFIG_KEY, None)
        if latest is not None:
            latest = dict(latest)
            expected = summary(report)
            # A training after this run has added this entry, and is no other run.
            latest.pop("retrained", None)
            expected.pop("retrained", None)
            has_other_summary = latest != expected
        # If only experts or decoder layers go, no operator is pruned, and two such runs have the same summary: the
        # later one has made the model smaller.
        has_other_size = False
        if report.removed:
            has_other_size = model.num_parameters() != report.model["num_parameters"]
        if has_other_size or has_other_summary:
            raise ValueError(
                f"model {type(model).__name__} was pruned again by another FistaPruner: use that one."
            )
        return report, masks

    def save_pretrained(
        self,
        model: PreTrainedModel,
        folder: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        """Save a model that this pruner has pruned, with masks, report and card (docs/files.md).

        Plain Transformers loads the folder. `tokenizer` is saved with the model, if it is passed. `overwrite` replaces
        a model in the folder, but never other files. `self.sources` has the tensors of the files from which the model
        was loaded: those that its class does not load are added, and the others are written in the dtypes of the files.
        Changes the model's configuration, which gets the summary of the run again, but no weights.
        """
        report, masks = self.result(model)
        with new_output(Path(folder), overwrite) as unfinished:
            write_checkpoint(model, unfinished, report, masks, tokenizer, self.sources[model])

    def push_to_hub(
        self,
        model: PreTrainedModel,
        repo_id: str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        folder: str | Path | None = None,
        overwrite: bool = False,
        **options: Any,
    ) -> str:
        """Save a model that this pruner has pruned, upload the folder to the Hub, and return the URL of the commit.

        `tokenizer` and `overwrite` are as in `save_pretrained`. The files stay in `folder` (`None`: one with the last
        part of `repo_id` as its name), also if the Hub can't be reached (OSError). `options` are those of
        `push_folder`.
        """
        require_repo_id(repo_id)
        target = Path(folder) if folder is not None else Path(repo_id.split("/")[-1])
        self.save_pretrained(model, target, tokenizer, overwrite=overwrite)
        return push_folder(target, repo_id, **options)


@contextmanager
def _prediction_layers(
    removal: Removal, source: SourceTensors
) -> Iterator[tuple[SourceTensors, list[LoadedPredictionLayer]]]:
    """Yield the layers that predict more tokens and lose experts, and `source` as it is known then.

    `source` are the tensors in the files from which a model in memory was loaded (`prediction_layers_of` changes a
    copy). The layers are copied to a temporary folder, which is deleted at the end.
    """
    if not source.prediction_layers:
        yield source, []
        return
    with tempfile.TemporaryDirectory(prefix="optimum-fista-") as copies:
        yield prediction_layers_of(removal, source, Path(copies))


def _loaded_source(model: PreTrainedModel, removal: Removal) -> SourceTensors:
    """Describe the tensors in the files from which a model in memory was loaded; their values may be others by now.

    `removal` says which of its tensors become smaller (`Removal.part_of`). If the files can't be read, `not_copied` of
    the result gives the reason, and the report repeats it. Changes nothing.
    """
    folder = local_source(model)
    if folder is None:  # for example, the model was made from a configuration
        return SourceTensors()
    try:
        with reading(str(folder)):  # errors on damaged files name the folder
            return source_tensors(
                model,
                folder,
                removal.part_of,
                quantized=False,
                layers_name=removal.layers.name,
            )
    except (OSError, ValueError) as error:
        lost = f"tensors in {str(folder)!r} that the model's class does not load"
        return SourceTensors(not_copied={lost: f"the files can't be read: {error}"})

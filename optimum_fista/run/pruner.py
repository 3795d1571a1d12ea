"""The pruner: models in, pruned models and reports out."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_fista.model.architecture import (
    DecoderLayers,
    UnsupportedArchitectureError,
    find_decoder_layers,
    find_operators,
    input_embedding,
)
from optimum_fista.model.calibration import CalibrationBatch, read_batches, tokens_sha256
from optimum_fista.model.offload import is_offloaded
from optimum_fista.model.operator import LinearOperator
from optimum_fista.run.checkpoint import save_checkpoint, summary
from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.hub import push_folder
from optimum_fista.run.loading import require_unquantized
from optimum_fista.run.model_pruning import ModelPruning, Operators, require_finite
from optimum_fista.run.perplexity import evaluation_mode
from optimum_fista.run.report import PruningReport
from optimum_fista.run.rollback import Rollback
from optimum_fista.run.single_weight import single_problem
from optimum_fista.solve.bitmask import pack_mask
from optimum_fista.solve.pruned import PrunedOperator

logger = logging.getLogger(__name__)


class FistaPruner:
    """Prunes decoder-only Transformers models after training, in one shot.

    It implements FISTAPruner (arXiv 2408.03728): decoder layer by decoder layer, the linear operators that
    share an input together and in execution order, each as a convex problem on Gram statistics of its inputs.

    Args:
        config: What to prune and how; 50% unstructured by default.
        progress: Whether to show a progress bar.
        storage_device: Where hidden states and recorded activations wait between passes; `None`: on the
            model's device. Pass `"cpu"` to spare the memory of a GPU.
    """

    def __init__(
        self,
        config: FistaPruningConfig | None = None,
        *,
        progress: bool = True,
        storage_device: str | torch.device | None = None,
    ) -> None:
        self.config = config if config is not None else FistaPruningConfig()
        self.progress = progress
        self.storage_device = storage_device
        self._results: WeakKeyDictionary[PreTrainedModel, tuple[PruningReport, dict[str, Tensor]]] = WeakKeyDictionary()

    def prune(
        self,
        model: PreTrainedModel,
        calib_dataloader: Iterable[Any],
        *,
        calibration_source: str | None = None,
    ) -> PruningReport:
        """Prune a model in place.

        Args:
            model: Decoder-only model with a language-model head, in memory on one device, in any floating
                dtype. On any error it is left as it was.
            calib_dataloader: Iterable of `{"input_ids", "attention_mask"}` dicts, tensors of ids
                [batch, sequence] or lists of ids. Padding counts nowhere. It is read once.
            calibration_source: Name of the text, for the report.

        Returns:
            The report; `save_pretrained` and `push_to_hub` save it with the model.

        Raises:
            ValueError: If the model is quantized or damaged, the loader is empty or does not fit the model, or
                the sparsity pattern does not fit an operator.
            UnsupportedArchitectureError: If the model's structure can't be pruned (a ValueError).
        """
        started = time.perf_counter()
        require_unquantized(model)
        layers = find_decoder_layers(model)
        operators, left_dense = self._choose_operators(layers)
        batches = read_batches(calib_dataloader, input_embedding(model).shape[0])
        report = PruningReport(
            config=self.config.resolved().to_dict(),
            model=_describe(model),
            calibration=_describe_calibration(batches, calibration_source),
            left_dense=left_dense,
        )
        self._warn_if_rank_deficient(operators, report)
        masks: dict[str, Tensor] = {}
        with evaluation_mode(model), torch.no_grad(), Rollback() as rollback:

            def write(operator: LinearOperator, pruned: PrunedOperator) -> None:
                rollback.write(operator, pruned.weight)
                masks[f"{operator.name}.weight"] = pack_mask(pruned.mask.T if operator.transposed else pruned.mask)

            pruning = ModelPruning(
                model,
                layers,
                operators,
                batches,
                self.config,
                report,
                write,
                progress=self.progress,
                storage_device=self.storage_device,
            )
            for _ in pruning.run():
                pass
        report.seconds["total"] = time.perf_counter() - started
        model.config.fista_pruning = summary(report)
        self._results[model] = (report, masks)
        logger.info("%s", report)
        return report

    def prune_weight(self, weight: Tensor, inputs: Tensor, dense_inputs: Tensor | None = None) -> PrunedOperator:
        """Prune one matrix without a model.

        It minimizes `|| W* X* - W X ||_F` over weights in the configured pattern.

        Args:
            weight: `W` [out, in].
            inputs: `X*` [tokens, in].
            dense_inputs: `X` [tokens, in], the same tokens in the dense network; `None`: equal to `inputs`.

        Returns:
            Weights and mask [out, in], relative error, iterations, penalty, converged.

        Raises:
            ValueError: If shapes disagree, a value is NaN or Inf, or the pattern does not fit.
        """
        pattern = self.config.pattern_for("weight")
        with torch.no_grad():
            problem = single_problem(weight, inputs, dense_inputs)
            pattern.require_shape((weight.shape[0], weight.shape[1]))
            return self.config.create_method("").prune(problem, pattern)

    def save_pretrained(
        self,
        model: PreTrainedModel,
        folder: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        """Save a model this pruner has pruned, as a folder that plain Transformers loads.

        Besides the usual files it holds `fista/masks.safetensors` (one bit a weight, 1 = kept),
        `fista/report.json`, and a model card.

        Raises:
            ValueError: If this pruner has not pruned the model, or its zeros were filled since.
            FileExistsError: If the folder already holds a model and `overwrite` is False.
        """
        if model not in self._results:
            raise ValueError(
                f"model ({type(model).__name__}) was not pruned by this FistaPruner: call prune(model, ...) first."
            )
        report, masks = self._results[model]
        save_checkpoint(model, Path(folder), report, masks, tokenizer, overwrite=overwrite)

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
        """Save a pruned model to a folder and upload it to the Hub.

        Args:
            model: A model this pruner has pruned.
            repo_id: Repository, `name` or `owner/name`; created if it is absent.
            tokenizer: Saved with the model.
            folder: Where the files are written and stay; `None`: `repo_id`'s last part in the working folder.
            overwrite: Replace a model that the folder already holds.
            options: `private`, `token`, `commit_message`, `revision` of `run.hub.push_folder`.

        Returns:
            URL of the commit.

        Raises:
            FileExistsError: If the folder already holds a model and `overwrite` is False.
            OSError: If the Hub refused or was not reached; the folder is complete.
        """
        target = Path(folder) if folder is not None else Path(repo_id.split("/")[-1])
        self.save_pretrained(model, target, tokenizer, overwrite=overwrite)
        return push_folder(target, repo_id, **options)

    def _choose_operators(self, layers: DecoderLayers) -> tuple[dict[str, dict[str, LinearOperator]], dict[str, str]]:
        """Operators to prune by decoder layer, and those left dense with the reason; checks all weights."""
        chosen: dict[str, dict[str, LinearOperator]] = {}
        left_dense: dict[str, str] = {}
        for layer_name, layer in layers:
            chosen[layer_name] = {}
            for name, operator in find_operators(layer_name, layer, self.config.exclude).items():
                reason = self.config.reason_left_dense(name)
                if reason is not None:
                    left_dense[name] = reason
                    continue
                self.config.pattern_for(name).require_shape(operator.shape, name)
                if not is_offloaded(operator.module):  # the others are checked when they are onloaded
                    require_finite(operator)
                chosen[layer_name][name] = operator
        if not any(chosen.values()):
            raise UnsupportedArchitectureError(
                f"no linear operator to prune in {layers.name}: looked for nn.Linear and Conv1D modules with "
                f"include={list(self.config.include)}, exclude={list(self.config.exclude)}, and found "
                f"{len(left_dense)}, all left dense: {', '.join(list(left_dense)[:4]) or 'none'}."
            )
        return chosen, left_dense

    def _warn_if_rank_deficient(self, operators: Operators, report: PruningReport) -> None:
        """Warn once when an operator has more inputs than there are calibration tokens."""
        tokens = report.calibration["num_tokens"]
        widest = max((o for group in operators.values() for o in group.values()), key=lambda o: o.shape[1])
        if tokens < widest.shape[1]:
            message = (
                f"{tokens} calibration tokens for the {widest.shape[1]} inputs of {widest.name}: its Gram matrix is "
                "rank-deficient and the result will fit these tokens only. Pass more calibration tokens."
            )
            report.warnings.append(message)
            warnings.warn(message, stacklevel=3)


def _describe(model: PreTrainedModel) -> dict[str, Any]:
    return {
        "class": type(model).__name__,
        "model_type": model.config.model_type,
        "name": getattr(model.config, "_name_or_path", "") or "",
        "num_parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _describe_calibration(batches: list[CalibrationBatch], source: str | None) -> dict[str, Any]:
    return {
        "source": source,
        "sha256": tokens_sha256(batches),
        "num_sequences": sum(batch.input_ids.shape[0] for batch in batches),
        "num_tokens": sum(batch.num_tokens for batch in batches),
    }

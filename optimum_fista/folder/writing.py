"""Write the files of a pruned model: a folder that plain Transformers loads, with masks, report and model card.

`output.py` decides where the folder is. Transformers saves a model in memory (`write_checkpoint`); a streamed run
writes the weights layer by layer and the rest here (`write_all_but_weights`). Both give the same files. Zeros stay in
the weights, so any program can read them, but the file is not smaller.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from optimum_fista import internals
from optimum_fista.folder.atomic import errors_of_writing, write_file
from optimum_fista.folder.card import PACKED_NOTE, model_card
from optimum_fista.folder.checkpoint import (
    CARD_FILE,
    CONFIG_FILE,
    CONFIG_KEY,
    MASKS_FILE,
    MASKS_FORMAT,
    MASKS_METADATA,
    PACKED_KEY,
    REPORT_FILE,
    VOCABULARY_FILE,
    checkpoint_files,
    read_json,
    write_index,
)
from optimum_fista.model.choice import find_operators
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.model.offload import describe_ties, stored_tensor
from optimum_fista.model.operators import LinearOperator
from optimum_fista.report import OperatorReport, PruningReport
from optimum_fista.solve.pattern import pack_mask, unpack_mask
from optimum_fista.source.configuration import content_of, source_content
from optimum_fista.source.files import copy_source
from optimum_fista.source.loading import forget_gguf, local_source
from optimum_fista.source.names import StoredName, stored_names
from optimum_fista.source.source_tensors import IS_NOT_DESCRIBED, SourceTensors
from optimum_fista.source.stored_tensor import StoredTensor, in_dtypes_of, write_stored

_GENERATION_FILE = "generation_config.json"


@contextlib.contextmanager
def _generation_file_copied(
    model: PreTrainedModel, source: Path | None, folder: Path
) -> Iterator[None]:
    """Copy `generation_config.json` from `source` to `folder` at the end if nobody has changed it since it was loaded.

    Inside, `model` has another generation configuration, which can be saved: Transformers 5.17 refuses to save one that
    it has loaded but calls invalid.
    """
    file = None if source is None else source / _GENERATION_FILE
    generation = getattr(model, "generation_config", None)
    if file is None or not file.exists() or not internals.is_as_loaded(generation):
        yield
        return
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = generation  # type: ignore[assignment]
    shutil.copyfile(file, folder / _GENERATION_FILE)


def write_checkpoint(
    model: PreTrainedModel,
    folder: Path,
    report: PruningReport,
    masks: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    stored_as: SourceTensors,
) -> None:
    """Write all files of a pruned model into an unfinished folder; `stored_as` has more tensors, and dtypes to keep."""
    found = operators_by_weight(model, report)
    operators = [found[o.name] for o in report.operators]
    for operator in (
        operators
    ):  # after a training step without masks, the zeros would be gone and the masks wrong
        weight = operator.select(stored_tensor(operator.owner, operator.tensor))
        mask = unpack_mask(masks[f"{operator.name}.weight"], tuple(weight.shape)).to(weight.device)
        if bool(torch.any(weight.masked_select(~mask) != 0)):
            why = f"{operator.name}.weight is no longer zero outside its mask: the model was changed after pruning"
            raise ValueError(
                f"{why}. Save it right after prune(), or keep the mask while training."
            )
    stored, masks = as_stored(report.operators, masks, stored_names(model, operators))
    retrained = report.retrained or bool(
        (getattr(model.config, CONFIG_KEY, None) or {}).get("retrained")
    )
    report = dataclasses.replace(report, operators=stored, retrained=retrained)
    forget_gguf(model)
    source = local_source(model)
    with errors_of_writing(folder), _generation_file_copied(model, source, folder):
        if source is not None and getattr(model.config, "auto_map", None):
            copy_source(
                source, folder, "*.py"
            )  # Transformers copies no code without `trust_remote_code`
        if source is not None and any(source.glob("*processor_config.json")):
            for pattern in ("*processor_config.json", "chat_template.*"):  # of images and sounds
                copy_source(source, folder, pattern)
        if hasattr(model, "hf_device_map") or not any(
            parameter.is_meta for parameter in model.parameters()
        ):
            model.save_pretrained(folder)
        else:  # it was offloaded after it was loaded, which Transformers does not notice
            tied = (
                model.all_tied_weights_keys
            )  # two parameters once they are offloaded, but the same memory
            model.hf_device_map = {"": "cpu"}  # type: ignore[assignment]
            try:
                model.save_pretrained(
                    folder,
                    state_dict={k: v for k, v in model.state_dict().items() if k not in tied},
                )
            finally:
                del model.hf_device_map
        known = stored_as.loaded_in(model.dtype)
        for shard in {*checkpoint_files(folder).values()} if known else ():
            in_dtypes_of(shard, known)
        if stored_as.unplaced:
            _add_shard(folder, stored_as.unplaced)
    write_all_but_weights(folder, model, tokenizer, report, masks)


def _add_shard(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Write further tensors into a last file of weights, and the index."""
    weights, index = checkpoint_files(folder), folder / "model.safetensors.index.json"
    shards = sorted({*weights.values()})
    names = [
        f"model-{number:05}-of-{len(shards) + 1:05}.safetensors"
        for number in range(1, len(shards) + 2)
    ]
    for shard, name in zip(shards, names, strict=False):
        shard.rename(folder / name)
    write_stored(folder / names[-1], tensors)
    new_names = dict(zip(shards, names, strict=False))
    weight_map = {name: new_names[shard] for name, shard in weights.items()} | dict.fromkeys(
        tensors, names[-1]
    )
    write_index(
        folder, "model", weight_map, read_json(index).get("metadata", {}) if index.exists() else {}
    )


def write_all_but_weights(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    report: PruningReport,
    masks: Mapping[str, Tensor],
    packed: Mapping[str, Any] | None = None,
    quantized: Mapping[str, Any] | None = None,
) -> None:
    """Write a pruned model's folder without its weights; the model's configuration gets the summary of the report.

    The report and the packed masks have the names of the checkpoint. `packed` is what `config.json` says of weights
    that are stored packed, and `quantized` of weights that are quantized as the source is; `None`: they are dense.
    """
    (folder / "fista").mkdir(exist_ok=True)
    write_file(folder / REPORT_FILE, report.to_json())
    source = local_source(model)
    if (
        source is not None and (source / VOCABULARY_FILE).exists()
    ):  # tokens that an earlier run removed
        shutil.copyfile(source / VOCABULARY_FILE, folder / VOCABULARY_FILE)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if model.can_generate() and not (folder / _GENERATION_FILE).exists():
        model.generation_config.save_pretrained(folder)
    describe_ties(model, model.config)
    reasons = report.model.get("lacks", {}).values()
    if any(not reason.endswith(IS_NOT_DESCRIBED) for reason in reasons):
        settings = model.config.get_text_config(decoder=True)
        for word, value in list(vars(settings).items()):
            is_of_further_tokens = "nextn" in word or "mtp" in word
            if type(value) is int and is_of_further_tokens:
                setattr(settings, word, 0)  # the result lacks these layers
    model.config.fista_pruning = summary(
        report
    )  # survives `save_pretrained` of whoever loads the model
    model.config.architectures = [type(model).__name__]  # a configuration made in Python names none
    model.config.dtype = str(model.dtype).removeprefix("torch.")  # in which Transformers loads it
    dense = getattr(model.config, "_name_or_path", "") or ""
    card = model_card(report, dense)
    content = content_of(model.config, source_content(source))
    write_form(folder, content, card, masks, packed, quantized)


def write_form(
    folder: Path,
    config: Mapping[str, Any],
    card: str | None,
    masks: Mapping[str, Tensor],
    packed: Mapping[str, Any] | None,
    quantized: Mapping[str, Any] | None = None,
) -> None:
    """Write the files that say whether the weights are dense or packed, as in `write_all_but_weights`.

    `config` is the content of `config.json`, which is written last: without it nothing loads. Packed weights contain
    their masks.
    """
    if packed is None:
        write_file(folder / MASKS_FILE, dict(masks), MASKS_METADATA)
    if card is not None:
        write_file(
            folder / CARD_FILE,
            card.replace(PACKED_NOTE, "") + ("" if packed is None else PACKED_NOTE),
        )
    config = {
        key: value
        for key, value in config.items()
        if key not in (PACKED_KEY, "transformers_weights")
    }
    config |= {PACKED_KEY: dict(quantized)} if quantized else {}
    if packed is not None:
        # Our loader replaces this name. Transformers without it finds no such file, and its error says what to do.
        refusal = "packed, run `import optimum_fista.packed` first.safetensors"
        config |= {PACKED_KEY: dict(packed), "transformers_weights": refusal}
    write_file(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def summary(report: PruningReport) -> dict[str, Any]:
    """The value of `fista_pruning` in `config.json`."""
    totals = report.totals
    return {
        "format": MASKS_FORMAT,
        **{
            key: report.config[key] for key in ("method", "pattern", "sparsity", "error_correction")
        },
        **{
            key: totals[key]
            for key in ("num_operators", "num_zeros", "mean_fit_error", "mean_output_error")
        },
        "masks": MASKS_FILE,
        "report": REPORT_FILE,
        "version": report.versions["optimum-fista"],
        # what the next run on the result has to know of the first model and of the runs since
        "origin": dataclasses.asdict(report.origin_of_result),
    } | ({"retrained": True} if report.retrained else {})


def operators_by_weight(model: PreTrainedModel, report: PruningReport) -> dict[str, LinearOperator]:
    """The linear operators of a pruned model, by the names of their weights in the model."""
    dense_experts = (
        ["*"] if report.removed else report.config["exclude"]
    )  # removing parts prunes no experts
    found = (
        find_operators(name, layer, dense_experts) for name, layer in find_decoder_layers(model)
    )
    return {
        f"{name}.weight": operator for operators in found for name, operator in operators.items()
    }


def as_stored(
    reports: Iterable[OperatorReport], masks: Mapping[str, Tensor], names: Mapping[str, StoredName]
) -> tuple[list[OperatorReport], dict[str, Tensor]]:
    """Reports of operators and their packed masks under other names; masks are laid out as the weights there are."""
    operators, stored = [], {}
    for operator in reports:
        found, mask = names[operator.name], masks[operator.name]
        if (
            found.transposed != operator.stored_transposed
        ):  # bits are row by row: [out, in] -> [in, out], or back
            mask = pack_mask(unpack_mask(mask, operator.stored_shape).T)
        stored[found.name] = mask
        operators.append(
            dataclasses.replace(operator, name=found.name, stored_transposed=found.transposed)
        )
    return operators, stored


def as_in_model(
    model: PreTrainedModel,
    operators: Iterable[LinearOperator],
    report: PruningReport,
    masks: Mapping[str, Tensor],
) -> tuple[PruningReport, dict[str, Tensor]]:
    """A report and packed masks, read from a checkpoint, under the names of the model: undoes `as_stored`."""
    found = list(operators)
    names = stored_names(model, found, all_of_them=False)
    by_name = {
        names[key].name: operator
        for operator in found
        if (key := f"{operator.name}.weight") in names
    }
    for entry in report.operators:
        operator = by_name.get(entry.name)
        if operator is None or operator.shape != entry.shape:
            has = "no such weight" if operator is None else f"it in shape {operator.shape}"
            why = f"{entry.name} of shape {entry.shape} has a mask, but {type(model).__name__} has {has}"
            raise ValueError(f"{why}: pass the folder or Hub id that this model was loaded from.")
    in_model = {name: StoredName(f"{o.name}.weight", o.transposed) for name, o in by_name.items()}
    entries, kept = as_stored(report.operators, masks, in_model)
    return dataclasses.replace(report, operators=entries), kept

"""Write the files of a pruned model: a folder that plain Transformers loads, with masks, report and model card.

`output.py` decides where the folder is. Transformers saves a model in memory (`write_checkpoint`); a streamed run
writes the weights layer by layer and the rest here (`write_all_but_weights`). Both give the same files. Zeros stay in
the weights, so any program can read them, but the file is not smaller.

The *source* is the folder that the model was loaded from, in the Hub's cache too. A *mask* has one bit for each weight
of a pruned operator, True = kept, packed to bytes (`solve.pattern.pack_mask`). A weight may have another name in the
files than in the model (`naming.py`); "names of the checkpoint" are those in the files.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from optimum_fista import internals
from optimum_fista.atomic import errors_of_writing, write_file
from optimum_fista.folder.card import PACKED_NOTE, model_card
from optimum_fista.folder.checkpoint import (
    CARD_FILE,
    MASKS_FILE,
    MASKS_FORMAT,
    MASKS_METADATA,
    REPORT_FILE,
    VOCABULARY_FILE,
    summary_of_latest_run,
    write_recoveries,
)
from optimum_fista.folder.naming import operators_by_weight, renamed_report
from optimum_fista.model.offload import describe_ties, stored_tensor
from optimum_fista.model.operators import LinearOperator
from optimum_fista.recovery_report import RecoveryReport
from optimum_fista.report import PruningReport
from optimum_fista.solve.pattern import unpack_mask
from optimum_fista.source.configuration import content_of, source_content
from optimum_fista.source.files import copy_source
from optimum_fista.source.inventory import IS_NOT_DESCRIBED
from optimum_fista.source.links import leads_out
from optimum_fista.source.loading import forget_gguf, local_source
from optimum_fista.source.model_folder import (
    CONFIG_FILE,
    PACKED_KEY,
    checkpoint_files,
    read_json,
    write_index,
)
from optimum_fista.source.names import stored_names
from optimum_fista.source.source_tensors import SourceTensors
from optimum_fista.source.stored_tensor import StoredTensor, restore_dtypes, write_stored

_GENERATION_FILE = "generation_config.json"


@contextlib.contextmanager
def _generation_file_copied(
    model: PreTrainedModel, source: Path | None, folder: Path
) -> Iterator[None]:
    """While `model` is saved inside the block, decide which `generation_config.json` its new `folder` gets.

    There are three cases. `source` is the folder that the model was loaded from, `None` if there is none.

    - The source has the file, and nobody has changed the generation configuration since it was loaded. Then the file is
      copied after the block. Inside, the model has an empty configuration (`GenerationConfig()`), because Transformers
      5.17 refuses to save one that it has loaded but calls invalid. An empty file that is saved is replaced.
    - The file is a link that leads out of the source. What it holds must not be written. So inside, the model has a
      configuration with the ids of its `config.json` alone, which is what is saved.
    - Otherwise nothing is done: the model's own configuration is saved.

    After the block, also after an error, the model has its own configuration again. Nothing is copied after an error.
    """
    if source is None:
        yield
        return
    generation = getattr(model, "generation_config", None)
    file = source / _GENERATION_FILE
    is_foreign = _is_foreign_link(file, source)
    has_file = not leads_out(file, source)  # also False if there is no such file
    is_copied = has_file and internals.is_as_loaded(generation)
    if not is_copied and not is_foreign:
        yield
        return

    # An empty file would be worse than none: Transformers would then not look for the ids in `config.json`.
    model.generation_config = (
        GenerationConfig() if is_copied else GenerationConfig.from_model_config(model.config)
    )
    try:
        yield
    finally:
        model.generation_config = generation  # type: ignore[assignment]
    if is_copied:
        shutil.copyfile(file, folder / _GENERATION_FILE)


def _is_foreign_link(file: Path, source: Path) -> bool:
    """Tell whether `file`, in the folder `source`, is a link that leads out: what it holds must not be written."""
    return file.is_symlink() and leads_out(file, source)


def write_checkpoint(
    model: PreTrainedModel,
    folder: Path,
    report: PruningReport,
    masks: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    stored_as: SourceTensors,
) -> None:
    """Write all files of a pruned model in memory into an unfinished folder.

    Changes the configuration of the model as `write_all_but_weights` does: among others, it gets the summary of the
    run. A model that was read from a GGUF file forgets that. `report` and `masks` are not changed.

    Args:
        model: The pruned model. Its weights are not changed.
        folder: An empty folder, as `new_output` yields it.
        report: Of the run, with the names of the model.
        masks: By the names of the weights in the model, packed to one bit a weight.
        tokenizer: Saved with the model if there is one.
        stored_as: What is known of the files that the model was loaded from: tensors that its class does not load,
            which are added, and the dtypes of the others, which the files of the result get again.

    Raises:
        ValueError: If a weight is no longer zero outside of its mask.
        OSError: If a file can't be written.
    """
    operators_of_model = operators_by_weight(model, report)
    operators = [operators_of_model[entry.name] for entry in report.masked]  # those with a mask
    for operator in operators:
        _require_zeros(operator, masks[f"{operator.name}.weight"])

    names = stored_names(model, operators)  # in the files, by the names in the model
    stored_report, stored_masks = renamed_report(report, masks, names)
    # The summary in the configuration knows of a training after the run (`checkpoint.mark_retrained`).
    was_retrained = report.retrained or bool(summary_of_latest_run(model.config).get("retrained"))
    stored_report = dataclasses.replace(stored_report, retrained=was_retrained)
    _write_weights_and_code(model, folder, stored_as)
    write_all_but_weights(folder, model, tokenizer, stored_report, stored_masks)


def write_dense(
    model: PreTrainedModel,
    folder: Path,
    recoveries: Sequence[RecoveryReport],
    tokenizer: PreTrainedTokenizerBase | None,
    stored_as: SourceTensors,
) -> None:
    """Write all files of a model that was trained and never pruned: no masks, no report of a run and no model card.

    Changes the configuration of the model, which gets the names of its class and dtype and whether weights are tied. A
    model that was read from a GGUF file forgets that.

    Args:
        model: The trained model. Its weights are not changed.
        folder: The unfinished folder, with the files that come along from the source (`copy_source`).
        recoveries: What this training and those before it did, in their order (`RECOVERY_FILE` of `checkpoint`).
        tokenizer: Saved if the folder has no files of one, because the source was a GGUF file; `None`: there is none.
        stored_as: What is known of the files that the model was loaded from, as in `write_checkpoint`.
    """
    _write_weights_and_code(model, folder, stored_as)
    write_recoveries(folder, recoveries)
    if tokenizer is not None and not any(folder.glob("tokenizer*")):
        tokenizer.save_pretrained(folder)
    content = _complete_config(model, folder, local_source(model))
    write_file(folder / CONFIG_FILE, json.dumps(content, indent=2) + "\n")


def _write_weights_and_code(model: PreTrainedModel, folder: Path, stored_as: SourceTensors) -> None:
    """Write the weights of a model in memory as the source has them, and copy the code and the processor of the source.

    Also writes the configurations that `save_pretrained` writes. The weights of `model` stay as they are; if it was
    read from a GGUF file, it forgets that. `folder` is the unfinished folder. `stored_as` is what is known of the files
    of the source: dtypes, and tensors that the model's class does not load, which are copied.
    """
    forget_gguf(model)
    source = local_source(model)
    with errors_of_writing(folder), _generation_file_copied(model, source, folder):
        if source is not None:
            _copy_code_and_processor(model, source, folder)
        _save_weights(model, folder)
        # Empty if the model was loaded in another dtype than that of its files: then it is saved in its own.
        original_tensors = stored_as.loaded_in_dtypes_of_files(model.dtype)
        if original_tensors:
            for shard in set(checkpoint_files(folder).values()):
                restore_dtypes(shard, original_tensors)  # writes the file again if dtypes differ
        if stored_as.tensors_to_copy:
            _add_shard(folder, stored_as.tensors_to_copy)


def _require_zeros(operator: LinearOperator, packed_mask: Tensor) -> None:
    """Refuse an operator with a weight that is not zero outside of its mask (ValueError).

    After a training step without masks the zeros would be gone, and the masks wrong. `packed_mask` has one bit for each
    weight, in the layout in which the weight is stored: [out, in], or [in, out] if the operator is `transposed`.
    Nothing is changed; an offloaded weight is read from where it is kept.
    """
    # The part of the stored tensor that is this operator's, as it is stored; `owner` is the module that has the tensor.
    weight = operator.select(stored_tensor(operator.owner, operator.tensor))
    mask = unpack_mask(packed_mask, tuple(weight.shape)).to(weight.device)
    if bool(torch.any(weight.masked_select(~mask) != 0)):
        raise ValueError(
            f"{operator.name}.weight is no longer zero outside its mask: the model was changed after pruning. Save it "
            "right after prune(), or keep the mask while training."
        )


def _copy_code_and_processor(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """Copy from `source` to `folder` what `save_pretrained` does not write: code of the model, and its processor.

    `source` is the folder that the model was loaded from. Of `model` only the configuration is read.
    """
    if getattr(model.config, "auto_map", None):
        # Transformers copies no code if the model was loaded without `trust_remote_code`.
        copy_source(source, folder, "*.py")
    has_processor = any(source.glob("*processor_config.json"))  # of images and sounds
    if has_processor:
        copy_source(source, folder, "*processor_config.json")
        # The processor's own template. That of a tokenizer is saved with the tokenizer.
        copy_source(source, folder, "chat_template.*")


def _save_weights(model: PreTrainedModel, folder: Path) -> None:
    """Save a model by its own `save_pretrained`, also one that was offloaded after it was loaded.

    Transformers does not notice such an offload: it needs the attribute `hf_device_map`, which the model has while it
    is saved, and not afterwards.
    """
    has_map = hasattr(model, "hf_device_map")
    is_offloaded = any(parameter.is_meta for parameter in model.parameters())
    if has_map or not is_offloaded:
        model.save_pretrained(folder)
        return

    # Tied weights are two parameters once they are offloaded, with the same values. One of the two is saved.
    tied = model.all_tied_weights_keys
    state_dict = {name: value for name, value in model.state_dict().items() if name not in tied}
    model.hf_device_map = {"": "cpu"}  # type: ignore[assignment]
    try:
        model.save_pretrained(folder, state_dict=state_dict)
    finally:
        del model.hf_device_map


def _add_shard(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Write further tensors into a new last file of weights, rename the other files, and write the index.

    The files of weights are numbered, and their names have the number of all ("model-00001-of-00002.safetensors").

    Args:
        folder: Has the weights that `save_pretrained` wrote, in one file or in several with an index.
        tensors: Those to add, by the names that they get in the file.
    """
    weights = checkpoint_files(folder)
    shards = sorted(set(weights.values()))
    num_shards = len(shards) + 1
    # by the paths of the files
    new_names = {
        shard: f"model-{number:05}-of-{num_shards:05}.safetensors"
        for number, shard in enumerate(shards, 1)
    }
    last_name = f"model-{num_shards:05}-of-{num_shards:05}.safetensors"

    for shard, new_name in new_names.items():
        shard.rename(folder / new_name)
    write_stored(folder / last_name, tensors)

    weight_map = {name: new_names[shard] for name, shard in weights.items()}
    weight_map |= dict.fromkeys(tensors, last_name)
    index = folder / "model.safetensors.index.json"
    metadata = read_json(index).get("metadata", {}) if index.exists() else {}
    # It counts `total_size` in the metadata anew, from the files.
    write_index(folder, "model", weight_map, metadata)


def write_all_but_weights(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    report: PruningReport,
    masks: Mapping[str, Tensor],
    packed: Mapping[str, Any] | None = None,
    quantized: Mapping[str, Any] | None = None,
) -> None:
    """Write a pruned model's folder without its weights: report, tokenizer, masks, card and configuration.

    It changes `model.config`, which is then written: the summary of the run, the names of the class and the dtype, tied
    weights, and 0 for layers that predict further tokens if the result lacks them.

    Args:
        folder: The unfinished folder. Files that the run has copied there may be replaced.
        model: The pruned model. Its weights need not be loaded.
        tokenizer: Saved with the model if there is one.
        report: With the names of the checkpoint.
        masks: By the names of the checkpoint, packed to one bit a weight.
        packed: What `config.json` says of weights that are stored packed (`packed_folder.packed_settings`); `None`:
            they are not packed.
        quantized: What `config.json` says of weights that are quantized as the source is; `None`: they are not.
    """
    (folder / "fista").mkdir(exist_ok=True)
    write_file(folder / REPORT_FILE, report.to_json())
    source = local_source(model)  # the folder that the model was loaded from
    if source is not None:
        # If an earlier run has removed tokens, this file has those that are left.
        vocabulary = source / VOCABULARY_FILE
        has_vocabulary = not leads_out(vocabulary, source)  # also False if there is no such file
        if has_vocabulary:
            shutil.copyfile(vocabulary, folder / VOCABULARY_FILE)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    _forget_further_tokens(model, report)
    model.config.fista_pruning = summary(report)  # stays if whoever loads the model saves it again
    content = _complete_config(model, folder, source)

    dense_name = internals.loaded_from(model.config)  # folder or Hub id, whose own card is read
    card = model_card(report, dense_name)
    write_masks_card_and_config(folder, content, card, masks, packed, quantized)


def _complete_config(model: PreTrainedModel, folder: Path, source: Path | None) -> dict[str, Any]:
    """Complete `model.config`, write `generation_config.json` if it is missing; return the content of `config.json`.

    Changes in `model.config` the names of the class and the dtype, and tied weights. `source` is the folder that the
    model was loaded from, `None` if there is none; its `config.json` says in which form keys are written.
    """
    if model.can_generate() and not (folder / _GENERATION_FILE).exists():
        generation = model.generation_config
        # What a link to outside of the source holds must not be written. The ids in `config.json` may.
        if source is not None and _is_foreign_link(source / _GENERATION_FILE, source):
            generation = GenerationConfig.from_model_config(model.config)
        generation.save_pretrained(folder)

    describe_ties(model, model.config)
    model.config.architectures = [type(model).__name__]  # a configuration made in Python names none
    model.config.dtype = str(model.dtype).removeprefix("torch.")  # in which Transformers loads it
    return content_of(model.config, source_content(source))


def _forget_further_tokens(model: PreTrainedModel, report: PruningReport) -> None:
    """If the result lacks the layers that predict further tokens, write into the configuration that there are none.

    The files of some models have such layers, which the model's class does not load. Other programs look for as many as
    the configuration says (`num_nextn_predict_layers` or a similar key). This key of the text section of `model.config`
    is set to 0.

    `report.model["lacks"]` has the modules of the source's files that are not in the result, each with the reason, a
    sentence. A sentence that ends in `IS_NOT_DESCRIBED` says that the configuration does not describe the module, such
    as an image tower. Every other sentence is of a layer that predicts further tokens: the configuration describes it.
    """
    reasons = report.model.get("lacks", {}).values()
    reasons_of_described = [reason for reason in reasons if not reason.endswith(IS_NOT_DESCRIBED)]
    if not reasons_of_described:
        return
    settings = model.config.get_text_config(decoder=True)
    attributes = list(vars(settings).items())  # a list, because the loop changes the attributes
    for word, value in attributes:
        is_of_further_tokens = "nextn" in word or "mtp" in word
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if is_number and is_of_further_tokens:
            setattr(settings, word, 0)


def write_masks_card_and_config(
    folder: Path,
    config: Mapping[str, Any],
    card: str | None,
    masks: Mapping[str, Tensor],
    packed: Mapping[str, Any] | None,
    quantized: Mapping[str, Any] | None = None,
) -> None:
    """Write the files that say whether the weights are dense or packed: masks, card and `config.json`.

    Args:
        folder: The unfinished folder.
        config: The content of `config.json`, which is written last: nothing loads a folder without this file.
        card: The text of the model card, with or without the part on packed weights; `None`: there is no card.
        masks: By the names of the checkpoint, packed to one bit a weight. They are written if `packed` is `None`:
            packed weights contain their masks.
        packed: What `config.json` says of weights that are stored packed; `None`: they are not packed.
        quantized: What it says of weights that are quantized as the source is; `None`: they are not quantized.
    """
    if packed is None:
        write_file(folder / MASKS_FILE, dict(masks), MASKS_METADATA)
    if card is not None:
        text = card.replace(PACKED_NOTE, "")
        if packed is not None:
            text += PACKED_NOTE
        write_file(folder / CARD_FILE, text)

    content = dict(config)
    for key in (PACKED_KEY, "transformers_weights"):  # the source may have been packed or quantized
        content.pop(key, None)
    if quantized:
        content[PACKED_KEY] = dict(quantized)
    if packed is not None:
        content[PACKED_KEY] = dict(packed)
        # Our loader replaces this name. If the package is not imported, Transformers finds no such file, and its error
        # says what to do.
        content["transformers_weights"] = (
            "packed, run `import optimum_fista.packed` first.safetensors"
        )
    write_file(folder / CONFIG_FILE, json.dumps(content, indent=2) + "\n")


def summary(report: PruningReport) -> dict[str, Any]:
    """Return the value of `fista_pruning` in `config.json`: what a run has done, in a few numbers.

    `report` is of the finished run. It is only read.
    """
    totals = report.totals
    values: dict[str, Any] = {"format": MASKS_FORMAT}
    for key in ("method", "pattern", "sparsity", "error_correction"):
        values[key] = report.config[key]
    values["num_operators"] = totals["num_operators"]
    # with those of earlier runs whose masks were carried
    values["num_zeros"] = report.num_zeros
    for key in ("mean_fit_error", "mean_output_error"):
        values[key] = totals[key]
    values["masks"] = MASKS_FILE
    values["report"] = REPORT_FILE
    values["version"] = report.versions["optimum-fista"]
    # what the next run on the result has to know of the first model and of the runs since
    values["origin"] = dataclasses.asdict(report.origin_of_result)
    if not values["origin"]["texts"]:
        del values["origin"]["texts"]  # as runs that measure no text have always written it
    if report.retrained:
        values["retrained"] = True
    return values

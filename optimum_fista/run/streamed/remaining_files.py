"""The files of a streamed run besides the shards of its decoder layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from optimum_fista.model.architecture import find_decoder_layers
from optimum_fista.model.offload import stored_tensor
from optimum_fista.packed.format import packed_names
from optimum_fista.run.checkpoints.atomic import write_bytes, write_tensors, write_text
from optimum_fista.run.checkpoints.checkpoint import MASKS_FILE, MASKS_METADATA, REPORT_FILE, summary
from optimum_fista.run.checkpoints.loading import forget_gguf
from optimum_fista.run.packed_folders.packing import CARD_NOTE, packed_settings
from optimum_fista.run.reports.card import model_card
from optimum_fista.run.reports.picture import PICTURE_FILE, error_picture
from optimum_fista.run.reports.report import PruningReport
from optimum_fista.run.streamed.journal import Journal, KeptLayer


def as_saved(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of the checkpoint, on the CPU, without those that are tied to others."""
    left_out = set(model.all_tied_weights_keys) | set(model._keys_to_ignore_on_save or ())
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if name not in left_out}
    return revert_weight_conversion(model, kept)


def write_remaining(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    report: PruningReport,
    masks: Mapping[str, Tensor] | None,
    journal: Journal,
    layers: dict[int, KeptLayer],
) -> None:
    """Write all that is not a decoder layer; the configuration, without which nothing loads, comes last.

    Without masks the folder is a packed one, whose weights bring theirs.
    """
    folder, prefix = journal.folder, f"{find_decoder_layers(model).name}."
    modules = dict(model.named_modules())
    rest = {}
    for name in model.state_dict():
        owner, _, leaf = name.rpartition(".")
        if not name.startswith(prefix) and name not in model.all_tied_weights_keys:
            rest[name] = stored_tensor(modules[owner], leaf)
    rest = as_saved(model, rest)
    last = journal.keep_shard(journal.num_shards - 1, rest)
    weight_map = {name: layer.shard for layer in layers.values() for name in layer.names}
    weight_map |= dict.fromkeys(rest, last.name)
    metadata = {"total_parameters": model.num_parameters(), "total_size": _total_size(folder)}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / journal.index_name, json.dumps(index, indent=2) + "\n")
    (folder / "fista").mkdir(exist_ok=True)
    if masks is not None:
        write_tensors(folder / MASKS_FILE, dict(masks), MASKS_METADATA)
    write_text(folder / REPORT_FILE, report.to_json())
    picture = error_picture(report)
    if picture is not None:
        write_bytes(folder / PICTURE_FILE, picture)
    card = model_card(report, None if picture is None else PICTURE_FILE)
    write_text(folder / "README.md", card if masks is not None else card + CARD_NOTE)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    forget_gguf(model)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    model.config.fista_pruning = summary(report)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    config = json.loads(model.config.to_json_string())
    if masks is None:
        config["quantization_config"] = packed_settings(journal.index_name, packed_names(weight_map))
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def _total_size(folder: Path) -> int:
    """Bytes of the tensors in all shards."""
    total = 0
    for shard in folder.glob("*.safetensors"):
        with shard.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        total += shard.stat().st_size - 8 - header
    return total

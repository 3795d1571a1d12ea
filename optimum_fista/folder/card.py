"""The model card of a pruned model.

The template card.md has the text; this file computes its values. A card does not depend on the time of writing, so
equal runs write equal folders. The *given* or *dense* model is the one that the run pruned; the *first* model is the
one that the user began with, if earlier runs pruned it before.

`model_card` is called when a model folder is written. Nothing here writes a file or asks the Hub.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from jinja2 import Environment, StrictUndefined
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from yaml import YAMLError

from optimum_fista.folder.checkpoint import CARD_FILE
from optimum_fista.headlines import STEP_HEADINGS, perplexities_to_compare, step_rows, title
from optimum_fista.installing import install_command
from optimum_fista.operator_grid import OperatorGrid
from optimum_fista.public_names import HUB_DATASETS
from optimum_fista.report import COST_OF_TOKENS_ELSEWHERE, PruningReport

PACKED_NOTE = f"""
## Packed

The pruned weights of this folder are stored without their zeros. `import optimum_fista.packed` before `from_pretrained`
loads it as a dense model, bit for bit; `optimum-fista unpack` writes that as a plain folder. To install the package run
{install_command()}.
"""

# Letters that Markdown gives a meaning; an underscore unless it is between two letters or digits.
_SPECIAL = re.compile(r"([\\`*{}\[\]<>|~$&]|(?<![^\W_])_|_(?![^\W_]))")
# Metadata of the dense model's card that holds for the pruned model, too.
_INHERITED = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class LoadingClass:
    """How Transformers loads a model, and what the Hub calls its task."""

    # Such as "AutoModelForCausalLM".
    name: str
    pipeline_tag: str
    # Further arguments of `from_pretrained`, as they are written in Python.
    arguments: str = ""


def model_card(report: PruningReport, dense: str = "") -> str:
    """Return the Markdown of the model card: card.md filled in, with the metadata that the Hub reads.

    Changes nothing. The template and the card of the dense model are read.

    Args:
        report: Report of the finished run; its operators have their names in the checkpoint.
        dense: Folder or Hub id of the model that the run was given, whose own card is read: the pruned model keeps its
            license and languages. Empty: there is none to read.
    """
    loading = loading_class(report.model["class"], report.model.get("model_type"))
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    # By the names that the template uses, functions that write a value.
    environment.filters |= {
        "thousands": "{:,}".format,
        "percent": "{:.2%}".format,
        "error": "{:.4f}".format,
        "two_digits": "{:.2f}".format,
        "plain": _plain,
    }
    compared = perplexities_to_compare(report) if report.perplexity else []
    template = environment.from_string(Path(__file__).with_name("card.md").read_text("utf-8"))
    text = template.render(
        report=report,
        totals=report.totals,
        tokens=report.calibration,
        metadata=_metadata(report, loading, dense).to_yaml(),
        title=title(report),
        loading=loading,
        step_headings=STEP_HEADINGS,
        steps=step_rows(report),
        zeros=_distribution_of_zeros(report),
        cost_of_tokens_elsewhere=COST_OF_TOKENS_ELSEWHERE,
        compared=compared,
        # one row for the operators of a kind in all decoder layers
        kinds=OperatorGrid(report.operators).kinds,
        config=json.dumps(report.config, indent=2),
    )
    return f"{text}\n"


def loading_class(model_class: str, model_type: str | None) -> LoadingClass:
    """Choose the automatic class of Transformers that loads a folder of this model as this class, with all its parts.

    A folder may fit several: `AutoModelForCausalLM` loads some multimodal models without their encoders.

    Args:
        model_class: Name of the model's class, such as "Qwen3VLForConditionalGeneration".
        model_type: `model_type` of its configuration, such as "qwen3_vl"; `None` if it is not known.
    """

    def is_loaded_by(class_names: dict[str, Any]) -> bool:
        """Tell whether an automatic class makes the class `model_class`.

        `class_names` are the names of the classes that it makes, by model type; they are asked for `model_type`.
        """
        if model_type is None:
            return model_class in class_names.values()
        return class_names.get(model_type) == model_class

    if is_loaded_by(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        return LoadingClass("AutoModelForImageTextToText", "image-text-to-text")
    if is_loaded_by(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        return LoadingClass("AutoModelForCausalLM", "text-generation")
    if is_loaded_by(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
        is_omni = "omni" in model_class.lower()
        tag = "any-to-any" if is_omni else "audio-text-to-text"
        return LoadingClass("AutoModelForMultimodalLM", tag)
    if hasattr(transformers, model_class):
        return LoadingClass(model_class, "text-generation")
    # Its code is in the folder.
    return LoadingClass(
        "AutoModelForCausalLM", "text-generation", arguments=", trust_remote_code=True"
    )


def _metadata(report: PruningReport, loading: LoadingClass, dense: str) -> ModelCardData:
    """Make the metadata for the Hub's search and its tree of models. Changes nothing.

    Args:
        report: Report of the run.
        loading: How Transformers loads the result (`loading_class`).
        dense: Folder or Hub id of the given model, whose own card is read if it is on this computer; may be empty.
    """
    metadata_of_dense = _card_metadata(dense)
    inherited = {key: metadata_of_dense[key] for key in _INHERITED if key in metadata_of_dense}
    first = report.first_model.name
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", first) is not None
    # A calibration on several texts has an entry for each of them.
    texts = report.calibration.get("sources") or [report.calibration]
    sources = [text.get("source") or "" for text in texts]
    # the Hub's names of sources such as "c4"
    datasets = [HUB_DATASETS[source] for source in sources if source in HUB_DATASETS]
    tags = ["optimum-fista", "pruned"]
    if not report.removed:
        tags.append("sparse")  # parts that are removed leave no zeros
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=loading.pipeline_tag,
        tags=tags,
        base_model=first if is_hub_id else None,
        # The Hub knows adapter, merge, quantized and finetune. A pruned model is of the base model's kind, with its
        # own weights in the same number format (in a packed folder, too).
        base_model_relation="finetune" if is_hub_id else None,
        datasets=datasets or None,
        **inherited,
    )


def _card_metadata(model: str) -> dict[str, Any]:
    """Read the metadata of a model's own card, without asking the Hub; empty if there is none that can be read.

    Args:
        model: Folder, or Hub id whose files may be in the cache; empty if the model has no name.
    """
    if not model:
        return {}
    card_file: str | Path = Path(model, CARD_FILE)
    if not os.path.isfile(card_file):
        try:
            cached = try_to_load_from_cache(model, CARD_FILE)
        except (OSError, ValueError):
            return {}  # the cache can't be read, or `model` has not the form of a Hub id
        if not isinstance(cached, str):  # None, or an object that says that the model has no card
            return {}
        card_file = cached
    try:
        card = ModelCard.load(card_file, ignore_metadata_errors=True)
    except (OSError, ValueError, YAMLError):
        return {}  # a damaged card
    metadata: dict[str, Any] = card.data.to_dict()
    return metadata


def _distribution_of_zeros(report: PruningReport) -> str:
    """Say how the zeros of a run were shared over the operators that it pruned, in words for the table of the card.

    `report` is that of the run.
    """
    if report.removed:
        return "none: what is removed is no longer there"
    is_shared = (
        report.config["allocation"] == "fisher" and report.config["pattern"] == "unstructured"
    )
    sparsities = [operator.sparsity for operator in report.operators]
    least = f"{min(sparsities):.1%}"
    most = f"{max(sparsities):.1%}"
    if is_shared:
        return f"shared over the operators by gradients of the loss, {least} to {most}"
    if least != most:
        return f"{least} to {most} of an operator, as the configuration says"
    return "the same share in every operator"


def _plain(text: Any) -> str:
    """Write text of other people in one line, so that nothing in it acts as Markdown."""
    line = " ".join(str(text).split())
    return _SPECIAL.sub(r"\\\1", line)


def markdown_lines(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Return the lines of a table in Markdown; cells are written by `str`, and nothing in them is escaped.

    Each row has as many cells as there are headings.
    """

    def line(cells: Iterable[Any]) -> str:
        """Write one row."""
        return f"| {' | '.join(map(str, cells))} |"

    rule = "|---" * len(headings) + "|"
    return [line(headings), rule, *(line(cells) for cells in rows)]

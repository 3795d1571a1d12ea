"""A tiny model of any family of Transformers: pruned, saved, loaded again, and what came of it."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from multimodal_inputs import multimodal_inputs
from safetensors.torch import load_file
from shrunken_config import VOCAB_SIZE, shrunken_config
from tiny_models import randomize
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from optimum_fista import FistaPruner, FistaPruningConfig, PruningReport
from optimum_fista.evaluate.verification import VerificationError, verify_checkpoint
from optimum_fista.folder.checkpoint import read_report
from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.choice import find_operators
from optimum_fista.model.experts import can_be_split, is_fused_experts
from optimum_fista.model.inputs import record_inputs
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.source.names import split_index

FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MULTIMODAL = tuple(
    family
    for family, name in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.items()
    if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family) != name
)
"""Families with a class for images or sounds that is not their causal language model."""
NO_TEXT_ALONE = "it does not run without an image"
ENOUGH_TOKENS = patch("optimum_fista.prune.loop.UNDER_CALIBRATED_TOKENS", 0)
"""Inside, no expert is under-calibrated, however few tokens it gets."""
_GEMMA4_MIXTURE = {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
}
MIXTURE_OPTIONS: dict[str, dict[str, Any]] = {
    "doge": {"is_moe": True},
    "flint": {"decoder_sparse_step": 1, "mlp_only_layers": []},
    "gemma4": _GEMMA4_MIXTURE,
    "gemma4_text": _GEMMA4_MIXTURE,
}
"""Families that have a mixture only if the configuration of their text decoder says so, with what it has to say."""
EXPERTS_WORK = "works"


@dataclass(frozen=True)
class Outcome:
    """What came of a family.

    Attributes:
        family: The model type of its configuration, such as "llama".
        model_class: Name of the class, or "".
        status: `works`, `refused` (by an `UnsupportedArchitectureError`), `not built` (Transformers can't build the
            model from its default configuration, or run it on token ids alone) or `not reloaded`.
        dense: What stays dense, with the reason.
        reason: Why it does not work, or what it needs.
        smaller: The kinds of parts of which half can go.
        seen: Names of the inputs of a multimodal model on which the saved one was compared.
        multimodal: Whether it is the class for images or sounds.
        experts: `works` if half of its experts can be removed in memory and from files, or why not; "" without a
            mixture.
    """

    family: str
    model_class: str
    status: str
    dense: tuple[str, ...] = ()
    reason: str = ""
    smaller: tuple[str, ...] = ()
    seen: tuple[str, ...] = ()
    multimodal: bool = False
    experts: str = ""


class NotReloaded(Exception):
    """What was saved can't be loaded or verified; the message says why."""


def family_model(
    family: str,
    seed: int = 0,
    kind: Any = AutoModelForCausalLM,
    settings: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A random tiny float32 model of a family; every parameter is random, biases and norms included.

    `settings` are for the configuration of its text decoder, which is the tiny default otherwise.
    """
    config = shrunken_config(family)
    for name, value in (settings or {}).items():
        setattr(config.get_text_config(decoder=True), name, value)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = kind.from_config(config, dtype=torch.float32).eval()
        randomize(model, torch.default_generator)
    return model


def family_tokens() -> list[Tensor]:
    """Two calibration batches of one sequence of 32 tokens."""
    ids = torch.randint(3, VOCAB_SIZE, (2, 32), generator=torch.Generator().manual_seed(1))
    return list(ids.split(1))


def family_batches(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """Two calibration batches of tokens, which hold an image each if the model does not run without."""
    text = [{"input_ids": ids} for ids in family_tokens()]
    try:
        logits(model, **text[0])
    except Exception:  # whatever a model raises without an image
        images = list(multimodal_inputs(model).values())
        if not images:
            raise
        ids = images[0]["input_ids"]
        return [images[0], images[0] | {"input_ids": ids.where(ids == VOCAB_SIZE - 1, ids + 20)}]
    return text


def logits(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    """Logits [batch, sequence, vocabulary] of the calibration tokens, or of other inputs if any are given."""
    if not inputs:
        inputs = {"input_ids": torch.cat(family_tokens())}
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def try_family(family: str, folder: Path, *, multimodal: bool = False) -> Outcome:
    """Prune a family at 2:4, save it to `folder`, load it again; assert that all is as promised.

    A multimodal model is also pruned from its files, and compared on images and sounds. One that does not run on text
    alone is calibrated on images, too.
    """
    model_class = ""  # not known before the model is built
    try:
        model = family_model(family, kind=_auto_class(multimodal))
        if multimodal:
            model_class = type(model).__name__
            find_decoder_layers(model)
        batches = family_batches(model)
        dense_logits = logits(model, **batches[0])
    except UnsupportedArchitectureError as error:
        return Outcome(
            family, model_class, "refused", reason=_first_sentence(error), multimodal=multimodal
        )
    except Exception as error:  # whatever a family raises on a default configuration
        return Outcome(
            family, "", "not built", reason=_first_sentence(error), multimodal=multimodal
        )

    model_class = type(model).__name__
    assert bool(torch.isfinite(dense_logits).all())
    try:
        return _pruned_and_saved(model, family, batches, folder, multimodal=multimodal)
    except UnsupportedArchitectureError as error:
        return Outcome(
            family, model_class, "refused", reason=_first_sentence(error), multimodal=multimodal
        )
    except NotReloaded as error:
        return Outcome(
            family,
            model_class,
            "not reloaded",
            reason=_first_sentence(error),
            multimodal=multimodal,
        )


def _auto_class(multimodal: bool) -> Any:
    """The class of Transformers that builds a model of text, or of images and sounds."""
    return AutoModelForMultimodalLM if multimodal else AutoModelForCausalLM


def _pruned_and_saved(
    model: PreTrainedModel,
    family: str,
    batches: list[dict[str, Tensor]],
    folder: Path,
    *,
    multimodal: bool,
) -> Outcome:
    """Prune a model twice, save it, and assert that all is as promised.

    The first time its zeros are shared by gradients, the second time errors are corrected.
    """
    excluded = stacked_weights(model)
    require_same_hidden_states(model, batches[0])
    by_gradients = FistaPruningConfig(
        0.2, method="magnitude", error_correction="none", exclude=excluded
    )
    report = prune(FistaPruner(by_gradients, progress=False), model, batches)
    assert report.totals["sparsity"] >= 0.19

    inputs: dict[str, dict[str, Tensor]] = {}  # of images and sounds
    if multimodal:
        model.save_pretrained(folder.with_name("dense"))
        inputs = multimodal_inputs(model)
    corrected = FistaPruningConfig(
        pattern="2:4",
        method="sparsegpt",
        error_correction=0.5,
        residual_correction=1.0,
        exclude=excluded,
    )
    pruner = FistaPruner(corrected, progress=False)
    report = prune(pruner, model, batches)
    require_told(model, report, excluded)
    require_saved(
        pruner, model, report, folder, {"text": batches[0]} | inputs, own_class=multimodal
    )

    if multimodal:
        source = str(folder.with_name("dense"))
        streamed = folder.with_name("streamed")
        prune(pruner, source, batches, output_dir=streamed, device="cpu")
        require_same_files(folder, streamed, dense=folder.with_name("dense"))

    runs_on_text = len(batches[0]) == 1
    return Outcome(
        family,
        type(model).__name__,
        "works",
        dense=what_stays_dense(report, excluded),
        reason="" if runs_on_text else NO_TEXT_ALONE,
        seen=tuple(inputs),
        multimodal=multimodal,
    )


def what_can_go(family: str, *, multimodal: bool = False) -> tuple[str, ...]:
    """The kinds of parts of which half can be removed from a family; the smaller models return finite logits."""
    patterns = {"channels": "channels:0.5/1", "heads": "heads:0.5", "experts": "experts:0.5"}
    removable = []
    for part, pattern in patterns.items():
        model = family_model(family, kind=_auto_class(multimodal))
        config = FistaPruningConfig(pattern=pattern, method="magnitude")
        pruner = FistaPruner(config, progress=False)
        try:
            batches = family_batches(model)
            report = prune(pruner, model, batches)
        except UnsupportedArchitectureError:
            continue
        assert report.model["num_parameters"] == model.num_parameters()
        assert report.totals["num_removed"] > 0
        assert bool(torch.isfinite(logits(model, **batches[0])).all())
        removable.append(part)
    return tuple(removable)


def try_experts(family: str, folder: Path, *, multimodal: bool = False) -> str:
    """Remove half of the experts of a family in memory and from files; returns what `Outcome.experts` says of it.

    Asserts that both give the same tensors and pass `verify` against the dense model, in `folder`.
    """
    model = family_model(
        family, kind=_auto_class(multimodal), settings=MIXTURE_OPTIONS.get(family, {})
    )
    names_of_modules = [
        name for _, layer in find_decoder_layers(model) for name, _ in layer.named_modules()
    ]
    has_mixture = family in MIXTURE_OPTIONS or any(
        name.split(".")[-1] == "experts" for name in names_of_modules
    )
    if not has_mixture:
        return ""
    batches = family_batches(model)
    # Experts are refitted to several texts only.
    texts = [batch | {"source": f"text {number}"} for number, batch in enumerate(batches)]
    model.save_pretrained(folder / "dense")
    pruner = FistaPruner(FistaPruningConfig(pattern="experts:0.5"), progress=False)
    try:
        report = prune(pruner, model, texts)
    except UnsupportedArchitectureError as error:
        reason = " ".join(str(error).split()).partition("can't lose experts: ")[2]
        return reason.removesuffix(".")

    assert report.mixtures
    assert bool(torch.isfinite(logits(model, **batches[0])).all())
    prune(pruner, str(folder / "dense"), texts, output_dir=folder / "streamed", device="cpu")
    streamed = type(model).from_pretrained(folder / "streamed").state_dict()
    assert all(torch.equal(tensor, streamed[name]) for name, tensor in model.state_dict().items())
    verified = verify_checkpoint(folder / "streamed", dense=folder / "dense")
    assert verified.num_mixtures == len(report.mixtures)
    return EXPERTS_WORK


def prune(
    pruner: FistaPruner,
    model: PreTrainedModel | str,
    batches: list[dict[str, Tensor]],
    **options: Any,
) -> PruningReport:
    """Prune a model, or the one in a folder, without warnings; `options` are those of `FistaPruner.prune`."""
    with warnings.catch_warnings(), ENOUGH_TOKENS:
        warnings.simplefilter("ignore")  # of too few tokens, and of operators left dense
        return pruner.prune(model, batches, **options)


def stacked_weights(model: PreTrainedModel) -> list[str]:
    """Modules of the decoder layers that hold many matrices in one 3-D parameter, in a form that can't be pruned."""
    return [
        name
        for layer_name, layer in find_decoder_layers(model)
        for name, module in layer.named_modules(prefix=layer_name)
        if is_fused_experts(module) and not can_be_split(module)
    ]


def require_same_hidden_states(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    """Decoder layers that run on what was recorded return what they return inside the model."""
    layers = find_decoder_layers(model)
    media = {name: tensor for name, tensor in inputs.items() if name != "input_ids"}
    batch = CalibrationBatch(inputs["input_ids"], media=media)
    outputs: list[Tensor] = []  # of the layers inside the model

    def copy_output(_: object, __: object, output: Any) -> None:
        """Keep a copy of a layer's output hidden states."""
        hidden_states = output[0] if isinstance(output, tuple) else output
        outputs.append(hidden_states.clone())

    handles = [layer.register_forward_hook(copy_output) for layer in layers.modules]
    with torch.no_grad():
        model(**inputs, use_cache=False)
        for handle in handles:
            handle.remove()

        recorded = record_inputs(layers, [batch])
        hidden = recorded.hidden_states[0]
        for calls, layer, expected in zip(recorded.calls, layers.modules, outputs, strict=True):
            hidden = calls[0].run(layer, hidden)
            torch.testing.assert_close(hidden, expected)


def require_told(model: PreTrainedModel, report: PruningReport, excluded: list[str]) -> None:
    """Every operator was pruned, or has a reason to be dense."""
    operators: set[str] = set()
    for layer_name, layer in find_decoder_layers(model):
        operators |= find_operators(layer_name, layer, dense_experts=excluded).keys()

    pruned = {operator.name.removesuffix(".weight") for operator in report.operators}
    assert pruned <= operators
    assert all(report.left_dense[name] for name in operators - pruned)


def require_same_files(first: Path, second: Path, dense: Path) -> None:
    """Two pruned folders have the tensors and the configuration of the dense one, except for what was pruned."""
    tensors = read_tensors(first)
    other_tensors = read_tensors(second)
    dense_tensors = read_tensors(dense)
    assert tensors.keys() == other_tensors.keys() == dense_tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, other_tensors[name]), name
    pruned = {split_index(operator.name)[0] for operator in read_report(first).operators}
    for name in tensors.keys() - pruned:
        assert torch.equal(tensors[name], dense_tensors[name]), name

    config = json.loads((first / "config.json").read_text())
    other_config = json.loads((second / "config.json").read_text())
    dense_config = json.loads((dense / "config.json").read_text())
    assert config == other_config
    assert config.pop("fista_pruning")
    assert dense_config.pop("fista_pruning")  # it had been pruned once as well
    assert config == dense_config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder's weight files, by name."""
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def require_saved(
    pruner: FistaPruner,
    model: PreTrainedModel,
    report: PruningReport,
    folder: Path,
    inputs: Mapping[str, dict[str, Tensor]],
    *,
    own_class: bool,
) -> None:
    """Save a pruned model, verify the folder, and assert that plain Transformers loads the same model from it.

    It is loaded by its own class if `own_class`. Logits are compared on `inputs`, such as those of "text".
    """
    pruned_logits = {name: logits(model, **values) for name, values in inputs.items()}
    pruner.save_pretrained(model, folder)
    try:
        verified = verify_checkpoint(folder)
        kind = type(model) if own_class else AutoModelForCausalLM
        again, info = kind.from_pretrained(folder, output_loading_info=True)
    except (VerificationError, ValueError) as error:
        raise NotReloaded(str(error)) from error
    if info["missing_keys"]:
        raise NotReloaded(
            f"{type(model).__name__} finds {len(info['missing_keys'])} of its tensors under no name"
        )
    assert verified.num_operators == len(report.operators)
    assert verified.num_zeros == report.totals["num_zeros"]
    assert type(again) is type(model)
    # a copy, because loaded tensors lie unaligned in memory, where products may differ in the last bit
    again = copy.deepcopy(again)
    for name, values in inputs.items():
        assert torch.equal(logits(again, **values), pruned_logits[name]), name


def what_stays_dense(report: PruningReport, excluded: list[str]) -> tuple[str, ...]:
    """What is left dense and why, each kind once: names end at the second last dot, without the numbers of layers."""
    left_dense = report.left_dense | dict.fromkeys(excluded, "many matrices in one parameter")
    names_by_reason: dict[str, set[str]] = {}
    for name, reason in left_dense.items():
        words = [part for part in name.split(".") if not part.isdigit()]
        short_name = ".".join(words[-2:])
        short_reason, _, _ = reason.partition(" with ")
        names_by_reason.setdefault(short_reason, set()).add(short_name)
    return tuple(
        f"{', '.join(sorted(names))}: {reason}" for reason, names in sorted(names_by_reason.items())
    )


def _first_sentence(error: Exception) -> str:
    """The message of an error on one line, without advice and lists, at most 160 characters."""
    text = " ".join(str(error).split())
    for beginning_of_rest in (": only models", ". Pass", "; its module lists"):
        text, _, _ = text.partition(beginning_of_rest)
    return text[:160]

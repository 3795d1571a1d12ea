"""A tiny model of any family of Transformers: pruned, saved, loaded again, and what came of it."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
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


@dataclass(frozen=True)
class Outcome:
    """What came of a family.

    `status` is `works`, `refused` (by an `UnsupportedArchitectureError`), `not built` (Transformers can't build the
    model from its default configuration, or run it on token ids alone) or `not reloaded`; `dense` is what stays dense,
    with the reason; `smaller` are the kinds of parts of which half can go. `seen` are the inputs of a multimodal model
    on which the saved one was compared.
    """

    family: str
    model_class: str
    status: str
    dense: tuple[str, ...] = ()
    reason: str = ""
    smaller: tuple[str, ...] = ()
    seen: tuple[str, ...] = ()
    multimodal: bool = False


class NotReloaded(Exception):
    """What was saved can't be loaded or verified; the message says why."""


def family_model(family: str, seed: int = 0, kind: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """A random tiny float32 model of a family; every parameter is random, biases and norms included."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = kind.from_config(shrunken_config(family), dtype=torch.float32).eval()
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
    """Logits [batch, sequence, vocabulary] of the calibration tokens, or of other inputs."""
    with torch.no_grad():
        return model(
            **(inputs or {"input_ids": torch.cat(family_tokens())}), use_cache=False
        ).logits


def try_family(family: str, folder: Path, *, multimodal: bool = False) -> Outcome:
    """Prune a family at 2:4, save it to `folder`, load it again; assert that all is as promised.

    A multimodal model is also pruned from its files, and compared on images and sounds. One that does not run on text
    alone is calibrated on images, too.
    """
    name, inputs, outcome = (
        "",
        dict[str, dict[str, Tensor]](),
        partial(Outcome, family, multimodal=multimodal),
    )
    try:
        model = family_model(
            family, kind=AutoModelForMultimodalLM if multimodal else AutoModelForCausalLM
        )
        if multimodal:
            name = type(model).__name__
            find_decoder_layers(model)
        batches = family_batches(model)
        dense = logits(model, **batches[0])
    except UnsupportedArchitectureError as error:
        return outcome(name, "refused", reason=_first_sentence(error))
    except (
        Exception
    ) as error:  # whatever a family of Transformers raises on a default configuration
        return outcome("", "not built", reason=_first_sentence(error))
    name = type(model).__name__
    assert bool(torch.isfinite(dense).all())
    try:
        excluded = stacked_weights(model)
        require_same_hidden_states(model, batches[0])
        by_gradients = FistaPruningConfig(
            0.2, method="magnitude", error_correction="none", exclude=excluded
        )
        assert (
            prune(FistaPruner(by_gradients, progress=False), model, batches).totals["sparsity"]
            >= 0.19
        )
        corrected = {"error_correction": 0.5, "residual_correction": 1.0, "exclude": excluded}
        pruner = FistaPruner(
            FistaPruningConfig(pattern="2:4", method="sparsegpt", **corrected), progress=False
        )
        if multimodal:
            model.save_pretrained(folder.with_name("dense"))
            inputs = multimodal_inputs(model)
        report = prune(pruner, model, batches)
        require_told(model, report, excluded)
        require_saved(
            pruner, model, report, folder, {"text": batches[0]} | inputs, own_class=multimodal
        )
        if multimodal:
            source = str(folder.with_name("dense"))
            prune(pruner, source, batches, output_dir=folder.with_name("streamed"), device="cpu")
            require_same_files(folder, folder.with_name("streamed"), folder.with_name("dense"))
    except UnsupportedArchitectureError as error:
        return outcome(name, "refused", reason=_first_sentence(error))
    except NotReloaded as error:
        return outcome(name, "not reloaded", reason=_first_sentence(error))
    needs = "" if len(batches[0]) == 1 else NO_TEXT_ALONE
    return outcome(name, "works", what_stays_dense(report, excluded), needs, seen=tuple(inputs))


def what_can_go(family: str, *, multimodal: bool = False) -> tuple[str, ...]:
    """The kinds of parts of which half can be removed from a family; the smaller models return finite logits."""
    found = []
    for part, pattern in (
        ("channels", "channels:0.5/1"),
        ("heads", "heads:0.5"),
        ("experts", "experts:0.5"),
    ):
        model = family_model(
            family, kind=AutoModelForMultimodalLM if multimodal else AutoModelForCausalLM
        )
        pruner = FistaPruner(
            FistaPruningConfig(pattern=pattern, method="magnitude"), progress=False
        )
        try:
            batches = family_batches(model)
            report = prune(pruner, model, batches)
        except UnsupportedArchitectureError:
            continue
        assert report.model["num_parameters"] == model.num_parameters()
        assert report.totals["num_removed"] > 0
        assert bool(torch.isfinite(logits(model, **batches[0])).all())
        found.append(part)
    return tuple(found)


def prune(
    pruner: FistaPruner,
    model: PreTrainedModel | str,
    batches: list[dict[str, Tensor]],
    **options: Any,
) -> PruningReport:
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
    inside: list[Tensor] = []
    handles = [
        layer.register_forward_hook(
            lambda _, __, output: inside.append(
                (output[0] if isinstance(output, tuple) else output).clone()
            )
        )
        for layer in layers.modules
    ]
    with torch.no_grad():
        model(**inputs, use_cache=False)
        for handle in handles:
            handle.remove()
        recorded = record_inputs(layers, [batch])
        hidden = recorded.hidden_states[0]
        for calls, layer, expected in zip(recorded.calls, layers.modules, inside, strict=True):
            hidden = calls[0].run(layer, hidden)
            torch.testing.assert_close(hidden, expected)


def require_told(model: PreTrainedModel, report: PruningReport, excluded: list[str]) -> None:
    """Every operator was pruned, or has a reason to be dense."""
    layers = find_decoder_layers(model)
    operators = {
        name for layer in layers for name in find_operators(*layer, dense_experts=excluded)
    }
    pruned = {operator.name.removesuffix(".weight") for operator in report.operators}
    assert pruned <= operators
    assert all(report.left_dense[name] for name in operators - pruned)


def require_same_files(first: Path, second: Path, dense: Path) -> None:
    """Two pruned folders have the tensors and the configuration of the dense one, except for what was pruned."""
    tensors, others, before = read_tensors(first), read_tensors(second), read_tensors(dense)
    assert tensors.keys() == others.keys() == before.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    pruned = {split_index(operator.name)[0] for operator in read_report(first).operators}
    assert all(torch.equal(tensors[name], before[name]) for name in tensors.keys() - pruned)
    found = [json.loads((folder / "config.json").read_text()) for folder in (first, second, dense)]
    assert found[0] == found[1]
    assert all(
        config.pop("fista_pruning") for config in found[1:]
    )  # the dense one had been pruned once as well
    assert found[1] == found[2]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's weight files."""
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def require_saved(
    pruner: FistaPruner,
    model: PreTrainedModel,
    report: PruningReport,
    folder: Path,
    inputs: Mapping[str, dict[str, Tensor]],
    *,
    own_class: bool,
) -> None:
    """The saved folder is verified, and plain Transformers loads the same model from it, by its own class if asked."""
    forms = list(inputs.values())
    pruned = [logits(model, **form) for form in forms]
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
    assert all(
        torch.equal(logits(again, **form), kept) for form, kept in zip(forms, pruned, strict=True)
    )


def what_stays_dense(report: PruningReport, excluded: list[str]) -> tuple[str, ...]:
    """What is left dense and why, each kind once: names end at the second last dot, without the numbers of layers."""
    reasons: dict[str, set[str]] = {}
    for name, reason in (
        report.left_dense | dict.fromkeys(excluded, "many matrices in one parameter")
    ).items():
        short = ".".join([part for part in name.split(".") if not part.isdigit()][-2:])
        reasons.setdefault(reason.partition(" with ")[0], set()).add(short)
    return tuple(
        f"{', '.join(sorted(names))}: {reason}" for reason, names in sorted(reasons.items())
    )


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text.split(": only models")[0].split(". Pass")[0].split("; its module lists")[0][:160]

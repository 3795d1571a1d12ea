"""Which experts stay in layers that predict more tokens: a run of these layers after the pruned model says so.

A *prediction layer* (`source.prediction_layers`) is in the files of a model, and the model's class does not load it. It
is a decoder layer like those of the model (its *template*), with a projection in front. For a token i, with the
embedding e(i) of a token and the hidden states h(i) that the final norm of the model returns, the projection P, and two
norms:

    x(i) = P [norm_e(e(i + 1)); norm_h(h(i))]          (DeepSeek-V3, arXiv 2412.19437, eq. 21)

enters the decoder layer. If there are several prediction layers, the one with the number k from 0 gets e(i + 1 + k).
All but the first get, in place of h(i), what the prediction layer before returns without its removed experts.

Before the run, `load_prediction_layers` writes each to a small checkpoint, from which Transformers loads it as a model
with one decoder layer, in any format that it reads. When the decoder layers of the given model are pruned,
`choose_prediction_experts` runs it, and chooses its experts as those of a decoder layer (`remove_experts`). Nothing is
refitted, so tensors of experts stay as they are stored.
"""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from optimum_fista.atomic import write_file
from optimum_fista.model.activations import ActivationStore, Storage
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.correction import Correction, LayerTargets
from optimum_fista.model.inputs import HiddenStates, LayerActivations, record_inputs
from optimum_fista.model.layers import DecoderLayers, find_decoder_layers
from optimum_fista.model.offload import execution_device, onloaded, stored_tensor
from optimum_fista.records import MixtureReport
from optimum_fista.removal.experts import remove_experts
from optimum_fista.removal.model_outline import ModelOutline
from optimum_fista.removal.parts import Part
from optimum_fista.removal.shrinking import Shrinking, plan_shrinking
from optimum_fista.source.loading import load_lazily
from optimum_fista.source.model_folder import CONFIG_FILE
from optimum_fista.source.prediction_layers import PredictionLayer, with_fewer_experts
from optimum_fista.source.quantization import forget_quantization
from optimum_fista.source.source_tensors import SourceTensors
from optimum_fista.source.stored_tensor import StoredTensor, write_stored

_REHEARSED_TOKENS = 16


@dataclass(frozen=True)
class LoadedPredictionLayer:
    """A prediction layer that can run.

    Attributes:
        layer: Where it is in the files.
        layers: The only decoder layer of a model that has the embedding of the given model. Its weights stay in files
            until they are needed.
        part: Its mixture, as a part of that model.
        plan: Of that model with fewer experts.
        norm: The final norm of the given model, without weights; all norms in front of the layer are of its class.
    """

    layer: PredictionLayer
    layers: DecoderLayers
    part: Part
    plan: Shrinking
    norm: nn.Module


def load_prediction_layers(
    source: SourceTensors, layers: DecoderLayers, num_kept: int, copies: Path
) -> tuple[SourceTensors, list[LoadedPredictionLayer]]:
    """Write each prediction layer to a small checkpoint of its own, and load that as a model with one decoder layer.

    Its weights stay in the files of this checkpoint until they are needed.

    The layers run one after the other, so none can do without the others. If one of them can't be loaded, cut or run,
    none is returned, and the returned copy of `source` says that their modules are not copied to the result, and why.
    Otherwise `source` itself is returned.

    Args:
        source: The tensors in the files of the given model.
        layers: Those of the given model, which is only read.
        num_kept: How many experts a mixture keeps.
        copies: A folder for the checkpoints; they have to stay there until the run has ended. It may not exist yet.
    """
    outline = ModelOutline(layers)
    first_experts = {layer.mixture: range(num_kept) for layer in source.prediction_layers}
    try:
        # Refuses tensors that can't be cut, before the run. Which experts will stay is not known yet.
        with_fewer_experts(source, layers.model, first_experts)
        loaded = [
            _load(
                layer,
                source,
                outline,
                num_kept=num_kept,
                copies=copies / layer.module,
            )
            for layer in source.prediction_layers
        ]
        _rehearse(loaded, layers)
    # An architecture that is not known is a ValueError, too. A rehearsal raises whatever the code of the model raises.
    except (ValueError, AttributeError, TypeError, LookupError, RuntimeError) as error:
        num_tensors = Counter(source.not_loaded.values())  # by the module
        not_copied = dict(source.not_copied)
        for layer in source.prediction_layers:
            not_copied[layer.module] = (
                f"{num_tensors[layer.module]} tensors: its experts can't be chosen, because it can't be run ({error})"
            )
        return replace(source, not_copied=not_copied, prediction_layers=()), []
    return source, loaded


def _rehearse(loaded: Sequence[LoadedPredictionLayer], layers: DecoderLayers) -> None:
    """Choose experts on a few tokens of random hidden states, so that a layer that can't run is known before the run.

    `layers` are the decoder layers of the given model. Changes nothing; raises what goes wrong.
    """
    config = layers.model.config.get_text_config(decoder=True)
    token_ids = torch.arange(_REHEARSED_TOKENS)[None] % config.vocab_size
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, _REHEARSED_TOKENS, config.hidden_size, generator=generator)
    choose_prediction_experts(
        loaded,
        layers,
        [CalibrationBatch(token_ids)],
        [hidden.to(layers.model.dtype)],
        storage=None,
    )


def _load(
    layer: PredictionLayer,
    source: SourceTensors,
    outline: ModelOutline,
    *,
    num_kept: int,
    copies: Path,
) -> LoadedPredictionLayer:
    """Write one prediction layer to the folder `copies`, and load it from there as a model with one decoder layer.

    `outline` is that of the given model; the other arguments are those of `load_prediction_layers`. ValueError or
    AttributeError if no such model can be loaded.
    """
    given = outline.layers
    decoder_name, _, _ = given.name.rpartition(".")  # such as "model"
    norm = outline.dense.get_submodule(f"{decoder_name}.norm")
    norm_weights = [name for name, _ in norm.named_parameters()]
    if norm_weights != ["weight"]:
        raise ValueError(f"{decoder_name}.norm has the parameters {norm_weights}")

    number = int(layer.template.rpartition(".")[2])
    model_folder = copies / "model"
    model_folder.mkdir(parents=True)
    config = _configuration(outline, number, source)
    write_file(model_folder / CONFIG_FILE, config.to_json_string())
    tensors = _tensors_of_small_model(layer, source, given.name)
    write_stored(model_folder / "model.safetensors", tensors)

    model, _, _ = load_lazily(
        str(model_folder),
        copies / "offload",
        device=str(execution_device(given.modules[-1])),
        dtype=given.model.dtype,
    )
    layers = find_decoder_layers(model)
    plan = plan_shrinking(ModelOutline(layers), {"experts": num_kept})
    (part,) = plan.parts.values()
    return LoadedPredictionLayer(layer, layers, part, plan, norm)


def _configuration(outline: ModelOutline, number: int, source: SourceTensors) -> PreTrainedConfig:
    """Return the configuration of a model with only the decoder layer `number` of the given one.

    It has the quantization settings of `source`, by which the files are read. `outline` is that of the given model.
    """
    one_layer = plan_shrinking(outline, layers=[number])
    config = copy.deepcopy(one_layer.model.config)
    config.architectures = [type(outline.model).__name__]
    forget_quantization(config)
    if source.settings:
        config.quantization_config = dict(source.settings)
    return config


def _tensors_of_small_model(
    layer: PredictionLayer, source: SourceTensors, layers_name: str
) -> dict[str, StoredTensor]:
    """Return the stored tensors of a model whose only decoder layer is that of a prediction layer, by name.

    The tensors outside of the decoder layers are those of the given model, whose list of decoder layers is called
    `layers_name`. `source` are the tensors in its files. Nothing is read yet.
    """
    tensors = {
        name: source.stored[name]
        for name, place in source.places.items()
        if not place.startswith(f"{layers_name}.")
    }
    for name in layer.places:
        tensors[f"{source.layers}0.{name.removeprefix(layer.prefix)}"] = source.stored[name]
    return tensors


def choose_prediction_experts(
    prediction_layers: Sequence[LoadedPredictionLayer],
    layers: DecoderLayers,
    batches: Sequence[CalibrationBatch],
    hidden_states: Sequence[Tensor],
    storage: Storage | None,
) -> list[MixtureReport]:
    """Choose the experts that stay in each prediction layer, by its own router; return a report of each mixture.

    The layers run, one after the other; nothing is changed. A report has the name of the mixture in the given files.

    Args:
        prediction_layers: One or more, as `load_prediction_layers` returns them, in the order in which they predict.
        layers: The decoder layers of the given model, of which the final norm is read.
        batches: The calibration; held-out batches are left out here.
        hidden_states: [batch, sequence, hidden] of each batch, as they leave the last decoder layer of the pruned model
            (of the dense one, if only those are known).
        storage: Where activations are kept between passes; `None`: where the layers compute.
    """
    # The first prediction layer gets the hidden states of the model after its final norm, without held-out batches.
    first = prediction_layers[0]
    device = execution_device(first.layers.modules[0])
    decoder_name, _, _ = layers.name.rpartition(".")
    final_norm = stored_tensor(layers.model, f"{decoder_name}.norm.weight")
    fitted_batches = list[CalibrationBatch]()
    states = ActivationStore(storage or device, device)
    for number, batch in enumerate(batches):
        if not batch.held_out:
            fitted_batches.append(batch)
            hidden = hidden_states[number].to(device)
            states.append(_normalized(first.norm, final_norm, hidden))

    # Each of the others gets the states that leave the prediction layer before it.
    reports = list[MixtureReport]()
    for distance, loaded in enumerate(prediction_layers, start=1):
        states, report = _choose_experts_of(loaded, fitted_batches, states, distance, storage)
        reports.append(report)
    return reports


def _choose_experts_of(
    loaded: LoadedPredictionLayer,
    batches: Sequence[CalibrationBatch],
    states: ActivationStore,
    distance: int,
    storage: Storage | None,
) -> tuple[ActivationStore, MixtureReport]:
    """Choose the experts of one prediction layer; return its outputs without the others, and the report.

    `states` [batch, sequence, hidden] of each batch are those of the model, or of the prediction layer before. The
    embeddings are those of the tokens that come `distance` tokens later. The other arguments are those of
    `choose_prediction_experts`. The weights of the layer are on its device while it runs.
    """
    layer = loaded.layers.modules[0]
    # The embeddings of the tokens, and the other arguments of the decoder layer (masks, positions).
    recorded = record_inputs(loaded.layers, batches, storage)
    entering = _layer_inputs(loaded, recorded.hidden_states, states, distance, storage)
    token_masks = []
    for batch, mask in zip(batches, recorded.token_masks, strict=True):
        is_real = torch.ones_like(batch.input_ids, dtype=torch.bool) if mask is None else mask
        token_masks.append(_with_later_token(is_real, distance))

    with onloaded(layer.modules(), read_only=True):
        activations = LayerActivations(
            layer,
            recorded.calls[0],
            token_masks,
            storage=storage or execution_device(layer),
        )
        name_in_layer = loaded.part.name.removeprefix(f"{loaded.layers.name}.0.")
        targets = LayerTargets(
            activations,
            groups=[],  # no operator is pruned
            # The dense layer need not run on inputs of its own.
            correction=Correction("full", dense_share=0.0),
            entering=HiddenStates(dense=None, pruned=entering),
            experts=layer.get_submodule(name_in_layer),
        )
        smaller_layer, report = remove_experts(
            loaded.part,
            f"{loaded.layers.name}.0",
            targets=targets,
            count=loaded.plan.num_kept[loaded.part.name],
            shrinking=loaded.plan,
            write=None,
        )
        outputs = targets.leave(smaller_layer).pruned
    assert isinstance(outputs, ActivationStore)
    return outputs, replace(report, name=loaded.layer.mixture)


def _layer_inputs(
    loaded: LoadedPredictionLayer,
    embeddings: Sequence[Tensor],
    states: Sequence[Tensor],
    distance: int,
    storage: Storage | None,
) -> ActivationStore:
    """Compute what enters the decoder layer of a prediction layer, [batch, sequence, hidden] of each batch.

    `embeddings` are those of the tokens themselves; the layer gets those of the tokens `distance` later. `states` are
    those of the model, or of the prediction layer before. All are [batch, sequence, hidden] of each batch. The result
    is kept at `storage` (`None`: where the layer computes).
    """
    device = execution_device(loaded.layers.modules[0])
    dtype = loaded.layers.model.dtype
    layer = loaded.layer
    embedding_norm = layer.embedding_norm.tensor().to(device, dtype)
    hidden_norm = layer.hidden_norm.tensor().to(device, dtype)
    projection = layer.projection.tensor().to(device, dtype)
    inputs = ActivationStore(storage or device, device)
    for embedding, hidden in zip(embeddings, states, strict=True):
        # The last tokens get the embeddings of the first ones: `_with_later_token` leaves them out.
        later = embedding.to(device).roll(-distance, dims=1)
        # [batch, sequence, 2 * hidden]
        both = torch.cat(
            [
                _normalized(loaded.norm, embedding_norm, later),
                _normalized(loaded.norm, hidden_norm, hidden.to(device)),
            ],
            dim=-1,
        )
        inputs.append(nn.functional.linear(both, projection))
    return inputs


def _with_later_token(is_real: Tensor, distance: int) -> Tensor:
    """Tell which tokens are real and have a real token `distance` later, bool [batch, sequence], as `is_real`."""
    later_is_real = is_real.roll(-distance, dims=1)
    later_is_real[:, -distance:] = False
    return is_real & later_is_real


def _normalized(norm: nn.Module, weight: Tensor, hidden_states: Tensor) -> Tensor:
    """Normalize hidden states [batch, sequence, hidden] as `norm` does, but with this `weight` [hidden]."""
    weights = {"weight": weight.to(hidden_states.device)}
    normalized: Tensor = torch.func.functional_call(norm, weights, (hidden_states,))
    return normalized

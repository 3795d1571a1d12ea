"""Check the report of a pruned model against the model that `config.json` describes.

The model is made without weights. `verify_model` counts its parameters, and compares its vocabulary, the shapes of all
tensors, and its mixtures of experts with the report and the files. Every check raises a `VerificationError` if it
fails, and changes nothing. `verify_checkpoint` calls it after it has checked the operators (`verification.py`).
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from optimum_fista import internals
from optimum_fista.evaluate.comparison import VerificationError
from optimum_fista.folder.checkpoint import REPORT_FILE, VOCABULARY_FILE, kept_tokens
from optimum_fista.folder.packed_folder import is_packed, packed_outlines
from optimum_fista.model.layers import token_limits
from optimum_fista.operator_grid import layer_and_kind
from optimum_fista.records import MixtureReport
from optimum_fista.removal.experts import experts_to_keep
from optimum_fista.removal.model_outline import count_router_groups
from optimum_fista.report import PruningReport
from optimum_fista.source.inventory import source_tensors
from optimum_fista.source.loaded_names import Naming
from optimum_fista.source.loading import load_tokenizer
from optimum_fista.source.source_tensors import EXPERT, SourceTensors

logger = logging.getLogger(__name__)


def verify_model(folder: Path, report: PruningReport) -> int | None:
    """Check the report against the model that `config.json` describes, which is made without weights.

    Its number of parameters is checked; if tokens were removed, the size of its vocabulary; that the files have all
    tensors, with the right shapes; and if parts were removed, the experts of each mixture.

    Args:
        folder: The folder that is verified.
        report: The report in it. `report.removed` says in words which parts were removed; it is empty if none were.

    Returns:
        The number of the model's parameters; `None` if Transformers can't make a model of its class, in which case
        nothing is checked.
    """
    model = _described_model(folder, report.model["class"])
    if model is None:
        return None

    num_parameters = int(model.num_parameters())
    promised = report.model["num_parameters"]
    if num_parameters != promised:
        raise VerificationError(
            f"{REPORT_FILE} promises {promised} parameters, the model has {num_parameters}."
        )
    tokens = kept_tokens(folder)
    if tokens is not None:  # the model has lost tokens
        num_rows, _ = token_limits(model)  # rows of the embedding, and the longest sequence
        _verify_vocabulary(folder, num_kept=len(tokens), num_rows=num_rows)
    source = source_tensors(model, folder)
    _verify_tensors(folder, model, source)
    has_lost_parts = bool(report.removed)
    if has_lost_parts:
        router_groups = count_router_groups(model.config.get_text_config(decoder=True))
        for mixture in report.mixtures:
            _verify_mixture(model, mixture, router_groups)
        _verify_routing_tables(model, source, report.mixtures)
    return num_parameters


def _verify_vocabulary(folder: Path, *, num_kept: int, num_rows: int) -> None:
    """Check that the embedding has a row for each kept token, and for each id that the tokenizer may write.

    `num_kept` is the number of tokens in the folder's table, `num_rows` that of rows which `config.json` describes.
    """
    if num_kept != num_rows:
        raise VerificationError(
            f"{VOCABULARY_FILE} names {num_kept} tokens, the embedding has {num_rows} rows."
        )
    tokenizer = load_tokenizer(str(folder))
    if tokenizer is None:
        return
    vocabulary = tokenizer.get_vocab()  # ids by token
    last = max(vocabulary, key=lambda token: vocabulary[token])  # the token with the highest id
    if vocabulary[last] >= num_rows:
        raise VerificationError(
            f"the tokenizer's token {last!r} has the id {vocabulary[last]}, the embedding has {num_rows} rows: the "
            f"tokenizer in {str(folder)!r} is not the one that was written with this model, or got a token afterwards. "
            "Put back the files that were written, or prune again."
        )


def _described_model(folder: Path, class_name: str) -> PreTrainedModel | None:
    """Make the model that `config.json` describes, without weights; `None` if Transformers can't make it.

    Args:
        folder: The pruned folder.
        class_name: Name of the model's class by the report, such as "LlamaForCausalLM".
    """
    model_class = getattr(transformers, class_name, None)
    if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
        return None
    if model_class.config_class is None:
        return None
    try:
        config = model_class.config_class.from_pretrained(folder)
        # The parameters take no memory there.
        with torch.device("meta"):
            model: PreTrainedModel = model_class(config)
            return model
    except Exception as error:  # anything the code of a family may raise on the meta device
        logger.info("%s could not be made without weights: %s", class_name, error)
        return None


def _verify_tensors(folder: Path, model: PreTrainedModel, source: SourceTensors) -> None:
    """Check that the files have every tensor of the model, those of all experts, and with the right shapes.

    Args:
        folder: The folder that is verified.
        model: The model without weights that its `config.json` describes.
        source: The tensors in the files of the folder.
    """
    # Tied to others, or made anew when the model is loaded.
    not_saved = {*model.all_tied_weights_keys, *internals.names_not_saved(model)}
    described = {
        name: tensor for name, tensor in model.state_dict().items() if name not in not_saved
    }
    # The shapes of stored tensors, and the parameters as which they are loaded, by their names in the files.
    stored_shapes = {name: tensor.shape for name, tensor in source.stored.items()}
    places = dict(source.places)
    naming = Naming(model, dequantizer=None)
    if is_packed(folder):
        for name, packed in packed_outlines(folder).items():
            stored_shapes[name] = packed.shape
            places[name] = naming.names_of(name).place

    filled = set[str]().union(*(naming.filled_by(name, place) for name, place in places.items()))
    missing = [name for name in described if name not in filled]
    if missing:
        raise VerificationError(f"{missing[0]} is not in the checkpoint.")
    for name in described.keys() & stored_shapes.keys():
        stored_shape = stored_shapes[name]
        shape = tuple(described[name].shape)
        if stored_shape != shape:
            raise VerificationError(
                f"{name} has shape {stored_shape}, config.json describes {shape}."
            )
    _verify_numbers_of_experts(places, described)


def _verify_numbers_of_experts(
    places: Mapping[str, str], described: Mapping[str, torch.Tensor]
) -> None:
    """Check that files that store each expert by itself have all of them, numbered from 0.

    `places` has the parameter as which each stored tensor is loaded, by its name in the files, and `described` the
    model's parameters by name; such a parameter has the weights of all experts, [experts, ...].
    """
    # Numbers of experts, by what stands before and after the number in the names of their tensors.
    numbers: dict[tuple[str, str], set[int]] = {}
    num_described: dict[tuple[str, str], int] = {}
    for name, place in places.items():
        expert = EXPERT.fullmatch(name)
        if expert is None or place not in described:
            continue
        is_of_all_experts = EXPERT.fullmatch(place) is None
        if is_of_all_experts:
            before, number, after = expert.groups()
            numbers.setdefault((before, after), set()).add(int(number))
            num_described[before, after] = len(described[place])
    for (before, after), found in numbers.items():
        expected = set(range(num_described[before, after]))
        if expected - found:
            raise VerificationError(
                f"{before}{min(expected - found)}{after} is not in the checkpoint."
            )


def _verify_mixture(model: PreTrainedModel, mixture: MixtureReport, router_groups: int) -> None:
    """Check that a mixture has as many experts as the report names, and that these are the most salient ones.

    Args:
        model: The smaller model, without weights.
        mixture: What the report says. Its `groups_kept` are the numbers of the experts that stay: each expert counts as
            a group there. Its `saliency` has a value for each expert of the dense model.
        router_groups: Another kind of groups: the router chooses among so many groups of experts first
            (`count_router_groups`). Each group keeps equally many.
    """
    num_kept = len(mixture.groups_kept)
    # Down projections of all experts are one tensor [experts, out, in]. Other weights of the module may have more
    # entries after those of the experts.
    tensors = dict(model.get_submodule(mixture.name).named_parameters(recurse=False))
    if "down_proj" not in tensors:
        raise VerificationError(
            f"{mixture.name} has no weights of experts, and the report says {num_kept} experts."
        )
    num_experts = len(tensors["down_proj"])
    if num_experts != num_kept:
        raise VerificationError(
            f"{mixture.name} has {num_experts} experts, and the report says {num_kept}."
        )
    saliency = torch.tensor(mixture.saliency, dtype=torch.float64)
    num_tokens = torch.tensor(mixture.expert_tokens)
    is_divided = len(saliency) % router_groups == 0
    expected: tuple[int, ...] | None = None
    if is_divided and len(num_tokens) == len(saliency):
        expected = experts_to_keep(saliency, num_kept, router_groups, num_tokens=num_tokens)
    if mixture.groups_kept != expected:
        raise VerificationError(
            f"{mixture.name}: groups_kept are not the experts with the largest saliency."
        )


def _verify_routing_tables(
    model: PreTrainedModel, source: SourceTensors, mixtures: Sequence[MixtureReport]
) -> None:
    """Check tables from which routers read the experts of a token: they name only experts that stay.

    Each table is read. The report must name substitutes for each removed expert of a mixture with such a table.

    Args:
        model: The smaller model, without weights.
        source: The tensors in its files.
        mixtures: What the report says; those without substitutes have no table.
    """
    mixtures_by_layer = dict[str, MixtureReport]()
    for mixture in mixtures:
        if mixture.substitutes:
            _verify_substitutes(mixture)
            layer_name, _ = layer_and_kind(mixture.name)
            mixtures_by_layer[layer_name] = mixture

    state = model.state_dict()
    for name, place in source.places.items():
        layer_name, _ = layer_and_kind(place)
        # A table has the numbers of experts. So, other than weights, it has no floating-point values.
        is_table = layer_name in mixtures_by_layer and not state[place].is_floating_point()
        if not is_table:
            continue
        num_kept = len(mixtures_by_layer[layer_name].groups_kept)
        table = source.stored[name].tensor()
        least = int(table.min())
        most = int(table.max())
        if least < 0 or most >= num_kept:
            raise VerificationError(
                f"{name} names experts from {least} to {most}, and the mixture has {num_kept}."
            )


def _verify_substitutes(mixture: MixtureReport) -> None:
    """Check that the report of a mixture with a table names experts that stay in place of each removed one."""
    num_removed = len(mixture.saliency) - len(mixture.groups_kept)
    names_kept_experts = all(
        choices and set(choices) <= set(mixture.groups_kept) for choices in mixture.substitutes
    )
    if len(mixture.substitutes) != num_removed or not names_kept_experts:
        raise VerificationError(
            f"{mixture.name}: substitutes do not name experts that stay for each of the {num_removed} removed ones."
        )

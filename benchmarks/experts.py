"""Which experts of a mixture are removed, and how the others make up for it: held-out losses of all ways, by domain.

Criteria are those of `expert_criteria.py`, repairs those of `expert_repairs.py`. A row is one share of removed experts,
text of the calibration (one domain, or "all"), criterion, repair, and seed of the calibration draw. Decoder layers are
taken one after the other as the package does by default: each sees the hidden states of the smaller layers before it,
and its targets correct their errors (`--streams pruned`). `reap` with the repair `none` is then the package's
`expert_refit=False`, and with `refit` its default, which refits nothing if the calibration is one text. With `--streams
dense`, as with `error_correction="none"`, all ways see the hidden states of the dense model. This is faster, because
what the experts compute is the same for all of them.

With the criterion `gradient_by_layer`, layers lose different numbers of experts: those with the smallest scores of the
whole model go (the stream `dense` without repairs only). No configuration of Transformers can say so, so the routers
are kept from choosing these experts, which computes the same.

MODEL is a folder of `mixtures.py` or `train_small.py`, and the text folder is that of `mixtures.py`: of each domain a
file to calibrate on and a held-out one. The dense model is the first row. The same command resumes.

    python benchmarks/experts.py MODEL --text-folder TEXTS --output rows.json
    python benchmarks/experts.py rows.json
"""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import mixtures  # noqa: F401, registers the experts implementation "channels"
import torch
from expert_criteria import CRITERIA, USE_GRADIENTS
from expert_repairs import REPAIRS, SmallerLayer, repair
from expert_view import MixtureView, output_gradients, parts_of, router_of
from mixture_texts import DOMAINS, text_file
from shared import open_record, parse_arguments, save
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_fista.config import FistaPruningConfig
from optimum_fista.evaluate.perplexity import evaluate_perplexity
from optimum_fista.folder.card import markdown_lines
from optimum_fista.model.activations import ActivationStore
from optimum_fista.model.calibration import CalibrationBatch, equal_shares
from optimum_fista.model.correction import Correction, LayerTargets
from optimum_fista.model.experts import FusedExperts
from optimum_fista.model.inputs import (
    HiddenStates,
    LayerActivations,
    RecordedInputs,
    record_inputs,
)
from optimum_fista.model.layers import DecoderLayers, find_decoder_layers
from optimum_fista.removal.experts import experts_of, experts_to_keep
from optimum_fista.removal.model_outline import ModelOutline
from optimum_fista.removal.parts import Part
from optimum_fista.removal.removed_parts import kept_by_kind, removed_parts
from optimum_fista.removal.shrinking import Shrinking, plan_shrinking
from optimum_fista.removal.smaller_modules import smaller_copy
from optimum_fista.source.loading import load_model
from optimum_fista.text.sources import load_text
from optimum_fista.text.windows import calibration_windows, evaluation_windows

Row = dict[str, Any]
BY_LAYER = "gradient_by_layer"  # a criterion; its scores are those of `gradient`
KEYS = ("stream", "calibration", "seed", "share", "criterion", "repair")
SEQUENCES_AT_ONCE = 4
# How errors of earlier layers are corrected: as by default, and not at all.
CORRECTIONS = {
    "pruned": FistaPruningConfig(pattern="experts:0.5").correction,
    "dense": Correction.parse("none"),
}
# Experts of fewer channels are computed as one MLP, which is faster on a CPU (`mixtures.experts_as_channels`).
FEW_CHANNELS = 128


class Way(NamedTuple):
    """What is removed, and how the rest makes up for it."""

    share: str  # of the experts, such as "0.25"
    criterion: str  # a name in `CRITERIA`
    repairs: str  # names in `REPAIRS`, joined by "+", or "none"


class Draw:
    """One draw of calibration text, and what the dense model says of it.

    Attributes:
        batches: Token ids; all sequences of a batch are of one domain.
        recorded: Inputs of the decoder layers.
        parts: Which part of the calibration each token is of (`expert_view.parts_of`).
    """

    def __init__(
        self, layers: DecoderLayers, windows: dict[str, Tensor], is_of_several: bool
    ) -> None:
        """Cut the `windows` [sequences, length] of each domain into batches, and record the layers' inputs."""
        self._layers = layers
        self._gradients: list[list[Tensor]] | None = None
        self.batches = [
            CalibrationBatch(ids, source=domain if is_of_several else None)
            for domain, of_domain in windows.items()
            for ids in of_domain.split(SEQUENCES_AT_ONCE)
        ]
        self.recorded: RecordedInputs = record_inputs(layers, self.batches)
        self.parts = parts_of(self.batches)

    def gradients(self, parts: Sequence[Part]) -> list[list[Tensor]]:
        """Gradients of the dense model's loss by the outputs of its mixtures, in their order; computed once."""
        if self._gradients is None:
            model = self._layers.model
            modules = [model.get_submodule(part.name) for part in parts]
            self._gradients = output_gradients(model, modules, self.batches)
        return self._gradients


@dataclass(frozen=True)
class DenseMixture:
    """The mixture of a decoder layer with all its experts, from which smaller layers are made.

    Attributes:
        part: The mixture as a part of the model.
        layer_name: Of its decoder layer, such as "model.layers.3".
        experts: All of them.
        view: What they compute for the calibration.
        activations: Run the layer on the calibration.
        hidden_states: That enter the layer, [batch, sequence, hidden] of each batch.
        targets: What the sum of the experts should be, [batch, sequence, hidden] of each batch; empty if no way
            repairs anything.
    """

    part: Part
    layer_name: str
    experts: FusedExperts
    view: MixtureView
    activations: LayerActivations
    hidden_states: Sequence[Tensor]
    targets: ActivationStore

    def layer_of_way(
        self, way: Way, plan: Shrinking, scores: Tensor, *, is_run: bool
    ) -> Callable[[], torch.nn.Module]:
        """Return a function that returns the layer without the experts with the lowest `scores` [experts].

        The function makes the layer, unless it is needed now: because it is repaired, or because its outputs enter the
        next layer (`is_run`). Counts by layer are not known yet, so for them it returns the dense layer.
        """
        layer = self.activations.layer
        if way.criterion == BY_LAYER:
            return partial(_same, layer)
        kept = experts_to_keep(scores, plan.num_kept[self.part.name])
        if is_run or way.repairs != "none":
            return partial(_same, self._smaller_layer(plan, kept, way.repairs))
        # This function has no reference to `self.view`, which is large and is freed before the next layer.
        return partial(smaller_copy, plan, self.layer_name, layer, {self.part.name: kept})

    def _smaller_layer(
        self, plan: Shrinking, kept: tuple[int, ...], repairs: str
    ) -> torch.nn.Module:
        """Copy the layer without the experts that are not `kept`, and make the `repairs` in the copy ("none": none)."""
        smaller = smaller_copy(
            plan, self.layer_name, self.activations.layer, {self.part.name: kept}
        )
        repair(
            repairs,
            SmallerLayer(
                view=self.view,
                kept=kept,
                all_experts=self.experts,
                experts=experts_of(self.part, self.layer_name, smaller),
                router=router_of(smaller),
                activations=replace(self.activations, layer=smaller),
                hidden_states=self.hidden_states,
                targets=self.targets,
            ),
        )
        return smaller


class Removals:
    """Removes experts of a model in memory, which is dense again afterwards.

    Attributes:
        model: The dense model.
        layers: Its decoder layers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Find the decoder layers of a model; small experts are computed as one MLP from now on."""
        self.model = model
        self.layers = find_decoder_layers(model)
        self._outline = ModelOutline(self.layers)
        self._top_k: int = model.config.num_experts_per_tok
        channels = getattr(model.config, "moe_intermediate_size", math.inf)
        self._are_small = channels < FEW_CHANNELS
        if self._are_small:
            model.set_experts_implementation("channels")

    def plan(self, share: str) -> Shrinking:
        """Plan the model without a share of the experts of each mixture, such as "0.25"."""
        pattern = FistaPruningConfig(pattern=f"experts:{share}").whole_parts
        assert pattern is not None
        counts = kept_by_kind(removed_parts(self._outline, pattern))
        plan = plan_shrinking(self._outline, counts)
        if self._are_small:
            plan.model.set_experts_implementation("channels")
        return plan

    def remove(
        self, draw: Draw, ways: Sequence[Way], *, stream: str, seed: int
    ) -> list[list[Callable[[], torch.nn.Module]]]:
        """Make the decoder layers of smaller models; the model stays as it is.

        Returns a list for each way, with a function for each decoder layer that returns it. The function makes the
        layer if nothing was repaired, so that few copies of the experts are in memory.

        Args:
            draw: The calibration.
            ways: What is removed and repaired; a single way for the stream "pruned".
            stream: "pruned": layers see the hidden states of the smaller layers before them; "dense": those of the
                dense model.
            seed: For random choices.
        """
        plans = {way.share: self.plan(way.share) for way in ways}
        plan, *_ = plans.values()
        parts = {part.name.rpartition(".mlp.")[0]: part for part in plan.parts.values()}
        gradients = dict[str, list[Tensor]]()
        if any(_scores_of(way) in USE_GRADIENTS for way in ways):
            gradients = dict(zip(parts, draw.gradients(list(parts.values())), strict=True))
        entering = draw.recorded.hidden_states
        is_pruned = stream == "pruned"
        states = HiddenStates(dense=entering, pruned=entering if is_pruned else None)

        layers_of_ways: list[list[Callable[[], torch.nn.Module]]] = [[] for _ in ways]
        gradient_scores = dict[str, Tensor]()  # by the name of the layer, for counts by layer
        for index, (name, layer) in enumerate(tqdm(self.layers, desc="Layers", leave=False)):
            activations = LayerActivations(
                layer=layer,
                calls=draw.recorded.calls[index],
                token_masks=draw.recorded.token_masks,
                storage=torch.device("cpu"),
                sources=draw.recorded.sources,
            )
            if name not in parts:
                # Only layers before all mixtures are dense, so the two networks are still the same.
                leaving = activations.outputs(states.to_prune_on)
                states = HiddenStates(dense=leaving, pruned=leaving if is_pruned else None)
                for layers in layers_of_ways:
                    layers.append(partial(_same, layer))
                continue

            experts = experts_of(parts[name], name, layer)
            targets = LayerTargets(
                activations, [], CORRECTIONS[stream], entering=states, experts=experts.module
            )
            expert_targets = activations.store()
            if any(way.repairs != "none" for way in ways):
                for target in targets.expert_targets():
                    expert_targets.append(target)
            mixture = DenseMixture(
                part=parts[name],
                layer_name=name,
                experts=experts,
                view=MixtureView.of(
                    experts,
                    router_of(layer),
                    activations.assigned_tokens(experts, states.to_prune_on),
                    gradients=gradients.get(name),
                    parts=draw.parts,
                ),
                activations=activations,
                hidden_states=states.to_prune_on,
                targets=expert_targets,
            )
            scores = {
                criterion: CRITERIA[criterion](mixture.view, seed * len(self.layers) + index)
                for criterion in {_scores_of(way) for way in ways}
            }
            if "gradient" in scores:
                gradient_scores[name] = scores["gradient"]
            for way, layers in zip(ways, layers_of_ways, strict=True):
                layers.append(
                    mixture.layer_of_way(
                        way, plans[way.share], scores[_scores_of(way)], is_run=is_pruned
                    )
                )
            del mixture  # its outputs of experts are large, and the next ones are made now

            smaller_layer = None
            if is_pruned:
                (way_layers,) = layers_of_ways
                smaller_layer = way_layers[-1]()
            states = targets.leave(smaller_layer)

        for way, layers in zip(ways, layers_of_ways, strict=True):
            if way.criterion == BY_LAYER:
                plan = plans[way.share]
                num_kept = sum(plan.num_kept[part.name] for part in parts.values())
                kept_of_layers = kept_by_layer(gradient_scores, num_kept, fewest=self._top_k)
                for index, (name, layer) in enumerate(self.layers):
                    if name in parts:
                        layers[index] = partial(without_choosing, layer, kept_of_layers[name])
        return layers_of_ways

    def losses(
        self, held_out: dict[str, Tensor], layers: Sequence[torch.nn.Module] | None = None
    ) -> dict[str, float]:
        """Held-out loss by domain in nats a token, of the model with other decoder `layers`, or of the dense one.

        `held_out` are token ids [windows, length]. The model has its own layers again at the end.
        """
        modules: Any = self.model.get_submodule(self.layers.name)
        own_layers = list(modules)
        try:
            for index, layer in enumerate(layers or own_layers):
                modules[index] = layer
            return {
                domain: math.log(evaluate_perplexity(self.model, ids, progress=False).perplexity)
                for domain, ids in held_out.items()
            }
        finally:
            for index, layer in enumerate(own_layers):
                modules[index] = layer


def _scores_of(way: Way) -> str:
    """The name in `CRITERIA` of the scores by which a way removes experts."""
    return "gradient" if way.criterion == BY_LAYER else way.criterion


def kept_by_layer(
    scores: Mapping[str, Tensor], num_kept: int, fewest: int
) -> dict[str, tuple[int, ...]]:
    """Choose which experts of each layer stay: those with the highest scores of all layers, `num_kept` together.

    `scores` are [experts] by the name of the layer. Each layer keeps at least the `fewest` best of its own.
    """
    kept: dict[str, list[int]] = {}
    # scores of the experts that need not stay, by layer and number
    others: dict[tuple[str, int], float] = {}
    for layer, of_layer in scores.items():
        best_first = of_layer.argsort(descending=True, stable=True).tolist()
        kept[layer] = best_first[:fewest]
        for expert in best_first[fewest:]:
            others[layer, expert] = float(of_layer[expert])
    best_of_others = sorted(others, key=others.__getitem__, reverse=True)
    num_more = num_kept - fewest * len(scores)
    for layer, expert in best_of_others[:num_more]:
        kept[layer].append(expert)
    return {layer: tuple(sorted(experts)) for layer, experts in kept.items()}


def without_choosing(layer: torch.nn.Module, kept: Sequence[int]) -> torch.nn.Module:
    """Copy a decoder layer, whose router can then choose only the experts that are `kept`; weights are shared.

    It returns what a layer without the other experts would, because the weights of a token have a fixed sum.
    """
    copied = deepcopy(layer, {id(weight): weight for weight in layer.parameters()})
    router = router_of(copied)
    holder = getattr(router, "moe_statics", router)  # Ernie keeps the bias in a module of its own
    bias = holder.e_score_correction_bias.detach().clone()
    is_removed = torch.ones_like(bias, dtype=torch.bool)
    is_removed[..., list(kept)] = False
    bias[is_removed] = -1e9
    if isinstance(holder.e_score_correction_bias, torch.nn.Parameter):
        bias = torch.nn.Parameter(bias, requires_grad=False)
    holder.e_score_correction_bias = bias
    return copied


def _same(layer: torch.nn.Module) -> torch.nn.Module:
    """Return the layer."""
    return layer


def windows_of_draw(
    arguments: Namespace, tokenizer: PreTrainedTokenizerBase, calibration: str, seed: int
) -> dict[str, Tensor]:
    """Random windows [sequences, length] of the texts to calibrate on: of one domain, or of all in equal numbers."""
    domains = DOMAINS if calibration == "all" else (calibration,)
    counts = equal_shares(arguments.num_samples, len(domains))
    windows = {}
    for domain, count in zip(domains, counts, strict=True):
        file = text_file(Path(arguments.text_folder), domain, "trained")
        text = load_text(str(file), "calibration")
        windows[domain] = calibration_windows(
            tokenizer, text, count, arguments.sequence_length, seed
        )
    return windows


def measure(arguments: Namespace) -> dict[str, Any]:
    """Measure the rows that the output lacks, and write each at once; returns the record."""
    # Rows of all these go into one file.
    varied = ["shares", "calibrations", "streams", "criteria", "repairs", "seeds"]
    record = open_record(arguments, *varied, "text_folder", "threads")
    rows = record["rows"]
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype, device="cpu")
    removals = Removals(model)
    held_out = {}
    for domain in DOMAINS:
        file = text_file(Path(arguments.text_folder), domain, "held-out")
        held_out[domain] = evaluation_windows(
            tokenizer,
            load_text(str(file), "test"),
            arguments.sequence_length,
            arguments.max_windows,
        )
    if not rows:
        rows.append({"criterion": "dense", "losses": removals.losses(held_out)})
        save(arguments, record)

    @cache
    def draw_of(calibration: str, seed: int) -> Draw:
        """The calibration draw with a seed."""
        windows = windows_of_draw(arguments, tokenizer, calibration, seed)
        return Draw(removals.layers, windows, is_of_several=calibration == "all")

    finished = {tuple(row.get(key) for key in KEYS) for row in rows}
    all_ways = [
        Way(share, criterion, repairs)
        for share, repairs, criterion in product(
            arguments.shares, arguments.repairs, arguments.criteria
        )
    ]
    only_removes = arguments.streams == ["dense"] and arguments.repairs == ["none"]
    if BY_LAYER in arguments.criteria and not only_removes:
        raise SystemExit(f"--criteria {BY_LAYER} needs --streams dense --repairs none.")
    # The seed changes last, so that the rows of earlier seeds are complete when another one begins.
    for seed, stream, calibration in product(
        arguments.seeds, arguments.streams, arguments.calibrations
    ):
        missing = [way for way in all_ways if (stream, calibration, seed, *way) not in finished]
        if not missing:
            continue
        # With the dense model's hidden states all ways see the same, so they are measured together.
        groups = [missing]
        if stream == "pruned":
            groups = [[way] for way in missing]
        for ways in groups:
            draw = draw_of(calibration, seed)
            with torch.no_grad():
                layers_of_ways = removals.remove(draw, ways, stream=stream, seed=seed)
            for way, layers in zip(ways, layers_of_ways, strict=True):
                row: Row = dict(zip(KEYS, (stream, calibration, seed, *way), strict=True))
                row["losses"] = removals.losses(held_out, [make() for make in layers])
                rows.append(row)
                save(arguments, record)
                tqdm.write(json.dumps(row))
    return record


def table(rows: Sequence[Row]) -> list[str]:
    """Write a line for each way: the rise of the loss over the dense model by domain, and as a share of REAP's.

    REAP's is that without a repair, of the same draw. Means are over the draws, with the standard deviation of several.
    """
    dense = rows[0]["losses"]
    rises: dict[tuple[Any, ...], dict[str, float]] = {}  # by the values of `KEYS`
    seeds_of_lines: dict[tuple[Any, ...], list[int]] = {}  # by the other values, without the seed
    for row in rows[1:]:
        stream, calibration, seed, share, criterion, repair = (row[key] for key in KEYS)
        rises[stream, calibration, seed, share, criterion, repair] = {
            domain: loss - dense[domain] for domain, loss in row["losses"].items()
        }
        line = (stream, calibration, share, criterion, repair)
        seeds_of_lines.setdefault(line, []).append(seed)

    lines = []
    # Sorted by hidden states, calibration and share; criteria and repairs are in the order of the rows.
    for line in sorted(seeds_of_lines, key=lambda line: line[:3]):
        stream, calibration, share, criterion, repair = line
        cells = []
        for domain in dense:
            rises_of_draws = []
            shares_of_reap = []
            for seed in seeds_of_lines[line]:
                rise = rises[stream, calibration, seed, share, criterion, repair][domain]
                rises_of_draws.append(rise)
                reap = rises.get((stream, calibration, seed, share, "reap", "none"))
                if reap is not None:
                    shares_of_reap.append(rise / reap[domain])
            cells += [_in_cell(rises_of_draws, ".3f"), _in_cell(shares_of_reap, ".2f")]
        lines.append((*line, len(seeds_of_lines[line]), *cells))
    columns = ["hidden states", "calibration", "removed", "criterion", "repair", "draws"]
    for domain, loss in dense.items():
        columns += [f"{domain}: rise over {loss:.3f}", "of REAP's"]
    return markdown_lines(columns, lines)


def _in_cell(values: Sequence[float], form: str) -> str:
    """The mean of values, and their standard deviation if there are several."""
    if not values:
        return ""
    text = format(mean(values), form)
    if len(values) > 1:
        text += f" ± {format(stdev(values), form)}"
    return text


def main() -> None:
    """Measure the rows that the output lacks, or read those of an earlier call, and print the table."""
    helps = {
        "text_folder": "the folder texts/ of a mixture of mixtures.py",
        "shares": "shares of the experts to remove",
        "calibrations": f"texts to calibrate on: some of {', '.join(DOMAINS)}, all",
        "streams": "whose hidden states a layer sees: pruned, of the smaller layers before it; dense, faster",
        "criteria": f"some of {', '.join(CRITERIA)}, {BY_LAYER}",
        "repairs": f"none, or some of {', '.join(REPAIRS)}, joined by +",
        "seeds": "of the calibration draw",
        "dtype": "of the model's weights",
    }
    arguments = parse_arguments(
        __doc__,
        "model",
        helps=helps,
        text_folder=str,
        shares=["0.25", "0.5"],
        calibrations=["web", "all"],
        streams=["pruned"],
        criteria=[*CRITERIA],
        repairs=["none"],
        seeds=[0],
        num_samples=32,
        sequence_length=512,
        max_windows=16,
        dtype="bfloat16",
        threads=1,
        output=Path("runs/experts.json"),
    )
    file = Path(arguments.model)
    record = json.loads(file.read_text()) if file.is_file() else measure(arguments)
    print("\n".join(table(record["rows"])))


if __name__ == "__main__":
    main()

"""Pruning one decoder layer: from activations to layer problems to pruned weights, group by group."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optimum_fista.model.activation_store import ActivationStore, Storage
from optimum_fista.model.gram import GramAccumulator
from optimum_fista.model.layer_sums import Group
from optimum_fista.model.operator import LinearOperator
from optimum_fista.model.paused import PausedForwards
from optimum_fista.model.residual import is_added_to_output, residual_problem
from optimum_fista.model.statistics import (
    DenseRecord,
    LayerActivations,
    problems_corrected,
    problems_same_input,
    record_dense,
)
from optimum_fista.run.memory.free_memory import release_free_memory
from optimum_fista.run.pruning.pruned_group import PrunedGroup
from optimum_fista.solve.method import PruningMethod
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.problem import LayerProblem
from optimum_fista.solve.pruned import PrunedOperator
from optimum_fista.solve.stacking import prune_stacked


@dataclass
class StarvedRule:
    """What happens to the operators of experts that the router sends few tokens.

    Attributes:
        tokens: Experts that see fewer are starved.
        method: The method that prunes them.
    """

    tokens: int
    method: PruningMethod


@dataclass
class HiddenStates:
    """Hidden states that enter a decoder layer, a batch each.

    Attributes:
        dense: From the dense network; `None` where nothing is corrected, so that they are not needed.
        pruned: From the network as pruned so far; `None` where every layer starts from the dense ones.
    """

    dense: Sequence[Tensor] | None
    pruned: Sequence[Tensor] | None = None

    @property
    def entering(self) -> Sequence[Tensor]:
        """Those that the layer is pruned on."""
        found = self.dense if self.pruned is None else self.pruned
        assert found is not None
        return found

    def move(self, storage: Storage, device: torch.device) -> None:
        """Bring them to another layer's device, and there or to its storage if they were kept on a device before."""
        for stream in (self.dense, self.pruned):
            if isinstance(stream, ActivationStore):
                stream.move(storage, device)


def hidden_state_error(states: HiddenStates, activations: LayerActivations) -> float | None:
    """`|| H* - H ||_F / || H ||_F` over the real tokens that are not held out; `None` where there is only one stream.

    Args:
        states: `H` and `H*` [batch, sequence, hidden], a batch each.
        activations: Says which tokens are real, and which batches are held out.
    """
    if states.dense is None or states.pruned is None:
        return None
    squares = []
    for batch, (dense, pruned) in enumerate(zip(states.dense, states.pruned, strict=True)):
        if activations.is_held_out(batch):
            continue
        wanted, found = (activations.real_tokens(h, batch).float() for h in (dense, pruned))
        norms = [torch.linalg.vector_norm(h) for h in (found - wanted, wanted)]
        squares.append(torch.stack(norms).double().square())
    error, energy = torch.stack(squares).sum(0).tolist()
    return math.sqrt(error / energy) if energy else 0.0


def stored(stream: Sequence[Tensor] | None) -> list[Tensor]:
    """The hidden states of a stream where they are kept; none where there is no stream."""
    return stream.kept() if isinstance(stream, ActivationStore) else list(stream or [])


class LayerPruning:
    """Prunes the groups of a decoder layer in execution order.

    Attributes:
        method: The pruning method.
        pattern_for: Sparsity pattern by operator name.
        error_correction: `"none"`, `"intra"`, `"full"`, or the share of the dense inputs in the targets.
        residual_share: Share of the error of the rest of the decoder layer that its last operator is to make up for.
        output_weights: Weights of the outputs, [out], of operators that share the zeros of their group.
        starved: The rule for starved experts; `None`: they are pruned like the others.
        keeps_dense: Whether the dense hidden states are needed behind the layer even where nothing is corrected.
        write: Called with an operator and its pruned weights before anything behind it runs.
    """

    def __init__(
        self,
        method: PruningMethod,
        pattern_for: Callable[[str], SparsityPattern],
        error_correction: str | float,
        write: Callable[[LinearOperator, PrunedOperator], None],
        residual_share: float = 0.0,
        output_weights: Mapping[str, Tensor] | None = None,
        starved: StarvedRule | None = None,
        keeps_dense: bool = False,
    ) -> None:
        self.method = method
        self.pattern_for = pattern_for
        self.error_correction = error_correction
        self._carries_on = error_correction == "full" or not isinstance(error_correction, str)
        self._dense_share = 1.0 if isinstance(error_correction, str) else float(error_correction)
        self.write = write
        self.residual_share = residual_share
        self.output_weights = output_weights or {}
        self.starved = starved
        self.keeps_dense = keeps_dense

    def enter(self, hidden_states: Sequence[Tensor]) -> HiddenStates:
        """The hidden states that enter the first decoder layer, in the streams that are needed."""
        if not self._carries_on:
            return HiddenStates(hidden_states)
        return HiddenStates(hidden_states if self._corrects or self.keeps_dense else None, hidden_states)

    def prune(
        self, activations: LayerActivations, groups: Sequence[Group], states: HiddenStates
    ) -> Generator[PrunedGroup]:
        """Prune the layer in place and replace `states` by the hidden states behind it.

        Yields:
            Every group once it is pruned and written.
        """
        sees_dense = [self._sees_dense_input(index) for index in range(len(groups))]
        outputs, records = None, [DenseRecord(False) for _ in groups]
        grams: list[GramAccumulator | None] = [None for _ in groups]
        if states.dense is not None and (self._corrects or not self._carries_on):
            outputs, records, grams = record_dense(activations, groups, states.dense, sees_dense)
        elif states.dense is not None:
            outputs, _, _ = record_dense(activations, [], states.dense, [])
        for index, group in enumerate(groups):
            gram, grams[index] = grams[index], None
            if gram is not None:
                yield self._solve(group, problems_same_input(group, gram), records[index])
        corrected = [index for index, seen in enumerate(sees_dense) if not seen]
        stops = [groups[index][0].module for index in corrected]
        waiting = activations.storage
        with PausedForwards(activations.layer, stops, activations.calls, states.entering, waiting) as forwards:
            for stop, index in enumerate(corrected):
                if outputs is not None and self._corrects_residual(activations, groups, index, states):
                    yield self._last(activations, groups[index], records[index], outputs, forwards, stop, states)
                    break
                given = activations, groups[index], records[index], forwards.inputs(stop), self._dense_share
                # no name for the problems: it would keep them while those of the next group are made
                yield self._solve(groups[index], problems_corrected(*given), records[index])
            else:
                if states.pruned is not None:
                    left = activations.store()
                    for output in forwards.outputs():
                        left.append(output)
                    states.pruned = left
        states.dense = outputs

    def pass_on(self, activations: LayerActivations, states: HiddenStates) -> None:
        """Replace the dense hidden states by those behind the layer, which stays dense."""
        assert states.dense is not None
        states.dense, _, _ = record_dense(activations, [], states.dense, [])

    def _corrects_residual(
        self, activations: LayerActivations, groups: Sequence[Group], index: int, states: HiddenStates
    ) -> bool:
        """Whether a group is the last of its layer, a single operator whose output is added to the layer's."""
        last = self.residual_share > 0 and index == len(groups) - 1 and len(groups[index]) == 1
        return last and is_added_to_output(activations, groups[index][0], states.entering[0])

    def _last(
        self,
        activations: LayerActivations,
        group: Group,
        record: DenseRecord,
        outputs: Sequence[Tensor],
        forwards: PausedForwards,
        stop: int,
        states: HiddenStates,
    ) -> PrunedGroup:
        """Prune the last operator against the decoder layer's output."""
        made = residual_problem(
            activations,
            group[0],
            record,
            outputs,
            forwards,
            stop,
            dense_share=self._dense_share,
            residual_share=self.residual_share,
            keep=states.pruned is not None,
        )
        pruned = self._solve(group, [made.problem], record)
        pruned.residual_corrected = True
        if states.pruned is not None:
            states.pruned = made.outputs(activations, group[0])
        return pruned

    @property
    def _corrects(self) -> bool:
        """Whether operators aim at anything that only the dense stream shows."""
        return self._dense_share > 0 or self.residual_share > 0

    def _sees_dense_input(self, index: int) -> bool:
        """Whether X* = X for a group: always without correction, for the first group with "intra"."""
        return self.error_correction == "none" or (self.error_correction == "intra" and index == 0)

    def _solve(self, group: Group, problems: Sequence[LayerProblem], record: DenseRecord) -> PrunedGroup:
        patterns = [self.pattern_for(operator.name) for operator in group]
        method, message = self._method(group, problems[0].statistics.num_tokens)
        release_free_memory()
        started = time.perf_counter()
        if not message and all(operator.name in self.output_weights for operator in group):
            weights = [self.output_weights[operator.name] for operator in group]
            pruned = prune_stacked(method, problems, patterns, weights)
            patterns = [replace(p, sparsity=q.sparsity) for p, q in zip(patterns, pruned, strict=True)]
        else:
            pruned = method.prune_sharing(problems, patterns)
            pruned = [replace(p, message=message or p.message) for p in pruned]
        if problems[0].weight.device.type != "cpu":
            torch.accelerator.synchronize(problems[0].weight.device)
        seconds = time.perf_counter() - started
        finite = torch.stack([torch.isfinite(result.weight).all() for result in pruned]).tolist()
        for operator, pattern, result, is_finite in zip(group, patterns, pruned, finite, strict=True):
            broken = pattern.violation(result.mask)
            if broken or not is_finite:
                raise RuntimeError(
                    f"method {method.name!r} failed on {operator.name}: {broken or 'weights hold NaN or Inf'}."
                )
            result.weight.masked_fill_(~result.mask, 0.0)  # no -0.0
            self.write(operator, result)
        return PrunedGroup(group, problems, pruned, patterns, method.name, seconds, record.take_held_out())

    def _method(self, group: Group, num_tokens: int) -> tuple[PruningMethod, str]:
        """The method for a group, and what to say where it is not the usual one."""
        if self.starved is None or group[0].tokens is None or num_tokens >= self.starved.tokens:
            return self.method, ""
        method = self.starved.method
        return method, f"starved expert: {num_tokens} calibration tokens reached it, so {method.name} pruned it"

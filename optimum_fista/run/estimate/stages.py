"""What a run computes, moves and reads, by stage."""

from __future__ import annotations

import numpy as np

from optimum_fista.model.expert_removal import ROUNDS
from optimum_fista.model.held_out import LEAST_TOKENS
from optimum_fista.run.estimate.planned_run import PlannedRun
from optimum_fista.run.estimate.work import CALL, LAYER_CALL, work
from optimum_fista.run.texts.self_sampling import num_batches, num_texts

_LAYER_SECONDS = 0.25
"""What Python takes for each decoder layer, most of it to look for unused objects; measured on a CPU."""
_CARD_SECONDS = 1.5
"""What the model card and its picture take, with the import that draws it; measured on a CPU."""
_CALLS = 40
"""Calls of PyTorch that add a batch to the sums of a group and read it, for each network that it is seen in."""
_WATCHED = 36
"""Those that see an operator on a sequence, forwards and backwards, to add up how the loss feels it."""
_BROUGHT = 4e-4
"""Seconds that Accelerate takes to bring one tensor of a checkpoint and to take it away; measured on a CPU."""
_SWEEP = 8
"""Bytes of a float32 that is read and written."""
_LOGIT = 14
"""Bytes moved for a logit: it becomes float32, and log-softmax reads and writes it."""
_LOGIT_GRADIENT = 34
"""Bytes moved for its gradient, back through both, the choice of the next token, and that of the tokens with a loss."""


def work_by_stage(run: PlannedRun) -> dict[str, np.ndarray]:
    """Work by stage."""
    config, names = run.config, ("calibration text", "allocation", "forward passes", "statistics", "solving")
    stages = {name: work() for name in (*names, "files and Python")}
    head = 2.0 * run.vocabulary * run.hidden
    if run.samples_itself:  # a token at a time, all weights read for each
        every = sum(kind.count * 2 * kind.num_active for kind in run.shapes.kinds) + head
        steps = -(-run.length // num_texts(run.length)) * num_batches(run.num_sampled)
        stages["calibration text"] = work(
            every * run.length * run.num_sampled,
            moved_bytes=steps * run.weight_bytes,
            python=steps * run.num_layers * LAYER_CALL,
        )
    first = min(run.tokens, -(-config.allocation_tokens // run.length) * run.length)
    gradients = run.differentiates * first
    # To choose decoder layers, each round tries the model without each of them; all run half of it on average.
    tried = first * sum(run.num_layers + 1 - done for done in range(run.rounds))
    stages["forward passes"] += _loss(run, 2 * LEAST_TOKENS * bool(run.num_unseen))
    stages["allocation"] = _loss(run, gradients, gradients=True) + _loss(run, tried)
    for kind in run.shapes.kinds:
        # A token's forward pass: products with weights, and all around them. Attention (half of all pairs of
        # tokens) is half as fast as products, and its softmax reads and writes scores in float32 on a CPU.
        products = work(2 * kind.num_active)
        around = work(4 * run.length * run.hidden, python=LAYER_CALL / run.batch)
        around += work(moved_bytes=8 * run.heads * run.length * run.on_cpu)
        for g in (g for g in kind.groups if not g.of_expert):  # norms and rotations are float32 in any model
            moved = (6 + 1.75 * run.value) * (g.outputs + g.columns)
            around += _moved(run, moved, run.value * run.batch * max(*g.rows, g.columns))
        token = products + around
        # In the pruned network, what is not pruned is taken to run once.
        again = float(any(g.passes for g in kind.groups))
        more = sum((g.passes - again) * n * g.outputs * g.columns * g.share for g, n in kind.groups.items())
        passes = run.records + again + more / kind.num_active
        unseen = 2 * LEAST_TOKENS * bool(run.num_unseen)
        stages["forward passes"] += token * (kind.count * (run.tokens * passes + 3 * run.batch + unseen))
        # Gradients: forwards, again, and backwards, which takes twice as long but for products with weights.
        backwards = (3 * products + 4.5 * around) * gradients
        bringing = 2 * gradients / run.length * kind.num_tensors * _BROUGHT * (not run.whole)
        stages["allocation"] += kind.count * (backwards + token * (tried / 2) + work(python=bringing))
        for g, count in kind.groups.items():
            times, tokens, square = kind.count * count, run.tokens * g.share, float(g.columns) ** 2
            # Its operators are watched: all that is seen of them becomes float32, twice; inputs are squared,
            # multiplied and added up, gradients squared and multiplied.
            seen, converted = len(g.rows) * g.columns, 2 * (run.value + 4) * (run.value < 4)
            moved = gradients * g.share * (16 * seen + 12 * g.outputs + converted * (seen + g.outputs))
            calls = gradients / run.length * _WATCHED * len(g.rows)
            stages["allocation"] += times * (_moved(run, moved, 4 * run.length * g.columns) + work(python=calls * CALL))
            sums = tokens * square  # half of each product of a Gram matrix is formed
            if not g.sees_dense and (run.corrects or g.last):
                sums += 2 * tokens * g.columns * (g.outputs if g.last else min(g.outputs, g.columns))
            problems = 2 * g.outputs * square * (2 - g.sees_dense) * (1 + bool(config.held_out))
            moved = tokens * (12 * g.columns + (0 if g.sees_dense else 24 * g.outputs))
            stages["statistics"] += times * _moved(run, moved, 4 * run.batch * g.columns)
            moved = 10 * _SWEEP * (square + g.outputs * g.columns)
            stages["statistics"] += times * _moved(run, moved, 4 * square)
            calls = _CALLS * (2 - g.sees_dense) * run.tokens / run.batch
            stages["statistics"] += times * work(products=sums + problems, python=calls * CALL)
            stages["solving"] += run.solved(g)[0] * times
        mixture = kind.mixture
        if mixture is not None:  # with all experts, with those that stay, and once they are refitted
            stages["forward passes"] += token * (kind.count * 3 * run.tokens)
            experts, square = kind.count * mixture.number * run.refits, float(mixture.columns) ** 2
            sums = run.tokens * mixture.share * (square + 8 * mixture.rows * mixture.columns)
            once = square * mixture.columns / 3 + 4 * mixture.rows * square
            fits = 6 * once  # on both halves and on all, twice each
            stages["statistics"] += work(products=ROUNDS * experts * sums)
            stages["solving"] += work(products=ROUNDS * experts * fits)
        sweeps = kind.count * _SWEEP * sum(count * g.outputs * g.columns for g, count in kind.groups.items())
        stages["allocation"] += work(moved_bytes=run.allocates * 24 * sweeps)
        layer = work(file_bytes=2 * kind.num_bytes + run.streams_bytes, python=_LAYER_SECONDS)
        stages["files and Python"] += layer * kind.count
    stages["files and Python"] += work(python=_CARD_SECONDS)
    stages["allocation"] += work(python=_LAYER_SECONDS * bool(gradients + tried))
    return {name: amount for name, amount in stages.items() if amount.any()}


def _moved(run: PlannedRun, amount: float, block: float) -> np.ndarray:
    """Work of operations that move so many bytes and make blocks of so many."""
    return work(large_bytes=amount) if block >= run.large_block else work(moved_bytes=amount)


def _loss(run: PlannedRun, tokens: float, gradients: bool = False) -> np.ndarray:
    """Work of the head and of the loss, a sequence at a time."""
    moved = _moved(run, (_LOGIT + gradients * _LOGIT_GRADIENT) * run.vocabulary, 4 * run.vocabulary * run.length)
    return tokens * (work(2.0 * (1 + gradients) * run.vocabulary * run.hidden) + moved)

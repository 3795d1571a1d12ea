"""Choose the decoder layers to remove, by the loss of the model without them.

SLEB (arXiv 2402.09025) runs a whole model for every candidate. Here all candidates of a round share one sweep: a
decoder layer is brought to its device once, and runs on the hidden states of each candidate, which take memory.
"""

import math
from collections.abc import Sequence

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.inputs import record_inputs
from optimum_fista.model.offload import execution_device, onloaded
from optimum_fista.model.sensitivity import DenseLoss
from optimum_fista.model.sweep import Sweep
from optimum_fista.removal.shrinking import plan_shrinking, require_same_outputs


def choose_layers(loss: DenseLoss, count: int) -> list[tuple[int, float]]:
    """Choose decoder layers to remove, as SLEB does (arXiv 2402.09025, Algorithm 1).

    In every round, each remaining layer is left out once. The layer without which the loss is smallest is removed,
    unless no configuration describes the model without it. A round costs about as many forward passes as half of the
    layers: a layer runs on the hidden states of the model as it is, and of all models that lack one layer before it.

    Returns the numbers of the layers in the order of their removal, each with the loss after it, in nats per token.
    """
    layers, model = loss.layers, loss.layers.model
    sequences = loss.sequences()
    if not sequences:
        raise ValueError(
            "calib_dataloader holds no sequence of two tokens, so there is no loss: pass longer ones."
        )
    recorded = record_inputs(layers, sequences, loss.storage)
    if recorded.handed_on:
        why = f"the decoder layers of {type(model).__name__} pass more than hidden states to the next one"
        raise UnsupportedArchitectureError(f"{why}, so none can be removed: use another pattern.")
    # What a model adds between two layers depends on how many layers came before, so these all stay.
    last = max(
        (i for i, calls in enumerate(recorded.calls) if any(call.added for call in calls)),
        default=-1,
    )
    left, removed = list(range(len(layers))), list[tuple[int, float]]()
    num_runs = sum(len(layers) - done for done in range(count))
    with (
        tqdm(
            total=num_runs, desc="Choosing decoder layers", unit="layer", disable=not loss.progress
        ) as bar,
        onloaded([*layers.around, model.get_output_embeddings()], copy=False),
    ):
        for _ in range(count):
            losses = Sweep(layers, left, sequences, loss.storage, recorded.rest, last + 1).losses(
                recorded, bar
            )
            if not math.isfinite(losses.pop(None)):
                raise ValueError(
                    "the loss of the model on the calibration tokens is NaN or Inf: the model is damaged."
                )
            index = _cheapest(model, left, losses)
            left.remove(index)
            removed.append((index, losses[index]))
            bar.set_postfix_str(
                f"loss {losses[index]:.4f} without {', '.join(str(i) for i, _ in removed)}"
            )
    moved = [old for new, old in enumerate(left) if new != old]
    if moved:  # prove that the first layer with a new number still returns the same
        layer, call, plan = (
            layers.modules[moved[0]],
            recorded.calls[moved[0]][0],
            plan_shrinking(model, layers=left),
        )
        hidden = recorded.hidden_states.kept()[0].to(execution_device(layer))
        with onloaded(layer.modules(), copy=False):
            require_same_outputs(
                plan,
                f"{layers.name}.{moved[0]}",
                layer,
                {},
                lambda module: call.run(module, hidden),
            )
    return removed


def _cheapest(model: PreTrainedModel, left: Sequence[int], losses: dict[int | None, float]) -> int:
    """Find the layer without which the loss is smallest, if a configuration describes the model without it.

    The last layer of its kind stays, such as the only attention layer between state-space layers: caches need one.
    """
    refused, candidates = (
        ValueError("the model adds features of images there"),
        [i for i in left if i in losses],
    )
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or [None] * (
        max(left) + 1
    )
    # A loss that is not finite counts as the largest.
    for index in sorted(
        candidates, key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf
    ):
        try:
            if kinds[index] is not None and [kinds[i] for i in left].count(kinds[index]) == 1:
                raise ValueError(
                    f"decoder layer {index} is the last of its kind ({kinds[index]}): remove fewer"
                )
            plan_shrinking(model, layers=[i for i in left if i != index])
            return index
        except ValueError as error:
            refused = error
    raise ValueError(
        f"none of the decoder layers {list(left)} can be removed: {refused}"
    ) from refused

"""Choose the decoder layers to remove, by the loss of the model without them.

SLEB (arXiv 2402.09025) runs a whole model for every candidate. Here all candidates of a round share one sweep: a
decoder layer is brought to its device once, and runs on the hidden states of each candidate, which take memory.

`layers_with_least_loss` is called once, before the first decoder layer is pruned. The *outline*
(`model_outline.ModelOutline`) has the model, and a copy of it without weights that is built from the configuration.
`RecordedInputs` has the hidden states that enter the first decoder layer in every batch, and the other arguments of all
layers.
"""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from optimum_fista.bars import tqdm
from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.inputs import RecordedInputs, record_inputs
from optimum_fista.model.offload import execution_device, onloaded
from optimum_fista.model.sensitivity import DenseLoss
from optimum_fista.model.sweep import Sweep
from optimum_fista.removal.model_outline import ModelOutline
from optimum_fista.removal.proof import require_same_outputs
from optimum_fista.removal.shrinking import plan_shrinking


def layers_with_least_loss(
    loss: DenseLoss, outline: ModelOutline, count: int
) -> list[tuple[int, float]]:
    """Choose `count` decoder layers to remove, as SLEB does (arXiv 2402.09025, Algorithm 1).

    In every round, each remaining layer is left out once. The layer without which the loss is smallest is removed,
    unless no configuration describes the model without it. A round costs about as many forward passes as half of the
    layers: a layer runs on the hidden states of the model as it is, and of all models that lack one layer before it.

    `loss` has the model and the sequences to measure on, and `outline` is that of its model. The model runs, and is not
    changed: no layer is taken out yet. The outline keeps what it finds out.

    Returns the numbers of the layers in the order of their removal, each with the loss after it, in nats per token.
    """
    layers = loss.layers
    sequences = loss.sequences()
    if not sequences:
        raise ValueError(
            "calib_dataloader holds no sequence of two tokens, so there is no loss: pass longer ones."
        )
    recorded = record_inputs(layers, sequences, loss.storage)
    if recorded.layers_pass_more:
        raise UnsupportedArchitectureError(
            f"the decoder layers of {type(layers.model).__name__} pass more than hidden states to the next one, so "
            "none can be removed: use a pattern that removes no layers, such as '2:4'."
        )
    first = _first_removable(recorded)

    # Each round runs the remaining layers once (`Sweep`), and removes one.
    remaining = list(range(len(layers)))
    removed = list[tuple[int, float]]()
    num_runs = sum(len(layers) - num_removed for num_removed in range(count))  # of a decoder layer
    progress = tqdm(
        total=num_runs, desc="Choosing decoder layers", unit="layer", disable=not loss.progress
    )
    # Modules outside of the decoder layers, which stay on their device during all rounds.
    outside = [*layers.around, layers.model.get_output_embeddings()]
    with progress as bar, onloaded(outside, read_only=True):
        for _ in range(count):
            sweep = Sweep(
                layers=layers,
                remaining=remaining,
                sequences=sequences,
                storage=loss.storage,
                returned_besides=recorded.returned_besides,
                first=first,
            )
            losses = sweep.losses(recorded, bar)  # by the layer that is left out; None: no layer
            loss_of_all = losses.pop(None)
            if not math.isfinite(loss_of_all):
                raise ValueError(
                    "the loss of the model on the calibration tokens is NaN or Inf: the model is damaged, or "
                    "overflows its dtype. Load or download it again, or load it in float32 (--dtype float32)."
                )
            index = _cheapest_layer(outline, remaining, losses)  # type: ignore[arg-type]
            remaining.remove(index)
            removed.append((index, losses[index]))
            numbers = ", ".join(str(number) for number, _ in removed)
            bar.set_postfix_str(f"loss {losses[index]:.4f} without {numbers}")

    _prove_renumbered(outline, remaining, recorded)
    return removed


def _first_removable(recorded: RecordedInputs) -> int:
    """Find the number of the first decoder layer that can be removed. Changes nothing.

    `recorded.calls[layer][batch]` has the arguments of a layer, and what the model adds to the hidden states that enter
    it (`added`, such as features of images; `None`: nothing). What it adds between two layers depends on how many
    layers came before, so these stay.
    """
    first = 0
    for index, calls in enumerate(recorded.calls):
        if any(call.added for call in calls):  # before this layer, in any batch
            first = index + 1
    return first


def _cheapest_layer(
    outline: ModelOutline, remaining: Sequence[int], losses: Mapping[int, float]
) -> int:
    """Find the layer without which the loss is smallest, among those that can be removed.

    A configuration must be able to describe the model without the layer. Returns its number; ValueError if there is
    none. `remaining` are the numbers of the layers that the model still has. `losses` are those of the model without
    one of them, by the number of the layer; layers that can't be removed have no loss. Nothing is removed here; the
    outline keeps what it finds out.
    """
    if not losses:
        raise ValueError(
            f"none of the decoder layers {list(remaining)} can be removed: the model adds features of images there. "
            "Ask for fewer layers, or pass another pattern, such as 'channels:0.2'."
        )

    def cost(index: int) -> float:
        """The loss without the layer with this number (`losses`); one that is not finite counts as the largest."""
        return losses[index] if math.isfinite(losses[index]) else math.inf

    refusal: ValueError | None = None  # of the latest layer that can't be removed
    for index in sorted(losses, key=cost):
        try:
            _require_removable(outline, remaining, index)
            return index
        except ValueError as error:
            refusal = error
    raise ValueError(
        f"none of the decoder layers {list(remaining)} can be removed: {refusal}"
    ) from refusal


def _require_removable(outline: ModelOutline, remaining: Sequence[int], index: int) -> None:
    """Refuse to remove the decoder layer with the number `index` if no configuration describes the model without it.

    `remaining` are the numbers of the layers that the model still has. The last layer of its kind stays, such as the
    only attention layer between state-space layers: caches need one. Nothing is removed here.
    """
    # of all layers of the model, such as "full_attention"
    kinds: Sequence[str] | None = getattr(outline.text_config, "layer_types", None)
    if kinds:
        kind = kinds[index]
        number_of_kind = [kinds[other] for other in remaining].count(kind)
        if number_of_kind == 1:
            raise ValueError(
                f"decoder layer {index} is the last of its kind ({kind}): remove fewer"
            )
    # raises ValueError, too
    plan_shrinking(outline, layers=[other for other in remaining if other != index])


def _prove_renumbered(
    outline: ModelOutline, remaining: Sequence[int], recorded: RecordedInputs
) -> None:
    """Prove that the first decoder layer that gets a new number still returns the same.

    Something in a layer may depend on its number, which shapes do not show. Two copies of the layer run: one with its
    old number, and one with its new number in the smaller configuration. If the first such layer returns the same, the
    number does not matter, so the others are not tried. Raises UnsupportedArchitectureError if the outputs differ.

    `remaining` are the numbers of the layers that stay, rising. `recorded` has the arguments of all layers, and the
    hidden states that enter the first layer. Any hidden states will do for a proof, so the copies run on these. While
    they run, the layer is on its device; nothing stays changed.
    """
    renumbered = [old for new, old in enumerate(remaining) if new != old]
    if not renumbered:  # the last layers were removed
        return
    index = renumbered[0]
    layer = outline.layers.modules[index]
    calls_of_batches = recorded.calls[index]  # the other arguments of the layer
    call = calls_of_batches[0]
    hidden_of_first_batch = recorded.hidden_states.stored_tensors()[0].to(execution_device(layer))

    def run(module: nn.Module) -> Tensor:
        """Run a copy of the layer on `hidden_of_first_batch` [batch, tokens, hidden], with the arguments of `call`."""
        return call.run(module, hidden_of_first_batch)

    with onloaded(layer.modules(), read_only=True):
        require_same_outputs(
            plan=plan_shrinking(outline, layers=remaining),
            name=f"{outline.layers.name}.{index}",
            module=layer,
            kept={},  # no part loses groups, only layers go
            run=run,
        )

"""Proofs, on numbers, that a smaller module computes the same as the whole one with zeros in what is removed.

Shapes don't show whether rows are in another order, or whether something depends on the number of the decoder layer or
on all channels or heads together (a norm without weights, slopes computed from the number of heads). Two runs on the
same hidden states do.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.removal.shrinking import Kept, Shrinking
from optimum_fista.removal.smaller_modules import copied, smaller_copy, tensors_of


def require_same_outputs(
    plan: Shrinking,
    name: str,
    module: nn.Module,
    kept: Kept,
    run: Callable[[nn.Module], Tensor],
) -> None:
    """Prove that a module returns the same without the removed groups as with zeros in their columns.

    `module` is a decoder layer or a whole model (name "") in memory that loses no experts; it is not changed. `kept`
    are the groups that stay (any will do for a proof). `run` calls the module that it is given, and returns the output
    [batch, tokens, hidden or vocabulary].

    Raises:
        UnsupportedArchitectureError: If the outputs differ by more than rounding, or the smaller module does not run.
    """
    zeroed = dict[str, Tensor]()
    for full_name, tensor in tensors_of(module, name):
        part = plan.part_of(full_name)
        if part is not None and full_name == f"{part.name}.weight":
            zeroed[full_name] = part.without_columns(tensor.detach(), kept[part.name])
    small = smaller_copy(plan, name, module, kept)

    shown_name = name or type(module).__name__
    with torch.no_grad():
        expected = run(copied(module, name, zeroed))
        try:
            output = run(small)
        except RuntimeError as error:
            raise UnsupportedArchitectureError(
                f"{shown_name} does not run without the removed groups: {error}"
            ) from error
    difference = difference_beyond_rounding(output, expected)
    if difference is not None:
        raise UnsupportedArchitectureError(
            f"{shown_name} does not return the same without the removed groups as with zeros in their columns "
            f"(relative difference {difference:.1e}): something in it depends on all groups together or on the number "
            "of the decoder layer, or its rows are in another order. Use another pattern for this model."
        )


def difference_beyond_rounding(output: Tensor, expected: Tensor) -> float | None:
    """The relative difference of hidden states [batch, tokens, hidden]; `None` if rounding explains it."""
    # token by token: the hidden states of a few are a thousand times as large as those of others
    sizes = expected.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    differences = (output.float() - expected.float()).norm(dim=-1) / sizes
    difference = float(differences.square().mean().sqrt())
    rounding = min(100 * torch.finfo(expected.dtype).eps, 2e-2)
    return None if difference <= rounding else difference


def small_hidden_states(hidden_states: Tensor) -> Tensor:
    """Make hidden states small: in 16 bits, the rounding of large ones hides what attention and MLP add."""
    hidden_size = hidden_states.shape[-1]
    directions = nn.functional.normalize(hidden_states.float(), dim=-1)
    return (directions * (0.01 * hidden_size**0.5)).to(hidden_states.dtype)

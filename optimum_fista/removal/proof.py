"""Proofs, on numbers, that a smaller module computes the same as the whole one with zeros in what is removed.

The *plan* of a smaller model is a `Shrinking`: it says which tensors become smaller. Each of them belongs to a *part*:
columns of one linear operator in groups (channels, heads), with the rows that compute them.

Shapes don't show whether rows are in another order, or whether something depends on the number of the decoder layer or
on all channels or heads together (a norm without weights, slopes computed from the number of heads). Two runs on the
same hidden states do.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from optimum_fista.memory import is_out_of_memory
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

    Args:
        plan: Says which tensors become smaller. It removes no experts of this module.
        name: The name of the module in the model, such as "model.layers.3"; "" for the whole model.
        module: A decoder layer or a whole model, in memory. It is not changed: copies of it run.
        kept: Numbers of the groups that stay, by the name of their part; any will do for a proof.
        run: Calls the copy that it is given, and returns the output [batch, tokens, hidden or vocabulary].

    Raises:
        UnsupportedArchitectureError: If the outputs differ by more than rounding, or the smaller module does not run.
        torch.OutOfMemoryError, RuntimeError: If there is no memory for the proof.
    """
    zeroed = dict[str, Tensor]()
    for full_name, tensor in tensors_of(module, name):
        # a tensor of the same shape, with zeros in the columns of the groups that do not stay
        with_zeros = plan.with_zeros(full_name, tensor.detach(), kept)
        if with_zeros is not None:  # other tensors of a part lose rows
            zeroed[full_name] = with_zeros
    small = smaller_copy(plan, name, module, kept)

    shown_name = name if name else type(module).__name__
    with torch.no_grad():
        # a copy of the module that shares its tensors, except those in `zeroed`
        expected = run(copied(module, name, zeroed))
        try:
            output = run(small)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise  # this says nothing of the module: smaller batches may fit
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
    """Measure the relative difference of two outputs [batch, tokens, hidden]; `None` if rounding explains it."""
    # token by token: the hidden states of a few are a thousand times as large as those of others. No size is 0, because
    # it is divided by.
    sizes = expected.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    differences = (output.float() - expected.float()).norm(dim=-1) / sizes
    difference = float(differences.square().mean().sqrt())
    # what rounding explains: a hundred times that of one number, but at most 2 %
    rounding = min(100 * torch.finfo(expected.dtype).eps, 2e-2)
    return None if difference <= rounding else difference


def scaled_down(hidden_states: Tensor) -> Tensor:
    """Copy hidden states [..., hidden] in the same shape, with small values: a root mean square of 0.01 for each token.

    In 16 bits, the rounding of large values hides what attention and MLP add.
    """
    hidden_size = hidden_states.shape[-1]
    # of norm 1, so the root mean square of their values is 1 / sqrt(hidden size)
    directions = nn.functional.normalize(hidden_states.float(), dim=-1)
    return (directions * (0.01 * hidden_size**0.5)).to(hidden_states.dtype)

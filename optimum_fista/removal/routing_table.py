"""Tables that send tokens to experts, and what becomes of such a table if experts are removed.

Most routers of mixtures choose experts by the hidden state of a token. Others read them from a *routing table*: a
buffer of whole numbers [vocabulary, k], whose row for a token id names the k experts that such a token is sent to
(DeepSeek-V4 in its first decoder layers). The router's weights still depend on the hidden state.

The entries of a removed expert get other experts, its *substitutes*. `substitutes.choose_substitutes` finds them, and
`KeptExperts` holds them. `repointed` is all that happens to the table: so a run in memory, a run from files, and the
comparison with the dense model change it in the same way.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class KeptExperts(tuple[int, ...]):
    """Numbers of the experts that stay in a mixture, rising, with the substitutes of the others.

    It is used as the plain tuple of these numbers wherever the kept groups of a part are asked for; only a routing
    table needs the substitutes.

    Attributes:
        substitutes: Of each removed expert, in the order of their numbers: the experts that may take its place, the
            best one first. All are numbers in the dense model, of experts that stay.
    """

    substitutes: Sequence[Sequence[int]]

    def __new__(
        cls, numbers: Iterable[int], substitutes: Sequence[Sequence[int]] = ()
    ) -> "KeptExperts":
        """Make the tuple of `numbers`, which are rising, and note the `substitutes` of the other experts."""
        kept = super().__new__(cls, numbers)
        kept.substitutes = substitutes
        return kept


def removed_experts(num_experts: int, kept: Sequence[int]) -> list[int]:
    """Return the numbers of the experts that are removed, rising, if only those in `kept` stay of `num_experts`."""
    return sorted(set(range(num_experts)).difference(kept))


def repointed(table: Tensor, num_experts: int, kept: Sequence[int]) -> Tensor:
    """Copy a routing table for a mixture that keeps only the experts `kept`, with their new numbers; same dtype.

    Entries of kept experts stay with them. The others of a row are filled from left to right: each gets the best
    substitute that the row does not name yet, because the mixture would count an expert twice that a row names twice.
    With as many substitutes as a row has entries, there always is one.

    Args:
        table: Whole numbers [vocabulary, k], from 0 to `num_experts - 1`. It is not changed, and may be on the meta
            device.
        num_experts: How many experts the mixture has now.
        kept: Numbers of the experts that stay, rising. If they are no `KeptExperts` that name substitutes, the kept
            experts themselves are the substitutes, in the order of their numbers.
    """
    removed = removed_experts(num_experts, kept)
    substitutes: Sequence[Sequence[int]] = [kept] * len(removed)
    if isinstance(kept, KeptExperts) and kept.substitutes:
        substitutes = kept.substitutes
    device = table.device
    is_removed = torch.zeros(num_experts, dtype=torch.bool, device=device)
    is_removed[removed] = True
    new_numbers = torch.zeros(num_experts, dtype=torch.int64, device=device)
    new_numbers[list(kept)] = torch.arange(len(kept), device=device)

    # Column c has the substitute number c of each removed expert. Rows of kept experts are never used.
    num_choices = min((len(choices) for choices in substitutes), default=0)
    candidates = torch.zeros(num_experts, num_choices, dtype=torch.int64, device=device)
    for expert, choices in zip(removed, substitutes, strict=True):
        candidates[expert] = torch.tensor(choices[:num_choices], device=device)

    rows = table.long()
    result = rows.clone()  # with the old numbers
    for column in range(rows.shape[1]):
        old = rows[:, column]
        is_open = is_removed[old]  # entries that still need an expert
        for choice in range(num_choices):
            substitute = candidates[old, choice]
            is_named_already = (result == substitute[:, None]).any(dim=1)
            takes_it = is_open & ~is_named_already
            result[:, column] = torch.where(takes_it, substitute, result[:, column])
            is_open = is_open & ~takes_it
    return new_numbers[result].to(table.dtype)

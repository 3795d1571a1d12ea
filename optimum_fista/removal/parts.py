"""Parts that a model can lose as a whole: channels of MLPs and experts, heads of attention, experts of mixtures.

A `Part` belongs to one decoder layer, and consists of *groups* that can be removed one by one: single channels, a
key-value head with its query heads, or single experts. The part of a linear operator has columns of its weight, and
the rows of other operators that compute their inputs. The part of a mixture has an entry of each tensor for an expert.
Every expert may lose channels of its own ("expert_channels"): then it is a part itself, although it has its matrices in
the tensors of its mixture. `Parts` are all parts of one kind in a model; `model_outline.ModelOutline` finds them.

A configuration states the number of parts by one of its *words*, such as "num_attention_heads". *Overrides* are its
settings of single decoder layers (`layer_overrides`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from optimum_fista.removal.layer_overrides import Overrides, scaled
from optimum_fista.removal.routing_table import repointed

Kind = Literal["channels", "expert_channels", "heads", "experts"]


class GroupAxis(NamedTuple):
    """Where a tensor has the groups of a part, or if the part is an expert, its own matrix in the tensor."""

    axis: int
    repeats: int  # how often all groups are on the axis: twice if a gate and an up projection are one matrix


@dataclass(frozen=True)
class Part:
    """Groups of columns of a linear operator that can be removed, with the rows that compute their inputs.

    The groups of a mixture are its experts, not columns, and `name` is that of the module that holds them. If `expert`
    is set, the operator is the down projection of this expert, and the groups are its channels. Then each of `tensors`
    has the matrices of all experts, which are parts of their own, one after the other on its first axis.
    """

    name: str  # of the operator, such as model.layers.0.mlp.down_proj
    groups: int
    width: int  # columns of a group: 1 for channels; for heads, those of the query heads of one key-value head
    tensors: Mapping[str, GroupAxis]  # that shrink, by their names in the model
    # Some routers first choose groups of experts, and then experts in these (`n_group` of DeepSeek-V3). Experts of a
    # router's group follow each other, and each of its groups keeps equally many. 1: the router chooses experts only.
    num_router_groups: int = 1
    # The name in the model of the table from which the router of a mixture reads the experts of a token
    # (`routing_table`). It keeps its shape, and names only experts that stay. None: the router has no table.
    table: str | None = None
    # The number of the expert in its mixture. None: the part is no expert, and has its tensors for itself.
    expert: int | None = None

    @property
    def changed_tensors(self) -> list[str]:
        """The names in the model of the tensors that become others if groups are removed.

        `self.tensors` become smaller, and entries of `self.table` change.
        """
        names = list(self.tensors)
        if self.table is not None:
            names.append(self.table)
        return names

    @property
    def mixture(self) -> str | None:
        """The name of the mixture of an expert, such as "model.layers.3.mlp.experts"; `None` if the part is no expert.

        The name of the expert's operator (`self.name`) is that of the mixture with a number and "down_proj".
        """
        if self.expert is None:
            return None
        return self.name.rsplit(".", 2)[0]

    @property
    def weight(self) -> str:
        """The name in the model of the tensor that loses columns; of a mixture, no tensor has this name.

        `self.name` is that of the operator. The matrix of an expert is in a tensor of its mixture (`self.mixture`):
        that of "model.layers.3.mlp.experts.5.down_proj" is in "model.layers.3.mlp.experts.down_proj".
        """
        if self.mixture is None:
            return f"{self.name}.weight"
        tensor = self.name.rpartition(".")[2]
        return f"{self.mixture}.{tensor}"

    @property
    def is_mixture(self) -> bool:
        """Tell whether the groups are experts, not columns."""
        return self.weight not in self.tensors

    def includes(self, name: str) -> bool:
        """Tell whether the tensor `name` belongs to the part.

        `name` is that of a parameter of the model, or of a tensor in its files that stands in the place of one: scales
        of the inputs of experts are no parameters, but are removed with the experts (`self.name` is their module).
        """
        if name in self.tensors or name == self.table:
            return True
        return name.startswith(f"{self.name}.") and self.is_mixture

    def kept_by(self, mask: Tensor) -> tuple[int, ...]:
        """Find the numbers of the groups of columns that a mask [out, in] keeps (True = kept), rising.

        The mask of the operator keeps or removes whole groups, each of `self.width` columns side by side.
        """
        by_group = mask.unflatten(1, (self.groups, self.width))  # [out, in] -> [out, groups, width]
        is_kept = by_group.any(2).any(0)
        return tuple(is_kept.nonzero()[:, 0].tolist())

    def shrink(self, name: str, tensor: Tensor, kept: Sequence[int]) -> Tensor:
        """Copy the tensor called `name`, one of this part, with only the groups `kept`, in this order.

        Of an expert, `tensor` is its own matrix in the tensor called `name`. `self.tensors` says, by the name of a
        tensor in the model, on which axis its groups are, and how often. The tensor called `self.table` keeps its
        shape: it names experts, and `kept` may say which ones replace the removed ones (`KeptExperts`). `self.groups`
        is the number of experts then.
        """
        if name == self.table:
            return repointed(tensor, self.groups, kept)
        axis, repeats = self.tensors[name]
        entries = self.entries(tensor.shape[axis], repeats, kept)
        return tensor.index_select(axis, entries.to(tensor.device))

    def entries(self, size: int, repeats: int, kept: Sequence[int]) -> Tensor:
        """Return the numbers of the entries that stay on an axis of `size` entries, int64, on the CPU.

        The axis has all groups of the part `repeats` times; `kept` are the numbers of the groups that stay, in the
        order that they get. After the experts of a mixture, which have one entry each, there may be further entries,
        all of which stay: a router may have rows for shared experts, for experts without weights, or for none.
        """
        if self.is_mixture:
            others = torch.arange(self.groups, size)
            return torch.cat([torch.tensor(kept, dtype=torch.int64), others])
        by_group = torch.arange(size).view(repeats, self.groups, -1)  # [repeats, groups, entries]
        return by_group[:, list(kept)].flatten()

    def without_columns(self, tensor: Tensor, kept: Sequence[int]) -> Tensor:
        """Copy the weight of the part's operator, as it is stored, with zeros in the columns of all groups but `kept`.

        `tensor` is [out, in] or [in, out]; `self.tensors` says which axis has the columns. The columns of a group are
        side by side, so the axis is divided into groups.
        """
        axis = self.tensors[self.weight].axis
        removed = sorted(set(range(self.groups)).difference(kept))
        indices = torch.tensor(removed, dtype=torch.int64, device=tensor.device)
        by_group = tensor.unflatten(axis, (self.groups, -1))
        return by_group.index_fill(axis, indices, 0).flatten(axis, axis + 1)


@dataclass(frozen=True)
class Parts:
    """All parts of one kind, and how a configuration states their number."""

    kind: Kind
    # What the configuration calls the number, with its value. None: the configuration leaves it to the model.
    words: Mapping[str, int | None]
    # Of each part; 0 as long as they have to be counted in columns. Of expert_channels, those of an expert: a shared
    # expert has a multiple of them if the configuration states how many experts wide it is.
    groups: int = 0
    constants: Mapping[str, int] = field(default_factory=dict)  # further settings to state
    num_router_groups: int = 1  # as in `Part`
    at_least: int = 1  # groups: a mixture needs as many experts as a token is sent to
    # In the order of the decoder layers, of which each may have several or none.
    parts: tuple[Part, ...] = ()

    def sizes(self, count: int) -> dict[str, int]:
        """Return the settings of a configuration in which every part has `count` groups, by their words.

        `self.words` has the present numbers, for parts of `self.groups` groups, such as {"num_attention_heads": 8}.
        `self.constants` are settings that are stated besides, whatever `count` is.
        """
        numbers = dict[str, int]()
        for word, value in self.words.items():
            # `None` and 0 leave the number to the model, which then has one for each group
            present = value if value else self.groups
            # With two query heads for each key-value head, for instance, there are 2 * count query heads.
            numbers[word] = count * present // self.groups
        return numbers | dict(self.constants)

    def num_kept(self, part: Part, count: int) -> int:
        """How many groups a part keeps if `count` of `self.groups` stay."""
        return count * part.groups // self.groups

    def scaled_overrides(self, overrides: Overrides | None, count: int) -> Overrides | None:
        """Copy the overrides of single decoder layers, with the numbers for `count` groups in every part.

        Overrides are settings by the number of the layer, such as {5: {"num_attention_heads": 4}}. `self.words` names
        the settings that change. `None` (there are no overrides) stays `None`.
        """
        if overrides is None:
            return None
        return scaled(overrides, self.words, new_groups=count, old_groups=self.groups)

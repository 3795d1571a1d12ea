"""How many parameters of a model a token uses: of the experts of a mixture, only those that a router chooses for it."""

from collections.abc import Mapping

from transformers import PreTrainedModel


def active_parameters(model: PreTrainedModel, shares_used: Mapping[str, float]) -> int:
    """Count the parameters that a token uses on average. Shared experts and routers count whole. Changes nothing.

    Args:
        model: On any device, the meta device included.
        shares_used: By the name of each module of experts, such as "model.layers.3.mlp.experts": which share of its
            experts the router chooses for a token, such as 2 / 8. All experts of a module have one size.
    """
    not_used = 0.0
    for name, share_used in shares_used.items():
        experts = model.get_submodule(name)
        num_parameters = sum(parameter.numel() for parameter in experts.parameters())
        not_used += num_parameters * (1 - share_used)
    return round(model.num_parameters() - not_used)

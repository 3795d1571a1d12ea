"""What belongs to the caller of a run, before and after it; and the weights of a model, wherever they are."""

from typing import Any

import torch
from torch import Tensor, nn

from optimum_fista.model.offload import stored_tensor


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters by name, on the CPU, wherever they are kept."""
    modules = dict(model.named_modules())
    names = [name.rpartition(".") for name, _ in model.named_parameters()]
    return {
        f"{owner}.{name}": stored_tensor(modules[owner], name).cpu().clone()
        for owner, _, name in names
    }


class Untouched:
    """`with Untouched(model):` asserts that the model is bit-identical, unmarked and without hooks afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.weights = {name: value.detach().clone() for name, value in self._weights().items()}
        self.state = self._state()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        self.check()

    def check(self) -> None:
        for name, value in self._weights().items():
            assert torch.equal(value.nan_to_num(), self.weights[name].nan_to_num()), name
        for name, state in self._state().items():
            assert state == self.state[name], name
        assert torch.is_grad_enabled()

    def _weights(self) -> dict[str, Tensor]:
        return {
            f"{prefix}.{name}": stored_tensor(module, name)
            for prefix, module in self.model.named_modules()
            for name in [*module._parameters, *module._buffers]
            if getattr(module, name) is not None
        }

    def _state(self) -> dict[str, Any]:
        """Of the configuration and of every module: mode, hooks, forward of its own, flags of its parameters."""
        state: dict[str, Any] = {"config": dict(vars(self.model.config))}
        for name, module in self.model.named_modules():
            hook = vars(module).get("_hf_hook")
            state[name] = (
                module.training,
                dict(module._forward_hooks),
                dict(module._forward_pre_hooks),
                vars(module).get("forward"),
                getattr(hook, "offload", None),
                [(p.device, p.requires_grad, p.grad) for p in module.parameters(recurse=False)],
                [b.device for b in module.buffers(recurse=False)],
            )
        return state

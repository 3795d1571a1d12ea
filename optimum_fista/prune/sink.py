"""Where pruned weights are written: into the model (a failure puts the old ones back), or into files."""

import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from optimum_fista.model.held_out import HeldOut
from optimum_fista.model.hooks import evaluation_mode
from optimum_fista.model.inputs import HiddenStates
from optimum_fista.model.offload import alignment_hooks, kept_tensor, offload_hook, store_tensor
from optimum_fista.model.operators import LinearOperator
from optimum_fista.report import LayerRecord
from optimum_fista.solve.pattern import pack_mask

Travelling = Sequence[HiddenStates | HeldOut]  # what enters the next decoder layer


class ModelSink:
    """Overwrites the weights of a model in memory, and on any exception puts the model back as it was.

    The loop calls `write` for each operator, then `undo` or `commit`. An interrupt (Ctrl-C) may come at any moment,
    several times, and even while a context removes its hooks from modules. So everything that modules, the hooks of
    Accelerate and the configuration hold is put back, and interrupts wait until that is done.

    Old weights are kept in CPU memory, one byte for each byte of pruned weights. Weights that are offloaded to the
    files of a checkpoint cost nothing, because the files are not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        # Entered after the sink: inside, an interrupt ends the run at once. It is a lock because Python leaves a lock
        # in a single step, and no interrupt can come between that step and `__exit__`.
        self.interruptible = threading.Lock()
        self.masks: dict[
            str, Tensor
        ] = {}  # by "{operator}.weight", laid out like it, packed to one bit a weight
        self._model = model
        self._entered = (
            ExitStack()
        )  # contexts around the run; no interrupt can come while they are left
        self._undo: list[Callable[[], None]] = []
        self._first: list[Callable[[], None]] = []
        self._committed = 0  # number of entries of `_undo` that belong to finished decoder layers
        self._onloaded: dict[
            tuple[int, str], tuple[nn.Module, str]
        ] = {}  # written where Accelerate brought them
        self._interrupt: Callable[[int, FrameType | None], Any] = signal.default_int_handler
        self._waits = False  # whether an interrupt waits until the model is whole

    def write(self, operator: LinearOperator, weight: Tensor, mask: Tensor | None = None) -> None:
        """Overwrite a weight [out, in], and keep its mask; from now on the model runs with the new weight."""
        self._keep(operator.owner, operator.tensor, partial(getattr, operator, "parameter"))
        operator.write(weight)
        if mask is not None:
            self.masks[f"{operator.name}.weight"] = pack_mask(
                mask.T if operator.transposed else mask
            )

    def replace(self, owner: nn.Module, name: str, value: Tensor) -> None:
        """Overwrite a whole parameter of a module, as it is stored."""
        self._keep(owner, name, partial(getattr, owner, name))
        getattr(owner, name).data.copy_(value)

    def _keep(self, owner: nn.Module, name: str, parameter: Callable[[], Tensor]) -> None:
        """Keep a parameter of a module, or a part of it, before it is overwritten."""
        if offload_hook(
            owner
        ):  # only the copy on the device is overwritten until the layer is committed
            self._onloaded[id(owner), name] = (owner, name)
            return
        original = parameter().detach().to("cpu", copy=True)

        def restore() -> None:
            parameter().data.copy_(original)

        self._undo.append(restore)

    def undo(self) -> None:
        """Put back all weights written since the last commit, so that the layer can start again."""
        while len(self._undo) > self._committed:
            self._undo[-1]()
            self._undo.pop()  # only now: an interrupt may come in between
        for owner, tensor in self._onloaded.values():
            getattr(owner, tensor).data.copy_(kept_tensor(owner, tensor))
        self._onloaded.clear()

    def commit(
        self, index: int, layer: nn.Module, record: LayerRecord, travelling: Travelling
    ) -> None:
        """Make the weights of a decoder layer final, while they are on the device; `travelling` enters the next one."""
        for owner, tensor in self._onloaded.values():
            store_tensor(
                owner, tensor, getattr(owner, tensor), self._undo.append
            )  # where Accelerate keeps it
        self._onloaded.clear()
        self._committed = len(self._undo)

    def undo_first(self, undo: Callable[[], None]) -> None:
        """Have `undo` called if the run fails, before all else: it gives tensors their old sizes again."""
        self._first.append(undo)

    def forget(self) -> None:
        """Free the old weights: they can no longer be put back."""
        self._undo.clear()
        self._first.clear()
        self._onloaded.clear()
        self._committed = 0

    def __enter__(self) -> Self:
        # This is before any context changes modules. Hooks, forwards, modes, parameters and submodules are all in the
        # instance dictionaries of modules, one level deep; hooks of Accelerate and the configuration change too.
        modules = list(self._model.modules())
        holders = [*modules, *(hook for module in modules for hook in alignment_hooks(module))]
        attributes = [
            vars(holder)
            for holder in (*holders, getattr(self._model, "config", None))
            if holder is not None
        ]
        inner = [
            value for found in attributes for value in found.values() if isinstance(value, dict)
        ]
        self._held = [(found, dict(found)) for found in (*attributes, *inner)]
        self._gradients = [(p, p.requires_grad, p.grad) for p in self._model.parameters()]
        handler = signal.getsignal(signal.SIGINT)
        # Python runs signal handlers only in the main thread, and only the main thread may set them
        if callable(handler) and threading.current_thread() is threading.main_thread():
            self._interrupt = handler
            signal.signal(signal.SIGINT, self._on_interrupt)
        try:
            self._entered.enter_context(evaluation_mode(self._model))
            self._entered.enter_context(torch.no_grad())
            if self._waits:
                raise KeyboardInterrupt
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with ExitStack() as steps:  # run from the last to the first, even if one fails
            steps.callback(self.forget)
            if kind is not None or self._waits:
                for undo in self._undo:
                    steps.callback(undo)
                steps.callback(self._put_back)
                for undo in self._first:
                    steps.callback(undo)
            steps.callback(self._entered.close)
        if signal.getsignal(signal.SIGINT) == self._on_interrupt:
            signal.signal(signal.SIGINT, self._interrupt)
        if self._waits and not isinstance(value, KeyboardInterrupt):
            self._interrupt(signal.SIGINT, None)

    def _put_back(self) -> None:
        for attributes, before in self._held:
            attributes.clear()
            attributes.update(before)
        for parameter, needed, gradient in self._gradients:
            parameter.grad = gradient
            if parameter.requires_grad != needed:
                parameter.requires_grad_(needed)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        """Interrupt the run, unless it begins or ends. Python may call this between any two steps of any function."""
        if self.interruptible.locked():
            self._interrupt(number, frame)
        else:
            self._waits = True

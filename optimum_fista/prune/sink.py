"""Sinks: where a run puts what it has pruned, and what is undone if the run fails.

A run (`run.run`) talks to its sink in this order: `opened` around everything, `budgets` and `share` before the first
decoder layer, `write` for each operator, then `undo` (to prune the layer again) or `store` and `commit` for each
decoder layer, and `complete` at the end. `Sink` has what all sinks share. `ModelSink` is for a model in memory, which
an exception leaves as it was; `files.FileSink` is for the files of a model. Terms:

- `LinearOperator`: a linear module of a decoder layer, or one matrix of one expert. `owner` is the module with its
  parameter, `tensor` the name of the parameter there, `transposed` whether that is stored as [in, out].
- `Plan`: what is pruned and how. `Budgets`: how many zeros each operator gets, and which decoder layers are removed.
- `Calibration`: the batches of the calibration text, with the hidden states that enter the next decoder layer.
- `HeldOut`: held-out sequences on their way through the dense and the pruned model, to measure perplexities.
- Accelerate may keep weights elsewhere (offloaded) and bring them to the device for one decoder layer. What is written
  to such a copy is lost unless it is stored where Accelerate keeps the weight.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_fista.folder.writing import summary
from optimum_fista.model.held_out import HeldOut
from optimum_fista.model.hooks import evaluation_mode
from optimum_fista.model.inputs import HiddenStates
from optimum_fista.model.offload import (
    alignment_hooks,
    offload_hook,
    offloaded_tensor,
    store_tensor,
)
from optimum_fista.model.operators import LinearOperator
from optimum_fista.model.precision import Products, products_as
from optimum_fista.prune.batches import Calibration
from optimum_fista.prune.notes import complete_report
from optimum_fista.prune.plan import Budgets, Plan
from optimum_fista.records import LayerRecord
from optimum_fista.removal.removal import groups_kept
from optimum_fista.report import PruningReport
from optimum_fista.solve.pattern import pack_mask
from optimum_fista.source.source_tensors import SourceTensors

T = TypeVar("T")
Travelling = Sequence[HiddenStates | HeldOut]
"""What enters the next decoder layer, and has to be kept if the run is to resume there."""


@dataclass(frozen=True)
class Work:
    """The share of a run that this process does.

    Attributes:
        todo: Indices of the decoder layers to prune.
        num_done: Decoder layers that an earlier start of the run has finished.
        calibration: Batches, with their hidden states before the first of these layers if they are known.
        held_out: Measures the perplexity on its way through the layers; `None` if it is not measured.
    """

    todo: Collection[int]
    num_done: int
    calibration: Calibration
    held_out: HeldOut | None


class Sink(ABC):
    """Overwrites weights of a model, and keeps the old ones until their decoder layer is committed.

    Attributes:
        masks: By "{operator}.weight", True = kept, laid out like the weight and packed to one bit a weight.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Begin without masks and without old values; `model` is the one whose weights will be overwritten."""
        # Of each pruned weight, by "{operator}.weight": True = kept, packed to one bit a weight.
        self.masks: dict[str, Tensor] = {}
        self._model = model
        # Each puts back one old value; the last one is called first.
        self._undo: list[Callable[[], None]] = []
        # Number of entries of `_undo` that belong to finished decoder layers.
        self._num_committed = 0
        # Parameters (module, name) that were overwritten where Accelerate brought them, by identity. Where they are
        # kept, they change only when their decoder layer is committed.
        self._onloaded: dict[tuple[int, str], tuple[nn.Module, str]] = {}

    @abstractmethod
    def opened(self, products: Products) -> AbstractContextManager[None]:
        """Around the run: put the model in evaluation mode without gradients.

        What an error undoes is a matter of the subclass: a model in memory gets its old weights back.
        Inside, matrices are multiplied as `products` says: "float32", "tf32", "bfloat16" or "widened".
        """

    @abstractmethod
    def budgets(self, share_budgets: Callable[[], Budgets]) -> Budgets:
        """Return the budgets of the run; `share_budgets` makes them, if no earlier start of the run did."""

    @abstractmethod
    def share(
        self,
        plan: Plan,
        calibration: Calibration,
        held_out: HeldOut | None,
        report: PruningReport,
    ) -> Work:
        """Take the plan with its budgets, and return the work of this process.

        `calibration` has all batches, without hidden states. `held_out` is `None` if no perplexity is measured.
        `report` may get warnings.
        """

    @abstractmethod
    def together(self, step: Callable[[], T]) -> T:
        """Do a step in every process of the run, and wait for the others; return the result of this process."""

    @abstractmethod
    def store(self, index: int, layer: nn.Module, record: LayerRecord) -> None:
        """Make the weights of a decoder layer final, while they are on the device."""

    @abstractmethod
    def commit(self, index: int, record: LayerRecord, travelling: Travelling) -> None:
        """Count the decoder layer whose weights were stored last as finished; `record` may say more by now."""

    @abstractmethod
    def complete(
        self, plan: Plan, report: PruningReport, held_out: HeldOut | None, started: float
    ) -> PruningReport:
        """Make the pruned model and its report complete, after all decoder layers; return the report.

        `started` is the time of `time.perf_counter` at which this start of the run began.
        """

    def write(self, operator: LinearOperator, weight: Tensor, mask: Tensor | None = None) -> None:
        """Overwrite the weight of an operator in the model by `weight` [out, in]; keep the old one, and the mask.

        From now on the model runs with the new weight. `mask` [out, in] is True for weights that stay; it goes to
        `self.masks`, packed to bits. `self._keep` notes how the old weight is put back.
        """
        # Called now, for a copy of the old weight, and again if that is put back.
        current_parameter = partial(getattr, operator, "parameter")
        self._keep(operator.owner, operator.tensor, current_parameter)
        operator.write(weight)
        if mask is not None:
            mask_as_stored = mask.T if operator.transposed else mask
            self.masks[f"{operator.name}.weight"] = pack_mask(mask_as_stored)

    def replace(self, owner: nn.Module, name: str, value: Tensor) -> None:
        """Overwrite a whole parameter of a module, as it is stored; note how the old value is put back.

        `name` is that of the parameter in the module `owner`, such as "weight", and `value` has its shape.
        """
        self._keep(owner, name, partial(getattr, owner, name))
        getattr(owner, name).data.copy_(value)

    def undo(self) -> None:
        """Put back all weights written since the last commit, so that the layer can start again.

        `self._undo` has a function for each old value, which puts it back; the first `self._num_committed` of these
        belong to finished layers and stay. `self._onloaded` are the modules and names of parameters that Accelerate has
        brought to the device, and whose old values it still keeps; it is empty afterwards.
        """
        # The latest change first: a weight may have been overwritten twice.
        while len(self._undo) > self._num_committed:
            put_back = self._undo.pop()
            put_back()
        for owner, name in self._onloaded.values():
            getattr(owner, name).data.copy_(offloaded_tensor(owner, name))
        self._onloaded.clear()

    def undo_at_failure(self, put_back: Callable[[], None]) -> None:
        """Have `put_back` called if the run fails, before what was changed earlier is put back."""
        self._undo.append(put_back)

    def forget_old_weights(self) -> None:
        """Free the old weights: they can no longer be put back."""
        self._undo.clear()
        self._onloaded.clear()
        self._num_committed = 0

    def _keep(self, owner: nn.Module, name: str, parameter: Callable[[], Tensor]) -> None:
        """Note how a parameter of a module is put back, before it is overwritten.

        `name` is that of the parameter in the module `owner`. `parameter` returns it, or the part of it that is
        overwritten (one expert of several). `self._undo` gets a function that puts back a copy on the CPU; of an
        offloaded parameter, `self._onloaded` gets the module and the name instead.
        """
        if offload_hook(owner):
            # Accelerate keeps the old value until `commit` stores the new one: `undo` reads it there.
            self._onloaded[id(owner), name] = (owner, name)
            return
        original = parameter().detach().to("cpu", copy=True)

        def put_back() -> None:
            """Overwrite what `parameter` returns with its old value, `original`, in place."""
            parameter().data.copy_(original)

        self._undo.append(put_back)


class ModelSink(Sink):
    """Overwrites the weights of a model in memory, and on any exception puts the model back as it was.

    Old weights are kept in CPU memory, one byte for each byte of pruned weights. Weights that are offloaded to the
    files of a checkpoint cost nothing, because the files are not changed.

    Attributes:
        source: The tensors in the files of the model by their names in the pruned model; known once it is complete.
    """

    source: SourceTensors

    @contextmanager
    def opened(self, products: Products) -> Iterator[None]:
        """Around the run: put the model in evaluation mode without gradients, and multiply as `products` says.

        After an error or Ctrl-C, weights, shapes, hooks, modes and configuration of `self._model` are as they were. The
        old weights are freed at the end, so a model whose run has ended is not put back any more. `products` is
        "float32", "tf32", "bfloat16" or "widened". `self._undo` has a function for each old value, which puts it back,
        in the order of the changes.
        """
        attributes_put_back = _attributes_kept(self._model)
        try:
            with evaluation_mode(self._model), torch.no_grad(), products_as(products):
                yield
        except BaseException:
            # At the end of its block, an ExitStack calls its steps backwards, and each even if another one fails. So
            # the latest change is put back first, earlier ones follow, and attributes are put back last.
            with ExitStack() as steps:
                steps.callback(attributes_put_back)
                for put_back in self._undo:
                    steps.callback(put_back)
            raise
        finally:
            self.forget_old_weights()

    def budgets(self, share_budgets: Callable[[], Budgets]) -> Budgets:
        """Return what `share_budgets` measures; there is no earlier start of the run."""
        return share_budgets()

    def share(
        self,
        plan: Plan,
        calibration: Calibration,
        held_out: HeldOut | None,
        report: PruningReport,
    ) -> Work:
        """Return all work: every decoder layer, from the embeddings on; nothing changes."""
        todo = range(len(plan.layers))
        return Work(todo, num_done=0, calibration=calibration, held_out=held_out)

    def together(self, step: Callable[[], T]) -> T:
        """Do a step, and return its result; there is only one process."""
        return step()

    def store(self, index: int, layer: nn.Module, record: LayerRecord) -> None:
        """Make the weights of a decoder layer final, while they are on the device.

        `undo` no longer puts them back; an error in the run still does (`self._undo`). Offloaded weights
        (`self._onloaded`) change where Accelerate keeps them. The arguments are not needed here: they are for a sink
        that writes files. `self._num_committed` becomes the number of entries of `self._undo`.
        """
        for owner, name in self._onloaded.values():
            # `self._undo` gets a function that puts back the old value.
            store_tensor(owner, name, getattr(owner, name), self._undo.append)
        self._onloaded.clear()
        self._num_committed = len(self._undo)

    def commit(self, index: int, record: LayerRecord, travelling: Travelling) -> None:
        """Do nothing: a run in memory does not resume."""

    def complete(
        self, plan: Plan, report: PruningReport, held_out: HeldOut | None, started: float
    ) -> PruningReport:
        """Complete the report, make the model smaller if parts are removed, and add a summary to its configuration.

        `plan` has its budgets; `report` has the records of all decoder layers, and is completed in place; `held_out` is
        `None` if no perplexity was measured. `started` is the time of `time.perf_counter` at which the run began. The
        model (`self._model`) and its configuration are changed in place. Sets `source`, to the tensors in the model's
        files in their smaller form.
        """
        model = self._model
        # The numbers of the groups (channels, heads, experts) that stay, by the name of their part. They are asked for
        # before names in the report become those of the smaller model.
        kept = groups_kept(report.layers, report.operators)
        plan = plan.with_fewer_prediction_experts(report)
        stored = plan.source.cut_tensors(model, plan.removal.part_of, kept, strict=False)
        complete_report(plan, report, held_out)
        # Weights and masks: `undo_at_failure` puts them back, too.
        plan.removal.make_smaller(model, report, self)
        report.seconds["total"] = time.perf_counter() - started
        model.config.fista_pruning = summary(report)
        self.source = replace(plan.source, stored=plan.source.tensors_to_copy | stored)
        return report


def _attributes_kept(model: nn.Module) -> Callable[[], None]:
    """Note the attributes of all modules, of Accelerate's hooks and of the configuration; return what puts them back.

    `model` is the one that a run is about to prune. Hooks, forward passes, modes, parameters and submodules of a module
    are all in its instance dictionary, one level deep. Values of tensors are not noted, but gradients and
    `requires_grad` are. Nothing is changed before the returned function is called.
    """
    modules = list(model.modules())
    holders: list[Any] = [*modules]
    for module in modules:
        holders += alignment_hooks(module)
    config = getattr(model, "config", None)
    if config is not None:
        holders.append(config)

    instance_dictionaries = [vars(holder) for holder in holders]
    dictionaries = list(instance_dictionaries)
    for attributes in instance_dictionaries:
        dictionaries += [value for value in attributes.values() if isinstance(value, dict)]
    # Each dictionary itself, and a copy of it as it is now.
    noted = [(attributes, dict(attributes)) for attributes in dictionaries]
    gradients = [
        (parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()
    ]

    def put_back() -> None:
        """Give every object the attributes that it had (`noted`), and parameters their gradients (`gradients`)."""
        for attributes, before in noted:
            attributes.clear()
            attributes.update(before)
        for parameter, requires_grad, gradient in gradients:
            parameter.grad = gradient
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)

    return put_back

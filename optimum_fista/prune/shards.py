"""Shards: the safetensors files of a pruned model, one for each decoder layer that stays, and one for the rest.

`ShardWriter` knows by which name and in which form each tensor is written: smaller if parts are removed, packed if the
folder is packed, in the dtype of the source's files if the run keeps that. The files of a run (`files.FileSink`) are
written by it, a decoder layer as soon as it is pruned. Terms:

- `Plan`: what is pruned and how; `plan.as_stored` says that all that stays is copied from the source's files.
- `LayerRecord`: the report of a decoder layer, and those of its pruned operators.
- A stored name is the name of a tensor in files, which may differ from the one in the model. A `StoredTensor` is a
  tensor in a file, which is read in pieces when it is written.
- Masks have one bit for each weight, True = kept (`solve.pattern.pack_mask`).
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from optimum_fista import internals
from optimum_fista.folder.naming import renamed_operators
from optimum_fista.folder.packed_folder import Packer
from optimum_fista.model.offload import stored_tensor
from optimum_fista.prune.plan import Plan
from optimum_fista.records import LayerRecord
from optimum_fista.removal.removal import groups_kept
from optimum_fista.source.names import as_saved, stored_names
from optimum_fista.source.stored_tensor import StoredTensor, write_stored


class ShardWriter:
    """Writes the shards of a pruned model to a folder.

    Args:
        plan: The plan of the run, with its budgets.
        folder: Where the shards are written.
        packed: Whether weights are written without their zeros.

    Attributes:
        stem: What the names of the shards begin with. Plain Transformers finds no weights in a packed folder.
        names: Stored names of the operators, by the names of their weights in the pruned model.
    """

    def __init__(self, plan: Plan, folder: Path, packed: bool) -> None:
        """Keep the arguments, and find out the names of tensors in files and the decoder layers that stay.

        `plan` is that of the run, with its budgets; `folder` is where the shards will be written; `packed` says whether
        weights are written without their zeros. Writes nothing yet, and does not change the model.
        """
        # What the names of the shards begin with. In a packed folder it is another word than usual, so that plain
        # Transformers finds no weights there.
        self.stem = "packed" if packed else "model"
        # Names in the files of the operators' weights, by their names in the pruned model, such as
        # "model.layers.3.mlp.down_proj.weight".
        self.names = stored_names(
            plan.layers.model,
            plan.operators.values(),
            # Returns the name of a module after the removal of decoder layers before it.
            renamed=plan.removal.new_name,
            layers_name=plan.layers.name,
        )
        self._plan = plan
        self._folder = folder
        self._packed = packed
        # Indices of the decoder layers that stay.
        self._layers_left = [
            index for index in range(len(plan.layers)) if index not in plan.removal.removed_layers
        ]

    def tensors_of_layer(
        self, layer: nn.Module, record: LayerRecord, masks: Mapping[str, Tensor]
    ) -> dict[str, StoredTensor]:
        """Collect the tensors to write of a pruned decoder layer, by their stored names. Changes nothing.

        `layer` is on its device, with all its weights, and `record` is its report. `masks` are those of its pruned
        operators and of those that were carried over from an earlier run, by the names of their weights in the model,
        such as "model.layers.3.mlp.down_proj.weight". `self._plan` is the plan of the run, `self._packed` says whether
        weights are written without their zeros, and `self.names` are the names in the files by those in the model.
        """
        plan = self._plan
        name = record.report.name
        # The numbers of the groups (channels, heads, experts) that stay, by the name of their part.
        kept = groups_kept([record.report], record.operators)
        # The tensors of the layer in the source's files, cut to these groups.
        originals = plan.stored(name, kept)
        tensors: dict[str, Tensor] = {}
        if not plan.as_stored:  # otherwise `originals` are what is written
            whole = {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
            tensors = self._by_stored_name(plan.removal.shrink_tensors(record, whole))
        if self._packed:
            names = self.names
            if plan.removal.earlier_masks is not None:
                # With those of weights whose masks were carried over from an earlier run.
                names = names | dict(plan.removal.earlier_masks.names)
            masked = [*record.operators, *record.carried]
            operators, stored_masks = renamed_operators(masked, masks, names)
            # Zeros never reach the disk. The packer asks for the mask of each weight by its stored name.
            packer = Packer(operators, tensors, read_mask=stored_masks.__getitem__)
            tensors = packer.pack(tensors)
        return self._in_stored_form(originals, tensors)

    def write_layer(self, index: int, tensors: Mapping[str, StoredTensor]) -> tuple[str, str]:
        """Write the shard of the decoder layer with this index; return its name and digest (SHA-256)."""
        # Shards are numbered without the decoder layers that the run removes.
        return self._write(self._layers_left.index(index), tensors)

    def write_rest(self, tensors_to_copy: Mapping[str, StoredTensor]) -> str:
        """Write the last shard, with the tensors outside the decoder layers, to the folder; return its file name.

        These are embeddings, norms and the head, and `tensors_to_copy`: tensors of the source's files that the model's
        class does not load, by their names in the result. The model is only read. `self._layers_left` are the numbers
        of the decoder layers that stay, each of which has a shard before this one.
        """
        plan = self._plan
        # The tensors of the source's files outside the decoder layers (`None`), of which no part is cut ({}).
        originals = plan.stored(None, {})
        tensors: dict[str, Tensor] = {}
        if not plan.as_stored:  # otherwise `originals` are what is written
            model = plan.layers.model
            tensors = self._by_stored_name(
                {name: stored_tensor(model, name) for name in plan.layers.names_around}
            )
        around = self._in_stored_form(originals, tensors)
        last = len(self._layers_left)
        name, _ = self._write(last, around | dict(tensors_to_copy))  # without its digest
        return name

    def _write(self, number: int, tensors: Mapping[str, StoredTensor]) -> tuple[str, str]:
        """Write the shard with this number, from 0, to `self._folder`; return its file name and digest (SHA-256)."""
        total = len(self._layers_left) + 1
        shard = self._folder / f"{self.stem}-{number + 1:05}-of-{total:05}.safetensors"
        return shard.name, write_stored(shard, tensors)

    def _by_stored_name(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that are saved, on the CPU, by their names in the files, in the form that they have there.

        `tensors` are by their names in the model, such as those of a decoder layer. Tensors that share the memory of
        another one, and those that the model's class never saves, are left out. The files may have a tensor for each
        expert, or other splits and merges (`as_saved`). Changes nothing; a tensor that is contiguous on the CPU is not
        copied.
        """
        model = self._plan.layers.model
        # Names of parameters that are tied to another one: Transformers ties them again when it loads the folder.
        tied = set(model.all_tied_weights_keys)
        never_saved = internals.names_not_saved(model)
        saved = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in tensors.items()
            if name not in tied and name not in never_saved
        }
        return as_saved(model, saved)

    def _in_stored_form(
        self, originals: Mapping[str, StoredTensor], tensors: Mapping[str, Tensor]
    ) -> dict[str, StoredTensor]:
        """Return what is written: `originals` if the run only removes parts, otherwise `tensors` in the right dtypes.

        Both are by stored names: `originals` are the tensors in the source's files, and `tensors` are those of the
        pruned model. These get the dtypes of the files if the plan says so. Changes nothing.
        """
        plan = self._plan
        if plan.as_stored:
            return dict(originals)
        written: dict[str, StoredTensor] = {}
        for name, tensor in tensors.items():
            keeps_dtype = plan.files_dtypes and name in originals
            written[name] = (
                originals[name].with_value(tensor) if keeps_dtype else StoredTensor.of(tensor)
            )
        return written

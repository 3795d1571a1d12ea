"""Which tensors of a model's files have an entry for each token, and how they are cut to the tokens that stay.

Two models *without weights* (on the meta device: shapes only), one with the old and one with the new number of tokens,
show it: a tensor that has another size in the smaller model has an entry for each token on that axis. Such are the
embedding, the head, and a bias of the head. Files may hold more tensors than the model's class loads, such as a head of
layers that predict further tokens: those with the shape of the embedding are cut too.

A *stored tensor* (`StoredTensor`) describes a tensor of the files; its values are read when they are written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor
from transformers import PreTrainedModel

from optimum_fista.removal.counted_model import num_rows_of
from optimum_fista.source.source_tensors import SourceTensors
from optimum_fista.source.stored_tensor import StoredTensor


def cut_to_tokens(
    source: SourceTensors, dense: PreTrainedModel, smaller: PreTrainedModel, kept: Tensor
) -> dict[str, StoredTensor]:
    """Describe all tensors of the files by name; those with an entry for each token have only the entries `kept`.

    The values are not read here, but when they are written. ValueError if the embedding or the head is missing, or a
    tensor with an entry for each token can't be cut.

    Args:
        source: The tensors in the dense model's files: `places` has the parameter as which each is loaded, by its name
            in the files, and `not_loaded` the names of those that the model's class does not load.
        dense: The dense model, without weights.
        smaller: The model with fewer tokens, without weights.
        kept: int64 [rows that stay]: their old ids.
    """
    num_rows = num_rows_of(dense)
    axes = _axes_of_tokens(dense, smaller)
    _require_in_files(axes, source, dense, model_name=str(smaller.config.name_or_path))

    embedding = next(dense.get_input_embeddings().parameters())  # its matrix
    embedding_shape = tuple(embedding.shape)
    stored = dict[str, StoredTensor]()
    for name, tensor in source.stored.items():
        is_loaded = name not in source.not_loaded  # by the class of the model
        # on which the tensor has an entry for each token; None: on none
        axis = axes.get(source.places[name]) if name in source.places else None
        if axis is None and not is_loaded and tensor.shape == embedding_shape:
            axis = 0  # embeddings and heads of layers that predict more tokens are cut too

        if axis is not None and axis < len(tensor.shape) and tensor.shape[axis] == num_rows:
            stored[name] = tensor.selected(axis, kept)
            continue

        # A quantized tensor may be stored in another shape than its parameter, or without the axis. And nobody knows
        # what a tensor that is not loaded means: one of its sizes may be the number of tokens by chance.
        may_be_of_tokens = axis is not None or (not is_loaded and num_rows in tensor.shape)
        has_one_value = math.prod(tensor.shape) == 1  # a scale of a whole tensor
        if may_be_of_tokens and not has_one_value:
            raise ValueError(
                f"{name} ({tensor.dtype} {[*tensor.shape]}) can't be cut to some of the {num_rows} tokens: delete it, "
                "or take a model whose embedding and head are in 16 bits."
            )
        stored[name] = tensor
    return stored


def _require_in_files(
    names: Iterable[str], source: SourceTensors, dense: PreTrainedModel, *, model_name: str
) -> None:
    """Refuse files that lack one of the parameters `names` of the dense model, by a ValueError with `model_name`."""
    in_files = set(source.places.values())  # names of the parameters that the files have
    tied = dense.all_tied_weights_keys  # maps a parameter to the one whose weights it uses
    # Of two tied parameters, the files may have either one.
    shared_by_files = {target for name, target in tied.items() if name in in_files}
    available = in_files | set(tied) | shared_by_files
    missing = [name for name in names if name not in available]
    if missing:
        raise ValueError(f"{model_name!r} lacks {min(missing)}: download it again.")


def _axes_of_tokens(dense: PreTrainedModel, smaller: PreTrainedModel) -> dict[str, int]:
    """Find the axis of each tensor that has an entry for each token, by the tensor's name in the model.

    On this axis, the tensor has another size in `smaller`. Tensors without such an axis are not in the result. Both
    models are without weights, and only read.
    """
    smaller_tensors = smaller.state_dict()
    axes = dict[str, int]()
    for name, tensor in dense.state_dict().items():
        sizes = zip(tensor.shape, smaller_tensors[name].shape, strict=True)
        for axis, (old, new) in enumerate(sizes):
            if old != new:
                axes[name] = axis
    return axes

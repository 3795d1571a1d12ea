"""Compare the teacher of a recovery with the dense model that the pruned model was made from.

A pruning run notes the SHA-256 of the dense model in its report (`PruningReport.model["sha256"]`). It is a digest of
all tensors as they were loaded: their names in the model's class, dtypes, shapes and bits. So it does not depend on how
the files are cut, and the teacher has to be loaded by the same class and in the same dtype to be compared. Tensors of a
quantized model are dequantized first, as in a pruning run.
"""

import logging
import tempfile
from pathlib import Path

from optimum_fista.folder.output import FOLDER
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.model.offload import sha256_of
from optimum_fista.source.loading import described, load_lazily, read_config
from optimum_fista.train.recovery_plan import RecoveryPlan

logger = logging.getLogger(__name__)


def require_dense_model(plan: RecoveryPlan, unfinished: Path) -> None:
    """Refuse a teacher that is not the model from which the pruned one was made; warn if that can't be checked.

    Reads all weights of the teacher once, one decoder layer at a time. Weights that are quantized are dequantized into
    a folder in `unfinished`, the folder of the run, which is deleted again.
    """
    model = plan.report.model
    unknown = _reason_not_to_compare(plan)
    if unknown is not None:
        logger.warning(
            "%s, so it can't be checked that the teacher %s is the dense model",
            unknown,
            plan.teacher_name,
        )
        return

    with tempfile.TemporaryDirectory(prefix="offload-", dir=unfinished / FOLDER) as offload_folder:
        digest = dense_sha256(plan.teacher, model.get("dtype", "auto"), Path(offload_folder))
    if digest != model["sha256"]:
        raise ValueError(
            f"teacher={plan.teacher_name!r} is not the dense model that {plan.source!r} was pruned from: its tensors "
            f"have the SHA-256 {digest}, and the report names {model['name']!r} with {model['sha256']}. Pass the dense "
            "model, or other_teacher=True (--other-teacher) to train towards this one."
        )


def _reason_not_to_compare(plan: RecoveryPlan) -> str | None:
    """Say why the report of the pruned model tells nothing about the teacher; `None` if they can be compared."""
    model = plan.report.model
    if "sha256" not in model:  # of a run that removed tokens, or of an older version
        return f"the report of {plan.source!r} has no SHA-256 of the dense model"
    if model.get("pruned_before"):
        return (
            f"{plan.source!r} was pruned several times, and its report has the SHA-256 of the model before the last "
            "run alone"
        )

    teachers_class = type(described(read_config(plan.teacher))).__name__
    if teachers_class != model["class"]:
        return (
            f"the dense model was loaded as {model['class']}, and the teacher is a {teachers_class}"
        )
    return None


def dense_sha256(folder: str, dtype: str, offload_folder: Path) -> str:
    """Digest of a dense model as a pruning run notes it; `dtype` is that of the run, such as "bfloat16".

    Weights that are not in safetensors files in this form are written to `offload_folder`.
    """
    model, _, _ = load_lazily(folder, offload_folder, device="cpu", dtype=dtype)
    layers = find_decoder_layers(model)
    digests = [sha256_of(layer, layer.state_dict()) for _, layer in layers]
    return layers.dense_digest(digests)

"""Compare the teacher of a recovery with the dense model that the pruned model was made from.

A pruning run notes the SHA-256 of the dense model in its report. After several runs, one on the result of the other,
the report has that of the first model, with which the user began (`PruningReport.first_model`). It is a digest of all
tensors as they were loaded: their names in the model's class, dtypes, shapes and bits. So it does not depend on how
the files are cut, and the teacher has to be loaded by the same class and in the same dtype to be compared. Tensors of a
quantized model are dequantized first, as in a pruning run.
"""

import logging
import tempfile
from pathlib import Path

from optimum_fista.folder.output import JOURNAL
from optimum_fista.report import PruningReport
from optimum_fista.source.loading import dense_sha256, model_without_weights, read_config
from optimum_fista.train.recovery_plan import RecoveryPlan

logger = logging.getLogger(__name__)


def require_dense_model(plan: RecoveryPlan, report: PruningReport, unfinished: Path) -> None:
    """Refuse a teacher that is not the model from which the pruned one was made; warn if that can't be checked.

    `plan` names the folders of both models, and `report` is that of the pruned model. Reads all weights of the teacher
    once, one decoder layer at a time. Weights that are quantized are dequantized into a new folder in `unfinished`, the
    folder of the run; the new folder is deleted again.
    """
    dense = report.first_model  # what the report says of the model with which the user began
    reason = _reason_not_to_compare(plan, report)
    if reason is not None:
        logger.warning(
            "%s, so it can't be checked that the teacher %s is the dense model",
            reason,
            plan.teacher_name,
        )
        return

    with tempfile.TemporaryDirectory(prefix="offload-", dir=unfinished / JOURNAL) as offload_folder:
        digest = dense_sha256(plan.teacher, dense.dtype or "auto", Path(offload_folder))
    if digest != dense.sha256:
        raise ValueError(
            f"teacher={plan.teacher_name!r} is not the dense model that {plan.source!r} was pruned from: its tensors "
            f"have the SHA-256 {digest}, and the report names {dense.name!r} with {dense.sha256}. Pass the dense "
            "model, or other_teacher=True (--other-teacher) to train towards this one."
        )


def _reason_not_to_compare(plan: RecoveryPlan, report: PruningReport) -> str | None:
    """Say why the report of the pruned model tells nothing about the teacher; `None` if they can be compared.

    Reads the configuration of the teacher, and changes nothing.
    """
    # There is no digest if the first run was one of an older version, or could not read the dense model to its end.
    if report.first_model.sha256 is None:
        return f"the report of {plan.source!r} has no SHA-256 of the dense model"

    class_of_dense = report.model["class"]  # runs do not change the class
    class_of_teacher = type(model_without_weights(read_config(plan.teacher))).__name__
    if class_of_teacher != class_of_dense:
        return f"the dense model was loaded as {class_of_dense}, and the teacher is a {class_of_teacher}"
    return None
